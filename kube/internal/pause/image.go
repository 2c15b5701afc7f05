// Package pause makes the image of the first process of every pod and puts it into containerd, without a registry.
//
// The image is one layer with one static program, which build.sh compiles into this package. Its digest hangs on the program only. Import does
// nothing when containerd has that very image. The package never removes one. Tests take the image apart and import it into a
// fake containerd; the real one is tried in a VM.
package pause

import (
	"archive/tar"
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Reference is the image's name: containerd's sandbox_image.
const Reference = "hutch.local/pause:1"

//go:embed bin
var programs embed.FS

// blob is a part of the image. Refs are the blobs that it names.
type blob struct {
	desc ocispec.Descriptor
	data []byte
	refs []ocispec.Descriptor
}

func newBlob(mediaType string, data []byte) blob {
	return blob{data: data, desc: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}}
}

// image gives the blobs of the image, its manifest last.
func image() ([]blob, error) {
	program, err := programs.ReadFile("bin/pause")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("make the pause image: the program isn't in this binary; build it with kube/build.sh")
	}
	if err != nil {
		return nil, fmt.Errorf("make the pause image: %w", err)
	}
	return imageOf(program)
}

func imageOf(program []byte) ([]blob, error) {
	files, err := layer(program)
	if err != nil {
		return nil, fmt.Errorf("make the pause image: %w", err)
	}
	l := newBlob(ocispec.MediaTypeImageLayer, files)
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   ocispec.ImageConfig{Entrypoint: []string{"/pause"}, User: "65535:65535"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.desc.Digest}},
	})
	if err != nil {
		return nil, fmt.Errorf("make the pause image: %w", err)
	}
	c := newBlob(ocispec.MediaTypeImageConfig, config)
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: c.desc, Layers: []ocispec.Descriptor{l.desc},
	})
	if err != nil {
		return nil, fmt.Errorf("make the pause image: %w", err)
	}
	m := newBlob(ocispec.MediaTypeImageManifest, manifest)
	m.refs = []ocispec.Descriptor{c.desc, l.desc}
	return []blob{l, c, m}, nil
}

// layer is a tar without times or owners, so that its digest is always the same.
func layer(program []byte) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "pause", Mode: 0o755, Size: int64(len(program)), Format: tar.FormatUSTAR}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
