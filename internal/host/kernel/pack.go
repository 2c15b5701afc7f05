package kernel

// Pack is a kernel with what it needs to boot: all files are read-only and
// content-addressed by ID.
type Pack struct {
	Version int    `json:"version"`
	ID      string `json:"id"`      // hex digest over all parts
	Release string `json:"release"` // "6.1.0-56-cloud-amd64"
	Kernel  string `json:"-"`       // path of vmlinuz
	Initrd  string `json:"-"`       // path of the initramfs that carries hutch-agent
	Modules string `json:"-"`       // path of the ext4 disk of /lib/modules/<release>
}
