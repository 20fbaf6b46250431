package failclosed

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// startEnvoyUnprivileged starts Envoy without the capabilities by which root passes over the permissions of files.
func (w *site) startEnvoyUnprivileged() {
	w.t.Helper()
	failed := make(chan error)
	go func() {
		// The bounding set belongs to the thread, and what it executes inherits it. The thread ends with this goroutine, because it
		// is never unlocked.
		runtime.LockOSThread()
		if os.Geteuid() == 0 {
			for _, c := range []uintptr{unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH} {
				if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
					failed <- err
					return
				}
			}
		}
		failed <- w.StartEnvoy(w.t.Context())
	}()
	if err := <-failed; err != nil {
		w.t.Fatal(err)
	}
}
