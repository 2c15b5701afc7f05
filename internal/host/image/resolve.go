package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hutch-run/hutch/internal/fault"
)

// content is a store of manifests and blobs by digest: a registry or a layout.
type content interface {
	// manifest opens a manifest or index; blob anything else. Neither has to
	// check what it returns.
	manifest(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
	blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
	// repeatable tells whether a blob that broke off may be opened again.
	repeatable() bool
}

// maxNesting is how deep indexes may refer to indexes.
const maxNesting = 4

// resolver finds the image for a platform behind a descriptor.
type resolver struct {
	from content
	want v1.Platform
	lim  Limits
}

// resolve follows d to an image and lists its layers.
func (r resolver) resolve(ctx context.Context, d v1.Descriptor) (*opened, error) {
	for range maxNesting {
		raw, err := r.fetch(ctx, d, maxManifest, r.from.manifest)
		if err != nil {
			return nil, fmt.Errorf("read manifest %s: %w", d.Digest, err)
		}
		mt, err := manifestType(d.MediaType, raw)
		if err != nil {
			return nil, err
		}
		if mt.IsImage() {
			return r.image(ctx, d, raw)
		}
		var idx v1.IndexManifest
		if err := json.Unmarshal(raw, &idx); err != nil {
			return nil, fault.New(fault.Invalid, "index %s is no valid JSON: %v", d.Digest, err)
		}
		if d, err = r.choose(d, idx); err != nil {
			return nil, err
		}
	}
	return nil, fault.New(fault.Invalid, "the image's indexes refer to each other more than %d deep", maxNesting)
}

// manifestType tells what a manifest is, by the descriptor that led to it and
// by itself; those have to agree where both say something.
func manifestType(said types.MediaType, raw []byte) (types.MediaType, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Layers        json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fault.New(fault.Invalid, "the manifest is no valid JSON: %v", err)
	}
	known := func(t types.MediaType) bool { return t.IsImage() || t.IsIndex() }
	mt := m.MediaType
	if !known(mt) {
		mt = said
	}
	switch {
	case m.SchemaVersion == 1 || said == types.DockerManifestSchema1 || said == types.DockerManifestSchema1Signed:
		return "", fault.New(fault.Invalid, "the image has a manifest of docker's schema 1, which nothing writes since 2016; push it again with a current docker")
	case known(m.MediaType) && known(said) && m.MediaType.IsIndex() != said.IsIndex(),
		m.Manifests != nil && m.Layers != nil:
		return "", fault.New(fault.Invalid, "the manifest is ambiguous: it can be read as an image and as an index")
	case known(mt):
		return mt, nil
	case m.Manifests != nil:
		return types.OCIImageIndex, nil
	case m.Layers != nil:
		return types.OCIManifestSchema1, nil
	}
	return "", fault.New(fault.Invalid, "there is no container image here, but a %s", quote(string(mt)))
}

// choose takes the image for the platform out of an index.
func (r resolver) choose(at v1.Descriptor, idx v1.IndexManifest) (v1.Descriptor, error) {
	var have []string
	var open []v1.Descriptor // say no platform; the config will
	for _, d := range idx.Manifests {
		mt := d.MediaType
		if mt != "" && !mt.IsImage() && !mt.IsIndex() || d.Annotations["vnd.docker.reference.type"] != "" {
			continue // attestations and other attachments
		}
		switch {
		case d.Platform == nil || d.Platform.OS == "" && d.Platform.Architecture == "":
			open = append(open, d)
		case matches(*d.Platform, r.want):
			return d, nil
		case d.Platform.OS != "unknown":
			have = append(have, platformName(*d.Platform))
		}
	}
	if len(open) == 1 {
		return open[0], nil
	}
	if len(open) > 1 {
		return v1.Descriptor{}, fault.New(fault.Invalid, "the index %s has %d images and says of none for which platform it is", at.Digest, len(open))
	}
	return v1.Descriptor{}, noPlatform(r.want, have)
}

func noPlatform(want v1.Platform, have []string) error {
	if len(have) == 0 {
		return fault.New(fault.Invalid, "the index holds no image for %s, nor for any other platform", platformName(want))
	}
	slices.Sort(have)
	have = slices.Compact(have)
	const most = 20
	more := ""
	if len(have) > most {
		have, more = have[:most], " and more"
	}
	for i := range have {
		have[i] = strings.Trim(quote(have[i]), `"`)
	}
	return fault.New(fault.Invalid, "there is no image for %s; there is one for %s%s", platformName(want), strings.Join(have, ", "), more)
}

// image reads manifest and config of one image.
func (r resolver) image(ctx context.Context, d v1.Descriptor, raw []byte) (*opened, error) {
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fault.New(fault.Invalid, "manifest %s is no valid JSON: %v", d.Digest, err)
	}
	if m.ArtifactType != "" || !m.Config.MediaType.IsConfig() {
		what := string(m.Config.MediaType)
		if m.ArtifactType != "" {
			what = m.ArtifactType
		}
		return nil, fault.New(fault.Invalid, "%s is an artifact of type %s, no container image", d.Digest, quote(what))
	}
	if len(m.Layers) > r.lim.Layers {
		return nil, fault.New(fault.Invalid, "the image has %d layers, the limit is %d", len(m.Layers), r.lim.Layers)
	}
	blob, err := r.fetch(ctx, m.Config, maxConfig, r.from.blob)
	if err != nil {
		return nil, fmt.Errorf("read image config %s: %w", m.Config.Digest, err)
	}
	o, diffs, err := readConfig(blob, r.want)
	if err != nil {
		return nil, err
	}
	if len(diffs) != len(m.Layers) {
		return nil, fault.New(fault.Invalid, "the manifest has %d layers, the image's config %d", len(m.Layers), len(diffs))
	}
	for i, ld := range m.Layers {
		l, err := r.layer(i, len(m.Layers), ld, diffs[i])
		if err != nil {
			return nil, err
		}
		o.layers = append(o.layers, l)
	}
	return o, nil
}

func (r resolver) layer(i, n int, d v1.Descriptor, diffID string) (layer, error) {
	name := fmt.Sprintf("layer %d of %d (%.19s)", i+1, n, d.Digest.String())
	switch {
	case len(d.URLs) > 0 || !d.MediaType.IsDistributable():
		return layer{}, fault.New(fault.Invalid, "%s is a foreign layer: its content is not in the registry but at an address of its own, which is not followed", name)
	case !isLayer(d.MediaType):
		return layer{}, fault.New(fault.Invalid, "%s is of type %s, no layer of a container image", name, quote(string(d.MediaType)))
	case d.Size < 0:
		return layer{}, fault.New(fault.Invalid, "%s has a negative size", name)
	}
	return layer{
		name: name, digest: d.Digest.String(), diffID: diffID, size: d.Size, again: r.from.repeatable(),
		open: func(ctx context.Context) (io.ReadCloser, error) { return r.from.blob(ctx, d) },
	}, nil
}

// isLayer reports whether t is a tar, packed in whatever way; the stream itself
// says which.
func isLayer(t types.MediaType) bool {
	switch t {
	case types.OCILayer, types.OCILayerZStd, types.OCIUncompressedLayer, types.DockerLayer, types.DockerUncompressedLayer,
		"application/vnd.docker.image.rootfs.diff.tar.zstd":
		return true
	}
	return false
}

// fetch reads a small blob whole and checks it against its descriptor.
func (r resolver) fetch(ctx context.Context, d v1.Descriptor, most int64, open func(context.Context, v1.Descriptor) (io.ReadCloser, error)) (b []byte, err error) {
	if d.Size > most {
		return nil, fault.New(fault.Invalid, "it is said to be %d bytes long, the limit is %d", d.Size, most)
	}
	h, err := newHash(d.Digest.String())
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, fault.New(fault.Invalid, "it is referred to without a digest")
	}
	rc, err := open(ctx, d)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	var buf bytes.Buffer
	if _, err := io.Copy(io.MultiWriter(&buf, h), io.LimitReader(rc, most+1)); err != nil {
		return nil, err
	}
	switch {
	case int64(buf.Len()) > most:
		return nil, fault.New(fault.Invalid, "it is longer than %d bytes, the limit", most)
	case digestOf(d.Digest.String(), h) != d.Digest.String():
		return nil, fault.New(fault.Invalid, "its digest is %s, not %s", digestOf(d.Digest.String(), h), d.Digest)
	}
	return buf.Bytes(), nil
}

// readConfig reads an image's config file.
func readConfig(raw []byte, want v1.Platform) (*opened, []string, error) {
	var cf v1.ConfigFile
	if err := json.Unmarshal(raw, &cf); err != nil {
		return nil, nil, fault.New(fault.Invalid, "the image's config is no valid JSON: %v", err)
	}
	have := v1.Platform{OS: cf.OS, Architecture: cf.Architecture, Variant: cf.Variant}
	if (have.OS != "" || have.Architecture != "") && !matches(have, want) {
		return nil, nil, noPlatform(want, []string{platformName(have)})
	}
	if cf.RootFS.Type != "" && cf.RootFS.Type != "layers" {
		return nil, nil, fault.New(fault.Invalid, "the image's config has a root filesystem of type %s, not of layers", quote(cf.RootFS.Type))
	}
	c := Config{User: cf.Config.User, Cwd: cf.Config.WorkingDir, Entrypoint: cf.Config.Entrypoint, Cmd: cf.Config.Cmd}
	for _, kv := range cf.Config.Env {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			continue // docker skips those too
		}
		if c.Env == nil {
			c.Env = map[string]string{}
		}
		c.Env[k] = v
	}
	if err := c.check(); err != nil {
		return nil, nil, err
	}
	diffs := make([]string, len(cf.RootFS.DiffIDs))
	for i, d := range cf.RootFS.DiffIDs {
		diffs[i] = d.String()
	}
	return &opened{config: c, platform: platformName(have)}, diffs, nil
}

// check refuses what no exec could take.
func (c Config) check() error {
	all := slices.Concat([]string{c.User, c.Cwd}, c.Entrypoint, c.Cmd)
	for k, v := range c.Env {
		all = append(all, k, v)
	}
	for _, s := range all {
		if strings.IndexByte(s, 0) >= 0 {
			return fault.New(fault.Invalid, "the image's config has a zero byte in %s", quote(s))
		}
	}
	if c.Cwd != "" && !strings.HasPrefix(c.Cwd, "/") {
		return fault.New(fault.Invalid, "the image's working directory %s is no absolute path", quote(c.Cwd))
	}
	return nil
}
