package kernel

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
)

// writeModulesDisk writes the tree below dir as an ext4 filesystem to path.
func writeModulesDisk(path, dir string) error {
	out, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("make modules disk: %w", err)
	}
	defer out.Close()
	pr, pw := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		pw.CloseWithError(writeTree(pw, dir))
	}()
	err = tar2ext4.ConvertTarToExt4(pr, out, tar2ext4.MaximumDiskSize(4<<30))
	pr.CloseWithError(err)
	<-written
	if err == nil {
		err = out.Sync()
	}
	if err != nil {
		return fmt.Errorf("make modules disk: %w", err)
	}
	return nil
}

// writeTree writes dir as a tar in the order of names, owned by root and
// without times: the same tree gives the same bytes. Links to sources outside
// ("build", "source") are left out.
func writeTree(w io.Writer, dir string) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		return addFile(tw, dir, path)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func addFile(tw *tar.Writer, dir, path string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	h, err := tar.FileInfoHeader(fi, "")
	if err != nil {
		return err
	}
	name, err := filepath.Rel(dir, path)
	if err != nil {
		return err
	}
	*h = tar.Header{Typeflag: h.Typeflag, Name: name, Size: h.Size, Mode: h.Mode & 0o755, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	if fi.IsDir() {
		h.Name += "/"
	}
	if err := tw.WriteHeader(h); err != nil || fi.IsDir() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}
