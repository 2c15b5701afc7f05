package sysinfo

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// plant writes files into a new root; a value that starts with "->" is the
// target of a symlink.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "->"); ok {
			err = os.Symlink(target, full)
		} else {
			err = os.WriteFile(full, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// fromUname are the fields that no tree decides.
var fromUname = cmpopts.IgnoreFields(Info{}, "Kernel", "Arch", "Hostname", "Addresses")

func TestTrees(t *testing.T) {
	noCPUList := uint32(runtime.NumCPU())
	long := strings.Repeat("x", 1000)
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  Info
	}{
		{
			"a whole machine",
			map[string]string{
				"etc/os-release":                 "PRETTY_NAME=\"x\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\n",
				"proc/meminfo":                   "MemTotal:         508340 kB\nMemFree:  1 kB\nMemAvailable:     401216 kB\n",
				"proc/loadavg":                   "0.52 1.25 3.00 2/345 6789\n",
				"proc/uptime":                    "12345.67 999.99\n",
				"sys/devices/system/cpu/online":  "0-2,5\n",
				"sys/devices/system/cpu/offline": "3-4\n",
			},
			Info{
				OSName: "Debian GNU/Linux", OSVersion: "12", TotalMemory: 508340 << 10, AvailableMemory: 401216 << 10,
				CPUs: 4, Load: [3]float64{0.52, 1.25, 3}, Uptime: 12345,
			},
		},
		{"nothing at all", nil, Info{OSName: "Linux", CPUs: noCPUList}},
		{
			"an absolute link to usr/lib",
			map[string]string{"etc/os-release": "->/usr/lib/os-release", "usr/lib/os-release": "NAME=Alpine\nVERSION_ID=3.20.1"},
			Info{OSName: "Alpine", OSVersion: "3.20.1", CPUs: noCPUList},
		},
		{
			"a dangling link, and the other file",
			map[string]string{"etc/os-release": "->../nowhere", "usr/lib/os-release": "NAME='It\"s'\n"},
			Info{OSName: `It"s`, CPUs: noCPUList},
		},
		{
			"a link out of the root",
			map[string]string{"etc/os-release": "->../../../../../../../../proc/version"},
			Info{OSName: "Linux", CPUs: noCPUList},
		},
		{
			"hostile words",
			map[string]string{
				"etc/os-release": "NAME=\"a\\\"b\\$c\x1b[31m\xff\"\nVERSION_ID=" + long + "\nNAME\n=\n\"\n",
				"proc/meminfo":   "MemTotal: 99999999999999999999999 kB\nMemAvailable: -1 kB\nMemTotal:\nx\n",
				"proc/loadavg":   "NaN -1 1e300\n", "proc/uptime": "+Inf",
				"sys/devices/system/cpu/online": "0-99999999999",
			},
			Info{OSName: "a\"b$c[31m?", OSVersion: long[:maxText], CPUs: noCPUList},
		},
		{
			"more CPUs than there can be",
			map[string]string{"sys/devices/system/cpu/online": strings.Repeat("0-65535,", 8) + "1"},
			Info{OSName: "Linux", CPUs: noCPUList},
		},
		{
			"a NAME behind the bound",
			map[string]string{"etc/os-release": strings.Repeat("#\n", maxFile) + "NAME=late\n"},
			Info{OSName: "Linux", CPUs: noCPUList},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Reader{Root: plant(t, tc.files)}.Read()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, fromUname); diff != "" {
				t.Errorf("info (-want +got):\n%s", diff)
			}
		})
	}
}

// TestThingsThatBlock puts what must not be read where files should be.
func TestThingsThatBlock(t *testing.T) {
	root := plant(t, map[string]string{"etc/x": "", "proc/x": "", "proc/loadavg": "->loadavg"})
	if err := unix.Mkfifo(filepath.Join(root, "etc/os-release"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "proc/meminfo"), 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := Reader{Root: root}.Read()
	if err != nil {
		t.Fatal(err)
	}
	want := Info{OSName: "Linux", CPUs: uint32(runtime.NumCPU())}
	if diff := cmp.Diff(want, got, fromUname); diff != "" {
		t.Errorf("info (-want +got):\n%s", diff)
	}
}

func TestThisMachine(t *testing.T) {
	got, err := Reader{}.Read()
	if err != nil {
		t.Fatal(err)
	}
	if got.Kernel == "" || got.Arch == "" || got.Hostname == "" || got.CPUs == 0 || got.TotalMemory < 1<<20 ||
		got.AvailableMemory > got.TotalMemory || got.Uptime == 0 {
		t.Errorf("info of this machine has holes: %+v", got)
	}
	for _, a := range got.Addresses {
		if ip := net.ParseIP(a); ip == nil || ip.IsLoopback() {
			t.Errorf("%q is not an address of a real interface", a)
		}
	}
	if available, total := (Reader{}).Memory(); total != got.TotalMemory || available == 0 {
		t.Errorf("memory = %d of %d, want of %d", available, total, got.TotalMemory)
	}
}

func TestAddresses(t *testing.T) {
	testenv.RequireRoot(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Errorf("lo: %v", err)
			return
		}
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		own, err := netlink.ParseAddr("198.18.0.2/30")
		if err != nil {
			t.Errorf("address: %v", err)
			return
		}
		for _, err := range []error{netlink.LinkSetUp(lo), netlink.LinkAdd(bridge), netlink.AddrAdd(bridge, own)} {
			if err != nil {
				t.Errorf("make interfaces: %v", err)
				return
			}
		}
		got, err := addresses()
		if err != nil || !slices.Equal(got, []string{"198.18.0.2"}) {
			t.Errorf("addresses = %q, %v; want only the bridge's", got, err)
		}
	}()
	<-done
}

func FuzzOSRelease(f *testing.F) {
	f.Add("NAME=\"x\\\"\nVERSION_ID='")
	f.Add("NAME=\\\nVERSION_ID=\"")
	f.Fuzz(func(t *testing.T, content string) {
		name, version := osRelease(content)
		for _, s := range []string{name, version} {
			if len(s) > maxText || !utf8.ValidString(s) || strings.ContainsAny(s, "\n\x00\x1b") {
				t.Errorf("%q comes out of %q", s, content)
			}
		}
		if name == "" {
			t.Errorf("no name out of %q", content)
		}
	})
}
