package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/testenv"
)

// kubeHost stands for hutchd with a sandbox sb-1 and a cluster in it.
type kubeHost struct {
	arcboxv1connect.UnimplementedAgentServiceHandler
	hostagentv1connect.UnimplementedSandboxServiceHandler
	hostagentv1connect.UnimplementedPortServiceHandler

	mu       sync.Mutex
	ca       string
	states   []*arcboxv1.KubernetesStatusResponse // one after the other; the last stays
	stopped  bool
	ports    []*hostagentv1.PublishedPort
	unknown  bool // there is no such sandbox
	noConfig bool
}

func (k *kubeHost) InspectSandbox(context.Context, *connect.Request[hostagentv1.InspectSandboxRequest]) (*connect.Response[hostagentv1.InspectSandboxResponse], error) {
	if k.unknown {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no sandbox sb-1"))
	}
	info := &hostagentv1.SandboxInfo{SandboxId: "sb-1"}
	return connect.NewResponse(&hostagentv1.InspectSandboxResponse{Sandbox: &hostagentv1.SandboxRecord{Info: info}}), nil
}

func (k *kubeHost) ListPorts(context.Context, *connect.Request[hostagentv1.ListPortsRequest]) (*connect.Response[hostagentv1.ListPortsResponse], error) {
	return connect.NewResponse(&hostagentv1.ListPortsResponse{Ports: k.ports}), nil
}

func (k *kubeHost) StartKubernetes(context.Context, *connect.Request[arcboxv1.KubernetesStartRequest]) (*connect.Response[arcboxv1.KubernetesStartResponse], error) {
	return connect.NewResponse(&arcboxv1.KubernetesStartResponse{Running: true, Detail: "starting"}), nil
}

func (k *kubeHost) StopKubernetes(context.Context, *connect.Request[arcboxv1.KubernetesStopRequest]) (*connect.Response[arcboxv1.KubernetesStopResponse], error) {
	return connect.NewResponse(&arcboxv1.KubernetesStopResponse{Stopped: k.stopped, Detail: "it is as it is"}), nil
}

func (k *kubeHost) GetKubernetesStatus(context.Context, *connect.Request[arcboxv1.KubernetesStatusRequest]) (*connect.Response[arcboxv1.KubernetesStatusResponse], error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.states[0]
	if len(k.states) > 1 {
		k.states = k.states[1:]
	}
	return connect.NewResponse(s), nil
}

func (k *kubeHost) GetKubeconfig(context.Context, *connect.Request[arcboxv1.KubernetesKubeconfigRequest]) (*connect.Response[arcboxv1.KubernetesKubeconfigResponse], error) {
	if k.noConfig {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no kubeconfig yet"))
	}
	yaml := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: hutch, cluster: {server: "https://127.0.0.1:6443", certificate-authority-data: %s}}]
users: [{name: hutch, user: {client-certificate-data: Y2VydA==, client-key-data: a2V5}}]
contexts: [{name: hutch, context: {cluster: hutch, user: hutch}}]
`, k.ca)
	return connect.NewResponse(&arcboxv1.KubernetesKubeconfigResponse{Kubeconfig: yaml, ContextName: "hutch", Endpoint: "https://127.0.0.1:6443"}), nil
}

func apiPort(port uint32, addresses ...string) *hostagentv1.PublishedPort {
	return &hostagentv1.PublishedPort{SandboxId: "sb-1", Owner: kubeOwner, Protocol: "tcp", HostPort: port, ContainerPort: kubePort, HostAddresses: addresses}
}

// run runs a command line, and returns its exit code and what it wrote.
func (k *kubeHost) run(t *testing.T, env map[string]string, args ...string) (code int, out, errs string) {
	t.Helper()
	path, agent := arcboxv1connect.NewAgentServiceHandler(k)
	mux := http.NewServeMux()
	mux.Handle("/sandboxes/sb-1"+path, http.StripPrefix("/sandboxes/sb-1", agent))
	mux.Handle(hostagentv1connect.NewSandboxServiceHandler(k))
	mux.Handle(hostagentv1connect.NewPortServiceHandler(k))
	server := httptest.NewUnstartedServer(mux)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	defer server.Close()
	var o, e bytes.Buffer
	app := &App{In: strings.NewReader(""), Out: &o, Err: &e, Getenv: func(name string) string {
		if v, ok := env[name]; ok {
			return v
		}
		return map[string]string{"HUTCH_HOST": "tcp://" + server.Listener.Addr().String()}[name]
	}}
	return app.Run(testenv.Context(t), args), o.String(), e.String()
}

func TestKubeconfigPrintsAPortOfTheHost(t *testing.T) {
	k := &kubeHost{ca: "b25l", ports: []*hostagentv1.PublishedPort{
		{SandboxId: "sb-1", Owner: "service/default/web", Protocol: "tcp", HostPort: 1, ContainerPort: kubePort, HostAddresses: []string{"127.0.0.1"}},
		apiPort(40123, "::1", "127.0.0.1"),
	}}
	code, out, errs := k.run(t, nil, "kubeconfig", "sb-1")
	if code != 0 || !strings.Contains(out, "server: https://127.0.0.1:40123\n") || !strings.Contains(out, "current-context: hutch-sb-1\n") || strings.Contains(out, "6443") {
		t.Errorf("code %d: %s%s", code, out, errs)
	}
	code, out, _ = k.run(t, nil, "kubeconfig", "--server", "https://[::1]:9", "sb-1")
	if code != 0 || !strings.Contains(out, "server: https://[::1]:9\n") || !strings.Contains(out, "tls-server-name: localhost\n") {
		t.Errorf("code %d: %s", code, out)
	}
	k.noConfig = true
	if code, _, errs = k.run(t, nil, "kubeconfig", "sb-1"); code != exitHutch || !strings.Contains(errs, "no kubeconfig yet") {
		t.Errorf("code %d: %s", code, errs)
	}
}

func TestKubeconfigMergesAndRemoves(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	env := map[string]string{"KUBECONFIG": file}
	k := &kubeHost{ca: "b25l", ports: []*hostagentv1.PublishedPort{apiPort(40123, "127.0.0.1")}}
	text := func() string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if code, out, errs := k.run(t, env, "kubeconfig", "--merge", "sb-1"); code != 0 || out != "context hutch-sb-1 is in "+file+"\n" {
		t.Fatalf("code %d: %s%s", code, out, errs)
	}
	if !strings.Contains(text(), "certificate-authority-data: b25l") || strings.Contains(text(), "current-context: hutch-sb-1") {
		t.Errorf("merged:\n%s", text())
	}
	k.ca = "dHdv" // the cluster was deleted and started again
	if code, _, errs := k.run(t, env, "kubeconfig", "--merge", "--use", "sb-1"); code != 0 {
		t.Fatal(errs)
	}
	if !strings.Contains(text(), "dHdv") || strings.Contains(text(), "b25l") || !strings.Contains(text(), "current-context: hutch-sb-1") {
		t.Errorf("merged again:\n%s", text())
	}
	k.unknown = true // the sandbox is no more
	if code, out, errs := k.run(t, env, "kubeconfig", "--remove", "sb-1"); code != 0 || out != "context hutch-sb-1 is out of "+file+"\n" {
		t.Errorf("code %d: %s%s", code, out, errs)
	}
	if strings.Contains(text(), "hutch-sb-1") {
		t.Errorf("after the removal:\n%s", text())
	}
	if code, _, errs := k.run(t, env, "kubeconfig", "--remove", "sb-1"); code != exitHutch || !strings.Contains(errs, "no kubeconfig has a context hutch-sb-1: ") {
		t.Errorf("code %d: %s", code, errs)
	}
	for _, args := range [][]string{{"--use"}, {"--use", "--remove"}, {"--merge", "--remove"}} {
		if code, _, _ := k.run(t, env, append(append([]string{"kubeconfig"}, args...), "sb-1")...); code == 0 {
			t.Errorf("%v was taken", args)
		}
	}
}

// TestKubectlHere runs a kubectl that tells what it was given.
func TestKubectlHere(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\necho \"$@\"\ncat \"$KUBECONFIG\"\nls -l \"$KUBECONFIG\"\nexit 9\n"
	if err := os.WriteFile(filepath.Join(dir, "kubectl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	k := &kubeHost{ca: "b25l", ports: []*hostagentv1.PublishedPort{apiPort(40123, "0.0.0.0")}}
	code, out, errs := k.run(t, nil, "kubectl", "sb-1", "--", "get", "nodes", "-o", "wide")
	if code != 9 || !strings.HasPrefix(out, "get nodes -o wide\n") || !strings.Contains(out, "server: https://127.0.0.1:40123\n") || !strings.Contains(out, "-rw-------") {
		t.Errorf("code %d: %s%s", code, out, errs)
	}
	left, _ := filepath.Glob(filepath.Join(os.TempDir(), "hutch-kubectl-*"))
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	k.ports = nil // the API has no port here: a tunnel
	code, out, errs = k.run(t, nil, "kubectl", "sb-1", "version")
	if code != 9 || !strings.Contains(out, "server: https://127.0.0.1:") || strings.Contains(out, ":40123") || strings.Contains(out, "6443") {
		t.Errorf("code %d: %s%s", code, out, errs)
	}
}

func TestRemoteHosts(t *testing.T) {
	for host, want := range map[string]bool{"unix:///x": true, "tcp://127.0.0.1:1": true, "tcp://[::1]:1": true, "tcp://localhost:1": true, "tcp://192.0.2.1:1": false, "https://box.example": false} {
		parsed, err := parseHost(host)
		if err != nil || parsed.isLocal() != want {
			t.Errorf("%s is local: %v, %v", host, parsed.isLocal(), err)
		}
	}
	c := &client{target: target{network: "tcp", address: "box.example:443"}}
	if _, err := c.kubeServer(t.Context(), "sb-1"); err == nil || !strings.Contains(err.Error(), "hutch port sb-1 16443:6443") {
		t.Errorf("error %v", err)
	}
}

func TestKubeStartWaits(t *testing.T) {
	k := &kubeHost{states: []*arcboxv1.KubernetesStatusResponse{
		{Running: true, Detail: "waiting for the API"}, {Running: true, ApiReady: true, NodeReady: true, Detail: "ready"},
	}}
	if code, out, errs := k.run(t, nil, "kube", "start", "--wait", "sb-1"); code != 0 || out != "sb-1\n" || errs != "waiting for the API\nready\n" {
		t.Errorf("code %d: %q, %q", code, out, errs)
	}
	if code, out, _ := k.run(t, nil, "kube", "start", "sb-1"); code != 0 || out != "starting\n" {
		t.Errorf("code %d: %q", code, out)
	}
	k.states = []*arcboxv1.KubernetesStatusResponse{{Detail: "somebody stopped it"}}
	if code, _, errs := k.run(t, nil, "kube", "start", "--wait", "sb-1"); code != exitHutch || !strings.Contains(errs, "not running any more: somebody stopped it") {
		t.Errorf("code %d: %s", code, errs)
	}
	k.states = []*arcboxv1.KubernetesStatusResponse{{Running: true}}
	if code, _, errs := k.run(t, nil, "kube", "start", "--wait", "--timeout", "10ms", "sb-1"); code != exitTimeout || !strings.Contains(errs, "not ready after 10ms") {
		t.Errorf("code %d: %s", code, errs)
	}
}

func TestKubeStopSaysWhatIsLeft(t *testing.T) {
	k := &kubeHost{}
	for _, stopped := range []bool{true, false} {
		k.stopped = stopped
		if code, out, errs := k.run(t, nil, "kube", "stop", "sb-1"); (code == 0) != stopped || out != "it is as it is\n" || (errs == "") != stopped {
			t.Errorf("stopped %v: code %d: %s%s", stopped, code, out, errs)
		}
	}
	k.states = []*arcboxv1.KubernetesStatusResponse{{Detail: "as it is", Services: []*arcboxv1.ServiceStatus{{Name: "kubelet", Status: "error", Crashes: 2, Detail: "dead"}}}}
	if code, out, _ := k.run(t, nil, "kube", "status", "sb-1"); code != 0 || !strings.Contains(out, "kubelet   error    2         dead") {
		t.Errorf("code %d: %s", code, out)
	}
}
