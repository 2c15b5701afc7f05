package kubernetes

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// inside runs f on a thread with network and mounts of its own, which end with
// it.
func inside(t *testing.T, f func() error) {
	t.Helper()
	testenv.RequireRoot(t)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread goes with its namespaces
		err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func names(all []Leftover) []string {
	var list []string
	for _, l := range all {
		list = append(list, l.What)
	}
	return list
}

func TestPrepareAndRestore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	inside(t, func() error {
		var asked []string
		s := System{Modules: func(names ...string) error { asked = names; return errors.New("no overlay") }}
		d := k3s("/k3s")
		d.Data, d.Modules, d.Sysctls = []string{dir}, []string{"overlay"}, map[string]string{"net.ipv4.conf.lo.forwarding": "1"}
		for range 2 { // the second changes nothing
			warnings, err := s.Prepare(t.Context(), d)
			if err != nil || !cmp.Equal(warnings, []string{"kernel modules: no overlay"}) || !cmp.Equal(asked, []string{"dummy", "overlay"}) {
				t.Errorf("warnings %q, modules %q, %v", warnings, asked, err)
			}
		}
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
		link, err := netlink.LinkByName(nodeLink)
		if err != nil {
			return err
		}
		addresses, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil || len(addresses) != 1 || addresses[0].IPNet.String() != "198.18.0.2/32" {
			t.Errorf("addresses %v, %v", addresses, err)
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
		if err != nil || len(routes) != 1 || routes[0].Priority != lastResort {
			t.Errorf("routes %v, %v", routes, err)
		}
		if text, err := os.ReadFile("/proc/thread-self/mountinfo"); err != nil || !strings.Contains(string(text), " shared:") {
			t.Errorf("mounts are not shared, %v", err)
		}
		if err := errors.Join(s.Restore(), s.Restore()); err != nil {
			return err
		}
		if _, err := netlink.LinkByName(nodeLink); err == nil {
			t.Error("the interface stays")
		}
		return nil
	})
}

func TestMountsAndNamespacesGo(t *testing.T) {
	dir := t.TempDir()
	below, deep, beside := filepath.Join(dir, "pods", "a b"), filepath.Join(dir, "pods", "a b", "c"), filepath.Join(dir, "pods2")
	inside(t, func() error {
		for _, p := range []string{filepath.Join(dir, "pods"), below, deep, beside} {
			if err := errors.Join(os.MkdirAll(p, 0o755), unix.Mount("tmpfs", p, "tmpfs", 0, "")); err != nil {
				return err
			}
		}
		found, err := findMounts(Leftovers{Mounts: []string{filepath.Join(dir, "pods")}})
		if d := cmp.Diff([]string{"mount " + deep, "mount " + below}, names(found)); d != "" || err != nil {
			t.Errorf("%v: %s", err, d)
		}
		if err := remove(t.Context(), found); err != nil {
			return err
		}
		left, err := mountPoints()
		if err != nil {
			return err
		}
		text := strings.Join(left, "\n")
		if strings.Contains(text, below) || !strings.Contains(text, beside) || !strings.Contains(text, dir+"/pods\n") {
			t.Errorf("mounted are now:\n%s", text)
		}

		ns := filepath.Join(dir, "netns")
		if err := errors.Join(os.MkdirAll(ns, 0o755), os.WriteFile(ns+"/cni-1", nil, 0o600), os.WriteFile(ns+"/mine", nil, 0o600), os.WriteFile(ns+"/cni-2", nil, 0o600)); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", ns+"/cni-1", "", unix.MS_BIND, ""); err != nil {
			return err
		}
		if found, err = findNamespaces(Leftovers{Netns: ns + "/cni-"}); err != nil || len(found) != 2 {
			t.Errorf("%v, %v", names(found), err)
		}
		if err := remove(t.Context(), found); err != nil {
			return err
		}
		if list, err := os.ReadDir(ns); err != nil || len(list) != 1 {
			t.Errorf("%v, %v", list, err)
		}
		return nil
	})
}

func TestInterfacesAndChainsAreFound(t *testing.T) {
	l := Leftovers{Interfaces: []string{"cni0", "flannel.1"}, Chains: []string{"KUBE-"}, Tables: []string{"kube-proxy"}}
	inside(t, func() error {
		for _, name := range []string{"cni0", "mine"} {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
				return err
			}
		}
		if none, err := findNetfilter(l); err != nil || len(none) != 0 {
			t.Errorf("in an empty namespace: %v, %v", names(none), err)
		}
		nft, err := nftables.New()
		if err != nil {
			return err
		}
		filter := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"})
		nft.AddChain(&nftables.Chain{Name: "KUBE-FORWARD", Table: filter})
		nft.AddChain(&nftables.Chain{Name: "DOCKER", Table: filter})
		nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv6, Name: "kube-proxy"})
		if err := nft.Flush(); err != nil {
			return err
		}
		interfaces, err := findInterfaces(l)
		if err != nil {
			return err
		}
		rules, err := findNetfilter(l)
		if err != nil {
			return err
		}
		want := []string{"interface cni0", "nf_tables table kube-proxy", "chain KUBE-FORWARD of nf_tables table filter"}
		if d := cmp.Diff(want, append(names(interfaces), names(rules)...)); d != "" {
			t.Error(d)
		}
		if err := remove(t.Context(), append(interfaces, rules...)); err != nil {
			return err
		}
		if interfaces, err := findInterfaces(l); err != nil || len(interfaces) != 0 {
			t.Errorf("%v, %v", names(interfaces), err)
		}
		return nil
	})
}

// TestContainersAndShimsGo has a process in a cgroup like kubelet's, which
// ignores signals, and one that looks like a shim.
func TestContainersAndShimsGo(t *testing.T) {
	root := testenv.Cgroup(t)
	pod := filepath.Join(root, "kubepods", "besteffort", "pod1")
	if err := os.MkdirAll(pod, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(pod)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	container := exec.Command("sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000")
	container.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Setsid: true}
	shims := []*exec.Cmd{
		{Path: "/bin/sleep", Args: []string{"/usr/bin/containerd-shim-runc-v2", "1000"}},
		{Path: "/bin/sh", Args: []string{"/usr/bin/containerd-shim-runc-v2", "-c", "read forever", "-namespace", "hutch-test"}},
		{Path: "/bin/sh", Args: []string{"/usr/bin/containerd-shim-runc-v2", "-c", "read forever", "-namespace", "moby"}},
	}
	for _, c := range shims { // without a child, which would look like it until its exec
		if _, err := c.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}
	all := append([]*exec.Cmd{container}, shims...)
	ended := make([]chan struct{}, len(all))
	for i, c := range all {
		if c.SysProcAttr == nil {
			c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		ended[i] = make(chan struct{})
		go func() { _ = c.Wait(); close(ended[i]) }()
		t.Cleanup(func() { _ = unix.Kill(-c.Process.Pid, unix.SIGKILL); <-ended[i] })
	}
	s := System{Cgroups: root}
	l := Leftovers{Cgroups: []string{"kubepods", "nothing"}, ShimNamespaces: []string{"hutch-test"}}
	found, err := s.Leftovers(l)
	if err != nil || len(found) != 2 || found[0].What != "cgroup kubepods" || !strings.HasPrefix(found[1].What, "shim ") {
		t.Fatalf("%v, %v", names(found), err)
	}
	if err := remove(testenv.Context(t), found); err != nil {
		t.Fatal(err)
	}
	<-ended[0]
	<-ended[2]
	if left, err := s.Leftovers(l); err != nil || len(left) != 0 {
		t.Errorf("%v, %v", names(left), err)
	}
	for _, i := range []int{1, 3} {
		if err := unix.Kill(all[i].Process.Pid, 0); err != nil {
			t.Errorf("%v was killed: %v", all[i].Args, err)
		}
	}
}

func TestResetIsBounded(t *testing.T) {
	root := testenv.Cgroup(t)
	own := filepath.Join(root, "reset")
	s := System{Own: own}
	reset := func(timeout int, script string) error {
		return s.Reset(testenv.Context(t), Reset{Command: []string{"/bin/sh", "-c", script}, Timeout: timeout}, []string{"WORD=left"})
	}
	if err := reset(60, `[ "$WORD" = left ] && echo fine`); err != nil {
		t.Error(err)
	}
	if err := reset(60, `echo "$WORD: mount /x" >&2; exit 3`); err == nil || !strings.Contains(err.Error(), "exit status 3: left: mount /x") {
		t.Errorf("a reset that leaves something: %v", err)
	}
	if err := reset(1, "setsid sleep 1000 & sleep 1000"); err == nil || !strings.Contains(err.Error(), "killed after 1s") {
		t.Errorf("a reset that hangs: %v", err)
	}
	if _, err := os.Stat(own); !os.IsNotExist(err) {
		t.Errorf("its cgroup: %v", err)
	}
	if err := killCgroup(context.Background(), own); err != nil {
		t.Errorf("no cgroup at all: %v", err)
	}
}
