package wal_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// childEnv names the directory in which this test binary, started again, acts as a process that will be killed.
const childEnv = "WAL_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := child(dir); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func childConfig(dir string) wal.Config {
	return wal.Config{Dir: dir, SegmentBytes: 256 << 10, MaxBytes: 4 << 20}
}

// child appends from eight goroutines and prints a line for every record whose level is reached, until it is killed.
func child(dir string) error {
	w, err := wal.Open(childConfig(dir))
	if err != nil {
		return err
	}
	first := w.Recovered().Next
	go func() { _ = w.Run(context.Background()) }() // it ends with the process
	release := func() {
		if n := w.Stats().Durable; n > first+100 {
			_ = w.Release(n - 100)
		}
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for {
				t, err := w.Append([]wal.Level{wal.Written, wal.Durable}[i%2], true, record)
				if errors.Is(err, wal.ErrFull) {
					release()
					continue
				}
				if err == nil {
					err = t.Wait(context.Background())
				}
				if err != nil {
					fmt.Println("error", err)
					return
				}
				_, _ = os.Stdout.WriteString(fmt.Sprintln("ack", t.Seq())) // unbuffered, so that a kill loses no line
				release()
			}
		})
	}
	wg.Wait()
	return errors.New("append ended")
}

// TestKillNine kills a real process on a real file system in full swing, several times over the same directory.
func TestKillNine(t *testing.T) {
	dir := t.TempDir() + "/wal"
	exe, err := os.Executable()
	must(t, err)
	total := 0
	for round := range 5 {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		acked := map[uint64]bool{}
		lines := bufio.NewScanner(out)
		killed := false
		for lines.Scan() {
			var seq uint64
			if _, err := fmt.Sscanf(lines.Text(), "ack %d", &seq); err != nil {
				t.Fatalf("round %d: child says %q", round, lines.Text())
			}
			if acked[seq] {
				t.Fatalf("round %d: number %d given twice", round, seq)
			}
			acked[seq] = true
			if len(acked) == 100 {
				// While it lives nobody else gets the directory.
				if _, err := wal.Open(childConfig(dir)); !errors.Is(err, wal.ErrLocked) {
					t.Errorf("round %d: second open: got %v, want ErrLocked", round, err)
				}
			}
			if len(acked) >= 3000 && !killed {
				killed = true
				must(t, cmd.Process.Kill()) // what it printed before it died still comes
			}
		}
		_ = cmd.Wait() // killed
		w := mustOpen(t, childConfig(dir))
		rec := w.Recovered()
		if next := audit(t, w); next != rec.Next || len(rec.Lost) > 0 || !rec.SameBoot {
			t.Fatalf("round %d: records end before %d: %+v", round, next, rec)
		}
		for seq := range acked {
			if seq >= rec.Next {
				t.Fatalf("round %d: acknowledged record %d is gone", round, seq)
			}
		}
		total += len(acked)
		must(t, w.Close())
	}
	t.Logf("%d acknowledged records over 5 kills", total)
}

// TestTwoOpens refuses a second open of one directory within a process, on the real file system and the other.
func TestTwoOpens(t *testing.T) {
	real := wal.Config{Dir: t.TempDir(), SegmentBytes: 64 << 10}
	for name, cfg := range map[string]wal.Config{"real": real, "memory": testConfig(waltest.New(0))} {
		w := mustOpen(t, cfg)
		if _, err := wal.Open(cfg); !errors.Is(err, wal.ErrLocked) {
			t.Errorf("%s: got %v, want ErrLocked", name, err)
		}
		must(t, w.Close())
		must(t, mustOpen(t, cfg).Close())
	}
}

// TestForeignFile refuses a directory that holds something else.
func TestForeignFile(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	must(t, mustOpen(t, cfg).Close())
	fs.Corrupt(simDir+"/notes.txt", []byte("mine"))
	if _, err := wal.Open(cfg); err == nil || !strings.Contains(err.Error(), "notes.txt") {
		t.Errorf("got %v, want an error naming the file", err)
	}
}

// TestConcurrent appends from many goroutines at both levels while segments are recycled, ends the process or the machine
// in full swing, and audits. It is also what the race detector is for.
func TestConcurrent(t *testing.T) {
	for round := range 8 {
		power := round%2 == 1
		fs := waltest.New(0)
		cfg := testConfig(fs)
		w := mustOpen(t, cfg)
		stop := run(t, w)
		type ack struct {
			seq   uint64
			level wal.Level
			id    uint64 // which append it was
		}
		var mu sync.Mutex
		var acks []ack
		alive := true // acknowledged after the machine died, says nothing
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				level := []wal.Level{wal.Written, wal.Durable}[g%2]
				for i := uint64(0); ; i++ {
					id := uint64(g)<<32 | i
					ticket, err := w.Append(level, g < 4, func(seq uint64) []byte {
						return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, seq), id)
					})
					if errors.Is(err, wal.ErrFull) { // releasing only after an append would never end it
						if s := w.Stats(); s.Durable > 200 {
							_ = w.Release(s.Durable - 200)
						}
						continue
					}
					if err == nil {
						err = ticket.Wait(context.Background())
					}
					mu.Lock()
					if err != nil || !alive {
						mu.Unlock()
						return
					}
					acks = append(acks, ack{ticket.Seq(), level, id})
					if len(acks) >= 4000 {
						alive = false
						if power {
							fs.Crash(nil)
						} else {
							fs.Kill()
						}
					} else if s := w.Stats(); s.Durable > 200 && len(acks)%50 == 0 {
						_ = w.Release(s.Durable - 200)
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		_ = stop() // fails, since its files are gone
		_ = w.Close()
		boot := "boot"
		if power {
			boot = "another"
		}
		again := mustOpen(t, onBoot(cfg, boot))
		rec := again.Recovered()
		ids := map[uint64]uint64{}
		next := rec.First
		must(t, again.Replay(func(seq uint64, b []byte) error {
			if seq != next || len(b) != 16 || binary.LittleEndian.Uint64(b) != seq {
				return fmt.Errorf("record %d: want %d", seq, next)
			}
			next++
			ids[seq] = binary.LittleEndian.Uint64(b[8:])
			return nil
		}))
		seen := map[uint64]bool{}
		for _, a := range acks {
			if seen[a.seq] {
				t.Fatalf("number %d given twice", a.seq)
			}
			seen[a.seq] = true
			id, here := ids[a.seq]
			switch {
			case here && id != a.id:
				t.Fatalf("record %d is another's", a.seq)
			case here || a.seq < rec.First:
			case a.level == wal.Durable || !power:
				t.Fatalf("round %d: acknowledged record %d is gone: %+v", round, a.seq, rec)
			case a.seq < rec.LostFrom || a.seq >= rec.LostTo:
				t.Fatalf("round %d: record %d is gone and not declared lost: %+v", round, a.seq, rec)
			}
		}
		must(t, again.Close())
	}
}

// TestRealFiles keeps what the tests in memory assume of the real file system: sizes, zeros, exclusive creation.
func TestRealFiles(t *testing.T) {
	fs := wal.OS()
	dir := t.TempDir() + "/a/b"
	must(t, fs.MkdirAll(dir, 0o700))
	f, err := fs.Create(dir + "/x")
	must(t, err)
	if _, err := fs.Create(dir + "/x"); !errors.Is(err, os.ErrExist) {
		t.Errorf("create twice: %v", err)
	}
	must(t, f.Allocate(8192))
	must(t, f.Allocate(4096))
	if n, err := f.Size(); n != 8192 || err != nil {
		t.Errorf("size %d, %v", n, err)
	}
	b := bytes.Repeat([]byte{1}, 8192)
	if _, err := f.ReadAt(b, 0); err != nil || !allZero(b) {
		t.Errorf("allocated space: %v", err)
	}
	must(t, f.Sync())
	must(t, f.Close())
	must(t, fs.Rename(dir+"/x", dir+"/y"))
	must(t, fs.SyncDir(dir))
	if _, err := fs.Open(dir + "/x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("open of the old name: %v", err)
	}
	names, err := fs.ReadDir(dir)
	if err != nil || len(names) != 1 || names[0] != "y" {
		t.Errorf("names %v, %v", names, err)
	}
	must(t, fs.Remove(dir+"/y"))
}
