package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// clusterGuest is a sandbox with a cluster, and a kubectl on the host with a
// file of credentials that has others in it too.
type clusterGuest struct {
	t       *testing.T
	d       *harness.Daemon
	id      string
	kubectl string
	config  string
}

// others is what the file of credentials has before.
const others = `apiVersion: v1
kind: Config
clusters:
- name: prod # not ours
  cluster:
    server: https://prod.example
users: []
contexts: []
current-context: ""
`

// podImage is what pods run, an image that was made here.
const podImage = "hutch.local/inside:1"

// manifest is one program with storage and an address, and a port of the host.
const manifest = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo}
spec:
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec:
      terminationGracePeriodSeconds: 1
      volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
      initContainers: [{name: note, image: IMAGE, imagePullPolicy: Never, args: [note, /data/notes, a pod was here], volumeMounts: [{name: data, mountPath: /data}]}]
      containers: [{name: echo, image: IMAGE, imagePullPolicy: Never, args: [serve], ports: [{containerPort: 9001}]}]
---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec: {selector: {app: echo}, ports: [{name: tcp, port: 80, targetPort: 9001}, {name: udp, port: 80, targetPort: 9001, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: front}
spec: {type: LoadBalancer, selector: {app: echo}, ports: [{port: PORT, targetPort: 9001}]}
`

// clusterTime bounds what a cluster is waited for, under emulation on a machine
// that does other things too.
const clusterTime = 8 * time.Minute

// TestKubernetes has a sandbox become a cluster, uses that from the host as if
// it were the host's own, stops it, and makes another one of it.
func TestKubernetes(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a cluster; -short")
	}
	d := harness.Start(t, harness.Options{})
	buildTemplate(t, d, "kubernetes")
	g := clusterGuest{t: t, d: d, kubectl: filepath.Join(d.Dir, "kubectl"), config: filepath.Join(d.Dir, "kubeconfig")}
	for _, err := range []error{
		os.Symlink(harness.Bin(t, "hutch-kube"), g.kubectl), // which is a kubectl by that name
		os.WriteFile(g.config, []byte(others), 0o640),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("KUBECONFIG", g.config)
	g.id = d.Create("kubernetes")
	last := time.Now()
	for _, part := range []struct {
		name string
		do   func(clusterGuest)
	}{
		{"start", clusterGuest.starts},
		{"credentials", clusterGuest.hasCredentials},
		{"deploy", clusterGuest.deploys},
		{"names and addresses", clusterGuest.resolves},
		{"logs and storage", clusterGuest.keepsData},
		{"port-forward", clusterGuest.forwards},
		{"load balancer", clusterGuest.balances},
		{"stop", clusterGuest.stops},
		{"another cluster", clusterGuest.startsAnew},
	} {
		ok := t.Run(part.name, func(t *testing.T) {
			g.t = t
			part.do(g)
		})
		t.Logf("%s took %s", part.name, time.Since(last).Round(100*time.Millisecond))
		last = time.Now()
		if !ok {
			t.Log(d.Try("kube", "status", g.id).Stdout)
			t.FailNow() // all others stand on it
		}
	}
}

// try runs kubectl on the host.
func (g clusterGuest) try(in string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), clusterTime)
	defer cancel()
	c := exec.CommandContext(ctx, g.kubectl, append([]string{"--context", "hutch-" + g.id}, args...)...)
	c.Stdin = strings.NewReader(in)
	var out, said bytes.Buffer
	c.Stdout, c.Stderr = &out, &said
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// run runs kubectl, which must succeed.
func (g clusterGuest) run(args ...string) string {
	g.t.Helper()
	out, err := g.try("", args...)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

func (g clusterGuest) starts() {
	if s := g.d.Hutch("kube", "status", g.id); !strings.HasPrefix(s, "hutch-kube is not running") {
		g.t.Errorf("before the start: %s", s)
	}
	if r := g.d.Try("kubeconfig", g.id); r.Code == 0 || !strings.Contains(r.Stderr, "start Kubernetes first") {
		g.t.Errorf("kubeconfig before the start: %+v", r)
	}
	if s := g.d.Hutch("kube", "start", g.id); !strings.Contains(s, "start") {
		g.t.Errorf("the start says %q", s)
	}
	g.awaits()
}

// awaits waits until pods can run.
func (g clusterGuest) awaits() {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), clusterTime)
	defer cancel()
	c := g.d.Command(ctx, "kube", "start", "--wait", "--timeout", clusterTime.String(), g.id)
	if out, err := c.CombinedOutput(); err != nil {
		g.t.Fatalf("it does not become ready: %v\n%s", err, out)
	}
}

func (g clusterGuest) hasCredentials() {
	g.d.Hutch("kubeconfig", "--merge", g.id)
	text := g.credentials()
	if !strings.Contains(text, "- name: prod # not ours\n") || !strings.Contains(text, `current-context: ""`) || strings.Contains(text, ":6443") {
		g.t.Errorf("merged:\n%s", text)
	}
	if fi, err := os.Stat(g.config); err != nil || fi.Mode().Perm() != 0o640 {
		g.t.Errorf("%v, %v", fi, err)
	}
	if nodes := g.run("get", "nodes", "--no-headers"); !strings.HasPrefix(nodes, "node ") || !strings.Contains(nodes, " Ready ") {
		g.t.Errorf("nodes: %s", nodes)
	}
	for where, path := range map[string]string{"of the host": filepath.Dir(g.kubectl) + ":" + os.Getenv("PATH"), "of the guest": "/nowhere"} {
		c := g.d.Command(testenv.Context(g.t), "kubectl", g.id, "--", "get", "nodes", "-o", "name")
		c.Env = append(c.Env, "PATH="+path)
		if out, err := c.CombinedOutput(); err != nil || string(out) != "node/node\n" {
			g.t.Errorf("the kubectl %s: %q, %v", where, out, err)
		}
	}
}

func (g clusterGuest) credentials() string {
	g.t.Helper()
	b, err := os.ReadFile(g.config)
	if err != nil {
		g.t.Fatal(err)
	}
	return string(b)
}

// deploys makes an image, and runs it.
func (g clusterGuest) deploys() {
	g.d.Hutch("cp", programImage(g.t, podImage, buildInside(g.t)), g.id+":/tmp/image.tar")
	g.d.Hutch("exec", "--timeout", "5m", g.id, "--", "ctr", "-n", "k8s.io", "images", "import", "/tmp/image.tar")
	out, err := g.try(strings.NewReplacer("IMAGE", podImage, "PORT", g.frontPort()).Replace(manifest), "apply", "-f", "-")
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Log(out)
	if out, err := g.try("", "rollout", "status", "deployment/echo", "--timeout", "5m"); err != nil {
		g.t.Fatalf("%v\n%s", err, g.run("describe", "pods,pvc"))
	} else if claim := g.run("get", "pvc", "data", "-o", "jsonpath={.status.phase}"); claim != "Bound" {
		g.t.Errorf("%s; the claim is %q", out, claim)
	}
}

// frontPort is a port of the host that was free when the test began.
func (g clusterGuest) frontPort() string {
	g.t.Helper()
	file := filepath.Join(g.d.Dir, "front-port")
	if b, err := os.ReadFile(file); err == nil {
		return string(b)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	if err := os.WriteFile(file, []byte(port), 0o600); err != nil {
		g.t.Fatal(err)
	}
	return port
}

// inPod runs a program in the pod.
func (g clusterGuest) inPod(args ...string) string {
	g.t.Helper()
	return g.run(append([]string{"exec", "deployment/echo", "-c", "echo", "--", "/inside"}, args...)...)
}

func (g clusterGuest) resolves() {
	want := g.run("get", "service", "echo", "-o", "jsonpath={.spec.clusterIP}")
	for _, name := range []string{"echo", "echo.default.svc.cluster.local"} {
		if got := g.inPod("lookup", name); got != want {
			g.t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := g.inPod("ask", "udp", "echo:80"); got != "?" {
		g.t.Errorf("the Service says %q", got)
	}
}

// keepsData has another pod take over what the first has written.
func (g clusterGuest) keepsData() {
	if got := g.run("logs", "deployment/echo", "-c", "note"); got != "a pod was here" {
		g.t.Errorf("the log says %q", got)
	}
	g.run("delete", "pod", "-l", "app=echo", "--wait")
	g.run("rollout", "status", "deployment/echo", "--timeout", "5m")
	if got := g.run("logs", "deployment/echo", "-c", "note"); got != "a pod was here\na pod was here" {
		g.t.Errorf("the next pod's log says %q", got)
	}
}

var forwardedPort = regexp.MustCompile(`127\.0\.0\.1:(\d+)`)

func (g clusterGuest) forwards() {
	ctx, cancel := context.WithCancel(testenv.Context(g.t))
	defer cancel()
	c := exec.CommandContext(ctx, g.kubectl, "--context", "hutch-"+g.id, "port-forward", "service/echo", ":80")
	out, err := c.StdoutPipe()
	if err != nil {
		g.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		g.t.Fatal(err)
	}
	defer func() { cancel(); _ = c.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	port := forwardedPort.FindStringSubmatch(line)
	if port == nil {
		g.t.Fatalf("kubectl says %q, %v", line, err)
	}
	if err := comesBack("127.0.0.1:" + port[1]); err != nil {
		g.t.Error(err)
	}
}

// comesBack has what it sends come back.
func comesBack(address string) error {
	c, err := net.DialTimeout("tcp", address, 20*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		return fmt.Errorf("%q came back, %w", b, errors.Join(err))
	}
	return nil
}

func (g clusterGuest) balances() {
	at := net.JoinHostPort("127.0.0.1", g.frontPort())
	harness.Eventually(g.t, time.Minute, func() error {
		if err := comesBack(at); err != nil {
			return fmt.Errorf("%w\n%s", err, g.d.Try("port", "ls", g.id).Stdout)
		}
		return nil
	})
}

// left prints what there is of a cluster in the machine, its own shell aside.
const left = `
for p in /proc/[0-9]*; do [ $p != /proc/$$ ] || continue; case $(tr '\0' ' ' <$p/cmdline 2>/dev/null) in *containerd-shim*k8s.io*|/inside*|*hutch-kube\ server*) echo "process $p";; esac; done
grep -E ' /var/lib/kubelet/| /run/netns/cni-|/k8s.io/' /proc/mounts
[ ! -e /sys/fs/cgroup/kubepods ] || echo cgroup kubepods
for i in /sys/class/net/*; do case $i in */cni0|*/veth*|*/hutch-node) echo "interface $i";; esac; done
nft list ruleset 2>/dev/null | grep -E 'KUBE-|CNI-|table .* kube-proxy'
true`

func (g clusterGuest) stops() {
	if said := g.d.Hutch("kube", "stop", g.id); said != "hutch-kube is stopped" {
		g.t.Errorf("the stop says %q", said)
	}
	if found := g.d.Hutch("exec", g.id, "--", "sh", "-c", left); found != "" {
		g.t.Errorf("left are\n%s", found)
	}
	harness.Eventually(g.t, time.Minute, func() error {
		if list := g.d.Hutch("port", "ls", "--json", g.id); strings.Contains(list, "kubernetes") || strings.Contains(list, "default/front") {
			return fmt.Errorf("published are still %s", list)
		}
		return nil
	})
	if s := g.d.Hutch("kube", "status", g.id); !strings.HasPrefix(s, "hutch-kube is not running") {
		g.t.Errorf("after the stop: %s", s)
	}
}

var caData = regexp.MustCompile(`certificate-authority-data: (\S+)`)

// startsAnew deletes the cluster: the next one has other keys, and its
// credentials take the place of the old ones.
func (g clusterGuest) startsAnew() {
	before := caData.FindString(g.credentials())
	if said := g.d.Hutch("kube", "delete", g.id); !strings.HasSuffix(said, "its data is wiped") {
		g.t.Errorf("the delete says %q", said)
	}
	g.awaits()
	g.d.Hutch("kubeconfig", "--merge", g.id)
	if after := caData.FindString(g.credentials()); after == before || after == "" {
		g.t.Errorf("the next cluster has the same certificate: %s", after)
	}
	if pods := g.run("get", "deployments,pods", "-o", "name"); pods != "" {
		g.t.Errorf("the new cluster has %s", pods)
	}
	g.d.Hutch("kubeconfig", "--remove", g.id)
	if text := g.credentials(); text != others {
		g.t.Errorf("after the removal:\n%s", text)
	}
}
