package config

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// immutable are the settings that a running server has built on: who it is, its directories, sockets and keys, and the
// clock of its ticks. Everything else can be taken over by a reload.
var immutable = []string{"origin", "instance", "state_dir", "listeners", "identity", "insecure_loopback", "keys", "log", "beat.cycle", "envoy.capture", "succeeds"}

// Changes names the settings that differ between two configurations and that a reload cannot apply, as paths such as
// log.seal_every, sorted. Defaults count as if they were written out. Without any, after can replace before.
func Changes(before, after *Config) []string {
	var paths []string
	differences(before.pb.ProtoReflect(), after.pb.ProtoReflect(), "", func(path string) {
		if isImmutable(path) {
			paths = append(paths, path)
		}
	})
	slices.Sort(paths)
	return paths
}

func isImmutable(path string) bool {
	for _, p := range immutable {
		if path == p || strings.HasPrefix(path, p+".") {
			return true
		}
	}
	return false
}

// differences names the fields in which two messages of one type differ, down to durations and lists as a whole.
func differences(a, b protoreflect.Message, path string, name func(string)) {
	fields := a.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		p := join(path, f.TextName())
		if m := f.Message(); m != nil && !f.IsList() && m.FullName() != "google.protobuf.Duration" {
			differences(a.Get(f).Message(), b.Get(f).Message(), p, name)
			continue
		}
		if f.IsList() || f.Message() != nil {
			only := func(m protoreflect.Message) proto.Message {
				out := m.New()
				if m.Has(f) {
					out.Set(f, m.Get(f))
				}
				return out.Interface()
			}
			if !proto.Equal(only(a), only(b)) {
				name(p)
			}
		} else if !a.Get(f).Equal(b.Get(f)) {
			name(p)
		}
	}
}
