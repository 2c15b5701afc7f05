package template

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/image"
	"github.com/hutch-run/hutch/internal/host/template/recipe"
)

// Overrides replace what an image says by itself; zero fields leave it.
type Overrides struct {
	Env        map[string]string // added to the image's, over those of the same name
	User       string
	Cwd        string
	Entrypoint []string // with Cmd: setting one clears the other of the image
	Cmd        []string
	VCPUs      int
	MemoryMB   int
	DiskMB     int
}

// ImportParams is one import.
type ImportParams struct {
	Name string
	// Recipe makes the image from Debian packages, and says what shape its
	// sandboxes need; else Source says from what.
	Recipe    string
	Source    image.Source
	Overrides Overrides
	Progress  image.Progress // may be nil; see image.Progress
}

// makers are the imports that run, by the name of their template.
type makers struct {
	mu      sync.Mutex
	running map[string]*maker // guarded by mu
}

type maker struct{ done chan struct{} }

// enter makes the caller the only one to make the template of a name. When
// another does so already it waits for that one first.
func (m *makers) enter(ctx context.Context, name string) (leave func(), err error) {
	for {
		m.mu.Lock()
		other := m.running[name]
		if other == nil {
			mine := &maker{done: make(chan struct{})}
			m.running[name] = mine
			m.mu.Unlock()
			return func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				delete(m.running, name)
				close(mine.done)
			}, nil
		}
		m.mu.Unlock()
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Import builds an image and names it, replacing a template of the same name at
// the end; until then the old one is served. Imports of one name follow each
// other, some of different names run at the same time. On error nothing is
// changed and nothing left. A host that cannot make a recipe is
// fault.Precondition, a source that is refused fault.Invalid, one that is not
// there fault.NotFound, one that cannot be reached fault.Unavailable.
func (s *Store) Import(ctx context.Context, p ImportParams) (Template, error) {
	if err := p.check(); err != nil {
		return Template{}, err
	}
	leave, err := s.made.enter(ctx, p.Name)
	if err != nil {
		return Template{}, err
	}
	defer leave()
	if p.Progress != nil && len(s.slots) == cap(s.slots) {
		p.Progress("waiting for another build", 0, 0)
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return Template{}, context.Cause(ctx)
	}
	img, shape, err := s.build(ctx, p)
	if err != nil {
		return Template{}, fmt.Errorf("make template %s: %w", p.Name, err)
	}
	defer img.Release() // the template holds it from then on
	t := p.template(img.Manifest, shape)
	if err := s.Put(t); err != nil {
		return Template{}, err
	}
	t.Version = Version
	s.p.Log.Info("template made", "template", t.Name, "digest", t.ImageDigest, "source", t.Source)
	return t, nil
}

func (p ImportParams) check() error {
	if err := CheckName(p.Name); err != nil {
		return err
	}
	if p.Recipe != "" && (p.Source.Ref != "" || p.Source.Path != "" || p.Source.Stream != nil) {
		return fault.BadField("source", "give a recipe or a source, not both")
	}
	if host := "linux/" + runtime.GOARCH; p.Recipe != "" && p.Source.Platform != "" && p.Source.Platform != host {
		return fault.BadField("platform", "recipes are made of this host's packages, for %s; pull an image for %s instead", host, p.Source.Platform)
	}
	o := p.Overrides
	switch {
	case o.VCPUs < 0:
		return fault.BadField("vcpus", "%d is negative", o.VCPUs)
	case o.MemoryMB < 0:
		return fault.BadField("memory_mb", "%d is negative", o.MemoryMB)
	case o.DiskMB < 0:
		return fault.BadField("disk_size_mb", "%d is negative", o.DiskMB)
	case o.Cwd != "" && !strings.HasPrefix(o.Cwd, "/"):
		return fault.BadField("cwd", "%q is no absolute path", o.Cwd)
	}
	for k, v := range o.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") {
			return fault.BadField("env", "%q is no name of a variable, or its value has a zero byte", k)
		}
	}
	for _, v := range append(append([]string{o.User, o.Cwd}, o.Entrypoint...), o.Cmd...) {
		if strings.Contains(v, "\x00") {
			return fault.BadField("defaults", "%q has a zero byte", v)
		}
	}
	return nil
}

// build makes the image of an import, from a recipe or a source. The shape is
// the recipe's.
func (s *Store) build(ctx context.Context, p ImportParams) (*image.Image, recipe.Shape, error) {
	if p.Recipe == "" {
		img, err := s.images.Build(ctx, p.Source, p.Progress)
		return img, recipe.Shape{}, err
	}
	r, err := recipe.Find(p.Recipe)
	if err != nil {
		return nil, recipe.Shape{}, err
	}
	img, err := s.buildRecipe(ctx, r, p.Progress)
	return img, r.Shape, err
}

func (s *Store) buildRecipe(ctx context.Context, r recipe.Recipe, progress image.Progress) (*image.Image, error) {
	work, err := os.MkdirTemp(filepath.Join(s.p.Root, "build"), "recipe-*")
	if err != nil {
		return nil, fmt.Errorf("make a work directory: %w", err)
	}
	defer func() {
		if err := os.RemoveAll(work); err != nil {
			s.p.Log.Error("remove a recipe's work directory", "dir", work, "err", err)
		}
	}()
	rootfs, err := s.cook(ctx, r, recipe.Params{Work: work, Programs: s.p.Programs, Progress: progress, Log: s.p.Log})
	if err != nil {
		return nil, err
	}
	img, err := s.images.Build(ctx, image.Source{
		Stream: rootfs.Tar, Kind: image.RootTar, Label: "recipe:" + r.Name, Config: &r.Config, Clamp: rootfs.Clamp,
	}, progress)
	if cerr := rootfs.Close(); err == nil && cerr != nil {
		img.Release()
		return nil, fmt.Errorf("finish recipe %s: %w", r.Name, cerr)
	}
	return img, err
}

// cook makes a recipe when no other is being made.
func (s *Store) cook(ctx context.Context, r recipe.Recipe, p recipe.Params) (*recipe.Rootfs, error) {
	select {
	case s.apt <- struct{}{}:
		defer func() { <-s.apt }()
		return r.Make(ctx, p)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// template is what an image becomes under the name of p.
func (p ImportParams) template(m image.Manifest, shape recipe.Shape) Template {
	o := p.Overrides
	t := Template{
		Version: Version, Name: p.Name, ImageDigest: string(m.Digest), Source: m.Source, Platform: m.Platform,
		User: m.Config.User, Cwd: m.Config.Cwd, Entrypoint: m.Config.Entrypoint, Cmd: m.Config.Cmd,
		VCPUs: cmp.Or(o.VCPUs, shape.VCPUs), MemoryMB: cmp.Or(o.MemoryMB, shape.MemoryMB), DiskMB: cmp.Or(o.DiskMB, shape.DiskMB),
		SizeBytes: m.Size, StoredBytes: m.Stored, CreatedAt: time.Now().UTC(),
	}
	if len(m.Config.Env)+len(o.Env) > 0 {
		t.Env = map[string]string{}
		maps.Copy(t.Env, m.Config.Env)
		maps.Copy(t.Env, o.Env)
	}
	if o.User != "" {
		t.User = o.User
	}
	if o.Cwd != "" {
		t.Cwd = o.Cwd
	}
	if o.Entrypoint != nil || o.Cmd != nil {
		t.Entrypoint, t.Cmd = o.Entrypoint, o.Cmd
	}
	return t
}
