// Package test tries the built program: a control plane on loopback, without a node, twice on the same data.
//
// HUTCH_KUBE names the program; without it there is nothing to try. Whole nodes are tried in a VM, by hutch's own tests.
package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

type cluster struct {
	*testing.T
	binary, data      string
	port, status, dns int
	cmd               *exec.Cmd
	log               bytes.Buffer
}

// ports gives n free ports of loopback.
func ports(t *testing.T, n int) []int {
	t.Helper()
	var out []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		out = append(out, l.Addr().(*net.TCPAddr).Port)
	}
	return out
}

func (c *cluster) start(free []int) {
	c.Helper()
	c.port, c.status, c.dns = free[0], free[1], free[2]
	c.log.Reset()
	c.cmd = exec.Command(c.binary, "server", "--without-node", "--node-ip", "127.0.0.1", "--data", c.data, "--kubelet-dir", filepath.Join(c.data, "kubelet"),
		"--port", fmt.Sprint(free[0]), "--status", fmt.Sprintf("127.0.0.1:%d", free[1]), "--dns-port", fmt.Sprint(free[2]),
		"--controllers-port", fmt.Sprint(free[3]), "--scheduler-port", fmt.Sprint(free[4]))
	c.cmd.Stdout, c.cmd.Stderr = &c.log, &c.log
	began := time.Now()
	if err := c.cmd.Start(); err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
		if c.Failed() {
			c.Logf("its log:\n%s", c.log.String())
		}
	})
	c.until("ready", func() bool { return c.get("/healthz") == http.StatusOK })
	c.Logf("ready after %v", time.Since(began).Round(100*time.Millisecond))
}

func (c *cluster) until(what string, ok func() bool) {
	c.Helper()
	end := time.Now().Add(3 * time.Minute)
	for !ok() {
		if time.Now().After(end) || syscall.Kill(c.cmd.Process.Pid, 0) != nil {
			c.Fatalf("never: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (c *cluster) get(path string) int {
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", c.status, path))
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

func (c *cluster) stop() {
	c.Helper()
	began := time.Now()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		c.Fatal(err)
	}
	late := time.AfterFunc(30*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer late.Stop()
	if err := c.cmd.Wait(); err != nil {
		c.Fatalf("it ended with %v", err)
	}
	c.Logf("ended after %v", time.Since(began).Round(100*time.Millisecond))
}

func (c *cluster) kubectl(args ...string) string {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.binary, append([]string{"kubectl", "--kubeconfig", filepath.Join(c.data, "admin.kubeconfig")}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+c.data)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.Fatalf("kubectl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// anonymous asks the API without a certificate.
func (c *cluster) anonymous(path string) int {
	c.Helper()
	h := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true,
	}}
	resp, err := h.Get(fmt.Sprintf("https://127.0.0.1:%d%s", c.port, path))
	if err != nil {
		c.Fatal(err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

func TestServerKeepsItsDataOverARestart(t *testing.T) {
	binary := os.Getenv("HUTCH_KUBE")
	if binary == "" {
		t.Skip("HUTCH_KUBE names no program")
	}
	// Not t.TempDir: a unix socket's path must be short.
	data, err := os.MkdirTemp("/tmp", "hk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(data) })
	c := &cluster{T: t, binary: binary, data: data}
	c.start(ports(t, 5))

	c.until("the default service account", func() bool {
		return exec.Command(binary, "kubectl", "--kubeconfig", filepath.Join(data, "admin.kubeconfig"), "get", "sa", "default").Run() == nil
	})
	c.kubectl("create", "configmap", "kept", "--from-literal=a=b")
	if got := c.kubectl("get", "storageclass", "-o", `jsonpath={.items[*].metadata.name}`); got != "hutch-local" {
		t.Errorf("storage classes: %q", got)
	}
	c.kubectl("create", "service", "loadbalancer", "lb", "--tcp=80")
	c.until("an ingress", func() bool {
		return c.kubectl("get", "service", "lb", "-o", `jsonpath={.status.loadBalancer.ingress[0].hostname}`) == "localhost"
	})
	ask(t, c.dns, "kubernetes.default.svc.cluster.local")
	ask(t, c.dns, "lb.default.svc.cluster.local")
	for path, want := range map[string]int{"/readyz": 200, "/livez": 200, "/version": 401, "/api": 401} {
		if got := c.anonymous(path); got != want {
			t.Errorf("%s without a certificate: %d, want %d", path, got, want)
		}
	}
	if again, err := exec.Command(binary, "server", "--data", data).CombinedOutput(); err == nil || !bytes.Contains(again, []byte("another hutch-kube")) {
		t.Errorf("a second server on the same data: %v: %s", err, again)
	}
	config := read(t, filepath.Join(data, "admin.kubeconfig"))
	c.stop()

	c.start(ports(t, 5))
	if got := c.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.a}"); got != "b" {
		t.Errorf("after a restart: %q", got)
	}
	if ca := authority(t, config); ca != authority(t, read(t, filepath.Join(data, "admin.kubeconfig"))) {
		t.Error("a restart made a new authority")
	}
	c.stop()
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func authority(t *testing.T, config string) string {
	t.Helper()
	_, rest, ok := strings.Cut(config, "certificate-authority-data: ")
	if !ok {
		t.Fatalf("no authority in %s", config)
	}
	ca, _, _ := strings.Cut(rest, "}")
	return ca
}

// ask resolves a name by the cluster's DNS.
func ask(t *testing.T, port int, name string) {
	t.Helper()
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", port))
	}}
	ips, err := r.LookupHost(t.Context(), name)
	if err != nil || len(ips) == 0 || !strings.HasPrefix(ips[0], "10.43.") {
		t.Errorf("%s is at %v: %v", name, ips, err)
	}
}
