package server

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/knhk/sidecar/server/access"
	"github.com/knhk/sidecar/server/config"
)

// settle is how long the file must be quiet before it is read: editors and config-map updates write in several steps.
const settle = 100 * time.Millisecond

// watchConfig reloads the configuration on SIGHUP and when its file changes.
func (s *Server) watchConfig(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch configuration: %w", err)
	}
	defer w.Close()
	// The directory is watched, not the file: a rename over the file, or a swapped symbolic link, replaces the inode.
	if err := w.Add(filepath.Dir(s.path)); err != nil {
		return fmt.Errorf("watch configuration: %w", err)
	}
	quiet := time.NewTimer(time.Hour)
	quiet.Stop()
	seen, _ := os.ReadFile(s.path)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			// Read before it is loaded: a change in between is then reloaded once more, not missed.
			seen, _ = os.ReadFile(s.path)
			s.reload("SIGHUP")
		case <-w.Events:
			quiet.Reset(settle)
		case err := <-w.Errors:
			s.log.Warn("watching the configuration file", "error", err)
		case <-quiet.C:
			if now, err := os.ReadFile(s.path); err == nil && string(now) != string(seen) {
				seen = now
				s.reload("file change")
			}
		}
	}
}

// reload puts the file's configuration in force, all or nothing: if anything in it is wrong or cannot change while running, the
// old one stays.
func (s *Server) reload(why string) {
	err := s.tryReload()
	if err != nil {
		s.metrics.Reload("refused")
		s.log.Error("configuration not reloaded, the old one stays in force", "trigger", why, "error", err)
		return
	}
	s.metrics.Reload("applied")
	s.log.Info("configuration reloaded", "trigger", why, "policy", fmt.Sprintf("%x", s.cfg.Load().PolicyDigest))
}

func (s *Server) tryReload() error {
	next, err := config.Load(s.path)
	if err != nil {
		return err
	}
	if fixed := config.Changes(s.cfg.Load(), next); len(fixed) > 0 {
		return fmt.Errorf("these cannot change while knhk runs: %s: restart it", strings.Join(fixed, ", "))
	}
	if err := s.pipeline.Set(next); err != nil {
		return err
	}
	s.cfg.Store(next)
	// Calls over HTTP of those who may no longer make them end with it. What Envoy asks is judged call by call, but an access log has one for
	// as long as its connection lives: the connections of those who lost the role are closed.
	s.access.Set(access.NewGrants(next.Roles))
	s.guard.expel(func(w access.Who) bool { return s.access.Knows(access.OnEnvoy, w) })
	return nil
}
