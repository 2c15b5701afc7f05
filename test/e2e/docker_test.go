package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// dockerHost is a sandbox whose Docker a stock client on the host talks to.
type dockerHost struct {
	t      *testing.T
	d      *harness.Daemon
	id     string
	client string
	env    []string // of the client
	plain  bool     // it is not told where the daemon is
}

func (h dockerHost) address() string {
	return "unix://" + filepath.Join(h.d.RunDir, "sandboxes", h.id, "docker.sock")
}

// command is a command line of the client.
func (h dockerHost) command(ctx context.Context, args ...string) *exec.Cmd {
	if !h.plain {
		args = append([]string{"-H", h.address()}, args...)
	}
	c := exec.CommandContext(ctx, h.client, args...)
	c.Env = slices.Concat(os.Environ(), []string{"DOCKER_CONFIG=" + filepath.Join(h.d.Dir, "docker"), "DOCKER_BUILDKIT=0"}, h.env)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	return c
}

// try runs the client.
func (h dockerHost) try(in io.Reader, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	c := h.command(ctx, args...)
	var out, said bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = in, &out, &said
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return strings.TrimSuffix(out.String(), "\n"), nil
}

// docker runs the client, which must succeed.
func (h dockerHost) docker(args ...string) string {
	h.t.Helper()
	out, err := h.try(nil, args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// TestDocker drives the Docker of a sandbox as if it were the host's own.
func TestDocker(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a Docker; -short")
	}
	program := buildInside(t)
	app := programImage(t, "app:1", program)
	d := harness.Start(t, harness.Options{TCP: true})
	buildTemplate(t, d, "docker")
	h := dockerHost{t: t, d: d, client: harness.DockerClient(t)}
	h.id = d.Create("docker", "--auto-resume")
	stage := stopwatch(t)
	if got := h.docker("ps", "-q"); got != "" {
		t.Errorf("containers %q in a new sandbox", got)
	}
	stage("first docker ps, cold")
	if got := h.docker("load", "-i", app); !strings.Contains(got, "app:1") {
		t.Errorf("loaded %q", got)
	}
	stage("load")
	for _, part := range []struct {
		name string
		do   func(*testing.T, dockerHost)
	}{
		{"ports", publishes}, {"exec, logs and cp", talksToContainers}, {"build", buildsImages}, {"compose", composes},
		{"standard input", keepsHalfCloses}, {"trim", givesDiskBack}, {"context", hasAContext}, {"sleep", wakesUp},
	} {
		t.Run(part.name, func(t *testing.T) {
			h.t = t
			part.do(t, h)
		})
		stage(part.name)
	}
	d.Hutch("rm", h.id)
	h.t = t
	copiesOfDocker(t, h)
	stage("warm")
}

// stopwatch logs how long stages took, for people: nothing depends on it.
func stopwatch(t *testing.T) func(stage string) {
	last := time.Now()
	return func(stage string) {
		t.Helper()
		t.Logf("%s took %s", stage, time.Since(last).Round(10*time.Millisecond))
		last = time.Now()
	}
}

// buildTemplate builds a recipe unless the prepared root has it.
func buildTemplate(t *testing.T, d *harness.Daemon, name string) {
	t.Helper()
	if !slices.Contains(strings.Fields(d.Hutch("template", "ls", "-q")), name) {
		d.Hutch("template", "build", name)
	}
}

// publishes runs a server, and asks it through the host's loopback.
func publishes(t *testing.T, h dockerHost) {
	port := strings.TrimPrefix(harness.FreePort(t), "127.0.0.1:")
	h.docker("run", "-d", "--name", "site", "-p", port+":80", "app:1", "site", "80", "hello from a container")
	harness.Eventually(t, time.Minute, func() error { return wantPage(port, "hello from a container\n") })
	if got := h.docker("port", "site", "80"); !strings.Contains(got, ":"+port) {
		t.Errorf("docker says it is published at %q", got)
	}
	if out, err := h.try(nil, "run", "--rm", "-p", port+":80", "app:1", "site", "80", "twice"); err == nil {
		t.Errorf("one port was published twice: %s", out)
	}
	h.docker("rm", "-f", "site")
	harness.Eventually(t, time.Minute, func() error {
		res, err := http.Get("http://127.0.0.1:" + port + "/")
		if err == nil {
			res.Body.Close()
			return fmt.Errorf("port %s still answers: %s", port, res.Status)
		}
		return nil
	})
}

// talksToContainers runs programs in a container, follows its log, and copies
// files in and out.
func talksToContainers(t *testing.T, h dockerHost) {
	h.docker("run", "-d", "--name", "counter", "app:1", "count")
	defer h.docker("rm", "-f", "counter")
	follow, cancel := context.WithCancel(testenv.Context(t))
	defer cancel()
	c := h.command(follow, "logs", "-f", "counter")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("line 1\nline 2\nline 3\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "line 1\nline 2\nline 3\n" {
		t.Errorf("followed %q, %v", line, err)
	}
	cancel()
	_ = c.Wait() // killed
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("some text"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.docker("cp", text, "counter:/text")
	if got := h.docker("exec", "counter", "/inside", "cat", "/text"); got != "some text" {
		t.Errorf("exec said %q", got)
	}
	h.docker("cp", "counter:/text", text+".back")
	if b, err := os.ReadFile(text + ".back"); err != nil || string(b) != "some text" {
		t.Errorf("copied back %q, %v", b, err)
	}
	if out, err := h.try(nil, "exec", "counter", "/inside", "cat", "/not-there"); err == nil || !strings.Contains(err.Error(), "/not-there") {
		t.Errorf("a program that failed: %q, %v", out, err)
	}
}

// buildsImages builds an image with the builder of the daemon, and with BuildKit,
// which opens a session of its own over the socket, as buildx does.
func buildsImages(t *testing.T, h dockerHost) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"Dockerfile": "FROM app:1\nCOPY greeting /\nRUN [\"/inside\", \"cat\", \"/greeting\"]\nCMD [\"cat\", \"/greeting\"]\n",
		"greeting":   "built in a sandbox",
		"Scratch":    "FROM scratch\nCOPY greeting /\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.docker("build", "-q", "-t", "scratched", "-f", filepath.Join(dir, "Scratch"), dir)
	for _, builder := range []string{"DOCKER_BUILDKIT=0", "DOCKER_BUILDKIT=1"} {
		h.env = []string{builder}
		h.docker("build", "-t", "built", "--no-cache", dir)
		if got := h.docker("run", "--rm", "built"); got != "built in a sandbox" {
			t.Errorf("with %s it says %q", builder, got)
		}
	}
}

// composition is what compose brings up.
const composition = `
version: "3"
services:
  site:
    image: app:1
    command: ["site", "80", "hello from compose"]
    ports: ["127.0.0.1:PORT:80"]
  asker:
    image: app:1
    command: ["count"]
    depends_on: [site]
`

// composes brings two containers up with Debian's compose, which talk by name.
func composes(t *testing.T, h dockerHost) {
	port := strings.TrimPrefix(harness.FreePort(t), "127.0.0.1:")
	file := filepath.Join(t.TempDir(), "compose.yml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(composition, "PORT", port)), 0o600); err != nil {
		t.Fatal(err)
	}
	args, env := harness.DockerCompose(t)
	compose := func(more ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		line := slices.Concat(args, []string{"-H", h.address(), "-f", file, "-p", "pair"}, more)
		c := exec.CommandContext(ctx, line[0], line[1:]...)
		c.Env = slices.Concat(os.Environ(), env, []string{"COMPOSE_HTTP_TIMEOUT=240"})
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("docker-compose %s: %v\n%s", strings.Join(more, " "), err, out)
		}
		return string(out)
	}
	compose("up", "-d")
	harness.Eventually(t, time.Minute, func() error { return wantPage(port, "hello from compose\n") })
	if got := h.docker("exec", "pair_asker_1", "/inside", "lookup", "site"); !strings.HasPrefix(got, "172.") {
		t.Errorf("by name it is at %q", got)
	}
	if got := compose("ps"); !strings.Contains(got, "pair_site_1") || !strings.Contains(got, ":"+port+"->80/tcp") {
		t.Errorf("compose lists\n%s", got)
	}
	compose("down", "-t", "1")
	if got := h.docker("ps", "-aq"); got != "" {
		t.Errorf("compose left %s", got)
	}
}

// wantPage wants a server on the host's loopback to say something.
func wantPage(port, want string) error {
	res, err := http.Get("http://127.0.0.1:" + port + "/")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(res.Body); err != nil || string(b) != want {
		return fmt.Errorf("it says %q, %w", b, err)
	}
	return nil
}

// keepsHalfCloses ends standard input again and again, which must get through
// as that and nothing else, and sends much at once.
func keepsHalfCloses(t *testing.T, h dockerHost) {
	rounds, size := 3, int64(32<<20)
	if testenv.Soak() {
		rounds, size = 1000, 1<<30
	}
	for i := range rounds {
		want := fmt.Sprintf("round %d", i)
		if got, err := h.try(strings.NewReader(want), "run", "--rm", "-i", "app:1", "cat"); err != nil || got != want {
			t.Fatalf("round %d: %q, %v", i, got, err)
		}
	}
	h.docker("run", "-d", "--name", "reader", "app:1", "count")
	defer h.docker("rm", "-f", "reader")
	for i := range 4 * rounds {
		want := fmt.Sprintf("exec %d", i)
		if got, err := h.try(strings.NewReader(want), "exec", "-i", "reader", "/inside", "cat"); err != nil || got != want {
			t.Fatalf("exec %d: %q, %v", i, got, err)
		}
	}
	sum := sha256.New()
	got, err := h.try(io.TeeReader(io.LimitReader(rand.Reader, size), sum), "exec", "-i", "reader", "/inside", "digest")
	if want := hex.EncodeToString(sum.Sum(nil)); err != nil || got != want {
		t.Errorf("of %d bytes: %q, %v, want %s", size, got, err, want)
	}
}

// givesDiskBack deletes much in the guest and looks at the host's file.
func givesDiskBack(t *testing.T, h dockerHost) {
	const size = 256 << 20
	disk := filepath.Join(h.d.Root, "sandboxes", h.id, "data.img")
	h.d.Hutch("exec", "--timeout", "4m", h.id, "--", "sh", "-ec", "dd if=/dev/urandom of=/var/lib/docker/much bs=1M count=256 2>/dev/null; sync")
	before := allocated(t, disk)
	h.d.Hutch("exec", "--timeout", "1m", h.id, "--", "sh", "-ec", "rm /var/lib/docker/much; sync")
	res, err := http.Post("http://"+h.d.TCP+"/sandboxes/"+h.id+"/arcbox.v1.AgentService/DiskTrim", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK || !bytes.Contains(b, []byte("bytesTrimmed")) {
		t.Errorf("trim: %s, %s, %v", res.Status, b, err)
	}
	if after := allocated(t, disk); before-after < size*9/10 {
		t.Errorf("the host's file has %d bytes, before it had %d, and %d were deleted", after, before, size)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// hasAContext uses the Docker by name, as the client's contexts have it.
func hasAContext(t *testing.T, h dockerHost) {
	t.Setenv("DOCKER_CONFIG", filepath.Join(h.d.Dir, "docker"))
	t.Setenv("PATH", filepath.Dir(h.client)+":"+os.Getenv("PATH"))
	h.d.Hutch("docker", "context", h.id)
	h.plain = true
	if got := h.docker("context", "inspect", "--format", "{{.Name}}"); got != "default" {
		t.Errorf("the context was switched to %s", got)
	}
	name := "hutch-" + h.id
	if got := h.docker("--context", name, "images", "-q", "app:1"); got == "" {
		t.Error("by its context it has no image")
	}
	h.d.Hutch("docker", "context", "--use", h.id)
	if got := h.docker("context", "inspect", "--format", "{{.Name}}"); got != name {
		t.Errorf("asked to be switched, the context is %s", got)
	}
	if got := h.docker("images", "-q", "app:1"); got == "" {
		t.Error("by the current context it has no image")
	}
}

// wakesUp: a request to the Docker of a sandbox that sleeps is a use of it.
func wakesUp(t *testing.T, h dockerHost) {
	h.docker("run", "-d", "--name", "sleeper", "app:1", "count")
	h.d.Hutch("hibernate", h.id)
	wantStatus(t, h.d, h.id, "hibernated", "")
	if got := h.docker("ps", "--format", "{{.Names}}"); got != "sleeper" {
		t.Errorf("running after the sleep: %q", got)
	}
	wantStatus(t, h.d, h.id, "running", "")
	h.docker("rm", "-f", "sleeper")
}

// copiesOfDocker makes the template warm with Docker up, and uses a copy.
func copiesOfDocker(t *testing.T, h dockerHost) {
	snap := h.d.Hutch("template", "warm", "docker", "--ready", "docker")
	if again := h.d.Hutch("template", "warm", "docker", "--ready", "docker"); again != snap {
		t.Errorf("warm already, and made again: %s after %s", again, snap)
	}
	if list := h.d.Hutch("snapshot", "ls"); !strings.Contains(list, "docker") {
		t.Errorf("listed as\n%s", list)
	}
	pages := map[string]string{} // by port
	first := freeNumber(t)
	for i := range 2 {
		h.id = h.d.Create("docker", "--id", fmt.Sprintf("copy-%d", i))
		if r := inspect(t, h.d, h.id); r.Snapshot != snap {
			t.Errorf("%s was made from %q", h.id, r.Snapshot)
		}
		if got := h.docker("ps", "-q"); got != "" {
			t.Errorf("containers %q in a copy", got)
		}
		h.docker("load", "-i", programImage(t, "app:1", buildInside(t)))
		if got := h.docker("run", "--rm", "app:1", "cat", "/proc/sys/kernel/hostname"); got == "" {
			t.Error("a container has no name")
		}
		h.publishesAny(first, pages)
	}
	for port, text := range pages {
		harness.Eventually(t, time.Minute, func() error { return wantPage(port, text) })
	}
}

// publishesAny runs servers whose ports are left to be chosen, and notes at
// which of the host each should be found: the daemons of two sandboxes would
// choose the same, of a range that begins with first too.
func (h dockerHost) publishesAny(first int, pages map[string]string) {
	h.t.Helper()
	for name, publish := range map[string][]string{
		"any": {"-p", "80"}, "every": {"-P", "--expose", "80"}, "range": {"-p", fmt.Sprintf("%d-%d:80", first, first+4)},
	} {
		text := name + " of " + h.id
		h.docker(slices.Concat([]string{"run", "-d", "--name", name}, publish, []string{"app:1", "site", "80", text})...)
		where, _, _ := strings.Cut(h.docker("port", name, "80"), "\n")
		port := where[strings.LastIndex(where, ":")+1:]
		if other := pages[port]; other != "" {
			h.t.Errorf("%q and %q are both to be found at port %s", other, text, port)
		}
		pages[port] = text + "\n"
	}
}
