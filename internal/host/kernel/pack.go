package kernel

// Version is the version of the pack.json format written by this build.
const Version = 1

// Pack is a kernel with what it needs to boot: all files are read-only, and ID
// is a digest over their contents.
type Pack struct {
	Version     int    `json:"version"`
	ID          string `json:"id"`      // 16 hex digits
	Release     string `json:"release"` // "6.1.0-56-cloud-amd64"
	Source      string `json:"source"`  // where the kernel came from, for people
	AgentDigest string `json:"agent_digest"`

	Kernel  string `json:"-"` // path of the kernel, unpacked
	Initrd  string `json:"-"` // path of the initramfs that carries hutch-agent
	Modules string `json:"-"` // path of the ext4 disk of /lib/modules/<release>
}

// BootModules are the modules that boot needs before it can read the modules
// disk, and the few that every sandbox needs. Those built into the kernel are
// left out of the initramfs; what they depend on comes along.
func BootModules() []string {
	return []string{
		"virtio_pci", "virtio_blk", "virtio_console", "overlay", "virtio_net", "virtio_rng",
	}
}
