package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hutch-run/hutch/internal/fault"
)

// archive is a tar file with an index: the files inside can be opened by name.
type archive struct {
	at     io.ReaderAt
	places map[string]place
}

// place is where a file of an archive is, or what a link in it leads to.
type place struct {
	off, size int64
	link      string // another name of the archive
}

// maxArchived is how many entries an archive of an image may have: some for
// each layer.
const maxArchived = 100_000

// indexArchive reads the headers of a tar of size bytes.
func indexArchive(ctx context.Context, at io.ReaderAt, size int64) (*archive, error) {
	a := &archive{at: at, places: map[string]place{}}
	sec := io.NewSectionReader(at, 0, size) // a Seeker: contents are skipped, not read
	tr := tar.NewReader(sec)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		off, _ := sec.Seek(0, io.SeekCurrent) // cannot fail
		if err != nil {
			return nil, tarError(err, off)
		}
		if n > maxArchived {
			return nil, fault.New(fault.Invalid, "the archive has more than %d entries, no archive of an image has", maxArchived)
		}
		name, err := cleanPath(h.Name, maxPath)
		if err != nil {
			return nil, refuse(h.Name, "%v", err)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			if h.Size > size-off {
				return nil, fault.New(fault.Invalid, "the archive is cut short in %s", quote(h.Name))
			}
			if _, ok := a.places[name]; ok {
				return nil, refuse(h.Name, "the archive has it twice")
			}
			a.places[name] = place{off: off, size: h.Size}
		case tar.TypeSymlink:
			// Old dockers share layers by links between their directories.
			a.places[name] = place{link: path.Join("/", path.Dir(name), h.Linkname)[1:]}
		case tar.TypeLink:
			a.places[name] = place{link: path.Join("/", h.Linkname)[1:]}
		case tar.TypeDir, tar.TypeXGlobalHeader:
		default:
			return nil, refuse(h.Name, "an archive of an image has files and links only")
		}
	}
}

// find follows links inside the archive.
func (a *archive) find(name string) (place, bool) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for range 8 {
		p, ok := a.places[name]
		if !ok || p.link == "" {
			return p, ok
		}
		name = p.link
	}
	return place{}, false
}

func (a *archive) open(name string) (io.ReadCloser, error) {
	p, ok := a.find(name)
	if !ok {
		return nil, fmt.Errorf("%s: %w", quote(name), fs.ErrNotExist)
	}
	return io.NopCloser(io.NewSectionReader(a.at, p.off, p.size)), nil
}

// savedImage is one image of docker save's manifest.json.
type savedImage struct {
	Config   string   `json:"Config"`
	RepoTags []string `json:"RepoTags"`
	Layers   []string `json:"Layers"`
}

// openSaved finds the image in a docker save archive. Layers are told by their
// unpacked digests only; the archive has no others.
func openSaved(s Source, a *archive, want v1.Platform, lim Limits) (*opened, error) {
	raw, err := readAll(a, saveIndex, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Invalid, "%s is no docker save archive, it has no %s", s, saveIndex)
	}
	if err != nil {
		return nil, err
	}
	var all []savedImage
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fault.New(fault.Invalid, "the archive's %s is not as docker save writes it: %v", saveIndex, err)
	}
	img, err := chooseSaved(all, s.Image)
	if err != nil {
		return nil, err
	}
	blob, err := readAll(a, img.Config, maxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Invalid, "the archive lacks the image's config %s", quote(img.Config))
	}
	if err != nil {
		return nil, err
	}
	o, diffs, err := readConfig(blob, want)
	if err != nil {
		return nil, err
	}
	if len(diffs) != len(img.Layers) {
		return nil, fault.New(fault.Invalid, "the archive lists %d layers, the image's config %d", len(img.Layers), len(diffs))
	}
	if len(diffs) > lim.Layers {
		return nil, fault.New(fault.Invalid, "the image has %d layers, the limit is %d", len(diffs), lim.Layers)
	}
	for i, name := range img.Layers {
		p, ok := a.find(name)
		if !ok {
			return nil, fault.New(fault.Invalid, "the archive lacks layer %d of %d, %s", i+1, len(diffs), quote(name))
		}
		o.layers = append(o.layers, layer{
			name: fmt.Sprintf("layer %d of %d (%.19s)", i+1, len(diffs), diffs[i]), diffID: diffs[i], size: p.size,
			open: func(context.Context) (io.ReadCloser, error) { return a.open(name) },
		})
	}
	return o, nil
}

func chooseSaved(all []savedImage, name string) (savedImage, error) {
	var names []string
	for _, img := range all {
		for _, tag := range img.RepoTags {
			if name != "" && sameImage(name, tag) {
				return img, nil
			}
		}
		if name != "" && strings.Contains(img.Config, strings.TrimPrefix(name, digestPrefix)) && len(name) >= 12 {
			return img, nil
		}
		names = append(names, strings.Join(img.RepoTags, " "))
	}
	switch {
	case len(all) == 0:
		return savedImage{}, fault.New(fault.Invalid, "the archive holds no image")
	case name != "":
		return savedImage{}, fault.New(fault.Invalid, "the archive has no image %s; it has %s", quote(name), list(names))
	case len(all) > 1:
		return savedImage{}, fault.New(fault.Invalid, "the archive holds several images, say which: %s", list(names))
	}
	return all[0], nil
}
