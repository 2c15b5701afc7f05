package spec

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/hutch-run/hutch/internal/testenv"
	arcboxv1 "github.com/hutch-run/hutch/test/spec/gen/arcboxv1"
	"github.com/hutch-run/hutch/test/spec/gen/arcboxv1/arcboxv1connect"
	hostagentv1 "github.com/hutch-run/hutch/test/spec/gen/hostagentv1"
	"github.com/hutch-run/hutch/test/spec/gen/hostagentv1/hostagentv1connect"

	"github.com/hutch-run/hutch/test/harness"
)

// api is the given interface over some protocol. An error is told by its
// Connect code.
type api interface {
	create(req *hostagentv1.CreateSandboxRequest) (*hostagentv1.CreateSandboxResponse, error)
	destroy(id string) error
	pause(id string) error
	resume(id string) error
	exec(id string, timeout int32, argv ...string) (*hostagentv1.ExecResponse, error)
	list() ([]*hostagentv1.SandboxInfo, error)
}

// generated is the given interface by generated clients.
type generated struct {
	ctx    context.Context
	client hostagentv1connect.HostAgentServiceClient
}

func (g generated) create(req *hostagentv1.CreateSandboxRequest) (*hostagentv1.CreateSandboxResponse, error) {
	return message(g.client.CreateSandbox(g.ctx, connect.NewRequest(req)))
}

func (g generated) destroy(id string) error {
	_, err := g.client.DestroySandbox(g.ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
	return err
}

func (g generated) pause(id string) error {
	_, err := g.client.PauseSandbox(g.ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id}))
	return err
}

func (g generated) resume(id string) error {
	_, err := g.client.ResumeSandbox(g.ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
	return err
}

func (g generated) exec(id string, timeout int32, argv ...string) (*hostagentv1.ExecResponse, error) {
	return message(g.client.Exec(g.ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: argv[0], Args: argv[1:], TimeoutSec: timeout})))
}

func (g generated) list() ([]*hostagentv1.SandboxInfo, error) {
	res, err := g.client.ListSandboxes(g.ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetSandboxes(), nil
}

func message[T any](res *connect.Response[T], err error) (*T, error) {
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// plain is the given interface as curl speaks it: JSON over HTTP/1.1.
type plain struct {
	t    *testing.T
	base string
}

// call posts a JSON body and returns the decoded answer.
func (p plain) call(method, body string) (map[string]any, error) {
	p.t.Helper()
	res, err := http.Post(p.base+"/hostagent.v1.HostAgentService/"+method, "application/json", strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	var out map[string]any
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("%s answered %q: %w", method, b, err)
	}
	if res.StatusCode != http.StatusOK {
		var code connect.Code
		if err := code.UnmarshalText([]byte(fmt.Sprint(out["code"]))); err != nil {
			return nil, fmt.Errorf("%s answered %s: %w", method, b, err)
		}
		return nil, connect.NewError(code, errors.New(fmt.Sprint(out["message"])))
	}
	return out, nil
}

func (p plain) create(req *hostagentv1.CreateSandboxRequest) (*hostagentv1.CreateSandboxResponse, error) {
	out, err := p.call("CreateSandbox", fmt.Sprintf(`{"template":%q,"vcpus":%d,"memoryMb":%d,"timeoutSec":%d}`, req.GetTemplate(), req.GetVcpus(), req.GetMemoryMb(), req.GetTimeoutSec()))
	if err != nil {
		return nil, err
	}
	return &hostagentv1.CreateSandboxResponse{SandboxId: out["sandboxId"].(string), Status: out["status"].(string), HostIp: out["hostIp"].(string)}, nil
}

func (p plain) byID(method, id string) error {
	_, err := p.call(method, fmt.Sprintf(`{"sandboxId":%q}`, id))
	return err
}

func (p plain) destroy(id string) error { return p.byID("DestroySandbox", id) }
func (p plain) pause(id string) error   { return p.byID("PauseSandbox", id) }
func (p plain) resume(id string) error  { return p.byID("ResumeSandbox", id) }

func (p plain) exec(id string, timeout int32, argv ...string) (*hostagentv1.ExecResponse, error) {
	args, _ := json.Marshal(argv[1:])
	out, err := p.call("Exec", fmt.Sprintf(`{"sandboxId":%q,"cmd":%q,"args":%s,"timeoutSec":%d}`, id, argv[0], args, timeout))
	if err != nil {
		return nil, err
	}
	res := &hostagentv1.ExecResponse{}
	if s, ok := out["stdout"].(string); ok {
		if res.Stdout, err = base64.StdEncoding.DecodeString(s); err != nil {
			return nil, err
		}
	}
	if s, ok := out["stderr"].(string); ok {
		if res.Stderr, err = base64.StdEncoding.DecodeString(s); err != nil {
			return nil, err
		}
	}
	if n, ok := out["exitCode"].(float64); ok {
		res.ExitCode = int32(n)
	}
	return res, nil
}

func (p plain) list() ([]*hostagentv1.SandboxInfo, error) {
	out, err := p.call("ListSandboxes", "{}")
	if err != nil {
		return nil, err
	}
	var list []*hostagentv1.SandboxInfo
	items, _ := out["sandboxes"].([]any)
	for _, item := range items {
		m := item.(map[string]any)
		list = append(list, &hostagentv1.SandboxInfo{SandboxId: m["sandboxId"].(string), Status: m["status"].(string)})
	}
	return list, nil
}

// h2c is an HTTP/2 client without TLS, as gRPC clients are on a plain port.
func h2c() *http.Client {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{Protocols: &p}}
}

func TestGivenHostInterface(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	base := "http://" + d.TCP
	ctx := testenv.Context(t)
	client := func(c *http.Client, o ...connect.ClientOption) api {
		return generated{ctx, hostagentv1connect.NewHostAgentServiceClient(c, base, o...)}
	}
	for name, a := range map[string]api{
		"curl and JSON": plain{t, base},
		"Connect":       client(http.DefaultClient),
		"Connect JSON":  client(http.DefaultClient, connect.WithProtoJSON()),
		"gRPC":          client(h2c(), connect.WithGRPC()),
		"gRPC-Web":      client(http.DefaultClient, connect.WithGRPCWeb()),
	} {
		t.Run(name, func(t *testing.T) { script(t, a) })
	}
	t.Run("empty list is {}", func(t *testing.T) {
		res, err := http.Post(base+"/hostagent.v1.HostAgentService/ListSandboxes", "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != "{}" {
			t.Errorf("got %q, %v", b, err)
		}
	})
}

// script is the given interface's whole story of one sandbox.
func script(t *testing.T, a api) {
	if got := states(t, a); len(got) != 0 {
		t.Fatalf("before the first create there are %v", got)
	}
	created, err := a.create(&hostagentv1.CreateSandboxRequest{Template: "minimal", Vcpus: 1, MemoryMb: 128, TimeoutSec: 300})
	if err != nil {
		t.Fatal(err)
	}
	id := created.GetSandboxId()
	if !strings.HasPrefix(id, "sb-") || created.GetStatus() != "running" || !strings.HasPrefix(created.GetHostIp(), "198.19.") {
		t.Errorf("created %v", created)
	}
	wantState(t, a, id, "running")
	wantExec(t, a, id, "hello\n", "echo", "hello")
	wantExec(t, a, id, "1\n2\n3\n", "sh", "-c", "echo 1; echo 2; echo 3")
	res, err := a.exec(id, 0, "sh", "-c", "echo out; echo err >&2; exit 7")
	if err != nil || string(res.GetStdout()) != "out\n" || string(res.GetStderr()) != "err\n" || res.GetExitCode() != 7 {
		t.Errorf("apart: %v, %v", res, err)
	}
	if err := a.pause(id); err != nil {
		t.Fatal(err)
	}
	wantState(t, a, id, "paused")
	if _, err := a.exec(id, 0, "true"); connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "paused") {
		t.Errorf("exec while paused: %v", err)
	}
	if err := a.resume(id); err != nil {
		t.Fatal(err)
	}
	wantState(t, a, id, "running")
	wantExec(t, a, id, "back\n", "echo", "back")
	if err := a.destroy(id); err != nil {
		t.Fatal(err)
	}
	if got := states(t, a); len(got) != 0 {
		t.Errorf("after destroy there are %v", got)
	}
	wantErrors(t, a)
}

// wantErrors checks that what cannot be is refused with the right code and
// words.
func wantErrors(t *testing.T, a api) {
	for name, c := range map[string]struct {
		call func() error
		code connect.Code
		say  string
	}{
		"destroy unknown": {func() error { return a.destroy("sb-nonexist") }, connect.CodeNotFound, "sb-nonexist"},
		"pause unknown":   {func() error { return a.pause("sb-nonexist") }, connect.CodeNotFound, "sb-nonexist"},
		"exec unknown":    {func() error { _, err := a.exec("sb-nonexist", 0, "true"); return err }, connect.CodeNotFound, "sb-nonexist"},
		"bad id":          {func() error { return a.destroy("../etc") }, connect.CodeInvalidArgument, "sandbox_id"},
		"empty id":        {func() error { return a.destroy("") }, connect.CodeInvalidArgument, "sandbox_id"},
		"unknown template": {func() error {
			_, err := a.create(&hostagentv1.CreateSandboxRequest{Template: "no-such"})
			return err
		}, connect.CodeNotFound, "no-such"},
		"negative vcpus": {func() error {
			_, err := a.create(&hostagentv1.CreateSandboxRequest{Vcpus: -1})
			return err
		}, connect.CodeInvalidArgument, "vcpus"},
		"too little memory": {func() error {
			_, err := a.create(&hostagentv1.CreateSandboxRequest{MemoryMb: 3})
			return err
		}, connect.CodeInvalidArgument, "memory_mb"},
	} {
		if err := c.call(); connect.CodeOf(err) != c.code || err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v, want %s naming %s", name, err, c.code, c.say)
		}
	}
}

func states(t *testing.T, a api) map[string]string {
	t.Helper()
	list, err := a.list()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, s := range list {
		out[s.GetSandboxId()] = s.GetStatus()
	}
	return out
}

func wantState(t *testing.T, a api, id, want string) {
	t.Helper()
	if got := states(t, a)[id]; got != want {
		t.Errorf("%s is %q, want %s", id, got, want)
	}
}

func wantExec(t *testing.T, a api, id, want string, argv ...string) {
	t.Helper()
	res, err := a.exec(id, 0, argv...)
	if err != nil {
		t.Errorf("%v: %v", argv, err)
		return
	}
	if !bytes.Equal(res.GetStdout(), []byte(want)) || res.GetExitCode() != 0 {
		t.Errorf("%v: stdout %q stderr %q exit %d", argv, res.GetStdout(), res.GetStderr(), res.GetExitCode())
	}
}

// lackOfDocker asks for Docker where the image has none.
func lackOfDocker(ctx context.Context, t *testing.T, c arcboxv1connect.AgentServiceClient) {
	t.Helper()
	ensured, err := c.EnsureRuntime(ctx, connect.NewRequest(&arcboxv1.RuntimeEnsureRequest{StartIfNeeded: true}))
	if err != nil || ensured.Msg.GetReady() || ensured.Msg.GetStatus() != "failed" || !strings.Contains(ensured.Msg.GetMessage(), "missing runtime binaries under ") {
		t.Errorf("ensure runtime: %v, %v", ensured, err)
	}
	status, err := c.GetRuntimeStatus(ctx, connect.NewRequest(&arcboxv1.RuntimeStatusRequest{}))
	if err != nil || status.Msg.GetContainerdReady() || status.Msg.GetDockerReady() || len(status.Msg.GetServices()) != 3 {
		t.Errorf("runtime status: %v, %v", status, err)
	}
	if _, err := c.GetKubeconfig(ctx, connect.NewRequest(&arcboxv1.KubernetesKubeconfigRequest{})); err == nil {
		t.Error("there is a kubeconfig without a cluster")
	}
}

// TestGivenGuestInterface speaks the guest's interface through the proxy.
func TestGivenGuestInterface(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	id := d.Create("-m", "128")
	ctx := testenv.Context(t)
	for name, c := range map[string]arcboxv1connect.AgentServiceClient{
		"Connect":  arcboxv1connect.NewAgentServiceClient(http.DefaultClient, "http://"+d.TCP+"/sandboxes/"+id),
		"gRPC":     arcboxv1connect.NewAgentServiceClient(h2c(), "http://"+d.TCP+"/sandboxes/"+id, connect.WithGRPC()),
		"gRPC-Web": arcboxv1connect.NewAgentServiceClient(http.DefaultClient, "http://"+d.TCP+"/sandboxes/"+id, connect.WithGRPCWeb()),
	} {
		t.Run(name, func(t *testing.T) {
			ping, err := c.Ping(ctx, connect.NewRequest(&arcboxv1.AgentPingRequest{Message: "hi"}))
			if err != nil || ping.Msg.GetMessage() != "pong: hi" || ping.Msg.GetVersion() == "" {
				t.Errorf("ping: %v, %v", ping, err)
			}
			info, err := c.GetSystemInfo(ctx, connect.NewRequest(&arcboxv1.Empty{}))
			if err != nil {
				t.Fatal(err)
			}
			m := info.Msg
			if m.GetCpuCount() != 1 || m.GetTotalMemory() == 0 || m.GetHostname() != id || len(m.GetLoadAverage()) != 3 || len(m.GetIpAddresses()) == 0 {
				t.Errorf("system info %v", m)
			}
			lackOfDocker(ctx, t, c)
		})
	}
	c := arcboxv1connect.NewAgentServiceClient(http.DefaultClient, "http://"+d.TCP+"/sandboxes/"+id)
	down, err := c.Shutdown(ctx, connect.NewRequest(&arcboxv1.ShutdownRequest{TimeoutSeconds: 5}))
	if err != nil || !down.Msg.GetAccepted() {
		t.Fatalf("shutdown: %v, %v", down, err)
	}
	if got := d.Hutch("wait", id); got != "stopped" {
		t.Errorf("after shutdown it is %s", got)
	}
}
