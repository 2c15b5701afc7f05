package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"github.com/hutch-run/hutch/internal/fault"
)

// filesystemRoom is how much room the ext4 writer keeps for group descriptors.
// It is part of the format: another value gives every image other bytes.
const filesystemRoom = 128 << 30

// writeImage writes the tree as an ext4 filesystem to f, which has to be empty,
// and returns its length.
func writeImage(ctx context.Context, t *tree, f *os.File, progress Progress) (int64, error) {
	pr, pw := io.Pipe()
	emitted := make(chan error, 1)
	go func() {
		bw := bufio.NewWriterSize(pw, 256<<10)
		e := &emitter{ctx: ctx, tw: tar.NewWriter(bw), progress: progress, total: t.count,
			first: map[*inode]string{}, buf: make([]byte, spoolBuffer)}
		err := e.tree(t)
		if err == nil {
			err = bw.Flush()
		}
		pw.CloseWithError(err)
		emitted <- err
	}()
	out := &sparseFile{f: f}
	err := tar2ext4.ConvertTarToExt4(bufio.NewReaderSize(pr, 256<<10), out, tar2ext4.MaximumDiskSize(filesystemRoom))
	pr.CloseWithError(errStopped) // an emitter that is still writing stops
	if eerr := <-emitted; eerr != nil && !errors.Is(eerr, errStopped) {
		return 0, eerr
	}
	if out.err != nil {
		err = out.err
	}
	if err != nil {
		return 0, fmt.Errorf("write the filesystem: %w", err)
	}
	if err := out.finish(); err != nil {
		return 0, fmt.Errorf("write the filesystem: %w", err)
	}
	if err := padBitmaps(f); err != nil {
		return 0, err
	}
	return out.high, nil
}

var errStopped = errors.New("the filesystem writer stopped")

// emitter writes a tree as the one normal tar of its contents: sorted, every
// header in the same form, nothing in it that is not part of the image.
type emitter struct {
	ctx      context.Context
	tw       *tar.Writer
	progress Progress
	done     int64
	total    int64
	first    map[*inode]string // the name under which an inode with several was written
	buf      []byte
}

func (e *emitter) tree(t *tree) error {
	if err := t.root.walk("", e.node); err != nil {
		return err
	}
	return e.tw.Close()
}

func (e *emitter) node(path string, n *node) error {
	if err := e.ctx.Err(); err != nil {
		return context.Cause(e.ctx)
	}
	e.done++
	e.progress.tell("writing files", e.done, e.total)
	ino := n.ino
	h := &tar.Header{
		Name: path, Mode: int64(ino.mode), Uid: int(ino.uid), Gid: int(ino.gid),
		ModTime: time.Unix(ino.mtime, 0), AccessTime: time.Unix(ino.mtime, 0), ChangeTime: time.Unix(ino.mtime, 0),
		Format: tar.FormatPAX,
	}
	if ino.names > 1 {
		if first, ok := e.first[ino]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return e.header(path, h)
		}
		e.first[ino] = path
	}
	switch ino.kind {
	case kindFile:
		h.Typeflag, h.Size = tar.TypeReg, ino.size
	case kindDir:
		h.Typeflag = tar.TypeDir
		if path == "" {
			h.Name = "./"
		}
	case kindSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, ino.link
	case kindFifo:
		h.Typeflag = tar.TypeFifo
	default:
		return fault.New(fault.Internal, "%s is a %v in the tree", quote(path), ino.kind)
	}
	for _, x := range ino.xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+x.name] = x.value
	}
	if err := e.header(path, h); err != nil || ino.kind != kindFile || ino.size == 0 {
		return err
	}
	return e.contents(path, ino)
}

func (e *emitter) header(path string, h *tar.Header) error {
	if err := e.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", quote(path), err)
	}
	return nil
}

// contents copies a file. A big one looks at ctx on its way.
func (e *emitter) contents(path string, ino *inode) error {
	r := ino.spool.open(ino.off, ino.size)
	for left := ino.size; left > 0; {
		if err := e.ctx.Err(); err != nil {
			return context.Cause(e.ctx)
		}
		n, err := io.ReadFull(r, e.buf[:min(left, int64(len(e.buf)))])
		if err != nil {
			return fmt.Errorf("read %s from its spool: %w", quote(path), err)
		}
		if _, err := e.tw.Write(e.buf[:n]); err != nil {
			return fmt.Errorf("write %s: %w", quote(path), err)
		}
		left -= int64(n)
	}
	return nil
}
