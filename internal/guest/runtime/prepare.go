package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/modules"
)

// kernelModules is what containers' file systems and Docker's network are made
// of. The tools that need them would ask for them by the image's modprobe,
// which may not be there.
func kernelModules() []string {
	return []string{
		"overlay", "veth", "bridge", "br_netfilter",
		"nf_conntrack", "nf_nat", "nf_conntrack_netlink",
		"nf_tables", "nft_compat", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_fib_inet", "nft_reject_inet",
		"xt_conntrack", "xt_addrtype", "xt_nat", "xt_MASQUERADE", "xt_comment", "xt_mark", "xt_tcpudp", "xt_multiport",
		"ip_tables", "iptable_nat", "iptable_filter",
	}
}

// prepareKernel brings the kernel into the state that the daemons take for
// granted. What does not work out is told by the daemon that needs it, in words
// that people can look up; here it goes to the log.
func prepareKernel(context.Context) error {
	errs := []error{modules.Load(kernelModules()...)}
	// Mounts of the host must reach containers that ask for it, as everywhere.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		errs = append(errs, fmt.Errorf("share mounts: %w", err))
	}
	for key, value := range map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/bridge/bridge-nf-call-iptables":  "1", // rules count between containers of one bridge
		"net/bridge/bridge-nf-call-ip6tables": "1",
		"fs/inotify/max_user_instances":       "8192",   // 128 are for one desktop
		"vm/max_map_count":                    "262144", // what search engines ask for
	} {
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (r *Runtime) prepareContainerd(ctx context.Context) error {
	if err := r.p.kernel(ctx); err != nil {
		r.p.Log.Warn("prepare the kernel for containers", "error", err)
	}
	for _, dir := range []string{"/run/containerd", "/var/lib/containerd"} {
		if err := os.MkdirAll(r.at(dir), 0o711); err != nil {
			return err
		}
	}
	return r.writeContainerdConfig()
}

func (r *Runtime) prepareDockerd(context.Context) error {
	for _, dir := range []string{"/run/docker", "/var/lib/docker"} {
		if err := os.MkdirAll(r.at(dir), 0o711); err != nil {
			return err
		}
	}
	// A pid in there may be another program's by now.
	if err := r.removeStale(dockerdPID); err != nil {
		return err
	}
	if err := r.linkSocket(); err != nil {
		r.p.Log.Warn("link Docker's socket to where clients look for it", "error", err)
	}
	return r.writeDockerdConfig(nil)
}

// linkSocket makes the socket be found in /var/run, where every client looks,
// also in an image whose /var/run is not /run.
func (r *Runtime) linkSocket() error {
	usual := r.at("/var/run/docker.sock")
	if err := os.MkdirAll(filepath.Dir(usual), 0o755); err != nil {
		return err
	}
	run, err := os.Stat(r.at("/run"))
	if err != nil {
		return err
	}
	other, err := os.Stat(filepath.Dir(usual))
	if err != nil || os.SameFile(run, other) {
		return err
	}
	if err := os.Symlink(DockerSocket, usual); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
