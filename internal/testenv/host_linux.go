package testenv

import (
	"fmt"
	"sort"
	"strings"
	"testing"
	"time"
)

// hostGrace is how long the kernel may take to finish what a test gave up:
// namespaces and cgroups go a moment after their last process.
const hostGrace = 5 * time.Second

// Scope names the part of the host that belongs to a test. What a field leaves
// empty is not looked at, so that tests on a shared machine see only their own.
type Scope struct {
	// Programs are prefixes of the base name of argv[0], such as "qemu-system".
	Programs []string
	// ProgramsWith narrows Programs to processes that carry this text in their
	// argv, such as the directory of the test.
	ProgramsWith string
	// NetnsDir is a directory of network namespace files, "/run/netns".
	NetnsDir string
	// NetnsPrefix narrows NetnsDir to names with this prefix.
	NetnsPrefix string
	// LinkPrefix is a prefix of interface names, in the test's namespace.
	LinkPrefix string
	// NFTPrefix is a prefix of names of nftables tables, in the test's
	// namespace. Their chains, sets and set elements are compared too.
	NFTPrefix string
	// Cgroups are directories below /sys/fs/cgroup; all directories inside are
	// compared. Patterns as of path/filepath.Glob are allowed.
	Cgroups []string
	// Mounts are prefixes of mount points, of sources and of roots.
	Mounts []string
	// LoopFiles is a prefix of the paths of files behind loop devices.
	LoopFiles string
	// Dirs are directories whose trees are compared by path, kind and nothing
	// else. A directory that does not exist counts as empty.
	Dirs []string
}

// Host is what a Scope held at one instant: lines, each one thing.
type Host struct {
	things map[string]bool
}

// Snapshot looks at the host. It fails the test when it can't.
func Snapshot(t testing.TB, s Scope) Host {
	t.Helper()
	h, err := look(s)
	if err != nil {
		t.Fatalf("look at the host: %v", err)
	}
	return h
}

// CheckHost snapshots the host now, and fails the test when something in the
// scope is there after it that was not there before, or the other way round. Call
// it before the test makes anything, so that its check runs after the test's
// own cleanups. What needs a moment to go is given 5 seconds.
func CheckHost(t testing.TB, s Scope) {
	t.Helper()
	before := Snapshot(t, s)
	t.Cleanup(func() {
		t.Helper()
		diff, err := settle(before, s, hostGrace)
		if err != nil {
			t.Errorf("look at the host: %v", err)
			return
		}
		if diff != "" {
			t.Errorf("%s changed the host (- gone, + left behind):\n%s", t.Name(), diff)
		}
	})
}

// settle compares until nothing differs, at the longest for grace.
func settle(before Host, s Scope, grace time.Duration) (string, error) {
	deadline := time.Now().Add(grace)
	tick := time.NewTicker(50 * time.Millisecond) // most of these things tell nobody when they go
	defer tick.Stop()
	for {
		after, err := look(s)
		if err != nil {
			return "", err
		}
		diff := before.Diff(after)
		if diff == "" || time.Now().After(deadline) {
			return diff, nil
		}
		<-tick.C
	}
}

// Diff returns what differs from h to after, a line each: "- " for what is
// gone and "+ " for what is new. It is empty when nothing differs.
func (h Host) Diff(after Host) string {
	var lines []string
	for thing := range h.things {
		if !after.things[thing] {
			lines = append(lines, "- "+thing)
		}
	}
	for thing := range after.things {
		if !h.things[thing] {
			lines = append(lines, "+ "+thing)
		}
	}
	sort.Slice(lines, func(i, j int) bool { return lines[i][2:] < lines[j][2:] })
	return strings.Join(lines, "\n")
}

// String lists all things, sorted.
func (h Host) String() string {
	lines := make([]string, 0, len(h.things))
	for thing := range h.things {
		lines = append(lines, thing)
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// look collects everything of the scope.
func look(s Scope) (Host, error) {
	h := Host{things: map[string]bool{}}
	for _, part := range []struct {
		name string
		find func(Scope) ([]string, error)
	}{
		{"process", processes},
		{"netns", namespaces},
		{"link", links},
		{"nftables", nftObjects},
		{"cgroup", cgroups},
		{"mount", mounts},
		{"loop", loops},
		{"file", files},
	} {
		found, err := part.find(s)
		if err != nil {
			return Host{}, fmt.Errorf("%s: %w", part.name, err)
		}
		for _, thing := range found {
			h.things[part.name+" "+thing] = true
		}
	}
	return h, nil
}
