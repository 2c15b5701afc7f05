package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hutch-run/hutch/internal/fault"
)

// files is a set of files by slash-separated names: a directory, or an archive
// with an index. A name that is not there is fs.ErrNotExist.
type files interface {
	open(name string) (io.ReadCloser, error)
}

// dirFiles are the files below a directory. os.Root keeps links that a hostile
// layout holds from leading out of it.
type dirFiles struct{ root *os.Root }

func (d dirFiles) open(name string) (io.ReadCloser, error) {
	f, err := d.root.Open(name)
	if err != nil {
		return nil, err
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("open %s: not a regular file: %w", name, fs.ErrNotExist), err, f.Close())
	}
	return f, nil
}

const (
	layoutMark  = "oci-layout"
	layoutIndex = "index.json"
	saveIndex   = "manifest.json"
)

// layoutContent is an OCI layout as a store of blobs.
type layoutContent struct{ files files }

func (l layoutContent) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	if d.Data != nil && int64(len(d.Data)) == d.Size {
		return io.NopCloser(strings.NewReader(string(d.Data))), nil
	}
	rc, err := l.files.open("blobs/" + d.Digest.Algorithm + "/" + d.Digest.Hex)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Invalid, "the layout lacks its blob %s", d.Digest)
	}
	return rc, err
}

func (l layoutContent) manifest(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	return l.blob(ctx, d)
}

func (l layoutContent) repeatable() bool { return false }

func openLayoutDir(ctx context.Context, s Source, want v1.Platform, lim Limits) (*opened, error) {
	root, err := os.OpenRoot(s.Path)
	if err != nil {
		return nil, fmt.Errorf("open layout: %w", err)
	}
	o, err := openLayout(ctx, s, dirFiles{root}, want, lim)
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	o.close = root.Close
	return o, nil
}

// openLayout finds the image in an OCI layout.
func openLayout(ctx context.Context, s Source, fsys files, want v1.Platform, lim Limits) (*opened, error) {
	raw, err := readAll(fsys, layoutIndex, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Invalid, "%s is no OCI layout, it has no %s; to import a root filesystem, give a tar of it", s, layoutIndex)
	}
	if err != nil {
		return nil, err
	}
	if mark, err := readAll(fsys, layoutMark, maxManifest); err == nil {
		var v struct {
			Version string `json:"imageLayoutVersion"`
		}
		if err := json.Unmarshal(mark, &v); err != nil || !strings.HasPrefix(v.Version, "1.") {
			return nil, fault.New(fault.Invalid, "the OCI layout has version %s, only 1 is known", quote(v.Version))
		}
	}
	var idx v1.IndexManifest
	if err := json.Unmarshal(raw, &idx); err != nil {
		return nil, fault.New(fault.Invalid, "the layout's %s is no valid JSON: %v", layoutIndex, err)
	}
	r := resolver{from: layoutContent{fsys}, want: want, lim: lim}
	d, err := chooseNamed(r, s.Image, idx)
	if err != nil {
		return nil, err
	}
	return r.resolve(ctx, d)
}

// chooseNamed takes one image out of the index of a layout: the one that name
// asks for, else the only one there is, else the one for the platform if all
// have the same name or none.
func chooseNamed(r resolver, name string, idx v1.IndexManifest) (v1.Descriptor, error) {
	var found v1.IndexManifest
	var names []string
	for _, d := range idx.Manifests {
		if mt := d.MediaType; mt != "" && !mt.IsImage() && !mt.IsIndex() {
			continue
		}
		full, tag := d.Annotations["io.containerd.image.name"], d.Annotations["org.opencontainers.image.ref.name"]
		shown := full
		if shown == "" {
			shown = tag
		}
		names = append(names, shown)
		if name == "" || sameImage(name, full) || name == tag || name == d.Digest.String() {
			found.Manifests = append(found.Manifests, d)
		}
	}
	distinct := slices.Compact(slices.Sorted(slices.Values(names)))
	switch {
	case len(idx.Manifests) == 0:
		return v1.Descriptor{}, fault.New(fault.Invalid, "the layout holds no image")
	case len(found.Manifests) == 0 && name != "":
		return v1.Descriptor{}, fault.New(fault.Invalid, "the layout has no image %s; it has %s", quote(name), list(distinct))
	case len(found.Manifests) == 1:
		return found.Manifests[0], nil
	case name == "" && len(distinct) > 1:
		return v1.Descriptor{}, fault.New(fault.Invalid, "the layout holds several images, say which: %s", list(distinct))
	}
	return r.choose(v1.Descriptor{}, found)
}

// sameImage compares two names of images as docker does: "app" is
// "docker.io/library/app:latest".
func sameImage(a, b string) bool {
	norm := func(s string) string {
		s = strings.TrimPrefix(s, "docker.io/")
		s = strings.TrimPrefix(s, "index.docker.io/")
		s = strings.TrimPrefix(s, "library/")
		if !strings.Contains(s[strings.LastIndexByte(s, '/')+1:], ":") {
			s += ":latest"
		}
		return s
	}
	return a != "" && b != "" && norm(a) == norm(b)
}

// list writes names for an error message.
func list(names []string) string {
	const most = 20
	var out []string
	for _, n := range names {
		if n == "" {
			n = "(one without a name)"
		}
		out = append(out, strings.Trim(quote(n), `"`))
	}
	if len(out) > most {
		out = append(out[:most], "and more")
	}
	return strings.Join(out, ", ")
}

// readAll reads a small file whole.
func readAll(fsys files, name string, most int64) ([]byte, error) {
	rc, err := fsys.open(name)
	if err != nil {
		return nil, err
	}
	defer rc.Close() //nolint:errcheck // only read
	b, err := io.ReadAll(io.LimitReader(rc, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > most {
		return nil, fault.New(fault.Invalid, "%s is longer than %d bytes, the limit", name, most)
	}
	return b, nil
}
