//go:build linux

package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/faultfs"
	"github.com/knhk/sidecar/e2e/harness"
)

// image is everything that a stopped knhk has on its disk, state and keys, and what it holds.
type image struct {
	files    map[string][]byte // by path below the directory of both
	receipts map[string]string // by id: verdict and results
}

// takeImages makes an image of a knhk that was killed under load and one of a knhk that ended in order.
func (w *world) takeImages() []*image {
	w.t.Helper()
	w.must(w.start())
	stop := w.load(mixes[0]...)
	w.must(w.eventually(harness.Patience, func() error {
		if n := w.ackedCount(); n < 300 {
			return fmt.Errorf("%d requests answered", n)
		}
		return nil
	}))
	w.kill()
	stop()
	killed := w.image()
	w.must(w.start())
	tr, err := w.audit()
	w.must(err)
	ended := w.image()
	ended.receipts = tr.told()
	// What the killed one holds is what it holds after a start that met no damage.
	w.restore(killed)
	w.must(w.StartKnhk(w.t.Context()))
	tr, err = w.settle()
	w.must(err)
	killed.receipts = tr.told()
	w.kill()
	for id := range w.acked {
		if killed.receipts[id] == "" && ended.receipts[id] == "" {
			w.t.Fatalf("receipt %s is in no image", id)
		}
	}
	return []*image{killed, ended}
}

func (w *world) image() *image {
	w.t.Helper()
	im := &image{files: map[string][]byte{}}
	root := filepath.Dir(w.StateDir)
	w.must(filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() { // a dead process's socket holds nothing
			return err
		}
		im.files[path[len(root)+1:]], err = os.ReadFile(path)
		return err
	}))
	return im
}

// restore puts an image in place of what is there.
func (w *world) restore(im *image) {
	w.t.Helper()
	root := filepath.Dir(w.StateDir)
	w.must(os.RemoveAll(root))
	for name, b := range im.files {
		path := filepath.Join(root, name)
		w.must(os.MkdirAll(filepath.Dir(path), 0o700))
		w.must(os.WriteFile(path, b, 0o600))
	}
	w.disk.SyncAll()
}

// told is what a transcript says, in a form that can be compared.
func (tr *transcript) told() map[string]string {
	m := map[string]string{}
	for _, e := range tr.list {
		s := e.d.Class + " " + e.d.Verdict
		for _, o := range e.outcomes {
			s += " " + o.Result
		}
		m[e.d.ID] += s
	}
	return m
}

// TestBitFlip flips one bit in a file of a stopped knhk: it does not start, or fsck or reading names the damage, or nothing is
// wrong. Whatever is handed out is whole.
func TestBitFlip(t *testing.T) {
	t.Parallel()
	run := fault.Begin(t, "storage/bit-flip")
	rng := run.Rand()
	w := newWorld(t)
	images := w.takeImages()
	for round := range run.Rounds() {
		im := images[round%len(images)]
		name, at, bit := pickBit(im, rng)
		w.restore(im)
		path := filepath.Join(filepath.Dir(w.StateDir), name)
		b := bytes.Clone(im.files[name])
		b[at] ^= 1 << bit
		w.must(os.WriteFile(path, b, 0o600))
		if got, err := os.ReadFile(path); err != nil || bytes.Equal(got, im.files[name]) {
			t.Fatalf("%s is as it was: %v", name, err)
		}
		run.Observed("the file, read again, differs in one bit")
		how, err := w.damaged(im)
		where := fmt.Sprintf("round %d: %s, byte %d of %d, bit %d: %s", round, name, at, len(b), bit, how)
		if err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		t.Log(where)
		run.Add(strings.ReplaceAll(strings.SplitN(how, ":", 2)[0], " ", "_"), 1)
		run.Done()
	}
}

// pickBit draws a class of files first, so that each is as likely as the others, then a bit, of a byte that is not zero if there
// is one, mostly: where nothing is written there is little to damage.
func pickBit(im *image, rng *rand.Rand) (name string, at, bit int) {
	classes := map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(im.files)) {
		if c := faultfs.Class(name); len(im.files[name]) > 0 {
			classes[c] = append(classes[c], name)
		}
	}
	names := slices.Sorted(maps.Keys(classes))
	list := classes[names[rng.IntN(len(names))]]
	name = list[rng.IntN(len(list))]
	b := im.files[name]
	at = rng.IntN(len(b))
	for range 1000 {
		if b[at] != 0 || rng.IntN(2000) == 0 {
			break
		}
		at = rng.IntN(len(b))
	}
	return name, at, rng.IntN(8)
}

// damaged says what fsck, a start and reading make of a damaged directory. An error: they make less of it, and nobody says so.
func (w *world) damaged(im *image) (how string, err error) {
	audit := w.fsck()
	if audit != nil {
		audit = fmt.Errorf("fsck: %s", lastLine(audit))
	}
	log := filepath.Join(w.Dir, "knhk.log")
	_ = os.Remove(log) // made again
	if start := w.StartKnhk(w.t.Context()); start != nil {
		w.Knhk = nil
		if !strings.Contains(start.Error(), "ended before it was ready") {
			return "", start
		}
		said, err := os.ReadFile(log)
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(string(said)) {
			if strings.HasPrefix(line, "knhk: ") || strings.HasPrefix(line, "panic: block store: ") {
				return "named at start: " + strings.TrimSpace(line), nil
			}
		}
		return "", fmt.Errorf("it does not say why it does not start: %s", said)
	}
	defer func() {
		if w.Knhk != nil {
			w.kill()
		}
	}()
	limit := harness.Patience
	if audit != nil { // there is a reason not to settle, and it has been named
		limit = 10 * time.Second
	}
	raw, read := w.export(limit)
	var told map[string]string
	if read == nil {
		tr, err := readTranscript(raw)
		if err != nil {
			return "", fmt.Errorf("the export is wrong, and nobody says so: %w (fsck: %v)", err, audit)
		}
		told = tr.told()
	}
	switch {
	case read == nil && maps.Equal(told, im.receipts):
		if audit != nil {
			return "named by fsck, receipts whole: " + audit.Error(), nil
		}
		return "harmless", nil
	case read != nil && !errors.Is(read, errIncomplete):
		return "named by reading: " + lastLine(read), nil
	case audit != nil && errors.Is(read, errIncomplete):
		return "named by fsck, nothing handed out: " + audit.Error(), nil
	}
	if read != nil {
		return "", fmt.Errorf("%w, and fsck finds nothing", read)
	}
	for id, want := range im.receipts {
		if told[id] != want {
			return "", fmt.Errorf("receipt %s is %q, was %q (fsck: %v)", id, told[id], want, audit)
		}
	}
	return "", fmt.Errorf("%d receipts, there were %d (fsck: %v)", len(told), len(im.receipts), audit)
}

var errIncomplete = errors.New("it does not settle")

// export waits until everything is signed, for limit at most, exports every receipt and verifies each.
func (w *world) export(limit time.Duration) ([]byte, error) {
	file := filepath.Join(w.Dir, "receipts.new")
	if err := w.eventually(limit, func() error {
		select {
		case <-w.Knhk.Exited():
			return nil
		default:
		}
		pending, err := w.metric("knhk_receipts_pending", "")
		unsigned, err2 := w.metric("knhk_log_unsigned_seconds", "")
		if pending != 0 || unsigned != 0 {
			err = fmt.Errorf("%v pending, unsigned for %v s", pending, unsigned)
		}
		return errors.Join(err, err2)
	}); err != nil {
		return nil, fmt.Errorf("%w: %w", errIncomplete, err)
	}
	if _, err := w.Run(w.t.Context(), nil, "receipts", "export", "--evidence", "--file", file); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil || len(b) == 0 { // an empty export is less, said by nobody
		return b, err
	}
	return b, w.verify(file, -1)
}

// lastLine is the last line of what an error says.
func lastLine(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
