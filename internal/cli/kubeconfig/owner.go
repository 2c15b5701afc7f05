package kubeconfig

import (
	"io/fs"
	"os"
	"syscall"
)

// keepOwner gives f the owner of another file, which only root can.
func keepOwner(f *os.File, like fs.FileInfo) error {
	st, ok := like.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}
