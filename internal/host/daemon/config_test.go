package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

func writeConfig(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hutchd.toml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigFileSaysWhatFlagsSay(t *testing.T) {
	path := writeConfig(t, `
root = "/srv/hutch"
listen = ["unix:/run/h.sock", "tcp:127.0.0.1:7070"]
accel = "tcg"
stop_vms = true
[limits]
max_sandboxes = 7
[slots]
prepared = 0
dns = ["192.0.2.53"]
[ports]
bind = "any"
privileged = true
[shares]
allow = ["/srv/a", "/srv/b c"]
`)
	c, err := ReadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.Root, want.Accel, want.StopVMs = "/srv/hutch", "tcg", true
	want.Listen = []string{"unix:/run/h.sock", "tcp:127.0.0.1:7070"}
	want.Limits.MaxSandboxes, want.Slots = 7, SlotsConfig{DNS: []string{"192.0.2.53"}}
	want.Ports = PortsConfig{Bind: "any", Privileged: true}
	want.Shares = SharesConfig{Allow: []string{"/srv/a", "/srv/b c"}}
	if d := cmp.Diff(want, c); d != "" {
		t.Error(d)
	}
}

func TestFlagsWinOverTheFile(t *testing.T) {
	path := writeConfig(t, "root = \"/srv/hutch\"\naccel = \"tcg\"\n")
	var f flags
	c := &cobra.Command{}
	f.register(c)
	if err := c.ParseFlags([]string{"--config", path, "--accel", "auto", "--listen", "unix:/a", "--listen", "unix:/b"}); err != nil {
		t.Fatal(err)
	}
	got, err := f.config(c)
	if err != nil {
		t.Fatal(err)
	}
	if got.Root != "/srv/hutch" || got.Accel != "auto" || cmp.Diff([]string{"unix:/a", "unix:/b"}, got.Listen) != "" {
		t.Errorf("%+v", got)
	}
}

func TestBadConfigSaysWhatIsWanted(t *testing.T) {
	for content, say := range map[string]string{
		"vmm = \"bhyve\"\n":         "qemu",
		"accel = \"fast\"\n":        "auto, kvm or tcg",
		"tls_cert = \"x\"\n":        "tls_key",
		"log_level = \"loud\"\n":    "debug, info, warn or error",
		"log_format = \"xml\"\n":    "text or json",
		"[ports]\nbind = \"lan\"\n": "loopback, any or none",
		"no_such_key = 1\n":         "no_such_key",
		"[limits]\nmax_typo = 1\n":  "max_typo",
		"root = \n":                 "hutchd.toml",
	} {
		path := writeConfig(t, content)
		c, err := ReadConfig(path)
		if err == nil {
			_, err = c.finish()
		}
		if err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%q: error %v does not say %q", content, err, say)
		}
	}
	if _, err := ReadConfig("/no/such/file.toml"); err == nil {
		t.Error("a missing file that was asked for is no error")
	}
}

func TestDefaultsFollowTheDirectories(t *testing.T) {
	c := DefaultConfig()
	c.RunDir = "/srv/run"
	c, err := c.finish()
	if err != nil {
		t.Fatal(err)
	}
	if cmp.Diff([]string{"unix:/srv/run/hutchd.sock"}, c.Listen) != "" || filepath.Base(c.Agent) != "hutch-agent" {
		t.Errorf("%+v", c)
	}
}

func TestRootsHaveTheirOwnTags(t *testing.T) {
	if rootTag("/a") == rootTag("/b") || len(rootTag("/a")) != 8 {
		t.Errorf("tags %s and %s", rootTag("/a"), rootTag("/b"))
	}
}

func TestSharedDirectoriesArePlain(t *testing.T) {
	for _, bad := range []string{"/", "srv", "/srv/", "/srv/../etc", ""} {
		c := DefaultConfig()
		c.Shares.Allow = []string{bad}
		if _, err := c.finish(); err == nil || !strings.Contains(err.Error(), "shares.allow") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
