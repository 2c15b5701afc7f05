package reset

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"
)

// machine is a fake one: what it has is in its fields, and goes by the calls.
type machine struct {
	mu      sync.Mutex
	pods    []string
	shims   []int
	cgroups []string
	mounts  []string
	files   map[string][]string
	links   []string
	tables  []string
	chains  map[string]string // per family, what -save prints
	fails   map[string]error  // by call
	calls   []string
}

func (m *machine) call(format string, a ...any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := fmt.Sprintf(format, a...)
	m.calls = append(m.calls, c)
	return m.fails[c]
}

func (m *machine) List(context.Context) ([]string, error) { return m.pods, m.call("list") }
func (m *machine) End(_ context.Context, id string) error {
	if err := m.call("end %s", id); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods = slices.DeleteFunc(slices.Clone(m.pods), func(s string) bool { return s == id })
	return nil
}
func (m *machine) Shims(string) ([]int, error) { return m.shims, m.call("shims") }
func (m *machine) Kill(pid int) error {
	m.shims = slices.DeleteFunc(slices.Clone(m.shims), func(n int) bool { return n == pid })
	return m.call("kill %d", pid)
}
func (m *machine) EndCgroup(_ context.Context, name string) (bool, error) {
	if err := m.call("cgroup %s", name); err != nil {
		return true, err
	}
	had := slices.Contains(m.cgroups, name)
	m.cgroups = slices.DeleteFunc(m.cgroups, func(s string) bool { return s == name })
	return had, nil
}
func (m *machine) Mounts() ([]string, error) { return slices.Clone(m.mounts), nil }
func (m *machine) Unmount(path string) error {
	if err := m.call("unmount %s", path); err != nil {
		return err
	}
	m.mounts = slices.DeleteFunc(m.mounts, func(s string) bool { return s == path })
	return nil
}
func (m *machine) Remove(pattern string) ([]string, error) {
	f := m.files[pattern]
	delete(m.files, pattern)
	return f, m.call("remove %s", pattern)
}
func (m *machine) RemoveBridge(name string) ([]string, error) {
	l := m.links
	m.links = nil
	return l, m.call("bridge %s", name)
}
func (m *machine) Run(_ context.Context, input []byte, name string, args ...string) ([]byte, error) {
	if err := m.call("%s", strings.Join(append([]string{name}, args...), " ")); err != nil {
		return nil, err
	}
	family, save := strings.CutSuffix(name, "-save")
	switch {
	case name == "nft" && args[0] == "list":
		return []byte(strings.Join(m.tables, "\n")), nil
	case name == "nft":
		m.tables = slices.DeleteFunc(m.tables, func(s string) bool { return s == "table "+args[2]+" "+args[3] })
	case save:
		return []byte(m.chains[family]), nil
	default:
		m.chains[strings.TrimSuffix(name, "-restore")] = string(input)
	}
	return nil, nil
}

func places() Places {
	return Places{
		Data: "/var/lib/hutch-kube", Kubelet: "/var/lib/kubelet", Namespace: "k8s.io", Cgroups: []string{"kubepods"},
		Bridge: "cni0", Network: "hutch", Mounts: []string{"/run/containerd/io.containerd.runtime.v2.task/k8s.io"},
	}
}

const docker = `*nat
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
`

func full() *machine {
	return &machine{
		pods: []string{"p1", "p2"}, shims: []int{7}, cgroups: []string{"kubepods", "docker"},
		mounts: []string{
			"/", "/var/lib/kubelet", "/var/lib/kubelet/pods/a/volumes/t", "/var/lib/docker/overlay2/x",
			"/run/containerd/io.containerd.runtime.v2.task/k8s.io/p1/rootfs", "/run/containerd/io.containerd.runtime.v2.task/moby/c/rootfs",
			"/run/netns/cni-1", "/var/lib/kubelet/pods/a/volumes/t/sub", "/var/lib/kubelet-other/x",
		},
		files:  map[string][]string{"/var/lib/cni/networks/hutch/*": {"10.42.0.2"}},
		links:  []string{"veth1", "cni0"},
		tables: []string{"table ip kube-proxy", "table ip6 kube-proxy", "table ip nat"},
		chains: map[string]string{"iptables": strings.Replace(docker, "COMMIT", `:KUBE-POSTROUTING - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 10.42.0.3/32 -m comment --comment "name: \"hutch\" id: \"x\"" -j CNI-9f
COMMIT`, 1), "ip6tables": docker},
		fails: map[string]error{},
	}
}

func TestEverythingGoesAndOthersStay(t *testing.T) {
	m := full()
	r := Do(t.Context(), places(), m, m)
	if len(r.Left) != 0 {
		t.Fatalf("left: %v", r.Left)
	}
	if len(m.pods)+len(m.shims)+len(m.links)+len(m.files) != 0 {
		t.Errorf("stayed: %+v", m)
	}
	if want := []string{"/", "/var/lib/kubelet", "/var/lib/docker/overlay2/x", "/run/containerd/io.containerd.runtime.v2.task/moby/c/rootfs", "/var/lib/kubelet-other/x"}; !slices.Equal(m.mounts, want) {
		t.Errorf("mounts: %v", m.mounts)
	}
	if m.chains["iptables"] != docker || slices.Contains(m.calls, "ip6tables-restore") {
		t.Errorf("rules: %q; calls: %v", m.chains, m.calls)
	}
	if !slices.Equal(m.tables, []string{"table ip nat"}) || !slices.Equal(m.cgroups, []string{"docker"}) {
		t.Errorf("tables %v, cgroups %v", m.tables, m.cgroups)
	}
	if sub, top := slices.Index(m.calls, "unmount /var/lib/kubelet/pods/a/volumes/t/sub"), slices.Index(m.calls, "unmount /var/lib/kubelet/pods/a/volumes/t"); sub > top {
		t.Error("an older mount went before the one on it")
	}
}

func TestSecondTimeFindsNothing(t *testing.T) {
	m := full()
	Do(t.Context(), places(), m, m)
	if r := Do(t.Context(), places(), m, m); len(r.Done)+len(r.Left) != 0 {
		t.Fatalf("%+v", r)
	}
}

func TestWithoutRuntimeOrPrograms(t *testing.T) {
	m := full()
	for _, name := range []string{"nft list tables", "iptables-save", "ip6tables-save"} {
		m.fails[name] = fs.ErrNotExist
	}
	r := Do(t.Context(), places(), nil, m)
	if len(r.Left) != 0 || slices.Contains(m.calls, "list") || len(m.shims) != 0 {
		t.Fatalf("%+v, calls %v", r, m.calls)
	}
}

func TestEveryFailureIsToldAndStopsNothing(t *testing.T) {
	for _, fail := range []string{
		"list", "end p1", "shims", "kill 7", "cgroup kubepods", "unmount /run/netns/cni-1", "remove /run/netns/cni-*", "bridge cni0",
		"nft list tables", "nft delete table ip kube-proxy", "iptables-save", "iptables-restore",
	} {
		t.Run(fail, func(t *testing.T) {
			m := full()
			m.fails[fail] = errors.New("no")
			r := Do(t.Context(), places(), m, m)
			if len(r.Left) != 1 {
				t.Errorf("left: %v", r.Left)
			}
			if m.calls[len(m.calls)-1] != "ip6tables-save" {
				t.Errorf("it ended with %s", m.calls[len(m.calls)-1])
			}
		})
	}
}
