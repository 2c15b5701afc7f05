package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// dockerGuest is a sandbox whose agent runs Docker, seen from the guest's API.
type dockerGuest struct {
	t     *testing.T
	d     *harness.Daemon
	id    string
	agent arcboxv1connect.AgentServiceClient
}

func (g dockerGuest) on(t *testing.T) dockerGuest { g.t = t; return g }

// in is the same of another sandbox.
func (g dockerGuest) in(id string) dockerGuest {
	g.id = id
	g.agent = arcboxv1connect.NewAgentServiceClient(http.DefaultClient, "http://"+g.d.TCP+"/sandboxes/"+id)
	return g
}

// sh runs a script in the guest, which must end well.
func (g dockerGuest) sh(script string) string {
	g.t.Helper()
	return g.d.Hutch("exec", g.id, "--", "sh", "-ec", script)
}

func (g dockerGuest) ensure(ctx context.Context, start bool) (*arcboxv1.RuntimeEnsureResponse, error) {
	r, err := g.agent.EnsureRuntime(ctx, connect.NewRequest(&arcboxv1.RuntimeEnsureRequest{StartIfNeeded: start}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// await asks for the runtime until ok says that its answer will do, seldom
// enough that an emulated guest gets on with its own work.
func (g dockerGuest) await(ok func(*arcboxv1.RuntimeEnsureResponse) bool) {
	g.t.Helper()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for ctx := testenv.Context(g.t); ; {
		e, err := g.ensure(ctx, true)
		if err == nil && ok(e) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			g.t.Fatalf("it stays %v, %v", e, err)
		}
	}
}

func (g dockerGuest) status() *arcboxv1.RuntimeStatusResponse {
	g.t.Helper()
	r, err := g.agent.GetRuntimeStatus(testenv.Context(g.t), connect.NewRequest(&arcboxv1.RuntimeStatusRequest{}))
	if err != nil {
		g.t.Fatal(err)
	}
	return r.Msg
}

// pids returns the pids of programs in the guest, which must run.
func (g dockerGuest) pids(programs string) string {
	g.t.Helper()
	return g.sh("for p in " + programs + "; do pidof $p; done")
}

// service returns one service of a status.
func (g dockerGuest) service(name string) *arcboxv1.ServiceStatus {
	g.t.Helper()
	for _, s := range g.status().GetServices() {
		if s.GetName() == name {
			return s
		}
	}
	g.t.Fatalf("no service %s", name)
	return nil
}

// TestDockerInAGuest starts Docker in one sandbox that has no network, by its
// agent's API, and has everything happen to it.
func TestDockerInAGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a Docker; -short")
	}
	d := harness.Start(t, harness.Options{TCP: true})
	buildTemplate(t, d, "docker")
	g := dockerGuest{t: t, d: d}.in(d.Create("--network", "none", "--vcpus", "2", "-m", "1024", "docker"))
	for _, part := range []struct {
		name string
		do   func(dockerGuest)
	}{
		{"who looks starts nothing", dockerGuest.looks},
		{"many ask at once", dockerGuest.startsOnce},
		{"a container", dockerGuest.runsAContainer},
		{"logs", dockerGuest.followsLogs},
		{"a container takes all memory", dockerGuest.survivesABomb},
		{"both are killed at work", dockerGuest.survivesBoth},
		{"the agent is killed", dockerGuest.survivesItsAgent},
		{"a copy", dockerGuest.goesOnInACopy},
		{"the end", dockerGuest.endsInOrder},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.do(g.on(t)) }) {
			break // all that follows needs it
		}
	}
}

func (g dockerGuest) looks() {
	e, err := g.ensure(testenv.Context(g.t), false)
	if err != nil || e.GetReady() || e.GetStatus() != "failed" || e.GetMessage() != "dockerd does not run: docker socket missing: /run/docker.sock" {
		g.t.Errorf("it says %v, %v", e, err)
	}
	if s := g.status(); s.GetDockerReady() || s.GetContainerdReady() || len(s.GetServices()) != 3 || s.GetServices()[2].GetStatus() != "ready" {
		g.t.Errorf("status %v", s)
	}
	g.sh("! pidof containerd && ! pidof dockerd")
}

// startsOnce has fifty callers ask at once until Docker is there.
func (g dockerGuest) startsOnce() {
	ctx := testenv.Context(g.t)
	var mu sync.Mutex
	count := map[string]int{}
	var slowest time.Duration
	var callers sync.WaitGroup
	for range 50 {
		callers.Go(func() {
			began := time.Now()
			e, err := g.ensure(ctx, true)
			mu.Lock()
			defer mu.Unlock()
			slowest = max(slowest, time.Since(began))
			if err != nil || e.GetReady() {
				g.t.Errorf("ensure: %v, %v", e, err)
			}
			count[e.GetStatus()]++
		})
	}
	callers.Wait()
	g.t.Logf("50 answers within %v", slowest)
	if count["starting"] != 50 {
		g.t.Errorf("statuses %v", count)
	}
	began := time.Now()
	g.await(func(e *arcboxv1.RuntimeEnsureResponse) bool {
		if e.GetStatus() != "starting" && e.GetStatus() != "started" {
			g.t.Errorf("meanwhile it says %v", e)
		}
		return e.GetReady()
	})
	g.t.Logf("ready after %v", time.Since(began))
	if e, err := g.ensure(ctx, true); err != nil || e.GetStatus() != "reused" || e.GetEndpoint() != "unix:///run/docker.sock" {
		g.t.Errorf("the second hears %v, %v", e, err)
	}
	if n := len(strings.Fields(g.pids("containerd dockerd"))); n != 2 {
		g.t.Errorf("%d daemons run", n)
	}
	for name, want := range map[string]string{"containerd": "0::/hutch-services/containerd", "dockerd": "0::/hutch-services/dockerd"} {
		if got := g.sh("p=$(pidof " + name + "); cat /proc/$p/cgroup /proc/$p/oom_score_adj /sys/fs/cgroup/hutch-services/" + name + "/memory.min"); !strings.HasPrefix(got, want+"\n-500\n") || strings.HasSuffix(got, "\n0") {
			g.t.Errorf("%s is in %q", name, got)
		}
	}
}

// runsAContainer starts a container that all that follows looks at.
func (g dockerGuest) runsAContainer() {
	program := buildInside(g.t)
	putInside(g.t, g.d, g.id, program)
	g.sh(`tar -C /bin -c inside | docker import -c 'ENTRYPOINT ["/inside"]' - inside:1
		docker run -d --name box -p 127.0.0.1:7002:9002 -p 7001:9001/udp inside:1 linger`)
	// Published ports are for the guest's loopback, where the agent connects.
	harness.Eventually(g.t, time.Minute, func() error {
		if r := g.d.Try("exec", g.id, "--", "inside", "ask", "tcp", "127.0.0.1:7002"); r.Stdout != "farewell\n" {
			return fmt.Errorf("it says %+v", r)
		}
		return nil
	})
	if got := g.sh("inside ask udp 127.0.0.1:7001"); got != "?" {
		g.t.Errorf("UDP says %q", got)
	}
	if got := g.sh("p=$(docker inspect -f '{{.State.Pid}}' box); cat /proc/$p/cgroup /proc/$p/oom_score_adj"); !strings.HasPrefix(got, "0::/docker/") || !strings.HasSuffix(got, "\n0") {
		g.t.Errorf("the container is in %q", got)
	}
}

func (g dockerGuest) box() string {
	return g.sh("docker inspect -f '{{.State.Pid}} {{.State.StartedAt}}' box")
}

func (g dockerGuest) followsLogs() {
	follow := func(service string) (string, error) {
		s, err := g.agent.FollowServiceLog(testenv.Context(g.t), connect.NewRequest(&arcboxv1.FollowServiceLogRequest{Service: service}))
		if err != nil {
			return "", err
		}
		defer s.Close()
		var text strings.Builder
		for s.Receive() {
			text.Write(s.Msg().GetData())
		}
		return text.String(), s.Err()
	}
	if text, err := follow("dockerd"); err != nil || !strings.Contains(text, "API listen on /run/docker.sock") {
		g.t.Errorf("dockerd wrote %q, %v", text, err)
	}
	if _, err := follow("runc"); connect.CodeOf(err) != connect.CodeNotFound {
		g.t.Errorf("runc has a log: %v", err)
	}
}

// survives kills a daemon, and finds it back and the container untouched.
// survivesABomb: a container that takes more memory than there is ends by that,
// and nothing else does.
func (g dockerGuest) survivesABomb() {
	was, box := g.pids("containerd dockerd hutch-agent"), g.box()
	if got := g.sh("docker run --rm inside:1 hold 3000 1 >/dev/null 2>&1 || echo $?"); got != "137" {
		g.t.Errorf("the container ended with %q", got)
	}
	if now := g.pids("containerd dockerd hutch-agent"); now != was {
		g.t.Errorf("the daemons were %q and are %q", was, now)
	}
	if now := g.box(); now != box {
		g.t.Errorf("the other container was %s and is %s", box, now)
	}
	if e, err := g.ensure(testenv.Context(g.t), true); err != nil || !e.GetReady() || e.GetStatus() != "reused" {
		g.t.Errorf("afterwards it says %v, %v", e, err)
	}
}

// works has containers come and go in the guest until the returned function is
// called, which waits for one more that works.
func (g dockerGuest) works() (rest func()) {
	g.t.Helper()
	g.sh(`rm -f /tmp/work.*; touch /tmp/work
		for i in 1 2; do setsid sh -c "while [ -e /tmp/work ]; do docker run --rm inside:1 cat /etc/hostname >> /tmp/work.$i; done" >/dev/null 2>&1 & done`)
	done := func(more int) int {
		n := 0
		harness.Eventually(g.t, 3*time.Minute, func() (err error) {
			if n, err = strconv.Atoi(g.sh("cat /tmp/work.* | wc -l")); err == nil && n < more {
				err = fmt.Errorf("%d containers have run, want %d", n, more)
			}
			return err
		})
		return n
	}
	done(1)
	return func() {
		g.t.Helper()
		done(done(0) + 1)
		g.sh("rm /tmp/work")
		harness.Eventually(g.t, 3*time.Minute, func() error {
			if left := g.sh("docker ps --format '{{.Names}}'; pgrep -f '/tmp/[w]ork' || true"); left != "box" {
				return fmt.Errorf("still there: %q", left)
			}
			return nil
		})
	}
}

// survivesBoth: the daemons are killed while containers come and go. Others run
// as soon as they are back.
func (g dockerGuest) survivesBoth() {
	rest := g.works()
	g.survives("dockerd")
	g.survives("containerd")
	rest()
}

// survives: a daemon is killed, and the container that was there is not touched.
func (g dockerGuest) survives(name string) {
	was := g.box()
	old := g.sh("p=$(pidof " + name + "); kill -9 $p; while [ -e /proc/$p ]; do :; done; echo $p")
	g.await(func(e *arcboxv1.RuntimeEnsureResponse) bool {
		if e.GetStatus() != "starting" && e.GetStatus() != "reused" {
			g.t.Errorf("meanwhile it says %v", e)
		}
		if !e.GetReady() {
			return false
		}
		s := g.status()
		return s.GetContainerdReady() && s.GetDockerReady()
	})
	s := g.service(name)
	if s.GetCrashes() != 1 || !strings.Contains(s.GetDetail(), "killed by signal SIGKILL") {
		g.t.Errorf("%s says %v", name, s)
	}
	if now := g.pids(name); now == old {
		g.t.Errorf("%s still is %s", name, now)
	}
	if got := g.sh("docker exec box /inside ask tcp 127.0.0.1:9002"); got != "farewell" {
		g.t.Errorf("the container says %q", got)
	}
	if now := g.box(); now != was {
		g.t.Errorf("the container was %s and is %s", was, now)
	}
}

func (g dockerGuest) survivesItsAgent() {
	was, box := g.pids("containerd dockerd"), g.box()
	// The command goes with the agent that runs it.
	g.d.Try("exec", g.id, "--", "sh", "-c", `for p in /proc/[0-9]*; do read name < $p/comm; [ $name = hutch-agent ] && [ $p != /proc/1 ] && kill -9 ${p#/proc/}; done`)
	harness.Eventually(g.t, time.Minute, func() error {
		e, err := g.ensure(testenv.Context(g.t), true)
		if err == nil && (!e.GetReady() || e.GetStatus() != "reused") {
			g.t.Errorf("the next agent says %v", e)
		}
		return err
	})
	if now := g.pids("containerd dockerd"); now != was {
		g.t.Errorf("the daemons were %q and are %q", was, now)
	}
	if now := g.box(); now != box {
		g.t.Errorf("the container was %s and is %s", box, now)
	}
}

// goesOnInACopy forks the sandbox, and finds all of it in the copy.
func (g dockerGuest) goesOnInACopy() {
	was, box := g.pids("containerd dockerd"), g.box()
	fork := g.in(strings.TrimSpace(g.d.Hutch("fork", g.id)))
	for _, g := range []dockerGuest{fork, g} {
		if e, err := g.ensure(testenv.Context(g.t), true); err != nil || e.GetStatus() != "reused" {
			g.t.Errorf("%s says %v, %v", g.id, e, err)
		}
		if now, nowBox := g.pids("containerd dockerd"), g.box(); now != was || nowBox != box {
			g.t.Errorf("%s has %q, %q; the original had %q, %q", g.id, now, nowBox, was, box)
		}
		if got := g.sh("docker run --rm inside:1 ask udp 172.17.0.2:9001"); got != "?" {
			g.t.Errorf("%s: a second container hears %q", g.id, got)
		}
	}
	g.d.Hutch("rm", fork.id)
}

// endsInOrder shuts the machine down, and looks at what is left of it.
func (g dockerGuest) endsInOrder() {
	r, err := g.agent.Shutdown(testenv.Context(g.t), connect.NewRequest(&arcboxv1.ShutdownRequest{TimeoutSeconds: 120}))
	if err != nil || !r.Msg.GetAccepted() {
		g.t.Fatalf("shutdown: %v, %v", r, err)
	}
	harness.Eventually(g.t, 3*time.Minute, func() error {
		if is := inspect(g.t, g.d, g.id).Info.Status; is != "stopped" {
			return fmt.Errorf("it is %s", is)
		}
		return nil
	})
	console, err := os.ReadFile(filepath.Join(g.d.Root, "sandboxes", g.id, "console.log"))
	if err != nil {
		g.t.Fatal(err)
	}
	rest := string(console)
	for _, stage := range []string{
		`msg="shutting down"`, `msg="stopping service" service=dockerd`, `msg="service stopped" service=dockerd`,
		`msg="stopping service" service=containerd`, `msg="service stopped" service=containerd`, `msg="stopping programs"`, `msg="powering off"`,
	} {
		_, after, found := strings.Cut(rest, stage)
		if !found {
			g.t.Fatalf("the console does not tell of %s in its place:\n%s", stage, console)
		}
		rest = after
	}
	if why := diskFaults(g.t, g.d, g.id); why != "" {
		g.t.Errorf("the disk: %s", why)
	}
	g.d.Hutch("resume", g.id)
	// What Docker wrote down of the container when it ended it, without Docker.
	if got := g.sh(`cd /var/lib/docker/containers/*; cat *-json.log`); !strings.Contains(got, "ended in order") {
		g.t.Errorf("the container wrote %s", got)
	}
	if got := g.sh(`cd /var/lib/docker/containers/*; cat config.v2.json`); !strings.Contains(got, `"Running":false`) || !strings.Contains(got, `"ExitCode":0`) {
		g.t.Errorf("the container's state: %s", got)
	}
}
