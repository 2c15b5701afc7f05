package recipe

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"regexp"
	"time"
)

// additions is what a system has that no package brings, and what it has not
// that one does.
type additions struct {
	sources string // of apt
	without *regexp.Regexp
	extras  []extra
}

// extra is a file that no package brings, or one that is there instead of a
// package's: with text, with the contents of a file of the host, or a link.
type extra struct {
	name string // "usr/bin/x"
	mode int64
	text string
	file string // a path on the host
	link string // what it points at
}

// replaces tells whether an entry of the system is left out.
func (a additions) replaces(name string, h *tar.Header) bool {
	if h.Typeflag == tar.TypeDir {
		return false
	}
	for _, e := range a.extras {
		if e.name == name {
			return true
		}
	}
	return a.without != nil && a.without.MatchString(name)
}

// write writes what is added, as made at a time. Directories above it that no
// entry made are the reader's to make.
func (a additions) write(tw *tar.Writer, at time.Time) error {
	list := append([]extra{{name: "etc/apt/sources.list.d/debian.sources", mode: 0o644, text: a.sources}}, a.extras...)
	for _, e := range list {
		h := tar.Header{Name: "./" + e.name, Typeflag: tar.TypeReg, Mode: e.mode, ModTime: at}
		var err error
		switch {
		case e.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, e.link, 0o777
			err = tw.WriteHeader(&h)
		case e.file != "":
			err = writeFile(tw, &h, e.file)
		default:
			err = writeText(tw, &h, e.text)
		}
		if err != nil {
			return fmt.Errorf("add %s: %w", e.name, err)
		}
	}
	return nil
}

// writeFile writes a file of the host, however large it is.
func writeFile(tw *tar.Writer, h *tar.Header, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h.Size = info.Size()
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.CopyN(tw, f, h.Size)
	return err
}
