package kms

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

func entry(t *testing.T, label, id string) Entry {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return Entry{Label: label, ID: id, Algorithm: keys.Ed25519, Public: pub, Created: time.Unix(1_800_000_000, 0).UTC()}
}

func archive(t *testing.T, dir string) *Archive {
	t.Helper()
	a, err := OpenArchive(dir, place)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestArchive: what is put is there after reopening, under its own name alone, and never becomes something else.
func TestArchive(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	a := archive(t, dir)
	e := entry(t, "daily", "1")
	long := entry(t, strings.Repeat("?", 64), "0001-20270115T080000Z-00000000.00000000-0000-0000-0000-000000000000")
	for _, p := range []Entry{e, e, long, entry(t, "daily@1", "2")} {
		if err := a.Put(p); err != nil {
			t.Fatal(err)
		}
	}
	other := entry(t, "daily", "1")
	if err := a.Put(other); err == nil || !strings.Contains(err.Error(), "another public key") {
		t.Errorf("Put of another key: %v", err)
	}
	gone := e
	gone.Destroyed, gone.Created = true, e.Created.Add(time.Hour)
	for _, p := range []Entry{gone, e} { // never taken back
		if err := a.Put(p); err != nil {
			t.Fatal(err)
		}
	}
	a = archive(t, dir)
	got, ok, err := a.Get("daily", "1")
	if err != nil || !ok || !got.Destroyed || !got.Created.Equal(e.Created) || !keys.SamePublic(got.Public, e.Public) {
		t.Errorf("Get: %+v, %v, %v", got, ok, err)
	}
	if es, err := a.List("daily"); err != nil || len(es) != 1 {
		t.Errorf("List: %+v, %v", es, err)
	}
	if es, err := a.List(long.Label); err != nil || len(es) != 1 || es[0].ID != long.ID {
		t.Errorf("List of a long label: %+v, %v", es, err)
	}
	if _, ok, err := a.Get("daily", "9"); ok || err != nil {
		t.Errorf("Get of none: %v, %v", ok, err)
	}
	elsewhere, err := OpenArchive(dir, "memory://there")
	if err != nil {
		t.Fatal(err)
	}
	if es, err := elsewhere.List("daily"); err != nil || len(es) != 0 {
		t.Errorf("another place lists %+v, %v", es, err)
	}
}

// TestArchiveDamaged: a file that is not what was written is an error that names it; what a crash leaves is none.
func TestArchiveDamaged(t *testing.T) {
	a := archive(t, t.TempDir())
	e := entry(t, "daily", "1")
	if err := a.Put(e); err != nil {
		t.Fatal(err)
	}
	path, err := a.path("daily", "1")
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ why, content string }{
		{"empty", ""},
		{"cut", string(good[:len(good)/2])},
		{"more behind it", string(good) + "{}"},
		{"unknown member", strings.Replace(string(good), `"format"`, `"formet"`, 1)},
		{"another place", strings.Replace(string(good), place, "memory://away", 1)},
		{"another label", strings.Replace(string(good), `"daily"`, `"dailx"`, 1)},
		{"another algorithm", strings.Replace(string(good), `"ed25519"`, `"ecdsa-p256"`, 1)},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := a.Get("daily", "1"); err == nil {
			t.Errorf("%s: Get: no error", c.why)
		}
		if _, err := a.List("daily"); err == nil {
			t.Errorf("%s: List: no error", c.why)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(a.dir, tmpPrefix+"1"), good[:9], 0o600); err != nil {
		t.Fatal(err)
	}
	if es, err := a.List("daily"); err != nil || len(es) != 1 {
		t.Errorf("beside what a crash left: %+v, %v", es, err)
	}
}
