package kubernetes

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
)

func TestK3sIsFound(t *testing.T) {
	root := t.TempDir()
	binary := filepath.Join(root, "usr/local/bin/k3s")
	if err := os.MkdirAll(filepath.Dir(binary), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(root); !fault.Is(err, fault.Precondition) {
		t.Errorf("a file that can't be run: %v", err)
	}
	if err := os.Chmod(binary, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := Find(root)
	if err != nil || d.Name != "k3s" || d.Command[0] != "/usr/local/bin/k3s" || d.check() != nil {
		t.Errorf("%+v, %v, %v", d, err, d.check())
	}
}

// TestOurOwnIsUnderstood reads the file that the template kubernetes carries.
func TestOurOwnIsUnderstood(t *testing.T) {
	b, err := os.ReadFile("../../../kube/kubernetes.json")
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseDistribution(b)
	if err != nil || len(d.Needs) != 1 || len(d.Components) < 5 || d.API.Readyz != "/readyz" || d.Ready.DNS == nil {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestBadDistributions(t *testing.T) {
	good := k3s("/usr/local/bin/k3s")
	for name, spoil := range map[string]func(*Distribution){
		"no name":         func(d *Distribution) { d.Name = "" },
		"relative":        func(d *Distribution) { d.Command = []string{"k3s"} },
		"unknown need":    func(d *Distribution) { d.Needs = []string{"sshd"} },
		"top directory":   func(d *Distribution) { d.Data = []string{"/var"} },
		"root":            func(d *Distribution) { d.Data = []string{"/"} },
		"dot dot":         func(d *Distribution) { d.Files = []string{"/var/lib/../../etc/x"} },
		"agent's cgroup":  func(d *Distribution) { d.Leftovers.Cgroups = []string{"agent"} },
		"users' cgroup":   func(d *Distribution) { d.Leftovers.Cgroups = []string{"hutch"} },
		"cgroup path":     func(d *Distribution) { d.Leftovers.Cgroups = []string{"../x"} },
		"all mounts":      func(d *Distribution) { d.Leftovers.Mounts = []string{"/run"} },
		"all namespaces":  func(d *Distribution) { d.Leftovers.Netns = "/" },
		"signal":          func(d *Distribution) { d.Stop.Signal = "KILL" },
		"node":            func(d *Distribution) { d.Ready.Node = "" },
		"sysctl":          func(d *Distribution) { d.Sysctls = map[string]string{"../../etc/x": "1"} },
		"deployment":      func(d *Distribution) { d.Ready.Deployments = []string{"coredns"} },
		"URL":             func(d *Distribution) { d.Components[0].URL = "file:///etc/shadow" },
		"environment":     func(d *Distribution) { d.Env = []string{"A"} },
		"DNS":             func(d *Distribution) { d.Ready.DNS = &Question{Server: "dns", Name: "x"} },
		"credentials":     func(d *Distribution) { d.API.Key = "admin.key" },
		"time":            func(d *Distribution) { d.Stop.Timeout = -1 },
		"another version": func(d *Distribution) { d.Version = 2 },
	} {
		b, err := json.Marshal(good)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseDistribution(b); err != nil {
			t.Fatalf("the good one: %v", err)
		}
		d := k3s("/usr/local/bin/k3s")
		spoil(&d)
		if b, err = json.Marshal(d); err != nil {
			t.Fatal(err)
		}
		if _, err := parseDistribution(b); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	for name, text := range map[string]string{"a key that is not known": `{"version":1,"nmae":"x"}`, "garbage": "{"} {
		if _, err := parseDistribution([]byte(text)); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if _, err := parseDistribution([]byte(`{"version":7,"later":1}`)); err == nil || !strings.Contains(err.Error(), "version 1") {
		t.Errorf("another version: %v", err)
	}
}
