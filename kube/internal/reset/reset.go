package reset

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Places says where a cluster lives.
type Places struct {
	Data      string // of the cluster
	Kubelet   string
	Namespace string   // of containerd: k8s.io
	Cgroups   []string // of pods, below the root of cgroups
	Bridge    string
	Network   string   // name of the CNI network
	Mounts    []string // directories below which everything mounted is the pods'
}

// Pods are what containerd knows of pods. End ends one, its grace bounded by ctx and by grace seconds, and removes it.
type Pods interface {
	List(ctx context.Context) ([]string, error)
	End(ctx context.Context, id string) error
}

// Machine is the machine below.
type Machine interface {
	// Processes lists the shims of a namespace of containerd.
	Shims(namespace string) ([]int, error)
	Kill(pid int) error
	// EndCgroup kills what is in the cgroup and removes it with all below. There being none is no error; told is whether there was.
	EndCgroup(ctx context.Context, name string) (told bool, err error)
	// Mounts lists mount points, the oldest first.
	Mounts() ([]string, error)
	Unmount(path string) error
	// Remove deletes files that match a pattern and tells which.
	Remove(pattern string) ([]string, error)
	// RemoveBridge deletes an interface and those attached to it, and tells which.
	RemoveBridge(name string) ([]string, error)
	// Run runs a program. A program that isn't there is fs.ErrNotExist.
	Run(ctx context.Context, input []byte, name string, args ...string) ([]byte, error)
}

// Result is what was taken away and what was not.
type Result struct {
	Done []string `json:"done"`
	Left []string `json:"left"`
}

func (r *Result) done(format string, a ...any) { r.Done = append(r.Done, fmt.Sprintf(format, a...)) }
func (r *Result) left(format string, a ...any) { r.Left = append(r.Left, fmt.Sprintf(format, a...)) }

// Do takes everything away. Pods is nil when containerd doesn't answer.
func Do(ctx context.Context, p Places, pods Pods, m Machine) Result {
	r := &Result{Done: []string{}, Left: []string{}}
	if pods != nil {
		endPods(ctx, pods, r)
	}
	killShims(p, m, r)
	for _, name := range p.Cgroups {
		told, err := m.EndCgroup(ctx, name)
		r.tell("cgroup "+name, told, err)
	}
	unmount(p, m, r)
	removeNetwork(p, m, r)
	removeRules(ctx, m, r)
	return *r
}

func (r *Result) tell(what string, told bool, err error) {
	switch {
	case err != nil:
		r.left("%s: %v", what, err)
	case told:
		r.done("%s", what)
	}
}

func killShims(p Places, m Machine, r *Result) {
	pids, err := m.Shims(p.Namespace)
	if err != nil {
		r.left("shims: %v", err)
	}
	for _, pid := range pids {
		r.tell(fmt.Sprintf("shim %d", pid), true, m.Kill(pid))
	}
}

// unmount takes the youngest mount first: it may be on an older one.
func unmount(p Places, m Machine, r *Result) {
	all, err := m.Mounts()
	if err != nil {
		r.left("mounts: %v", err)
		return
	}
	for _, path := range slices.Backward(all) {
		if p.owns(path) {
			r.tell("mount "+path, true, m.Unmount(path))
		}
	}
}

// owns tells whether a mount is the pods'. The directories themselves are not: they may be mounts of the machine's own.
func (p Places) owns(path string) bool {
	for _, dir := range append([]string{p.Data, p.Kubelet}, p.Mounts...) {
		if strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") {
			return true
		}
	}
	return isNetns(path)
}

func isNetns(path string) bool {
	return strings.HasPrefix(path, "/run/netns/cni-") || strings.HasPrefix(path, "/var/run/netns/cni-")
}

func removeNetwork(p Places, m Machine, r *Result) {
	for _, pattern := range []string{
		"/run/netns/cni-*",
		"/var/lib/cni/networks/" + p.Network + "/*",
		"/var/lib/cni/results/" + p.Network + "-*",
	} {
		files, err := m.Remove(pattern)
		r.tell(fmt.Sprintf("%s: %d", pattern, len(files)), len(files) > 0, err)
	}
	links, err := m.RemoveBridge(p.Bridge)
	r.tell("interfaces "+strings.Join(links, " "), len(links) > 0, err)
}
