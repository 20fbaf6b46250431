package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// apply returns the mutated source, or says why the mutation no longer fits.
func (m *mutation) apply(source []byte) ([]byte, error) {
	if n := strings.Count(string(source), m.old); n != 1 {
		return nil, fmt.Errorf("%s: %s holds the old text %d times, want once: %q", m.name, m.file, n, m.old)
	}
	if m.old == m.new {
		return nil, fmt.Errorf("%s: changes nothing", m.name)
	}
	out := []byte(strings.Replace(string(source), m.old, m.new, 1))
	if _, err := parser.ParseFile(token.NewFileSet(), m.file, out, parser.SkipObjectResolution); err != nil {
		return nil, fmt.Errorf("%s: %w", m.name, err)
	}
	return out, nil
}

// applyIn is apply on the file below root.
func (m *mutation) applyIn(root string) (original, mutated []byte, err error) {
	if original, err = os.ReadFile(filepath.Join(root, m.file)); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", m.name, err)
	}
	mutated, err = m.apply(original)
	return original, mutated, err
}

// product are the folders whose code is shipped.
var product = []string{"api", "crypto", "envoy", "policy", "region", "server"}

// syncCalls are the names whose calls make something durable. Whoever calls a new one adds it here.
var syncCalls = map[string]bool{
	"Sync": true, "SyncDir": true, "syncDir": true, "Fdatasync": true, "Fsync": true, "Syncfs": true, "SyncFileRange": true, "Msync": true,
}

// syncSites returns the byte offsets at which a source file makes something durable: calls by the names above, and the mention
// of pebble.Sync.
func syncSites(name string, source []byte) ([]int, error) {
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, name, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var at []int
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			switch fun := n.Fun.(type) {
			case *ast.Ident:
				if syncCalls[fun.Name] {
					at = append(at, files.Position(fun.Pos()).Offset)
				}
			case *ast.SelectorExpr:
				if syncCalls[fun.Sel.Name] {
					at = append(at, files.Position(fun.Sel.Pos()).Offset)
				}
			}
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && (x.Name == "pebble" && n.Sel.Name == "Sync" || n.Sel.Name == "O_SYNC" || n.Sel.Name == "O_DSYNC") {
				at = append(at, files.Position(n.Sel.Pos()).Offset)
			}
		}
		return true
	})
	return at, nil
}

// productSources calls fn for every shipped source file, by its path from root.
func productSources(root string, fn func(name string, source []byte) error) error {
	for _, top := range product {
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "testdata" || strings.HasSuffix(d.Name(), "test")): // keystest, waltest, ...
				return filepath.SkipDir
			case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go"):
				return nil
			}
			source, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			name, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			return fn(filepath.ToSlash(name), source)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// moduleRoot is the folder of the go.mod above the working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = up
	}
}
