package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

func files() []protoreflect.FileDescriptor {
	return []protoreflect.FileDescriptor{
		hostagentv1.File_hostagent_v1_hostagent_proto, hostagentv1.File_hostagent_v1_sandbox_proto,
		hostagentv1.File_hostagent_v1_template_proto, hostagentv1.File_hostagent_v1_host_proto,
	}
}

func (w *world) sandboxClient(t *testing.T) hostagentv1connect.SandboxServiceClient {
	return hostagentv1connect.NewSandboxServiceClient(w.client(t, true), w.url(), connect.WithGRPC())
}

// drive makes three events of box a and one of box b.
func (w *world) drive(t *testing.T) {
	t.Helper()
	ctx := testenv.Context(t)
	for _, id := range []sandbox.ID{"a", "b"} {
		if _, err := w.Create(ctx, id, sandbox.Spec{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Pause(ctx, "a"), w.Resume(ctx, "a")); err != nil {
		t.Fatal(err)
	}
}

func (w *world) watch(t *testing.T, r *hostagentv1.WatchEventsRequest) *connect.ServerStreamForClient[hostagentv1.WatchEventsResponse] {
	t.Helper()
	s, err := w.sandboxClient(t).WatchEvents(testenv.Context(t), connect.NewRequest(r))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func collect(t *testing.T, s *connect.ServerStreamForClient[hostagentv1.WatchEventsResponse]) []string {
	t.Helper()
	var got []string
	for s.Receive() {
		e := s.Msg().GetEvent()
		got = append(got, fmt.Sprint(e.GetSequence(), " ", e.GetSandboxId(), " ", e.GetStatus(), " ", e.GetCause()))
	}
	if err := s.Err(); err != nil {
		t.Error(err)
	}
	return got
}

func TestWatchEvents(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	all := []string{"1 a running user", "2 b running user", "3 a paused user", "4 a running user"}
	for range 2 { // reading takes nothing away
		if diff := cmp.Diff(all, collect(t, w.watch(t, &hostagentv1.WatchEventsRequest{NoFollow: true}))); diff != "" {
			t.Errorf("all (-want +got):\n%s", diff)
		}
	}
	if diff := cmp.Diff(all[2:], collect(t, w.watch(t, &hostagentv1.WatchEventsRequest{After: 2, NoFollow: true}))); diff != "" {
		t.Errorf("after 2 (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(all[1:2], collect(t, w.watch(t, &hostagentv1.WatchEventsRequest{SandboxId: "b", NoFollow: true}))); diff != "" {
		t.Errorf("of b (-want +got):\n%s", diff)
	}
	s := w.watch(t, &hostagentv1.WatchEventsRequest{After: 99})
	if s.Receive() || connect.CodeOf(s.Err()) != connect.CodeInvalidArgument {
		t.Errorf("a cursor of the future: %v", s.Err())
	}
}

func TestFollowEvents(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	ctx, leave := context.WithCancel(testenv.Context(t))
	defer leave()
	s, err := w.sandboxClient(t).WatchEvents(ctx, connect.NewRequest(&hostagentv1.WatchEventsRequest{After: -1}))
	if err != nil {
		t.Fatal(err)
	}
	s.ResponseHeader() // comes when the cursor is set
	for i := range 3 {
		if err := w.Destroy(ctx, w.List()[0].ID); err != nil && i < 2 {
			t.Fatal(err)
		}
		if i < 2 && (!s.Receive() || s.Msg().GetEvent().GetStatus() != "gone" || s.Msg().GetEvent().GetSequence() != int64(5+i)) {
			t.Fatalf("%v, %v", s.Msg(), s.Err())
		}
		if len(w.List()) == 0 {
			break
		}
	}
	leave()
	if s.Receive() || connect.CodeOf(s.Err()) != connect.CodeCanceled {
		t.Errorf("after leaving: %v", s.Err())
	}
}

// TestShutdownEndsWaiters: what follows and waits ends by itself, so that
// Shutdown needs no force.
func TestShutdownEndsWaiters(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	c := w.sandboxClient(t)
	follow := w.watch(t, &hostagentv1.WatchEventsRequest{After: -1})
	follow.ResponseHeader()
	if err := os.WriteFile(filepath.Join(w.logs, "a-console.log"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := c.ReadLogs(testenv.Context(t), connect.NewRequest(&hostagentv1.ReadLogsRequest{SandboxId: "a", Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	if !log.Receive() {
		t.Fatal(log.Err())
	}
	waited := make(chan error, 1)
	go func() {
		_, err := c.WaitSandbox(testenv.Context(t), connect.NewRequest(&hostagentv1.WaitSandboxRequest{SandboxId: "a"}))
		waited <- err
	}()
	if err := w.server.Shutdown(testenv.Context(t)); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{<-waited, end(follow), end(log)} {
		if connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("got %v", err)
		}
	}
}

func end[M any](s *connect.ServerStreamForClient[M]) error {
	for s.Receive() {
	}
	return s.Err()
}

func TestWaitSandbox(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	c := w.sandboxClient(t)
	wait := func(status ...string) string {
		t.Helper()
		res, err := c.WaitSandbox(testenv.Context(t), connect.NewRequest(&hostagentv1.WaitSandboxRequest{SandboxId: "a", Status: status}))
		if err != nil {
			t.Fatal(err)
		}
		return res.Msg.GetStatus()
	}
	if got := wait("running"); got != "running" {
		t.Errorf("for running: %s", got)
	}
	done := make(chan string, 1)
	go func() { done <- wait() }()
	if err := w.Destroy(testenv.Context(t), "a"); err != nil {
		t.Fatal(err)
	}
	if got := <-done; got != "gone" {
		t.Errorf("for the end: %s", got)
	}
}

func TestReadLogs(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	path := filepath.Join(w.logs, "a-console.log")
	read := func(r *hostagentv1.ReadLogsRequest) string {
		t.Helper()
		s, err := w.sandboxClient(t).ReadLogs(testenv.Context(t), connect.NewRequest(r))
		if err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		for s.Receive() {
			got.Write(s.Msg().GetData())
		}
		if s.Err() != nil {
			t.Error(s.Err())
		}
		return got.String()
	}
	if got := read(&hostagentv1.ReadLogsRequest{SandboxId: "a"}); got != "" {
		t.Errorf("no log yet: %q", got)
	}
	write(t, path+".1", "older ")
	write(t, path, strings.Repeat("new", 50000))
	if got := read(&hostagentv1.ReadLogsRequest{SandboxId: "a"}); got != "older "+strings.Repeat("new", 50000) {
		t.Errorf("%d bytes", len(got))
	}
	write(t, filepath.Join(w.logs, "a-vmm.log"), "vmm")
	if got := read(&hostagentv1.ReadLogsRequest{SandboxId: "a", Source: hostagentv1.ReadLogsRequest_SOURCE_VMM}); got != "vmm" {
		t.Errorf("%q", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", path); err != nil {
		t.Fatal(err)
	}
	s, err := w.sandboxClient(t).ReadLogs(testenv.Context(t), connect.NewRequest(&hostagentv1.ReadLogsRequest{SandboxId: "a"}))
	if err != nil {
		t.Fatal(err)
	}
	if s.Receive() {
		t.Errorf("a link was followed: %q", s.Msg().GetData())
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, content); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFollowLogs writes while it is read, through several turns of the file,
// and destroys the sandbox at the end.
func TestFollowLogs(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	path := filepath.Join(w.logs, "a-console.log")
	s, err := w.sandboxClient(t).ReadLogs(testenv.Context(t), connect.NewRequest(&hostagentv1.ReadLogsRequest{SandboxId: "a", Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	received := ""
	more := func(n int) {
		t.Helper()
		for len(received) < n && s.Receive() {
			received += string(s.Msg().GetData())
		}
	}
	for i := range 30 {
		line := fmt.Sprintf("line %d\n", i)
		want.WriteString(line)
		write(t, path, line)
		if i%10 == 9 {
			if i == 9 { // a turn while the reader is behind
				line = "last before the turn\n"
				want.WriteString(line)
				write(t, path, line)
			} else {
				more(want.Len())
			}
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
		}
		if i == 15 {
			more(want.Len())
		}
	}
	more(want.Len())
	if err := w.Destroy(testenv.Context(t), "a"); err != nil {
		t.Fatal(err)
	}
	if s.Receive() || s.Err() != nil {
		t.Errorf("after destroy: %q, %v", s.Msg().GetData(), s.Err())
	}
	if diff := cmp.Diff(want.String(), received); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func (w *world) templateClient(t *testing.T) hostagentv1connect.TemplateServiceClient {
	return hostagentv1connect.NewTemplateServiceClient(w.client(t, true), w.url())
}

func TestBuildTemplate(t *testing.T) {
	w := newWorld(t)
	w.shelf.build = func(_ context.Context, b BuildTemplate, progress func(string, int64, int64)) (TemplateInfo, error) {
		want := BuildTemplate{Name: "n", Reference: "r:1", Platform: "linux/amd64", Defaults: TemplateDefaults{User: "u", VCPUs: 2}, DockerConfig: []byte("c")}
		if diff := cmp.Diff(want, b); diff != "" {
			t.Errorf("request (-want +got):\n%s", diff)
		}
		for i := range int64(1000) {
			progress("pull", i, 1000)
		}
		progress("write", 7, 0)
		return minimal(), nil
	}
	s, err := w.templateClient(t).BuildTemplate(testenv.Context(t), connect.NewRequest(&hostagentv1.BuildTemplateRequest{
		Name: "n", Source: &hostagentv1.BuildTemplateRequest_Reference{Reference: "r:1"}, Platform: "linux/amd64",
		Defaults: &hostagentv1.TemplateDefaults{User: "u", Vcpus: 2}, DockerConfig: []byte("c"),
	}))
	if err != nil {
		t.Fatal(err)
	}
	last := map[string]int64{}
	var made *hostagentv1.Template
	for s.Receive() {
		if p := s.Msg().GetProgress(); p != nil {
			if made != nil || p.GetDoneBytes() < last[p.GetStep()] {
				t.Errorf("report %v out of order", p)
			}
			last[p.GetStep()] = p.GetDoneBytes()
		} else {
			made = s.Msg().GetTemplate()
		}
	}
	if s.Err() != nil || made.GetName() != "minimal" || made.GetDiskBytes() != 5 {
		t.Errorf("%v, %v", made, s.Err())
	}
	if diff := cmp.Diff(map[string]int64{"pull": 999, "write": 7}, last); diff != "" {
		t.Errorf("last reports (-want +got):\n%s", diff)
	}
}

func TestBuildTemplateFails(t *testing.T) {
	w := newWorld(t)
	w.shelf.build = func(_ context.Context, _ BuildTemplate, progress func(string, int64, int64)) (TemplateInfo, error) {
		progress("pull", 1, 2)
		return TemplateInfo{}, fault.New(fault.Invalid, "layer 3 is wrong")
	}
	request := connect.NewRequest(&hostagentv1.BuildTemplateRequest{Name: "n", Source: &hostagentv1.BuildTemplateRequest_Recipe{Recipe: "x"}})
	s, err := w.templateClient(t).BuildTemplate(testenv.Context(t), request)
	if err != nil {
		t.Fatal(err)
	}
	if err := end(s); connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "layer 3") {
		t.Errorf("got %v", err)
	}
	w.shelf.build = func(context.Context, BuildTemplate, func(string, int64, int64)) (TemplateInfo, error) { panic("oh") }
	if s, err = w.templateClient(t).BuildTemplate(testenv.Context(t), request); err != nil {
		t.Fatal(err)
	}
	if err := end(s); connect.CodeOf(err) != connect.CodeInternal {
		t.Errorf("a panic: %v", err)
	}
}

func TestCallerLeavesBuild(t *testing.T) {
	w := newWorld(t)
	started, ended := make(chan struct{}), make(chan error, 1)
	w.shelf.build = func(ctx context.Context, _ BuildTemplate, _ func(string, int64, int64)) (TemplateInfo, error) {
		close(started)
		<-ctx.Done()
		ended <- ctx.Err()
		return TemplateInfo{}, ctx.Err()
	}
	ctx, leave := context.WithCancel(testenv.Context(t))
	defer leave()
	s, err := w.templateClient(t).BuildTemplate(ctx, connect.NewRequest(&hostagentv1.BuildTemplateRequest{Name: "n", Source: &hostagentv1.BuildTemplateRequest_Recipe{Recipe: "x"}}))
	if err != nil {
		t.Fatal(err)
	}
	<-started
	leave()
	end(s)
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the build goes on")
	}
}

func TestImportTemplate(t *testing.T) {
	w := newWorld(t)
	s := w.templateClient(t).ImportTemplate(testenv.Context(t))
	send := func(r *hostagentv1.ImportTemplateRequest) {
		t.Helper()
		if err := s.Send(r); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Header_{Header: &hostagentv1.ImportTemplateRequest_Header{Name: "mine"}}})
	want := strings.Repeat("0123456789", 1<<17)
	for i := 0; i < len(want); i += 100 << 10 {
		send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Chunk{Chunk: []byte(want[i:min(len(want), i+100<<10)])}})
	}
	send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Chunk{}})
	res, err := s.CloseAndReceive()
	if err != nil || res.Msg.GetTemplate().GetName() != "mine" {
		t.Fatalf("%v, %v", res, err)
	}
	if string(w.shelf.imported) != want {
		t.Errorf("%d bytes arrived of %d", len(w.shelf.imported), len(want))
	}

	s = w.templateClient(t).ImportTemplate(testenv.Context(t))
	send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Chunk{Chunk: []byte("x")}})
	if _, err := s.CloseAndReceive(); connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "header") {
		t.Errorf("without a header: %v", err)
	}
	s = w.templateClient(t).ImportTemplate(testenv.Context(t))
	for range 2 {
		send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Header_{Header: &hostagentv1.ImportTemplateRequest_Header{Name: "mine"}}})
	}
	if _, err := s.CloseAndReceive(); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("two headers: %v", err)
	}
}

// TestImportCut: an archive whose sender went away is not taken for a whole one.
func TestImportCut(t *testing.T) {
	w := newWorld(t)
	got := make(chan error, 1)
	w.shelf.build = nil
	imports := &cutShelf{shelf: w.shelf, got: got}
	w2 := newWorld(t, func(p *Params) { p.Templates = imports })
	ctx, leave := context.WithCancel(testenv.Context(t))
	defer leave()
	s := w2.templateClient(t).ImportTemplate(ctx)
	if err := s.Send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Header_{Header: &hostagentv1.ImportTemplateRequest_Header{Name: "mine"}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Chunk{Chunk: []byte("half")}}); err != nil {
		t.Fatal(err)
	}
	leave()
	if err := <-got; err == nil {
		t.Error("half an archive read to a clean end")
	}
	s.CloseAndReceive()
}

type cutShelf struct {
	*shelf
	got chan error
}

func (c *cutShelf) Import(_ context.Context, i ImportTemplate) (TemplateInfo, error) {
	_, err := io.ReadAll(i.Archive)
	c.got <- err
	return minimal(), err
}

func TestSmallCalls(t *testing.T) {
	w := newWorld(t)
	w.drive(t)
	for _, x := range []struct{ procedure, body, want string }{
		{"SandboxService/KeepAlive", `{"sandboxId":"a"}`, `map[]`},
		{"SandboxService/GetStats", `{"sandboxId":"a"}`, `map[cpuMicros:1000000 rssBytes:7]`},
		{"HostService/GetHostInfo", `{}`, `map[cpus:2 sandboxes:2 startedAtUnix:5 version:1]`},
		{"HostService/Diagnose", `{}`, `map[checks:[map[advice:use it detail:no name:kvm result:warning]]]`},
		{"TemplateService/ListTemplates", `{}`, `map[templates:[map[diskBytes:5 imageDigest:sha256:1 name:minimal sizeBytes:10 source:recipe:minimal]]]`},
		{"TemplateService/InspectTemplate", `{"name":"minimal"}`, `map[sandboxIds:[a b] template:map[diskBytes:5 imageDigest:sha256:1 name:minimal sizeBytes:10 source:recipe:minimal]]`},
		{"TemplateService/RemoveTemplate", `{"name":"minimal"}`, `map[]`},
	} {
		if status, _, m := w.curl(t, x.procedure, x.body); status != 200 || fmt.Sprint(m) != x.want {
			t.Errorf("%s: %d %v, want %s", x.procedure, status, m, x.want)
		}
	}
	if status, _, m := w.curl(t, "TemplateService/RemoveTemplate", `{"name":"other"}`); status != 404 {
		t.Errorf("unknown template: %d %v", status, m)
	}
}
