package wal

import "fmt"

// Check verifies a log that nobody has open, as Open does, and calls fn for every record from Recovery.First on, as Replay does.
// It changes nothing, makes nothing durable and takes no lock: the caller makes sure that the log stays closed. Of cfg it needs
// Dir, FS and BootID. Errors are those of Open; fs.ErrNotExist when there is no log.
func Check(cfg Config, fn func(seq uint64, rec []byte) error) (Recovery, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return Recovery{}, err
	}
	w := &WAL{cfg: cfg, log: cfg.Log}
	if w.boot, err = cfg.BootID(); err != nil || len(w.boot) > maxBoot {
		w.boot = ""
	}
	numbers, _, err := w.list()
	if err == nil {
		w.id, err = w.readVersion()
	}
	if err == nil {
		_, err = w.look(numbers)
	}
	if err != nil {
		return Recovery{}, fmt.Errorf("check write-ahead log: %w", err)
	}
	return w.Recovered(), w.Replay(fn)
}
