package rpc

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/grpcreflect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/emptypb"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/proxy"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// TestScript is the twelve steps of the given interface's own acceptance
// script, as plain curl with JSON does them.
func TestScript(t *testing.T) {
	w := newWorld(t)
	const s = "HostAgentService/"
	ok := func(procedure, body string) map[string]any {
		t.Helper()
		status, _, m := w.curl(t, s+procedure, body)
		if status != 200 {
			t.Fatalf("%s %s: %d %v", procedure, body, status, m)
		}
		return m
	}
	stdout := func(m map[string]any) string {
		t.Helper()
		b, err := base64.StdEncoding.DecodeString(m["stdout"].(string))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	listed := func() string {
		t.Helper()
		var out []string
		list, _ := ok("ListSandboxes", "{}")["sandboxes"].([]any)
		for _, one := range list {
			out = append(out, fmt.Sprint(one.(map[string]any)["sandboxId"], " ", one.(map[string]any)["status"]))
		}
		return strings.Join(out, ",")
	}
	if m := ok("ListSandboxes", "{}"); len(m) != 0 {
		t.Errorf("1: list of nothing is %v, want {}", m)
	}
	id := ok("CreateSandbox", `{"template":"minimal","vcpus":1,"memoryMb":512,"timeoutSec":300}`)["sandboxId"].(string)
	if got := listed(); got != id+" running" {
		t.Errorf("3: %s", got)
	}
	if got := stdout(ok("Exec", `{"sandboxId":"`+id+`","cmd":"echo","args":["hello"]}`)); got != "hello\n" {
		t.Errorf("4: %q", got)
	}
	if got := stdout(ok("Exec", `{"sandboxId":"`+id+`","cmd":"echo","args":["a\nb\nc"],"timeoutSec":10}`)); got != "a\nb\nc\n" {
		t.Errorf("5: %q", got)
	}
	ok("PauseSandbox", `{"sandboxId":"`+id+`"}`)
	if got := listed(); got != id+" paused" {
		t.Errorf("6: %s", got)
	}
	if status, _, m := w.curl(t, s+"Exec", `{"sandboxId":"`+id+`","cmd":"echo"}`); status != 400 || m["code"] != "failed_precondition" || !strings.Contains(m["message"].(string), "paused") {
		t.Errorf("7: %d %v", status, m)
	}
	ok("ResumeSandbox", `{"sandboxId":"`+id+`"}`)
	if got := listed(); got != id+" running" {
		t.Errorf("8: %s", got)
	}
	if got := stdout(ok("Exec", `{"sandboxId":"`+id+`","cmd":"echo","args":["again"]}`)); got != "again\n" {
		t.Errorf("9: %q", got)
	}
	ok("DestroySandbox", `{"sandboxId":"`+id+`"}`)
	if m := ok("ListSandboxes", "{}"); len(m) != 0 {
		t.Errorf("11: %v", m)
	}
	if status, _, m := w.curl(t, s+"DestroySandbox", `{"sandboxId":"sb-nonexist"}`); status != 404 || m["code"] != "not_found" {
		t.Errorf("12: %d %v", status, m)
	}
}

// everyProtocol runs test with clients of all protocols.
func everyProtocol(t *testing.T, test func(t *testing.T, w *world, c hostagentv1connect.HostAgentServiceClient)) {
	for name, x := range map[string]struct {
		http2   bool
		options []connect.ClientOption
	}{
		"connect":        {false, nil},
		"connect http2":  {true, nil},
		"connect json":   {false, []connect.ClientOption{connect.WithProtoJSON()}},
		"grpc":           {true, []connect.ClientOption{connect.WithGRPC()}},
		"grpcweb":        {false, []connect.ClientOption{connect.WithGRPCWeb()}},
		"grpcweb http2":  {true, []connect.ClientOption{connect.WithGRPCWeb()}},
		"grpc, gzip out": {true, []connect.ClientOption{connect.WithGRPC(), connect.WithSendGzip()}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			test(t, w, hostagentv1connect.NewHostAgentServiceClient(w.client(t, x.http2), w.url(), x.options...))
		})
	}
}

func TestEveryProtocol(t *testing.T) {
	everyProtocol(t, func(t *testing.T, w *world, c hostagentv1connect.HostAgentServiceClient) {
		ctx := testenv.Context(t)
		made, err := c.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{SandboxId: "box-1"}))
		if err != nil || made.Msg.GetSandboxId() != "box-1" || made.Msg.GetHostIp() == "" || made.Msg.GetStages()[0].GetMicros() != 1500 {
			t.Fatalf("create: %v, %v", made, err)
		}
		id := made.Msg.GetSandboxId()
		ran, err := c.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: "killed"}))
		if err != nil || string(ran.Msg.GetStdout()) != "part" || ran.Msg.GetExitCode() != 137 || ran.Msg.GetSignal() != "SIGKILL" || !ran.Msg.GetTimedOut() || ran.Msg.GetOomKilled() {
			t.Errorf("exec that was killed: %v, %v", ran, err)
		}
		ran, err = c.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: "starved"}))
		if err != nil || ran.Msg.GetTimedOut() || !ran.Msg.GetOomKilled() {
			t.Errorf("exec that the guest had no memory for: %v, %v", ran, err)
		}
		if _, err := c.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id})); err != nil {
			t.Error(err)
		}
		_, err = c.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: "echo"}))
		if connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("exec while paused: %v", err)
		}
		if _, err := c.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id})); err != nil {
			t.Error(err)
		}
		list, err := c.ListSandboxes(ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
		if err != nil || len(list.Msg.GetSandboxes()) != 1 || list.Msg.GetSandboxes()[0].GetStatus() != "running" {
			t.Errorf("list: %v, %v", list, err)
		}
		if _, err := c.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id})); err != nil {
			t.Error(err)
		}
		_, err = c.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("destroy again: %v", err)
		}
	})
}

// TestLargestExec: both streams full pass in every encoding.
func TestLargestExec(t *testing.T) {
	for name, option := range map[string]connect.ClientOption{"json": connect.WithProtoJSON(), "grpc": connect.WithGRPC()} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if _, err := w.Create(testenv.Context(t), "b", sandbox.Spec{}); err != nil {
				t.Fatal(err)
			}
			c := hostagentv1connect.NewHostAgentServiceClient(w.client(t, true), w.url(), option,
				connect.WithReadMaxBytes(MaxSend), connect.WithAcceptCompression("gzip", nil, nil))
			ran, err := c.Exec(testenv.Context(t), connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: "b", Cmd: "big"}))
			if err != nil {
				t.Fatal(err)
			}
			if len(ran.Msg.GetStdout()) != MaxExecOutput || len(ran.Msg.GetStderr()) != MaxExecOutput || !ran.Msg.GetStdoutTruncated() || ran.Msg.GetStderrTruncated() {
				t.Errorf("%d and %d bytes", len(ran.Msg.GetStdout()), len(ran.Msg.GetStderr()))
			}
		})
	}
}

// TestErrors is the table from what goes wrong inside to what callers see.
func TestErrors(t *testing.T) {
	for class, want := range map[fault.Class]struct {
		status int
		code   string
	}{
		fault.Internal: {500, "internal"}, fault.Invalid: {400, "invalid_argument"}, fault.NotFound: {404, "not_found"},
		fault.Exists: {409, "already_exists"}, fault.Precondition: {400, "failed_precondition"}, fault.Exhausted: {429, "resource_exhausted"},
		fault.Unavailable: {503, "unavailable"}, fault.Denied: {403, "permission_denied"}, fault.Unauthenticated: {401, "unauthenticated"},
		fault.Canceled: {499, "canceled"}, fault.Deadline: {504, "deadline_exceeded"}, fault.Unimplemented: {501, "unimplemented"},
	} {
		t.Run(class.String(), func(t *testing.T) {
			w := newWorld(t)
			w.exec = func(context.Context, guestconn.Exec) (guestconn.Result, error) {
				return guestconn.Result{}, fault.New(class, "it broke")
			}
			w.curl(t, "HostAgentService/CreateSandbox", `{"sandboxId":"b"}`)
			status, _, m := w.curl(t, "HostAgentService/Exec", `{"sandboxId":"b","cmd":"x"}`)
			if status != want.status || m["code"] != want.code || !strings.Contains(m["message"].(string), "it broke") {
				t.Errorf("%d %v, want %v", status, m, want)
			}
		})
	}
}

// TestFieldsAreNamed: a bad value is refused before anything happens, and the
// answer says which one it was.
func TestFieldsAreNamed(t *testing.T) {
	w := newWorld(t)
	for _, x := range []struct{ procedure, body, field string }{
		{"HostAgentService/CreateSandbox", `{"vcpus":65}`, "vcpus"},
		{"HostAgentService/CreateSandbox", `{"vcpus":-1}`, "vcpus"},
		{"HostAgentService/CreateSandbox", `{"memoryMb":5}`, "memory_mb"},
		{"HostAgentService/CreateSandbox", `{"timeoutSec":-1}`, "timeout_sec"},
		{"HostAgentService/CreateSandbox", `{"diskSizeMb":1}`, "disk_size_mb"},
		{"HostAgentService/CreateSandbox", `{"sandboxId":"../x"}`, "sandbox_id"},
		{"HostAgentService/CreateSandbox", `{"sandboxId":"UPPER"}`, "sandbox_id"},
		{"HostAgentService/CreateSandbox", `{"template":"a/b"}`, "template"},
		{"HostAgentService/CreateSandbox", `{"defaultUser":"a b"}`, "default_user"},
		{"HostAgentService/CreateSandbox", `{"defaultEnv":{"A=B":"x"}}`, "default_env"},
		{"HostAgentService/CreateSandbox", `{"network":{"allow":["::1"]}}`, "network.allow"},
		{"HostAgentService/CreateSandbox", `{"network":{"mode":99}}`, "network.mode"},
		{"HostAgentService/DestroySandbox", `{}`, "sandbox_id"},
		{"HostAgentService/Exec", `{"sandboxId":"b"}`, "cmd"},
		{"HostAgentService/Exec", `{"sandboxId":"b","cmd":"x","timeoutSec":-5}`, "timeout_sec"},
		{"SandboxService/KeepAlive", `{"sandboxId":"-bad-"}`, "sandbox_id"},
		{"SandboxService/WaitSandbox", `{"sandboxId":"b","status":["sleeping"]}`, "status"},
		{"TemplateService/InspectTemplate", `{}`, "name"},
	} {
		status, _, m := w.curl(t, x.procedure, x.body)
		if message, _ := m["message"].(string); status != 400 || m["code"] != "invalid_argument" || !strings.Contains(message, x.field) {
			t.Errorf("%s %s: %d %v, want %s named", x.procedure, x.body, status, m, x.field)
		}
	}
	if len(w.specs) != 0 {
		t.Errorf("bad requests reached the sandboxes: %v", w.specs)
	}
}

func TestCreateConverts(t *testing.T) {
	w := newWorld(t)
	w.curl(t, "HostAgentService/CreateSandbox", `{"sandboxId":"b","template":"t","vcpus":2,"memoryMb":256,"diskSizeMb":100,"timeoutSec":5,"onTimeout":"ON_TIMEOUT_PAUSE","autoResume":true,
		"defaultUser":"u","defaultEnv":{"B":"own"},"labels":{"k":"v"},"network":{"mode":"MODE_ALLOW","allow":["192.0.2.7","10.0.0.0/8"]},
		"shares":[{"hostPath":"/srv/a","guestPath":"/mnt","readOnly":true}]}`)
	want := []sandbox.Spec{{
		Template: "t", VCPUs: 2, MemoryMB: 256, DiskMB: 100, Timeout: 5 * time.Second, DefaultUser: "u",
		OnTimeout: sandbox.PauseOnTimeout, AutoResume: true,
		DefaultEnv: map[string]string{"B": "own"}, Labels: map[string]string{"k": "v"},
		Network: sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"192.0.2.7/32", "10.0.0.0/8"}},
		Shares:  []sandbox.Share{{HostPath: "/srv/a", GuestPath: "/mnt", ReadOnly: true}},
	}}
	if diff := cmp.Diff(want, w.specs); diff != "" {
		t.Errorf("spec (-want +got):\n%s", diff)
	}
	_, _, m := w.curl(t, "SandboxService/InspectSandbox", `{"sandboxId":"b"}`)
	record := m["sandbox"].(map[string]any)
	if diff := cmp.Diff(map[string]any{"A": "template", "B": "own"}, record["env"]); diff != "" {
		t.Errorf("env (-want +got):\n%s", diff)
	}
	if record["onTimeout"] != "ON_TIMEOUT_PAUSE" || record["autoResume"] != true {
		t.Errorf("on timeout %v, auto resume %v", record["onTimeout"], record["autoResume"])
	}
	if record["defaultUser"] != "u" || record["network"].(map[string]any)["mode"] != "MODE_ALLOW" {
		t.Errorf("record %v", record)
	}
	if diff := cmp.Diff([]any{map[string]any{"hostPath": "/srv/a", "guestPath": "/mnt", "readOnly": true}}, record["shares"]); diff != "" {
		t.Errorf("shares (-want +got):\n%s", diff)
	}
	w.curl(t, "HostAgentService/CreateSandbox", `{}`)
	if diff := cmp.Diff(sandbox.Spec{Network: sandbox.Policy{Mode: sandbox.ModeInternet}}, w.specs[1]); diff != "" {
		t.Errorf("zero values must stay for the template's defaults (-want +got):\n%s", diff)
	}
}

// TestOnTimeoutConverts goes there and back with every value of the API.
func TestOnTimeoutConverts(t *testing.T) {
	want := map[string]sandbox.OnTimeout{"UNSPECIFIED": "", "DESTROY": "destroy", "PAUSE": "pause", "HIBERNATE": "hibernate"}
	for n, name := range hostagentv1.OnTimeout_name {
		short := strings.TrimPrefix(name, "ON_TIMEOUT_")
		got, err := onTimeoutOf(hostagentv1.OnTimeout(n))
		if w, known := want[short]; err != nil || !known || got != w || onTimeoutTo(got) != hostagentv1.OnTimeout(n) {
			t.Errorf("%s is %q (%v), and that is %s", name, got, err, onTimeoutTo(got))
		}
	}
	if _, err := onTimeoutOf(99); !fault.Is(err, fault.Invalid) || !strings.HasPrefix(err.Error(), "on_timeout: ") {
		t.Errorf("99: %v", err)
	}
}

func TestExecConverts(t *testing.T) {
	w := newWorld(t)
	var got guestconn.Exec
	w.exec = func(_ context.Context, e guestconn.Exec) (guestconn.Result, error) {
		got = e
		if n := w.List()[0].InFlight; n != 1 {
			t.Errorf("%d in flight while it runs", n)
		}
		return guestconn.Result{}, nil
	}
	w.curl(t, "HostAgentService/CreateSandbox", `{"sandboxId":"b"}`)
	w.curl(t, "HostAgentService/Exec", `{"sandboxId":"b","cmd":"c","args":["a"],"envs":{"K":"v"},"cwd":"/w","user":"u","stdin":"aGk="}`)
	want := guestconn.Exec{
		Cmd: "c", Args: []string{"a"}, Env: map[string]string{"K": "v"}, Cwd: "/w", User: "u", Stdin: []byte("hi"),
		Timeout: 30 * time.Second, MaxOutput: 8 << 20,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("exec (-want +got):\n%s", diff)
	}
	w.curl(t, "HostAgentService/Exec", `{"sandboxId":"b","cmd":"c","timeoutSec":7}`)
	if got.Timeout != 7*time.Second {
		t.Errorf("timeout %v", got.Timeout)
	}
	if n := w.List()[0].InFlight; n != 0 {
		t.Errorf("%d in flight after it ended", n)
	}
}

func TestRequestTooLarge(t *testing.T) {
	w := newWorld(t)
	status, _, m := w.curl(t, "HostAgentService/Exec", `{"sandboxId":"b","cmd":"`+strings.Repeat("x", 17<<20)+`"}`)
	if status != 429 || m["code"] != "resource_exhausted" {
		t.Errorf("%d %v", status, m)
	}
}

func TestHealthAndReflection(t *testing.T) {
	w := newWorld(t)
	for _, service := range []string{"", hostagentv1connect.HostAgentServiceName, hostagentv1connect.TemplateServiceName} {
		status, _, m := post(t, w, "/grpc.health.v1.Health/Check", `{"service":"`+service+`"}`)
		if status != 200 || !strings.Contains(m, "SERVING") {
			t.Errorf("health of %q: %d %s", service, status, m)
		}
	}
	stream := grpcreflect.NewClient(w.client(t, true), w.url(), connect.WithGRPC()).NewStream(testenv.Context(t))
	defer stream.Close()
	names, err := stream.ListServices()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"hostagent.v1.HostAgentService", "hostagent.v1.SandboxService", "hostagent.v1.TemplateService", "hostagent.v1.HostService", "grpc.health.v1.Health"} {
		if !strings.Contains(fmt.Sprint(names), want) {
			t.Errorf("%s is not in %v", want, names)
		}
	}
	files, err := stream.FileContainingSymbol("hostagent.v1.SandboxService")
	if err != nil || len(files) == 0 {
		t.Errorf("no descriptor: %v", err)
	}
}

func post(t *testing.T, w *world, path, body string, header ...string) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(testenv.Context(t), "POST", w.url()+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := w.client(t, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var b bytes.Buffer
	if _, err := io.Copy(&b, res.Body); err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, res.Header, b.String()
}

// TestNothingIsOpenByAccident calls every RPC without a token.
func TestNothingIsOpenByAccident(t *testing.T) {
	w := newWorld(t, func(p *Params) { p.Tokens = testTokens(t) })
	for _, file := range files() {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				path := fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name())
				c := connect.NewClient[emptypb.Empty, emptypb.Empty](w.client(t, true), w.url()+path, connect.WithGRPC())
				stream := c.CallBidiStream(testenv.Context(t))
				stream.Send(&emptypb.Empty{})
				stream.CloseRequest()
				if _, err := stream.Receive(); connect.CodeOf(err) != connect.CodeUnauthenticated {
					t.Errorf("%s without a token: %v", path, err)
				}
				stream.CloseResponse()
			}
		}
	}
	for _, path := range []string{"/metrics", "/sandboxes/b/health", "/sandboxes/b/ports/80/", "/sandboxes/b/files"} {
		if status, head, body := post(t, w, path, ""); status != 401 || head.Get("WWW-Authenticate") != "Bearer" {
			t.Errorf("%s without a token: %d %s", path, status, body)
		}
	}
	for _, x := range []struct {
		path, token string
		status      int
	}{
		{"/hostagent.v1.HostAgentService/ListSandboxes", "read", 200},
		{"/hostagent.v1.HostAgentService/CreateSandbox", "read", 403},
		{"/hostagent.v1.HostAgentService/CreateSandbox", "admin", 200},
		{"/metrics", "read", 200},
		{"/sandboxes/sb-none/files", "read", 403},
		{"/sandboxes/sb-none/files", "admin", 404},
		{"/grpc.health.v1.Health/Check", "", 200},
	} {
		if status, _, body := post(t, w, x.path, "{}", "Authorization", "Bearer "+secretOf(x.token)); status != x.status {
			t.Errorf("%s with token %q: %d, want %d: %s", x.path, x.token, status, x.status, body)
		}
	}
}

func TestPagesAreRefused(t *testing.T) {
	w := newWorld(t)
	for name, header := range map[string][]string{
		"cross-site": {"Sec-Fetch-Site", "cross-site"}, "old browser": {"Origin", "https://evil.example"}, "sandboxed page": {"Origin", "null"},
	} {
		for _, path := range []string{"/hostagent.v1.HostAgentService/ListSandboxes", "/metrics", "/sandboxes/b/files"} {
			if status, _, body := post(t, w, path, "{}", header...); status != 403 {
				t.Errorf("%s to %s: %d %s", name, path, status, body)
			}
		}
	}
	if status, _, body := post(t, w, "/hostagent.v1.HostAgentService/ListSandboxes", "{}", "Origin", w.url()); status != 200 {
		t.Errorf("a page of our own: %d %s", status, body)
	}
}

func TestRoutes(t *testing.T) {
	w := newWorld(t)
	w.curl(t, "HostAgentService/CreateSandbox", `{"sandboxId":"b"}`)
	for path, want := range map[string]string{
		"/sandboxes/b/process.Process/List":                  "guest /process.Process/List",
		"/":                                                  "not_found",
		"/hostagent.v1.HostAgentService":                     "not_found",
		"/hostagent.v1.HostAgentService/":                    "404 page",
		"/hostagent.v1.HostAgentService/Nope":                "404 page",
		"//hostagent.v1.HostAgentService/ListSandboxes":      "not_found",
		"/x/../hostagent.v1.HostAgentService/Exec":           "not_found",
		"/hutch.guest.v1.GuestService/Configure":             "not_found",
		"/process.Process/List":                              "not_found",
		"/sandboxes/b/hutch.guest.v1.GuestService/Configure": "not_found",
	} {
		req, _ := http.NewRequest("POST", w.url(), strings.NewReader("{}"))
		req.URL.Path, req.URL.RawPath = path, path
		req.Header.Set("Content-Type", "application/json")
		res, err := w.client(t, false).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if !strings.Contains(string(body), want) {
			t.Errorf("%s: %d %q, want %q", path, res.StatusCode, body, want)
		}
	}
	if status, _, body := post(t, w, "/metrics", ""); status != 200 || !strings.Contains(body, `hutch_create_total{result="ok"} 1`) {
		t.Errorf("metrics: %d", status)
	}
	if status, head, _ := post(t, w, "/sandboxes/b/ports/80/", ""); status != 503 || head.Get(proxy.FailureHeader) != string(proxy.PortClosed) {
		t.Errorf("closed port: %d %v", status, head)
	}
}

func TestHeadTooLarge(t *testing.T) {
	w := newWorld(t)
	status, _, _ := post(t, w, "/hostagent.v1.HostAgentService/ListSandboxes", "{}", "X-Large", strings.Repeat("x", 80<<10))
	if status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("status %d", status)
	}
}

// TestCallerLeavesExec: the hold on the sandbox ends with the call.
func TestCallerLeavesExec(t *testing.T) {
	w := newWorld(t)
	started := make(chan struct{})
	ended := make(chan error, 1)
	w.exec = func(ctx context.Context, _ guestconn.Exec) (guestconn.Result, error) {
		close(started)
		<-ctx.Done()
		ended <- ctx.Err()
		return guestconn.Result{}, ctx.Err()
	}
	w.curl(t, "HostAgentService/CreateSandbox", `{"sandboxId":"b"}`)
	ctx, leave := context.WithCancel(testenv.Context(t))
	answered := make(chan error, 1)
	c := hostagentv1connect.NewHostAgentServiceClient(w.client(t, true), w.url(), connect.WithGRPC())
	go func() {
		_, err := c.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: "b", Cmd: "x"}))
		answered <- err
	}()
	<-started
	leave()
	if err := <-answered; connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("caller: %v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("guest: %v", err)
	}
}
