package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

const testUID = 64998

// tree is a host with something to share: srv/data of a user, srv/root of
// root, and links out of srv and into it.
func tree(t *testing.T) string {
	t.Helper()
	testenv.RequireRoot(t)
	dir := t.TempDir()
	for _, d := range []string{"srv/data/sub", "srv/root", "srv/own/x", "srv2"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"srv/out": "../srv2", "in": "srv/data", "srv/etc": "/etc"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"srv/data", "srv/data/sub", "srv2"} {
		if err := os.Chown(filepath.Join(dir, d), 64001, 64002); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newTest(t *testing.T, p Params) (*Virtiofs, Place) {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	j, err := jail.New(jail.Params{Parent: fmt.Sprintf("hutch-share-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Errorf("a cgroup is left: %v", err)
		}
	})
	p.Jail = j
	dir := t.TempDir()
	v := New(testenv.Context(t), p)
	return v, Place{ID: "sb-1", Index: 3, Dir: dir, Log: filepath.Join(dir, "log"), UID: testUID}
}

func TestOnlyWhatIsAllowedIsShared(t *testing.T) {
	dir := tree(t)
	allow := []string{filepath.Join(dir, "srv")}
	v, _ := newTest(t, Params{Allow: allow, Deny: []string{filepath.Join(dir, "srv/own"), "/etc"}})
	for _, c := range []struct {
		path string
		ro   bool
		want string // of the error; empty: none
	}{
		{"srv/data", false, ""}, {"srv/data/sub", true, ""}, {"in", false, ""}, {"in/sub/..", true, ""},
		{"srv/out", true, "srv2 is not below a directory that this host shares"},
		{"srv2", false, "is not below a directory that this host shares"},
		{"srv/data/../../srv2", false, "is not below"},
		{".", true, "belongs to the host itself"}, {"srv", true, "belongs to the host itself"}, {"srv/own/x", true, "belongs to the host itself"}, {"srv/root", false, "it belongs to root"},
		{"srv/etc", true, "belongs to the host itself"},
		{"srv/none", true, "no such file"}, {"srv/root", true, ""},
	} {
		err := v.Check([]sandbox.Share{{HostPath: filepath.Join(dir, c.path), GuestPath: "/x", ReadOnly: c.ro}})
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.path, err)
		case c.want != "" && (!fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.path, err, c.want)
		}
	}
	_, err := (&Virtiofs{}).open(sandbox.Share{HostPath: filepath.Join(dir, "srv")})
	if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "[shares] allow") {
		t.Errorf("of a host that shares nothing: %v", err)
	}
}

func TestRootsDirectoryIsNotWritten(t *testing.T) {
	dir := tree(t)
	v, _ := newTest(t, Params{Allow: []string{dir}})
	root := sandbox.Share{HostPath: filepath.Join(dir, "srv/root"), GuestPath: "/x"}
	if err := v.Check([]sandbox.Share{root}); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "chown") {
		t.Error(err)
	}
	root.ReadOnly = true
	if err := v.Check([]sandbox.Share{root}); err != nil {
		t.Error(err)
	}
}

func TestDirectoryOfAGuestsUserIsNotShared(t *testing.T) {
	dir := tree(t)
	v, _ := newTest(t, Params{Allow: []string{dir}})
	for _, owner := range [][2]int{{ownerBase, 5}, {5, ownerBase + jail.MappedIDs - 1}} {
		if err := os.Chown(filepath.Join(dir, "srv2"), owner[0], owner[1]); err != nil {
			t.Fatal(err)
		}
		err := v.Check([]sandbox.Share{{HostPath: filepath.Join(dir, "srv2"), GuestPath: "/x"}})
		if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "ids of programs in guests") {
			t.Errorf("%v: %v", owner, err)
		}
	}
}

func TestHostWithoutADaemonSaysSo(t *testing.T) {
	dir := tree(t)
	data := []sandbox.Share{{HostPath: filepath.Join(dir, "srv/data"), GuestPath: "/x"}}
	for binary, want := range map[string]string{"/usr/none": "no such file", "/usr/bin/echo": "it said", "/usr/bin/false": "exit status 1"} {
		v, at := newTest(t, Params{Binary: binary, Allow: []string{dir}})
		if err := v.Check(nil); err != nil {
			t.Errorf("nothing is shared, and %v", err)
		}
		_, _, serveErr := v.Serve(testenv.Context(t), data[0], at)
		for _, err := range []error{v.Check(data), serveErr} {
			if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", binary, err)
			}
		}
	}
}

func TestServe(t *testing.T) {
	dir := tree(t)
	v, at := newTest(t, Params{Allow: []string{dir}})
	ctx := testenv.Context(t)
	server, conn, err := v.Serve(ctx, sandbox.Share{HostPath: filepath.Join(dir, "in"), GuestPath: "/x"}, at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	features := hello(t, conn)
	if features == 0 {
		t.Error("the daemon has no features")
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", server.ID().PID), &st); err != nil || st.Uid != 64001 || st.Gid != 64002 {
		t.Errorf("it runs as %d:%d, %v", st.Uid, st.Gid, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", server.ID().PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs:\t1\n", "Seccomp:\t2\n", "CapBnd:\t0000000000000000\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", server.ID().PID))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(mounts), "\n"); n != 1 {
		t.Errorf("it sees %d mounts:\n%s", n, mounts)
	}
	if entries, err := filepath.Glob(at.Dir + "/share*"); err != nil || len(entries) != 0 {
		t.Errorf("sockets that are left: %v, %v", entries, err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	next, err := v.Adopt(ctx, server.ID(), at)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := next.Kill(ctx); err != nil {
			t.Error(err)
		}
	}
	if why := next.Why(); !strings.HasPrefix(why, "virtiofsd ended") {
		t.Errorf("why: %q", why)
	}
	if _, err := v.Adopt(ctx, server.ID(), at); !fault.Is(err, fault.NotFound) {
		t.Errorf("adopted what is gone: %v", err)
	}
}

// hello asks for the features, as the first message of a VMM does.
func hello(t *testing.T, conn *os.File) uint64 {
	t.Helper()
	c, err := net.FileConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if deadline, ok := testenv.Context(t).Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	if _, err := c.Write([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}); err != nil { // VHOST_USER_GET_FEATURES, version 1
		t.Fatal(err)
	}
	reply := make([]byte, 12+8)
	if _, err := io.ReadFull(c, reply); err != nil {
		t.Fatal(err)
	}
	var features uint64
	for i, b := range reply[12:] {
		features |= uint64(b) << (8 * i)
	}
	return features
}

func TestDaemonEndsWithItsVMM(t *testing.T) {
	dir := tree(t)
	v, at := newTest(t, Params{Allow: []string{dir}})
	ctx := testenv.Context(t)
	server, conn, err := v.Serve(ctx, sandbox.Share{HostPath: filepath.Join(dir, "srv/root"), GuestPath: "/x", ReadOnly: true}, at)
	if err != nil {
		t.Fatal(err)
	}
	hello(t, conn)
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-server.Done():
	case <-ctx.Done():
		t.Error("it lives on")
	}
	if err := server.Kill(context.WithoutCancel(ctx)); err != nil {
		t.Error(err)
	}
}

func TestFailedServeLeavesNothing(t *testing.T) {
	dir := tree(t)
	v, at := newTest(t, Params{Allow: []string{dir}})
	data := sandbox.Share{HostPath: filepath.Join(dir, "srv/data"), GuestPath: "/x"}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := v.Serve(cancelled, data, at); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	nowhere := at
	nowhere.Dir = filepath.Join(dir, "none")
	if _, _, err := v.Serve(testenv.Context(t), data, nowhere); err == nil {
		t.Error("a socket without a directory")
	}
	if entries, err := filepath.Glob(at.Dir + "/share*"); err != nil || len(entries) != 0 {
		t.Errorf("sockets that are left: %v, %v", entries, err)
	}
}

func TestArguments(t *testing.T) {
	if d := cmp.Diff([]string{"--fd=4", "--shared-dir=/share", "--sandbox=chroot"}, inRust.args(4)[:3]); d != "" {
		t.Error(d)
	}
	if got := strings.Join(inC.args(4), " "); !strings.Contains(got, "--fd=4 ") || !strings.Contains(got, "source=/share,sandbox=chroot") || !strings.Contains(got, "no_xattr") {
		t.Error(got)
	}
}

func TestJailsAreNamedAfterTheirSandbox(t *testing.T) {
	at := Place{ID: sandbox.ID(strings.Repeat("a-", 19) + "bc"), Index: 7}
	if got := Owner(at.cell()); got != at.ID || Owner("sb-1") != "sb-1" {
		t.Errorf("%s belongs to %s", at.cell(), got)
	}
}
