package recipe

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// A .deb is an ar archive of three members: debian-binary, control.tar and
// data.tar, the tars packed (deb(5)). apt has verified the packages read here;
// they are still read with bounds, for a mistake must not cost the host.

const (
	arMagic  = "!<arch>\n"
	arHeader = 60
	// mostPackage bounds what one package may unpack to here.
	mostPackage = 512 << 20
)

// readDeb calls visit for every entry of a package's data and returns the
// fields of its control file.
func readDeb(file string, visit func(*tar.Header, io.Reader) error) (control map[string]string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	control, err = readDebStream(bufio.NewReader(f), visit)
	if err != nil {
		return nil, fmt.Errorf("read package %s: %w", file, err)
	}
	return control, nil
}

func readDebStream(r io.Reader, visit func(*tar.Header, io.Reader) error) (map[string]string, error) {
	magic := make([]byte, len(arMagic))
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != arMagic {
		return nil, errors.New("it is no Debian package")
	}
	var control map[string]string
	for {
		name, size, err := arNext(r)
		if errors.Is(err, io.EOF) {
			return nil, errors.New("it has no data")
		}
		if err != nil {
			return nil, err
		}
		member := io.LimitReader(r, size)
		base, comp, _ := strings.Cut(name, ".tar")
		switch base {
		case "control":
			if control, err = readControl(member, comp); err != nil {
				return nil, err
			}
		case "data":
			return control, eachEntry(member, comp, visit)
		}
		if _, err := io.Copy(io.Discard, member); err != nil {
			return nil, err
		}
		if size%2 == 1 {
			if _, err := io.CopyN(io.Discard, r, 1); err != nil {
				return nil, err
			}
		}
	}
}

// arNext reads the header of an ar member.
func arNext(r io.Reader) (name string, size int64, err error) {
	var h [arHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return "", 0, err
	}
	size, err = strconv.ParseInt(strings.TrimSpace(string(h[48:58])), 10, 64)
	if err != nil || size < 0 || string(h[58:]) != "`\n" {
		return "", 0, errors.New("its archive is damaged")
	}
	return strings.TrimSuffix(strings.TrimSpace(string(h[:16])), "/"), size, nil
}

// eachEntry calls visit for every entry of a tar packed as its suffix says.
func eachEntry(r io.Reader, suffix string, visit func(*tar.Header, io.Reader) error) error {
	var z io.Reader
	var err error
	switch suffix {
	case "":
		z = r
	case ".gz":
		z, err = gzip.NewReader(r)
	case ".xz":
		z, err = xz.NewReader(bufio.NewReader(r))
	case ".zst":
		var d *zstd.Decoder
		if d, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1)); err == nil {
			defer d.Close()
			z = d
		}
	default:
		err = fmt.Errorf("its tar is packed as %q, which is not known", suffix)
	}
	if err != nil {
		return err
	}
	tr := tar.NewReader(io.LimitReader(z, mostPackage))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := visit(h, tr); err != nil {
			return err
		}
	}
}

// readControl reads the fields of a control file; continued lines stay out.
func readControl(r io.Reader, suffix string) (map[string]string, error) {
	fields := map[string]string{}
	err := eachEntry(r, suffix, func(h *tar.Header, r io.Reader) error {
		if strings.TrimPrefix(h.Name, "./") != "control" {
			return nil
		}
		b, err := io.ReadAll(io.LimitReader(r, 1<<20))
		if err != nil {
			return err
		}
		for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
			if k, v, ok := strings.Cut(sc.Text(), ":"); ok && !strings.HasPrefix(k, " ") {
				fields[k] = strings.TrimSpace(v)
			}
		}
		return nil
	})
	return fields, err
}
