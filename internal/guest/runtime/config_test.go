package runtime

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func (g guest) read(name string) string {
	g.t.Helper()
	b, err := os.ReadFile(filepath.Join(g.root, name))
	if err != nil {
		g.t.Fatal(err)
	}
	return string(b)
}

func TestDockerdConfig(t *testing.T) {
	g := newGuest(t)
	r, _ := g.server()
	ours := func(more map[string]any) map[string]any {
		c := map[string]any{
			"hosts": []any{"unix://" + g.root + "/run/docker.sock"}, "containerd": g.root + "/run/containerd/containerd.sock",
			"exec-root": g.root + "/run/docker", "pidfile": g.root + "/run/docker.pid", "live-restore": true, "userland-proxy": false,
		}
		for k, v := range more {
			c[k] = v
		}
		return c
	}
	for name, tc := range map[string]struct {
		image string
		now   map[string]any
		want  map[string]any
	}{
		"none":  {"", nil, ours(nil)},
		"blank": {" \n", nil, ours(nil)},
		"image": {
			`{"live-restore": false, "hosts": ["tcp://127.0.0.1:2375"], "exec-root": "/x", "dns": ["1.2.3.4"]}`, nil,
			ours(map[string]any{
				"live-restore": false, "dns": []any{"1.2.3.4"},
				"hosts": []any{"unix://" + g.root + "/run/docker.sock", "tcp://127.0.0.1:2375"},
			}),
		},
		"now": {`{"live-restore": true}`, map[string]any{"live-restore": false}, ours(map[string]any{"live-restore": false})},
	} {
		g.file("etc/docker/daemon.json", tc.image)
		if err := r.writeDockerdConfig(tc.now); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got map[string]any
		if err := json.Unmarshal([]byte(g.read(dockerdConfig)), &got); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if now := g.read("etc/docker/daemon.json"); now != tc.image {
			t.Errorf("%s: the image's file was changed: %q", name, now)
		}
	}
	g.file("etc/docker/daemon.json", "{")
	if err := r.writeDockerdConfig(nil); err == nil || !strings.Contains(err.Error(), "/etc/docker/daemon.json") {
		t.Errorf("a broken file: %v", err)
	}
}

func TestContainerdConfig(t *testing.T) {
	g := newGuest(t)
	r, _ := g.server()
	own := "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"/usr/lib/cni\"\n  conf_dir = \"/etc/cni/net.d\"\n"
	for image, want := range map[string]string{
		"":                                    own,
		"disabled_plugins = [\"cri\"]\n":      own, // of containerd 1.0, which newer ones do not read in full
		"# x\nversion = 2\nroot = \"/y\"\n":   "# x\nversion = 2\nroot = \"/y\"\n",
		"version=3\n":                         "version=3\n",
		"root = \"/y\"\n[x]\n  version = 2\n": own,
	} {
		if image != "" {
			g.file("etc/containerd/config.toml", image)
		}
		if err := r.writeContainerdConfig(); err != nil {
			t.Errorf("%q: %v", image, err)
		}
		if diff := cmp.Diff(want, g.read(containerdConfig)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", image, diff)
		}
		os.Remove(filepath.Join(g.root, "etc/containerd/config.toml"))
	}
	// A file that leads out of the image, or that is none, is not read.
	if err := os.Symlink("/dev/zero", filepath.Join(g.root, "etc/containerd/config.toml")); err != nil {
		t.Fatal(err)
	}
	if err := r.writeContainerdConfig(); err != nil {
		t.Errorf("a link to nowhere: %v", err)
	}
}

func TestTheSocketIsWhereClientsLook(t *testing.T) {
	g := newGuest(t)
	r, _ := g.server()
	if err := r.linkSocket(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(g.root, "run/docker.sock")); !os.IsNotExist(err) {
		t.Errorf("where /var/run is /run, something was made: %v", err)
	}
	if err := os.Remove(filepath.Join(g.root, "var/run")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.linkSocket(); err != nil {
			t.Error(err)
		}
	}
	if to, err := os.Readlink(filepath.Join(g.root, "var/run/docker.sock")); err != nil || to != DockerSocket {
		t.Errorf("the link leads to %q, %v", to, err)
	}
}
