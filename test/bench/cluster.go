package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/delay"
)

// siteSnapshot is the named snapshot of a cluster in which the site runs.
const siteSnapshot = "bench-site"

// sitePlace is where the guest has the program that the site's pod runs.
const sitePlace = "/opt/site/site"

// siteManifest is a pod and its Service, at a port of the host.
const siteManifest = `
apiVersion: v1
kind: Pod
metadata: {name: site, labels: {app: site}}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: program, hostPath: {path: /opt/site}}]
  containers: [{name: site, image: "hutch.local/pause:1", imagePullPolicy: Never, command: [/opt/site/site], volumeMounts: [{name: program, mountPath: /opt/site}]}]
---
apiVersion: v1
kind: Service
metadata: {name: site}
spec: {type: LoadBalancer, selector: {app: site}, ports: [{port: %d, targetPort: 8080}]}
`

// cluster is what the rows of Kubernetes need: a kubectl on the host, and a site.
type cluster struct {
	*bench
	kubectl string // a directory for PATH
	site    string // program
	port    int    // of the host, for the site's Service
}

// measureKubernetes measures a create to the moment when the host's kubectl has
// a node that is Ready, and to the one when a pod answers through its Service,
// at a port of the host. Warm, the first comes from a template that was made
// warm with Kubernetes up, the second from the named snapshot of a sandbox in
// which that pod ran. It is left out where hutch-kube was not built.
func (b *bench) measureKubernetes(ctx context.Context) error {
	if _, err := os.Stat("bin/hutch-kube"); errors.Is(err, os.ErrNotExist) {
		say("  there is no bin/hutch-kube; make kube builds it")
		return nil
	}
	if err := b.prepareReady(ctx, "kubernetes"); err != nil {
		return err
	}
	c, err := b.prepareCluster(ctx)
	if err != nil {
		return fmt.Errorf("prepare a cluster: %w", err)
	}
	say("  bring a cluster with a pod up, to copy it")
	if err := c.saveSite(ctx); err != nil {
		return err
	}
	held, err := compete(ctx, []string{kubernetesContest, siteContest}, b.plan.Ready, 1, []side{
		{name: sideHutch, do: c.warm}, {name: sideCold, every: 2, do: c.cold},
	})
	b.report.Contests = append(b.report.Contests, held...)
	return err
}

func (b *bench) prepareCluster(ctx context.Context) (*cluster, error) {
	c := &cluster{bench: b, kubectl: filepath.Join(b.scratch, "kubectl"), site: filepath.Join(b.scratch, "site")}
	program, err := filepath.Abs("bin/hutch-kube")
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(c.kubectl, 0o755); err != nil {
		return nil, err
	}
	if err := os.Symlink(program, filepath.Join(c.kubectl, "kubectl")); err != nil { // which is a kubectl by that name
		return nil, err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", c.site, "./test/bench/site")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the site: %w: %s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c.port = l.Addr().(*net.TCPAddr).Port
	return c, l.Close()
}

// saveSite makes the named snapshot of a cluster in which the site answers.
func (c *cluster) saveSite(ctx context.Context) error {
	save := func(ctx context.Context, id string) error {
		_, err := c.host.snapshots.CreateSnapshot(ctx, connect.NewRequest(&hostagentv1.CreateSnapshotRequest{SandboxId: id, Name: siteSnapshot}))
		return err
	}
	_, err := c.createToUse(ctx, "kubernetes", false, func(ctx context.Context, id string) error {
		for _, step := range []func(context.Context, string) error{c.awaitNode, c.deploy, c.awaitSite, save} {
			if err := step(ctx, id); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// warm copies the template, and then the snapshot.
func (c *cluster) warm(ctx context.Context) ([]time.Duration, error) {
	node, err := c.createToUse(ctx, "kubernetes", false, c.awaitNode)
	if err != nil {
		return nil, err
	}
	site, err := c.createToUse(ctx, siteSnapshot, false, c.awaitSite)
	return []time.Duration{node, site}, err
}

// cold has one sandbox do both: the pod is made as soon as the node is Ready.
func (c *cluster) cold(ctx context.Context) ([]time.Duration, error) {
	var node time.Duration
	began := time.Now()
	site, err := c.createToUse(ctx, "kubernetes", true, func(ctx context.Context, id string) error {
		if err := c.awaitNode(ctx, id); err != nil {
			return err
		}
		node = time.Since(began)
		if err := c.deploy(ctx, id); err != nil {
			return err
		}
		return c.awaitSite(ctx, id)
	})
	return []time.Duration{node, site}, err
}

// awaitNode starts a cluster, unless it is there, waits until it says that pods
// run, and then until the host's kubectl says that the node is Ready.
func (c *cluster) awaitNode(ctx context.Context, id string) error {
	agent := arcboxv1connect.NewAgentServiceClient(c.host.http, "http://localhost/sandboxes/"+id)
	status := func() (bool, error) {
		res, err := agent.GetKubernetesStatus(ctx, connect.NewRequest(&arcboxv1.KubernetesStatusRequest{}))
		return err == nil && res.Msg.GetApiReady() && res.Msg.GetNodeReady(), err
	}
	ready, err := status()
	if err == nil && !ready {
		_, err = agent.StartKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStartRequest{}))
	}
	if err != nil {
		return err
	}
	if err := until(ctx, status); err != nil {
		return err
	}
	return until(ctx, func() (bool, error) {
		out, err := c.runKubectl(ctx, id, "", "get", "nodes", "--no-headers")
		return strings.Contains(out, " Ready "), err
	})
}

// deploy brings the site into a cluster.
func (c *cluster) deploy(ctx context.Context, id string) error {
	if _, err := c.host.exec(ctx, id, "mkdir", "-p", filepath.Dir(sitePlace)); err != nil {
		return err
	}
	if err := c.host.cli(ctx, "cp", c.site, id+":"+sitePlace); err != nil {
		return err
	}
	_, err := c.runKubectl(ctx, id, fmt.Sprintf(siteManifest, c.port), "apply", "-f", "-")
	return err
}

// awaitSite waits until the pod answers at the host's port.
func (c *cluster) awaitSite(ctx context.Context, _ string) error {
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	return until(ctx, func() (bool, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", c.port), nil)
		if err != nil {
			return false, err
		}
		res, err := client.Do(r)
		if err != nil {
			return false, ctx.Err() // nobody is there yet
		}
		said, err := io.ReadAll(res.Body)
		return string(said) == "hello\n", errors.Join(err, res.Body.Close())
	})
}

// runKubectl runs the host's kubectl, as hutch does for its user.
func (c *cluster) runKubectl(ctx context.Context, id, in string, args ...string) (string, error) {
	k := exec.CommandContext(ctx, "bin/hutch", append([]string{"kubectl", id, "--"}, args...)...)
	k.Env = append(os.Environ(), "HUTCH_HOST=unix://"+c.host.socket, "PATH="+c.kubectl+":"+os.Getenv("PATH"))
	var out, said bytes.Buffer
	k.Stdin, k.Stdout, k.Stderr = strings.NewReader(in), &out, &said
	if err := k.Run(); err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return out.String(), nil
}

// until asks again and again, until the answer is yes.
func until(ctx context.Context, yes func() (bool, error)) error {
	for {
		if ok, err := yes(); ok || err != nil {
			return err
		}
		if err := delay.For(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}
