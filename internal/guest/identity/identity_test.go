package identity

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/testenv"
)

var _ account.Defaults = (*Identity)(nil)

// machine stands for the kernel, the network and the clock.
type machine struct {
	hostname  string
	hostnames int
	entropy   [][]byte
	links     []LinkParams
	host      []clock.HostTime
	forced    []clock.HostTime
	bootIDs   []string

	bootIDErr, entropyErr, hostnameErr, linkErr, clockErr error
}

func (m *machine) Release() (string, error)  { return "6.1.0-test", nil }
func (m *machine) Hostname() (string, error) { return m.hostname, nil }
func (m *machine) Loopback() error           { return nil }

func (m *machine) SetHostname(name string) error {
	m.hostname, m.hostnames = name, m.hostnames+1
	return m.hostnameErr
}

func (m *machine) AddEntropy(seed []byte) error {
	m.entropy = append(m.entropy, bytes.Clone(seed)) // the caller's is overwritten
	return m.entropyErr
}

func (m *machine) Apply(p LinkParams) error {
	m.links = append(m.links, p)
	return m.linkErr
}

func (m *machine) Sync(host clock.HostTime) (clock.Result, error) {
	m.host = append(m.host, host)
	return clock.Result{}, m.clockErr
}

func (m *machine) Force(host clock.HostTime) (clock.Result, error) {
	m.forced = append(m.forced, host)
	return clock.Result{}, m.clockErr
}

func (m *machine) SetBootID(id string) error {
	m.bootIDs = append(m.bootIDs, id)
	return m.bootIDErr
}

func newIdentity(root string, m *machine) *Identity {
	return New(Params{Root: root, Kernel: m, Links: m, Clock: m, Log: slog.New(slog.DiscardHandler)})
}

// tree makes a root with a boot id and the given files; a value that starts
// with "->" is the target of a symlink.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	all := map[string]string{"proc/sys/kernel/random/boot_id": "0c4d-boot\n"}
	for path, text := range files {
		all[path] = text
	}
	for path, text := range all {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(text, "->"); ok {
			err = os.Symlink(target, full)
		} else {
			err = os.WriteFile(full, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// etc returns what lies in /etc: the text of files, "->target" of symlinks.
func etc(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	entries, err := os.ReadDir(filepath.Join(root, "etc"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(root, "etc", e.Name())
		if target, err := os.Readlink(path); err == nil {
			found[e.Name()] = "->" + target
			continue
		}
		if !e.Type().IsRegular() {
			found[e.Name()] = e.Type().String()
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found[e.Name()] = string(text)
	}
	return found
}

const machineID = "0123456789abcdef0123456789abcdef"

func config() Config {
	return Config{
		ID: "sb-1", MachineID: machineID,
		Network: Network{Address: "198.18.0.2/30", Gateway: "198.18.0.1", DNS: []string{"198.18.0.1", "fd00::1"}, MTU: 1500},
		Host:    clock.HostTime{Secs: 1_900_000_000, Exact: true},
		Entropy: bytes.Repeat([]byte{7}, 32),
		Env:     map[string]string{"A": "1"}, User: "app", Cwd: "/srv",
	}
}

const (
	ourHosts = marker + "\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n198.18.0.2\tsb-1\n"
	ourDNS   = marker + "\nnameserver 198.18.0.1\nnameserver fd00::1\n"
)

func TestConfigureAFreshGuest(t *testing.T) {
	root := tree(t, nil)
	m := &machine{hostname: "(none)"}
	i := newIdentity(root, m)
	facts, err := i.Configure(testenv.Context(t), config())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Facts{Kernel: "6.1.0-test", BootID: "0c4d-boot"}, facts); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
	want := &machine{
		hostname: "sb-1", hostnames: 1,
		entropy: [][]byte{bytes.Repeat([]byte{7}, 32)},
		links: []LinkParams{{
			Name: "eth0", Address: netip.MustParsePrefix("198.18.0.2/30"), Gateway: netip.MustParseAddr("198.18.0.1"), MTU: 1500,
		}},
		host: []clock.HostTime{{Secs: 1_900_000_000, Exact: true}},
	}
	if diff := cmp.Diff(want, m, cmp.AllowUnexported(machine{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("machine (-want +got):\n%s", diff)
	}
	files := map[string]string{"hostname": "sb-1\n", "machine-id": machineID + "\n", "hosts": ourHosts, "resolv.conf": ourDNS}
	if diff := cmp.Diff(files, etc(t, root)); diff != "" {
		t.Errorf("/etc (-want +got):\n%s", diff)
	}
	if i.User() != "app" || i.Cwd() != "/srv" || !cmp.Equal(i.Env(), map[string]string{"A": "1"}) {
		t.Errorf("defaults = %q, %q, %v", i.User(), i.Cwd(), i.Env())
	}
}

// TestRepeating looks at inodes: a file that is right must not be touched.
func TestRepeating(t *testing.T) {
	root := tree(t, nil)
	m := &machine{}
	i := newIdentity(root, m)
	var before map[string]uint64
	for range 3 {
		if _, err := i.Configure(testenv.Context(t), config()); err != nil {
			t.Fatal(err)
		}
		now := inodes(t, root)
		if before != nil {
			if diff := cmp.Diff(before, now); diff != "" {
				t.Errorf("files were written again (-before +after):\n%s", diff)
			}
		}
		before = now
	}
	if m.hostnames != 1 {
		t.Errorf("the hostname was set %d times", m.hostnames)
	}
	if len(m.entropy) != 3 {
		t.Errorf("fresh entropy was used %d times of 3", len(m.entropy))
	}
}

func inodes(t *testing.T, root string) map[string]uint64 {
	t.Helper()
	found := map[string]uint64{}
	for name := range etc(t, root) {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, "etc", name), &st); err != nil {
			t.Fatal(err)
		}
		found[name] = st.Ino
	}
	return found
}

// TestAnotherSandbox is a restore: the guest wakes up with a snapshot's
// identity and gets its own.
func TestAnotherSandbox(t *testing.T) {
	root := tree(t, nil)
	m := &machine{}
	i := newIdentity(root, m)
	if _, err := i.Configure(testenv.Context(t), config()); err != nil {
		t.Fatal(err)
	}
	c := Config{ID: "sb-2", MachineID: strings.Repeat("f", 32)}
	if _, err := i.Configure(testenv.Context(t), c); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"hostname": "sb-2\n", "machine-id": strings.Repeat("f", 32) + "\n", "resolv.conf": marker + "\n",
		"hosts": strings.Replace(ourHosts, "198.18.0.2\tsb-1", "127.0.1.1\tsb-2", 1),
	}
	if diff := cmp.Diff(want, etc(t, root)); diff != "" {
		t.Errorf("/etc (-want +got):\n%s", diff)
	}
	if m.hostname != "sb-2" || m.links[1].Address.IsValid() {
		t.Errorf("hostname %q, link %v", m.hostname, m.links[1])
	}
	if i.User() != "" || i.Cwd() != "" || len(i.Env()) != 0 {
		t.Errorf("defaults of the other sandbox are left: %q, %q, %v", i.User(), i.Cwd(), i.Env())
	}
}

// TestACopy is told its boot id again and again, by the server that was there
// and by one that was started since.
func TestACopy(t *testing.T) {
	const copyID, nextID = "0b3f1c52-6a9d-4e0f-8d21-5c7e9a1b2c3d", "ffffffff-6a9d-4e0f-8d21-5c7e9a1b2c3d"
	root := tree(t, nil)
	m := &machine{}
	i := newIdentity(root, m)
	configure := func(id string) Facts {
		t.Helper()
		c := config()
		c.BootID, c.Still = id, true
		facts, err := i.Configure(testenv.Context(t), c)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.Entropy, make([]byte, 32)) {
			t.Error("the entropy is left in memory")
		}
		return facts
	}
	for _, step := range []struct {
		tell, want string
		renamed    bool
	}{
		{"", "0c4d-boot", false},
		{copyID, copyID, true},
		{copyID, copyID, false},
		{"", copyID, false},
		{nextID, nextID, true},
	} {
		if f := configure(step.tell); f.BootID != step.want || f.Renamed != step.renamed || len(f.Warnings) != 0 {
			t.Errorf("told %q: %+v", step.tell, f)
		}
	}
	if diff := cmp.Diff([]string{copyID, nextID}, m.bootIDs); diff != "" {
		t.Errorf("boot ids (-want +got):\n%s", diff)
	}
	if len(m.forced) != 5 || len(m.host) != 0 {
		t.Errorf("the clock was forced %d times, synced %d times", len(m.forced), len(m.host))
	}

	tree := filepath.Join(root, bootIDPath)
	if err := os.WriteFile(tree, []byte(nextID+"\n"), 0o644); err != nil { // as it was mounted
		t.Fatal(err)
	}
	i = newIdentity(root, m)
	if f := configure(nextID); f.Renamed || f.BootID != nextID {
		t.Errorf("the next server: %+v", f)
	}
	m.bootIDErr = errors.New("no mount")
	if f := configure(copyID); f.BootID != copyID || len(f.Warnings) != 1 {
		t.Errorf("a name that programs can't see: %+v", f)
	}
	if f := configure(""); f.BootID != copyID {
		t.Errorf("and later: %+v", f)
	}
}

func TestFilesOfTheImage(t *testing.T) {
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  map[string]string // of hosts and resolv.conf, and what they point to
	}{
		{
			"its own files stay",
			map[string]string{"etc/hosts": "127.0.0.1 localhost\n", "etc/resolv.conf": "nameserver 9.9.9.9\n"},
			map[string]string{"hosts": "127.0.0.1 localhost\n", "resolv.conf": "nameserver 9.9.9.9\n"},
		},
		{
			"blank files don't say anything",
			map[string]string{"etc/hosts": "", "etc/resolv.conf": "\n \n"},
			map[string]string{"hosts": ourHosts, "resolv.conf": ourDNS},
		},
		{
			"dangling links are replaced",
			map[string]string{"etc/hosts": "->hosts", "etc/resolv.conf": "->/run/systemd/resolve/stub-resolv.conf"},
			map[string]string{"hosts": ourHosts, "resolv.conf": ourDNS},
		},
		{
			"a link out of the root is dangling inside",
			map[string]string{"etc/resolv.conf": "->../../../../../../../../../etc/passwd"},
			map[string]string{"hosts": ourHosts, "resolv.conf": ourDNS},
		},
		{
			"a link to a file that says something stays",
			map[string]string{"etc/resolv.conf": "->/etc/real", "etc/real": "nameserver 1.1.1.1\n", "etc/hosts": "->real"},
			map[string]string{"hosts": "->real", "resolv.conf": "->/etc/real", "real": "nameserver 1.1.1.1\n"},
		},
		{
			"what hutch wrote before is written again",
			map[string]string{"etc/hosts": marker + "\n1.2.3.4 old\n", "etc/resolv.conf": marker + "\n"},
			map[string]string{"hosts": ourHosts, "resolv.conf": ourDNS},
		},
		{
			"without the marker it is the user's",
			map[string]string{"etc/hosts": "#" + marker + "\n1.2.3.4 mine\n"},
			map[string]string{"hosts": "#" + marker + "\n1.2.3.4 mine\n", "resolv.conf": ourDNS},
		},
		{
			"leftovers of a crash are no hindrance",
			map[string]string{"etc/.hutch-hosts": "->/etc/real", "etc/.hutch-machine-id": "half", "etc/real": "x"},
			map[string]string{"hosts": ourHosts, "resolv.conf": ourDNS, "real": "x"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := tree(t, tc.files)
			facts, err := newIdentity(root, &machine{}).Configure(testenv.Context(t), config())
			if err != nil || len(facts.Warnings) != 0 {
				t.Errorf("error = %v, warnings = %q", err, facts.Warnings)
			}
			tc.want["hostname"], tc.want["machine-id"] = "sb-1\n", machineID+"\n"
			if diff := cmp.Diff(tc.want, etc(t, root)); diff != "" {
				t.Errorf("/etc (-want +got):\n%s", diff)
			}
		})
	}
}

// TestLinksAreNotFollowed plants links where files are always written.
func TestLinksAreNotFollowed(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	root := tree(t, map[string]string{
		"etc/machine-id": "->" + outside, "etc/hostname": "->../other", "other": "inside",
	})
	if _, err := newIdentity(root, &machine{}).Configure(testenv.Context(t), config()); err != nil {
		t.Fatal(err)
	}
	if got := etc(t, root); got["machine-id"] != machineID+"\n" || got["hostname"] != "sb-1\n" {
		t.Errorf("/etc = %q", got)
	}
	for path, want := range map[string]string{outside: "precious", filepath.Join(root, "other"): "inside"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", path, got, err, want)
		}
	}
}

func TestWhatCannotBeWrittenIsAWarning(t *testing.T) {
	root := tree(t, map[string]string{"etc/machine-id/x": "", "etc/hostname/x": ""})
	if err := unix.Mkfifo(filepath.Join(root, "etc/resolv.conf"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(root, "proc")); err != nil {
		t.Fatal(err)
	}
	m := &machine{clockErr: errors.New("no such clock")}
	facts, err := newIdentity(root, m).Configure(testenv.Context(t), config())
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(facts.Warnings, "\n")
	for _, want := range []string{"no such clock", "write /etc/machine-id: ", "write /etc/hostname: ", "boot_id"} {
		if !strings.Contains(all, want) {
			t.Errorf("no warning with %q in:\n%s", want, all)
		}
	}
	if got := etc(t, root); got["hosts"] != ourHosts {
		t.Errorf("the others were given up: %q", got)
	}
	for name := range etc(t, root) {
		if strings.HasPrefix(name, ".hutch-") {
			t.Errorf("%s is left", name)
		}
	}
}

func TestKernelFailuresAreErrors(t *testing.T) {
	for name, m := range map[string]*machine{
		"reseed random generator": {entropyErr: unix.EPERM},
		"set hostname sb-1":       {hostnameErr: unix.EPERM},
		"configure eth0":          {linkErr: unix.EPERM},
	} {
		i := newIdentity(tree(t, nil), m)
		_, err := i.Configure(testenv.Context(t), config())
		if !errors.Is(err, unix.EPERM) || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%s: error = %v", name, err)
		}
		if i.User() != "" {
			t.Errorf("%s: commands already run as %q", name, i.User())
		}
	}
}

func TestBadConfigsChangeNothing(t *testing.T) {
	for _, tc := range []struct {
		field string
		spoil func(*Config)
	}{
		{"sandbox_id", func(c *Config) { c.ID = "sb_1" }},
		{"sandbox_id", func(c *Config) { c.ID = "-sb" }},
		{"sandbox_id", func(c *Config) { c.ID = "a\nb" }},
		{"sandbox_id", func(c *Config) { c.ID = strings.Repeat("x", 64) }},
		{"machine_id", func(c *Config) { c.MachineID = machineID[1:] }},
		{"machine_id", func(c *Config) { c.MachineID = strings.ToUpper(machineID) }},
		{"boot_id", func(c *Config) { c.BootID = machineID }},
		{"boot_id", func(c *Config) { c.BootID = "0B3F1C52-6A9D-4E0F-8D21-5C7E9A1B2C3D" }},
		{"boot_id", func(c *Config) { c.BootID = "0b3f1c52-6a9d-4e0f-8d21-5c7e9a1b2c3" }},
		{"boot_id", func(c *Config) { c.BootID = "0b3f1c52-6a9d-4e0f-8d21-5c7e9a1b2c\n\n" }},
		{"entropy", func(c *Config) { c.Entropy = make([]byte, 31) }},
		{"entropy", func(c *Config) { c.Entropy = make([]byte, maxEntropy+1) }},
		{"env", func(c *Config) { c.Env = map[string]string{"A=B": ""} }},
		{"env", func(c *Config) { c.Env = map[string]string{"": "x"} }},
		{"env", func(c *Config) { c.Env = map[string]string{"A": "x\x00y"} }},
		{"default_user", func(c *Config) { c.User = "a:b" }},
		{"default_cwd", func(c *Config) { c.Cwd = "srv" }},
		{"network.address", func(c *Config) { c.Network.Address = "198.18.0.2" }},
		{"network.gateway", func(c *Config) { c.Network.Gateway = "gate" }},
		{"network.gateway", func(c *Config) { c.Network.Gateway = "198.18.0.9" }},
		{"network.gateway", func(c *Config) { c.Network.Address = "" }},
		{"network.mtu", func(c *Config) { c.Network.MTU = 100 }},
		{"network.dns", func(c *Config) { c.Network.DNS = []string{"one.one.one.one"} }},
		{"network.dns", func(c *Config) { c.Network.DNS = make([]string, maxDNS+1) }},
	} {
		root, m, c := tree(t, nil), &machine{}, config()
		tc.spoil(&c)
		_, err := newIdentity(root, m).Configure(testenv.Context(t), c)
		var fe *fault.Error
		if !errors.As(err, &fe) || fe.Class != fault.Invalid || fe.Field != tc.field {
			t.Errorf("error = %v, want field %s", err, tc.field)
		}
		if len(etc(t, root)) != 0 || len(m.entropy)+len(m.links)+len(m.host)+m.hostnames != 0 {
			t.Errorf("%v, but something was done", err)
		}
	}
}

func TestACancelledCallDoesNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m := &machine{}
	if _, err := newIdentity(tree(t, nil), m).Configure(ctx, config()); !errors.Is(err, context.Canceled) || len(m.entropy) != 0 {
		t.Errorf("error = %v, machine %+v", err, m)
	}
}

func TestDefaultsAreReadWhileConfigured(t *testing.T) {
	i := newIdentity(tree(t, nil), &machine{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				if _, err := i.Configure(t.Context(), config()); err != nil {
					t.Errorf("configure: %v", err)
				}
			}
		})
		wg.Go(func() {
			for range 200 {
				if u := i.User(); u != "" && (u != "app" || i.Env()["A"] != "1" || i.Cwd() != "/srv") {
					t.Errorf("defaults torn: %q", u)
				}
			}
		})
	}
	wg.Wait()
}
