// Package wiretest holds wire scanners to google.golang.org/protobuf: it makes random wire bytes that are nearly a given
// message, and decoders for just the fields that a scanner reads. Only tests import it.
package wiretest

import (
	"fmt"
	"math/rand/v2"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// Keep says which fields of a message a scanner reads. A message field with an empty Keep is read as opaque bytes; for
// a map, field 1 is the key and field 2 the value (Trim makes it a list of entries: the same on the wire, and the slow
// path of google.golang.org/protobuf 1.36.12 panics on a map key that comes twice, the second time of a wrong wire type).
type Keep map[protoreflect.FieldNumber]Keep

// Trim gives a decoder for the fields in keep and nothing else: it fails exactly on what is wrong with those.
func Trim(md protoreflect.MessageDescriptor, keep Keep) (func([]byte) error, error) {
	root, err := trim(md, keep, "Root", ".trim.Root")
	if err != nil {
		return nil, err
	}
	fd, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("trim.proto"), Package: proto.String("trim"), Syntax: proto.String("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{root},
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("trim %s: %w", md.FullName(), err)
	}
	trimmed := fd.Messages().Get(0)
	return func(b []byte) error { return proto.Unmarshal(b, dynamicpb.NewMessage(trimmed)) }, nil
}

func trim(md protoreflect.MessageDescriptor, keep Keep, name, path string) (*descriptorpb.DescriptorProto, error) {
	out := &descriptorpb.DescriptorProto{Name: proto.String(name)}
	oneofs := map[protoreflect.Name]int32{}
	nums := make([]protoreflect.FieldNumber, 0, len(keep))
	for n := range keep {
		nums = append(nums, n)
	}
	slices.Sort(nums)
	for _, n := range nums {
		f := md.Fields().ByNumber(n)
		if f == nil {
			return nil, fmt.Errorf("trim %s: no field %d", md.FullName(), n)
		}
		p := &descriptorpb.FieldDescriptorProto{
			Name:   proto.String(fmt.Sprintf("f%d", n)),
			Number: proto.Int32(int32(n)),
			Label:  descriptorpb.FieldDescriptorProto_Label(f.Cardinality()).Enum(),
			Type:   descriptorpb.FieldDescriptorProto_Type(f.Kind()).Enum(),
		}
		switch {
		case f.Kind() == protoreflect.EnumKind:
			p.Type = descriptorpb.FieldDescriptorProto_TYPE_INT32.Enum()
		case f.Kind() == protoreflect.MessageKind && len(keep[n]) == 0:
			p.Type = descriptorpb.FieldDescriptorProto_TYPE_BYTES.Enum()
		case f.Kind() == protoreflect.MessageKind:
			sub := fmt.Sprintf("F%dEntry", n)
			nested, err := trim(f.Message(), keep[n], sub, path+"."+sub)
			if err != nil {
				return nil, err
			}
			p.TypeName = proto.String(path + "." + sub)
			out.NestedType = append(out.NestedType, nested)
		}
		if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
			i, ok := oneofs[o.Name()]
			if !ok {
				i = int32(len(out.OneofDecl))
				oneofs[o.Name()] = i
				out.OneofDecl = append(out.OneofDecl, &descriptorpb.OneofDescriptorProto{Name: proto.String(string(o.Name()))})
			}
			p.OneofIndex = proto.Int32(i)
		}
		out.Field = append(out.Field, p)
	}
	return out, nil
}

// Generator makes random wire bytes along a descriptor: known fields in any order and number, now and then one of a wrong
// wire type, an unknown one, a group, or a broken end.
type Generator struct {
	Rand *rand.Rand
	// Words are tried as strings and map keys: those that the scanner looks for, and others.
	Words []string
	// Prefer are the fields by full message name that are chosen most of the time; messages not listed use all fields.
	Prefer map[protoreflect.FullName][]protoreflect.FieldNumber
}

// Message gives bytes that are nearly a message of type md.
func (g *Generator) Message(md protoreflect.MessageDescriptor) []byte { return g.message(nil, md, 0) }

func (g *Generator) message(b []byte, md protoreflect.MessageDescriptor, depth int) []byte {
	if depth > 12 || md.Fields().Len() == 0 {
		return b
	}
	for range g.Rand.IntN(5) {
		b = g.field(b, md, depth)
	}
	return b
}

func (g *Generator) field(b []byte, md protoreflect.MessageDescriptor, depth int) []byte {
	f := md.Fields().Get(g.Rand.IntN(md.Fields().Len()))
	if prefer := g.Prefer[md.FullName()]; len(prefer) > 0 && g.Rand.IntN(8) > 0 {
		f = md.Fields().ByNumber(prefer[g.Rand.IntN(len(prefer))])
	}
	num := f.Number()
	switch g.Rand.IntN(60) {
	case 0: // a field that the message does not have
		num = protowire.Number(g.Rand.IntN(1<<12) + 1)
	case 1: // a wrong wire type
		b = protowire.AppendTag(b, num, protowire.VarintType)
		return protowire.AppendVarint(b, g.Rand.Uint64()>>g.Rand.IntN(64))
	case 2:
		b = protowire.AppendTag(b, num, protowire.Fixed64Type)
		return protowire.AppendFixed64(b, g.Rand.Uint64())
	case 3:
		return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), g.word())
	case 4:
		b = protowire.AppendTag(b, num, protowire.StartGroupType)
		return protowire.AppendTag(b, num, protowire.EndGroupType)
	case 5:
		return protowire.AppendFixed32(protowire.AppendTag(b, num, protowire.Fixed32Type), g.Rand.Uint32())
	case 6:
		if g.Rand.IntN(8) == 0 { // something broken
			return append(b, byte(g.Rand.Uint32()), byte(g.Rand.Uint32()))
		}
	}
	switch f.Kind() {
	case protoreflect.MessageKind:
		b = protowire.AppendTag(b, num, protowire.BytesType)
		return protowire.AppendBytes(b, g.message(nil, f.Message(), depth+1))
	case protoreflect.StringKind, protoreflect.BytesKind:
		return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), g.word())
	case protoreflect.DoubleKind, protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind:
		return protowire.AppendFixed64(protowire.AppendTag(b, num, protowire.Fixed64Type), g.Rand.Uint64())
	case protoreflect.FloatKind, protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind:
		return protowire.AppendFixed32(protowire.AppendTag(b, num, protowire.Fixed32Type), g.Rand.Uint32())
	default:
		b = protowire.AppendTag(b, num, protowire.VarintType)
		return protowire.AppendVarint(b, g.Rand.Uint64()>>g.Rand.IntN(64))
	}
}

// word is one of Words, rarely with a byte that is not UTF-8.
func (g *Generator) word() string {
	w := g.Words[g.Rand.IntN(len(g.Words))]
	if g.Rand.IntN(200) == 0 {
		w += "\xff"
	}
	return w
}
