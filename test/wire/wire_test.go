package wire

import (
	"os"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	_ "github.com/hutch-run/hutch/gen/arcbox/v1"
	_ "github.com/hutch-run/hutch/gen/filesystem"
	_ "github.com/hutch-run/hutch/gen/hostagent/v1"
	_ "github.com/hutch-run/hutch/gen/process"
)

func TestProtosKeepEveryFactOfTheGivenOnes(t *testing.T) {
	for _, file := range []string{"testdata/given.binpb", "testdata/e2b.binpb"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var set descriptorpb.FileDescriptorSet
		if err := proto.Unmarshal(b, &set); err != nil {
			t.Fatal(err)
		}
		given, err := protodesc.NewFiles(&set)
		if err != nil {
			t.Fatal(err)
		}
		messages, services := 0, 0
		given.RangeFiles(func(f protoreflect.FileDescriptor) bool {
			if f.Package() == "google.protobuf" {
				return true
			}
			for i := range f.Services().Len() {
				checkService(t, f.Services().Get(i))
				services++
			}
			for i := range f.Messages().Len() {
				checkMessage(t, f.Messages().Get(i))
				messages++
			}
			for i := range f.Enums().Len() {
				checkEnum(t, f.Enums().Get(i))
			}
			return true
		})
		if messages < 20 || services < 2 {
			t.Errorf("%s: found only %d messages and %d services to compare", file, messages, services)
		}
	}
}

func ours[D protoreflect.Descriptor](t *testing.T, given D) (D, bool) {
	t.Helper()
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(given.FullName())
	if err != nil {
		t.Errorf("%s: %v", given.FullName(), err)
		var none D
		return none, false
	}
	same, ok := d.(D)
	if !ok {
		t.Errorf("%s is another kind of thing", given.FullName())
	}
	return same, ok
}

func checkService(t *testing.T, given protoreflect.ServiceDescriptor) {
	for i := range given.Methods().Len() {
		g := given.Methods().Get(i)
		o, ok := ours(t, g)
		if !ok {
			continue
		}
		if o.Input().FullName() != g.Input().FullName() || o.Output().FullName() != g.Output().FullName() ||
			o.IsStreamingClient() != g.IsStreamingClient() || o.IsStreamingServer() != g.IsStreamingServer() {
			t.Errorf("%s has another signature", g.FullName())
		}
	}
}

func checkMessage(t *testing.T, given protoreflect.MessageDescriptor) {
	o, ok := ours(t, given)
	if !ok {
		return
	}
	for i := range given.Fields().Len() {
		g := given.Fields().Get(i)
		f := o.Fields().ByNumber(g.Number())
		if f == nil {
			t.Errorf("%s: no field has number %d", g.FullName(), g.Number())
			continue
		}
		if f.Name() != g.Name() || f.JSONName() != g.JSONName() || f.Kind() != g.Kind() || f.Cardinality() != g.Cardinality() || f.IsMap() != g.IsMap() || f.HasPresence() != g.HasPresence() {
			t.Errorf("%s differs: ours is %v", g.FullName(), f)
		}
		if g.Message() != nil && f.Message() != nil && g.Message().FullName() != f.Message().FullName() {
			t.Errorf("%s is a %s, ours a %s", g.FullName(), g.Message().FullName(), f.Message().FullName())
		}
		if (g.ContainingOneof() == nil) != (f.ContainingOneof() == nil) || g.ContainingOneof() != nil && g.ContainingOneof().Name() != f.ContainingOneof().Name() {
			t.Errorf("%s is in another oneof", g.FullName())
		}
	}
	for i := range given.Messages().Len() {
		if m := given.Messages().Get(i); !m.IsMapEntry() {
			checkMessage(t, m)
		}
	}
	for i := range given.Enums().Len() {
		checkEnum(t, given.Enums().Get(i))
	}
}

func checkEnum(t *testing.T, given protoreflect.EnumDescriptor) {
	o, ok := ours(t, given)
	if !ok {
		return
	}
	for i := range given.Values().Len() {
		g := given.Values().Get(i)
		if v := o.Values().ByNumber(g.Number()); v == nil || v.Name() != g.Name() {
			t.Errorf("%s: value %d differs", g.FullName(), g.Number())
		}
	}
}
