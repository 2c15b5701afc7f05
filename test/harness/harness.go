// Package harness runs the real hutchd for tests: in a root and a run
// directory of its own, stopped or killed at will, and checked for leaks at the
// end.
//
// It owns the directories, the daemon process and what is kept of a failed
// test. It knows the programs in bin/ and nothing of their insides. Its users
// are the packages below test/.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// readyTimeout bounds the start of a daemon.
const readyTimeout = 60 * time.Second

// commandTimeout bounds one hutch command.
const commandTimeout = 5 * time.Minute

// Options say how a daemon runs. The zero value is a daemon on a unix socket.
type Options struct {
	// TCP also serves on a free port of the loopback.
	TCP bool
	// Args are more arguments for hutchd.
	Args []string
	// Config is the content of a configuration file.
	Config string
	// AutoWarm lets shapes become warm by themselves, which takes the processors
	// from the test at a time of its own.
	AutoWarm bool
	// Disk is a directory on another disk, for the root to be on; empty: beside
	// everything else.
	Disk string
	// Netns is the path of the network namespace that hutchd takes for its
	// host's; empty: the test's own.
	Netns string
}

// Daemon is one hutchd with its directories. It is used by one test.
type Daemon struct {
	T      testing.TB
	Dir    string // holds root and run
	Root   string
	RunDir string
	Socket string
	TCP    string // "127.0.0.1:port", empty without Options.TCP

	options Options
	log     *os.File
	cmd     *exec.Cmd
	exited  chan struct{}
	once    sync.Once
}

// Repo returns the top of the source tree.
func Repo(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == "/" {
			t.Fatal("not inside the source tree")
		}
		dir = filepath.Dir(dir)
	}
}

// Bin returns the path of one of the programs that make build makes.
func Bin(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(Repo(t), "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	return path
}

// prepared returns the root that "hutchd setup" has prepared for tests.
func prepared(t testing.TB) string {
	t.Helper()
	root := os.Getenv("HUTCH_TEST_ROOT")
	if root == "" {
		root = filepath.Join(Repo(t), ".cache/root")
	}
	if _, err := os.Stat(filepath.Join(root, "kernels/current")); err != nil {
		t.Fatalf("%v: prepare it with bin/hutchd setup --root %s", err, root)
	}
	return root
}

// Start starts a daemon in directories of its own, with the templates and the
// kernel pack of the prepared root. At the end of the test every sandbox is
// destroyed, the daemon stopped, and the host checked for leaks.
func Start(t testing.TB, o Options) *Daemon {
	t.Helper()
	testenv.RequireVM(t)
	dir, err := os.MkdirTemp("", "hutch-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{T: t, Dir: dir, Root: filepath.Join(dir, "root"), RunDir: filepath.Join(dir, "run"), options: o}
	if o.Disk != "" {
		d.Root = filepath.Join(o.Disk, "root")
	}
	d.Socket = filepath.Join(d.RunDir, "hutchd.sock")
	t.Cleanup(d.removeDir)
	d.checkLeaks()
	d.linkRoot(prepared(t))
	if o.TCP {
		d.TCP = FreePort(t)
	}
	if d.log, err = os.Create(filepath.Join(dir, "hutchd.log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.log.Close() })
	d.Up()
	t.Cleanup(d.end)
	return d
}

// checkLeaks compares the host before and after the test, as far as it belongs
// to this daemon.
func (d *Daemon) checkLeaks() {
	testenv.CheckHost(d.T, testenv.Scope{
		Programs: []string{"qemu-system", "hutchd"}, ProgramsWith: d.Dir,
		Mounts: []string{d.Dir},
		// The root's own directories stay; what sandboxes leave does not.
		Dirs: []string{
			filepath.Join(d.Root, "sandboxes"), filepath.Join(d.Root, "trash"),
			filepath.Join(d.RunDir, "sandboxes"), filepath.Join(d.RunDir, "netns"),
		},
	})
}

// linkRoot makes the daemon's root with hard links to what is prepared: images
// and packs never change once they are there. To another disk, which may be
// small, the default template alone is copied.
func (d *Daemon) linkRoot(from string) {
	d.T.Helper()
	how, names := "-al", []string{"kernels", "images", "templates"}
	if d.options.Disk != "" {
		how, names = "-a", []string{"kernels", "templates/" + sandbox.DefaultTemplate, "images/" + d.defaultImage(from)}
	}
	for _, name := range names {
		to := filepath.Join(d.Root, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o711); err != nil {
			d.T.Fatal(err)
		}
		if out, err := exec.Command("cp", how, filepath.Join(from, name), to).CombinedOutput(); err != nil {
			d.T.Fatalf("link the prepared root: %v: %s", err, out)
		}
	}
}

// defaultImage returns the name of the default template's image in a root.
func (d *Daemon) defaultImage(root string) string {
	d.T.Helper()
	var t struct {
		ImageDigest string `json:"image_digest"`
	}
	b, err := os.ReadFile(filepath.Join(root, "templates", sandbox.DefaultTemplate, "template.json"))
	if err == nil {
		err = json.Unmarshal(b, &t)
	}
	if err != nil {
		d.T.Fatal(err)
	}
	return strings.TrimPrefix(t.ImageDigest, "sha256:")
}

// FreePort returns an address on the loopback that was free just now.
func FreePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Up starts the daemon, which must not be running, and returns when it serves.
func (d *Daemon) Up() {
	d.T.Helper()
	ready, address := d.notifySocket()
	defer ready.Close()
	args := []string{"--root", d.Root, "--run-dir", d.RunDir, "--listen", "unix:" + d.Socket, "--log-level", "debug"}
	if d.TCP != "" {
		args = append(args, "--listen", "tcp:"+d.TCP)
	}
	file := filepath.Join(d.Dir, "hutchd.toml")
	config := fmt.Sprintf("%s\n[warm]\nauto = %v\n", d.options.Config, d.options.AutoWarm)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		d.T.Fatal(err)
	}
	args = append(args, "--config", file)
	args = append([]string{Bin(d.T, "hutchd")}, append(args, d.options.Args...)...)
	if d.options.Netns != "" {
		args = append([]string{"nsenter", "--net=" + d.options.Netns}, args...)
	}
	d.cmd = exec.Command(args[0], args[1:]...)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+address)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		d.T.Fatal(err)
	}
	exited := make(chan struct{})
	d.exited = exited
	go func() { d.cmd.Wait(); close(exited); ready.SetReadDeadline(time.Now()) }()
	if err := awaitReady(ready); err != nil {
		d.T.Fatalf("hutchd did not come up: %v\n%s", err, d.Log())
	}
}

// notifySocket makes what systemd gives a service to say that it is ready.
func (d *Daemon) notifySocket() (*net.UnixConn, string) {
	d.T.Helper()
	path := filepath.Join(d.Dir, "notify.sock")
	os.Remove(path)
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		d.T.Fatal(err)
	}
	return c, path
}

func awaitReady(c *net.UnixConn) error {
	c.SetReadDeadline(time.Now().Add(readyTimeout))
	buf := make([]byte, 512)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		if strings.Contains(string(buf[:n]), "READY=1") {
			return nil
		}
	}
}

// PID returns the daemon's process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Signal sends a signal to the daemon.
func (d *Daemon) Signal(s os.Signal) {
	d.T.Helper()
	if err := d.cmd.Process.Signal(s); err != nil {
		d.T.Fatalf("signal hutchd: %v", err)
	}
}

// Down ends the daemon with a signal and waits until it is gone.
func (d *Daemon) Down(s os.Signal) {
	d.T.Helper()
	d.Signal(s)
	select {
	case <-d.exited:
	case <-time.After(2 * time.Minute):
		d.cmd.Process.Signal(syscall.SIGQUIT)
		<-d.exited
		d.T.Fatalf("hutchd did not end after %s\n%s", s, d.Log())
	}
}

// Running reports whether the daemon runs.
func (d *Daemon) Running() bool {
	select {
	case <-d.exited:
		return false
	default:
		return true
	}
}

// Log returns the end of what the daemon logged.
func (d *Daemon) Log() string {
	b, err := os.ReadFile(d.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-16<<10):])
}

// Result is how one command line ended.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// Command returns the hutch command line args, ready to run against the
// daemon.
func (d *Daemon) Command(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, Bin(d.T, "hutch"), args...)
	c.Env = append(os.Environ(), "HUTCH_HOST=unix://"+d.Socket, "NO_COLOR=1")
	return c
}

// Try runs a hutch command and returns how it ended.
func (d *Daemon) Try(args ...string) Result {
	d.T.Helper()
	// Not the test's own context: that one is over when the cleanup runs.
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	c := d.Command(ctx, args...)
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.T.Fatalf("hutch %s: %v", strings.Join(args, " "), err)
	}
	return Result{out.String(), errOut.String(), c.ProcessState.ExitCode()}
}

// Hutch runs a hutch command that must succeed, and returns what it printed
// without the last line's end.
func (d *Daemon) Hutch(args ...string) string {
	d.T.Helper()
	r := d.Try(args...)
	if r.Code != 0 {
		d.T.Fatalf("hutch %s: exit %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSuffix(r.Stdout, "\n")
}

// Create makes a sandbox and returns its id.
func (d *Daemon) Create(args ...string) string {
	d.T.Helper()
	return d.Hutch(append([]string{"create"}, args...)...)
}

// end destroys what the test left, stops the daemon, and tells what it said
// when the test failed.
func (d *Daemon) end() {
	if d.T.Failed() {
		d.keep()
	}
	if !d.Running() {
		d.Up()
	}
	if r := d.Try("rm", "--all"); r.Code != 0 {
		d.T.Errorf("destroy what is left: %s", r.Stderr)
	}
	d.Down(syscall.SIGTERM)
}

// keep copies what explains a failure to where CI looks, and logs the end of
// the daemon's log.
func (d *Daemon) keep() {
	d.T.Logf("hutchd said at its end:\n%s", d.Log())
	keep := filepath.Join(os.TempDir(), "hutch-failed", strings.ReplaceAll(d.T.Name(), "/", "_"))
	if err := os.MkdirAll(keep, 0o755); err != nil {
		d.T.Log(err)
		return
	}
	files, _ := filepath.Glob(filepath.Join(d.Root, "sandboxes/*/*"))
	for _, f := range append(files, d.log.Name()) {
		name := filepath.Base(filepath.Dir(f)) + "-" + filepath.Base(f)
		if strings.HasSuffix(f, ".img") {
			continue
		}
		if out, err := exec.Command("cp", f, filepath.Join(keep, name)).CombinedOutput(); err != nil {
			d.T.Logf("keep %s: %v: %s", f, err, out)
			continue
		}
		if strings.HasSuffix(f, "console.log") {
			b, _ := os.ReadFile(f)
			d.T.Logf("%s ends:\n%s", name, b[max(0, len(b)-4<<10):])
		}
	}
	d.T.Logf("kept in %s", keep)
}

func (d *Daemon) removeDir() {
	d.once.Do(func() {
		if err := os.RemoveAll(d.Dir); err != nil {
			d.T.Errorf("remove %s: %v", d.Dir, err)
		}
	})
}

// Eventually waits until check returns nil, looking again every 50 ms, and
// fails the test with its last error when limit is over.
func Eventually(t testing.TB, limit time.Duration, check func() error) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); ; <-tick.C {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(fmt.Errorf("not within %s: %w", limit, err))
		}
	}
}
