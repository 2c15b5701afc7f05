package auth

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	filesystempb "github.com/hutch-run/hutch/gen/filesystem"
	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	processpb "github.com/hutch-run/hutch/gen/process"
)

// procedures lists every RPC there is: those of our descriptors, and those of
// the two standard services that we serve.
func procedures() []string {
	list := []string{
		"/grpc.health.v1.Health/Check",
		"/grpc.health.v1.Health/Watch",
		"/grpc.health.v1.Health/List",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	}
	for _, file := range []protoreflect.FileDescriptor{
		hostagentv1.File_hostagent_v1_hostagent_proto,
		hostagentv1.File_hostagent_v1_sandbox_proto,
		hostagentv1.File_hostagent_v1_template_proto,
		hostagentv1.File_hostagent_v1_snapshot_proto,
		hostagentv1.File_hostagent_v1_port_proto,
		hostagentv1.File_hostagent_v1_host_proto,
		arcboxv1.File_arcbox_v1_agent_proto,
		arcboxv1.File_arcbox_v1_common_proto,
		processpb.File_process_process_proto,
		filesystempb.File_filesystem_filesystem_proto,
	} {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				list = append(list, "/"+string(s.FullName())+"/"+string(s.Methods().Get(j).Name()))
			}
		}
	}
	return list
}

// TestEveryRPCHasARule compares the table with the descriptors in both
// directions: an RPC that is added without a rule fails here, as does a rule
// whose RPC is gone.
func TestEveryRPCHasARule(t *testing.T) {
	var ruled []string
	for route := range maps.Keys(rules()) {
		if strings.HasPrefix(route, "/") {
			ruled = append(ruled, route)
		}
	}
	slices.Sort(ruled)
	real := procedures()
	slices.Sort(real)
	if diff := cmp.Diff(real, ruled); diff != "" {
		t.Errorf("RPCs (-) and rules (+) differ:\n%s", diff)
	}
}

// TestReadChangesNothing names what role Read may call, so that giving it more
// is a decision that shows in a diff.
func TestReadChangesNothing(t *testing.T) {
	want := []string{
		"/arcbox.v1.AgentService/FollowServiceLog",
		"/arcbox.v1.AgentService/GetKubernetesStatus",
		"/arcbox.v1.AgentService/GetRuntimeStatus",
		"/arcbox.v1.AgentService/GetSystemInfo",
		"/arcbox.v1.AgentService/WatchPorts",
		"/grpc.health.v1.Health/Check",
		"/grpc.health.v1.Health/List",
		"/grpc.health.v1.Health/Watch",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
		"/hostagent.v1.HostAgentService/ListSandboxes",
		"/hostagent.v1.HostService/Diagnose",
		"/hostagent.v1.HostService/GetHostInfo",
		"/hostagent.v1.PortService/ListPorts",
		"/hostagent.v1.SandboxService/GetStats",
		"/hostagent.v1.SandboxService/ReadLogs",
		"/hostagent.v1.SandboxService/WaitSandbox",
		"/hostagent.v1.SandboxService/WatchEvents",
		"/hostagent.v1.SnapshotService/ListSnapshots",
		"/hostagent.v1.TemplateService/InspectTemplate",
		"/hostagent.v1.TemplateService/ListTemplates",
		RouteMetrics,
		RouteGuestHealth,
	}
	var got []string
	for route, role := range rules() {
		if role <= Read {
			got = append(got, route)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what Read may call (-want +got):\n%s", diff)
	}
}
