package runtime

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/hutch-run/hutch/internal/guest/rootfs"
)

// What the daemons read, on a tmpfs of root's.
const (
	containerdConfig = "/run/hutch/containerd.toml"
	dockerdConfig    = "/run/hutch/docker.json"
	dockerdPID       = "/run/docker.pid"
)

// maxConfig bounds what is read of an image's configuration, in bytes.
const maxConfig = 1 << 20

// readConfig returns a file of the image; nil: it has none.
func (r *Runtime) readConfig(path string) ([]byte, error) {
	f, err := rootfs.Open(filepath.Join(r.p.root, "/"), path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	return io.ReadAll(io.LimitReader(f, maxConfig))
}

// writeConfig writes a file that a daemon reads, whole or not at all.
func (r *Runtime) writeConfig(path string, content []byte) error {
	path = r.at(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// writeContainerdConfig takes the image's configuration, or else our own. Where
// things are is said by flags, which win.
func (r *Runtime) writeContainerdConfig() error {
	const file = "/etc/containerd/config.toml"
	image, err := r.readConfig(file)
	if err != nil {
		return err
	}
	if image != nil && configVersion(image) < 2 {
		r.p.Log.Warn("containerd goes without the image's configuration: it has no version or an old one", "file", file)
		image = nil
	}
	if image == nil {
		image = r.ownContainerdConfig()
	}
	return r.writeConfig(containerdConfig, image)
}

// configVersion returns the version that a configuration of containerd says, 0
// when it says none. That is among its first keys, before any table.
func configVersion(toml []byte) (version int) {
	for line := range bytes.Lines(toml) {
		line = bytes.TrimSpace(line)
		if bytes.HasPrefix(line, []byte("[")) {
			return 0
		}
		if n, _ := fmt.Sscanf(strings.ReplaceAll(string(line), " ", ""), "version=%d", &version); n == 1 {
			return version
		}
	}
	return 0
}

// ownContainerdConfig serves Docker, and Kubernetes where the plugins for its
// network are in one of the usual places.
func (r *Runtime) ownContainerdConfig() []byte {
	plugins := "/opt/cni/bin"
	if _, err := os.Stat(r.at("/usr/lib/cni")); err == nil {
		plugins = "/usr/lib/cni" // Debian's
	}
	return fmt.Appendf(nil, `version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = %q
  conf_dir = "/etc/cni/net.d"
`, plugins)
}

// writeDockerdConfig lays the image's configuration over ours, and over both
// what must be so. Dockerd takes no option twice, so all go into one file.
func (r *Runtime) writeDockerdConfig(now map[string]any) error {
	config := map[string]any{
		"live-restore":   true,
		"userland-proxy": false,
	}
	const file = "/etc/docker/daemon.json"
	image, err := r.readConfig(file)
	if err != nil {
		return err
	}
	if len(bytes.TrimSpace(image)) > 0 {
		if err := json.Unmarshal(image, &config); err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
	}
	hosts, _ := config["hosts"].([]any)
	maps.Copy(config, map[string]any{
		"hosts":      append([]any{"unix://" + r.docker.socket}, hosts...),
		"containerd": r.at(ContainerdSocket),
		"exec-root":  r.at("/run/docker"),
		"pidfile":    r.at(dockerdPID),
	})
	maps.Copy(config, now)
	b, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	return r.writeConfig(dockerdConfig, append(b, '\n'))
}
