package arch

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/hutch-run/hutch/"

// rule says what packages of this module a package may import. A pattern
// ending in "/..." matches that package and everything below. Why is the reason, shown when the
// rule is broken.
type rule struct {
	pkg string
	may []string
	why string
}

// vocabulary is what every package may import: words without I/O.
func vocabulary() []string {
	return []string{"internal/sandbox", "internal/fault", "internal/undo", "internal/delay", "internal/version"}
}

// leaf is the rule of a leaf of the host side: the vocabulary, proc, and what
// more is given.
func leaf(pkg string, more ...string) rule {
	return rule{pkg, append(more, pkg, pkg+"/..."), "leaves never import each other: a shared fact moves down into the vocabulary"}
}

// rules is the table of design.md part 10. The first rule that matches counts.
func rules() []rule {
	return []rule{
		{"internal/sandbox", nil, "the vocabulary imports only the standard library"},
		{"internal/fault", nil, "the vocabulary imports only the standard library"},
		{"internal/undo", nil, "the vocabulary imports only the standard library"},
		{"internal/delay", nil, "the vocabulary imports only the standard library"},
		{"internal/version", nil, "the vocabulary imports only the standard library"},
		{"internal/arch", nil, "tests only"},
		{"internal/testenv", nil, "tests only; it must not pull the product in"},
		{"internal/link", []string{"internal/link/..."}, "both sides share the wire facts; it knows neither side"},
		{"internal/rpcx/validate", []string{"internal/rpcx", "gen/..."}, "kept apart so that the guest need not link it"},
		{"internal/rpcx", nil, "Connect glue knows no service"},
		{"internal/proc", nil, "child processes know nothing of sandboxes beyond the vocabulary"},
		{"gen/...", []string{"gen/..."}, "generated"},

		{"cmd/hutchd", []string{"internal/host/daemon"}, "a main calls its one root"},
		{"cmd/hutch-agent", []string{"internal/guest/agent", "internal/guest/boot"}, "a main calls its one root, and PID 1 apart from it"},
		{"cmd/hutch", []string{"internal/cli"}, "a main calls its one root"},

		{"internal/host/daemon", []string{"internal/host/...", "internal/rpcx/...", "internal/proc"}, "the only composition root of the host"},
		{"internal/host/rpc", []string{
			"gen/...", "internal/rpcx/...", "internal/host/lifecycle", "internal/host/auth", "internal/host/proxy",
			"internal/host/guestconn", "internal/host/template", "internal/host/events", "internal/host/snapshot", "internal/host/ports",
		}, "handlers convert, call, convert; the API is one handler, so the proxy and the callers' rights are put together here"},
		{"internal/host/proxy", []string{"internal/link", "internal/rpcx", "internal/host/lifecycle", "internal/host/guestconn", "internal/host/relay", "internal/host/auth", "gen/..."}, "the proxy reaches guests through lifecycle"},
		{"internal/host/dockersock", []string{"internal/link", "internal/host/lifecycle", "internal/host/guestconn", "internal/host/relay", "internal/host/events"}, "like the proxy; ports of the host come through an interface"},
		{"internal/host/relay", nil, "it carries bytes and knows neither side"},
		{"internal/host/auth", []string{"internal/rpcx", "gen/..."}, "a leaf; the services' names come from gen"},
		{"internal/host/lifecycle", []string{
			"internal/host/vmm", "internal/host/network", "internal/host/disk", "internal/host/template", "internal/host/kernel",
			"internal/host/guestconn", "internal/host/store", "internal/host/events", "internal/host/snapshot", "internal/host/share",
		}, "the heart knows its leaves' interfaces, never gen, never a concrete driver"},
		{"internal/host/guestconn", []string{"internal/host/guestconn/...", "internal/link", "internal/rpcx", "gen/..."}, "the one client of the guest"},
		{"internal/host/vmm/qemu", []string{"internal/host/vmm", "internal/host/vmm/qemu/...", "internal/proc", "internal/host/jail", "internal/link"}, "a driver never knows another driver"},
		{"internal/host/vmm/fake", []string{"internal/host/vmm", "internal/proc"}, "a driver never knows another driver"},
		{"internal/host/vmm/qemu/qmp", nil, "the protocol knows no machine"},
		{"internal/host/vmm/qemu/ram", nil, "memory knows no VMM"},
		{"internal/host/vmm/vmmtest", []string{"internal/host/vmm", "internal/host/vmm/vmmtest/...", "internal/host/kernel", "internal/link", "internal/proc", "internal/testenv"}, "the suite knows the interface only"},
		{"internal/host/vmm/vmmtest/testguest", nil, "it is linked into the test's guest"},
		{"internal/host/vmm/vmmtest/guestinit", []string{"internal/host/vmm/vmmtest/testguest"}, "the test's guest is small"},
		leaf("internal/host/vmm"),
		leaf("internal/host/jail", "internal/proc"),
		leaf("internal/host/share", "internal/host/jail", "internal/proc"),
		leaf("internal/host/network"),
		leaf("internal/host/disk"),
		leaf("internal/host/snapshot"),
		leaf("internal/host/template", "internal/host/image"),        // a template is made of an image
		leaf("internal/host/template/recipe", "internal/host/image"), // a recipe says how its image runs
		leaf("internal/host/image"),
		leaf("internal/host/kernel"),
		leaf("internal/host/store"),
		leaf("internal/host/events"),
		leaf("internal/host/metrics"),
		leaf("internal/host/ports", "internal/host/relay"), // which carries bytes and knows nothing

		{"internal/guest/agent", []string{"internal/guest/...", "internal/link", "internal/rpcx"}, "the composition root of the guest"},
		{"internal/guest/rpc", []string{"gen/...", "internal/rpcx", "internal/guest/..."}, "handlers convert, call, convert"},
		{"internal/guest/process/processrpc", []string{"gen/process/...", "internal/rpcx", "internal/guest/process", "internal/guest/account"}, "handlers convert, call, convert"},
		{"internal/guest/files/filesrpc", []string{"gen/filesystem/...", "internal/rpcx", "internal/guest/files", "internal/guest/account"}, "handlers convert, call, convert"},
		{"internal/guest/rootfs", nil, "domain packages share it; it knows none of them"},
		{"internal/guest/process", []string{"internal/guest/account"}, "domain packages know no protocol"},
		{"internal/guest/files", []string{"internal/guest/account"}, "domain packages know no protocol"},
		{"internal/guest/...", []string{"internal/guest/..."}, "guest packages never know the host"},

		{"internal/cli/kubeconfig", nil, "it knows files of kubectl and nothing of hutch"},
		{"internal/cli", []string{"gen/...", "internal/cli/kubeconfig"}, "the CLI talks to the public API only"},
		{"test/...", []string{"gen/...", "internal/...", "test/..."}, "tests may look everywhere"},
	}
}

type pkg struct {
	ImportPath                string
	Name                      string
	Doc                       string
	Imports                   []string
	TestImports, XTestImports []string
}

// packages lists the packages of this module, for Linux.
func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Doc,Imports", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

func matches(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == prefix || strings.HasPrefix(path, prefix+"/")
	}
	return pattern == path
}

func ruleFor(path string) (rule, bool) {
	for _, r := range rules() {
		if matches(r.pkg, path) {
			return r, true
		}
	}
	return rule{}, false
}

func TestImportsFollowTheTable(t *testing.T) {
	for _, p := range packages(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		r, ok := ruleFor(path)
		if !ok {
			t.Errorf("%s has no rule: say in rules() what it may import", path)
			continue
		}
		allowed := append(vocabulary(), r.may...)
		for _, imp := range p.Imports {
			imp, ours := strings.CutPrefix(imp, module)
			if !ours || slices.ContainsFunc(allowed, func(a string) bool { return matches(a, imp) }) {
				continue
			}
			t.Errorf("%s imports %s: %s", path, imp, r.why)
		}
	}
}

func TestVocabularyIsStandardLibraryOnly(t *testing.T) {
	for _, path := range vocabulary() {
		out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", module+path).Output()
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		for _, dep := range strings.Fields(string(out)) {
			if !slices.Contains(vocabulary(), strings.TrimPrefix(dep, module)) {
				t.Errorf("%s depends on %s", path, dep)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for _, p := range packages(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		if strings.HasPrefix(path, "gen/") || strings.HasPrefix(path, "test/spec/gen/") {
			continue
		}
		if p.Doc == "" {
			t.Errorf("%s has no package doc", path)
		}
	}
}
