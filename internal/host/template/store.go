package template

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/renameio/v2"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/image"
)

// Params says where a Store keeps things.
type Params struct {
	// Root is hutch's root directory: templates/, images/, trash/ and, for
	// builds, build/ are in there.
	Root string
	// Programs is the directory of hutch's own programs, which recipes put into
	// images.
	Programs string
	Limits   image.Limits
	// Builds is the number of imports that run at once; others wait (default 2).
	Builds int
	Log    *slog.Logger // nil: nothing is logged
}

// Store keeps templates. It is safe for concurrent use; one process at a time
// owns the directories.
//
// Locks: mu is taken before the image store's, never the other way round.
type Store struct {
	p      Params
	images *image.Store
	slots  chan struct{} // one for each import that may run
	apt    chan struct{} // one: apt's own locks make others fail, not wait
	made   makers

	mu sync.Mutex // held while templates change or are counted against images
}

const (
	templateName = "template.json"
	trashPrefix  = "template-"
)

// Open returns the store below a root directory.
func Open(p Params) (*Store, error) {
	if p.Builds <= 0 {
		p.Builds = 2
	}
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	images, err := image.Open(image.Params{
		Images: filepath.Join(p.Root, "images"), Work: filepath.Join(p.Root, "build"),
		Trash: filepath.Join(p.Root, "trash"), Limits: p.Limits, Log: p.Log,
	})
	if err != nil {
		return nil, err
	}
	s := &Store{p: p, images: images, slots: make(chan struct{}, p.Builds), apt: make(chan struct{}, 1), made: makers{running: map[string]*maker{}}}
	if err := os.MkdirAll(s.root(), 0o755); err != nil {
		return nil, fmt.Errorf("make the template store: %w", err)
	}
	return s, nil
}

func (s *Store) root() string           { return filepath.Join(s.p.Root, "templates") }
func (s *Store) trash() string          { return filepath.Join(s.p.Root, "trash") }
func (s *Store) dir(name string) string { return filepath.Join(s.root(), name) }

// Reclaim removes what builds and removals of an earlier process left. Call it
// before the first import.
func (s *Store) Reclaim(ctx context.Context) error {
	errs := []error{s.images.Reclaim(ctx)}
	left, err := filepath.Glob(filepath.Join(s.trash(), trashPrefix+"*"))
	errs = append(errs, err)
	for _, dir := range left {
		errs = append(errs, os.RemoveAll(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("reclaim templates: %w", err)
	}
	return nil
}

// Get returns a template. It is fault.NotFound if there is none.
func (s *Store) Get(name string) (Template, error) {
	if err := CheckName(name); err != nil {
		// A name that cannot be is one that is not there.
		return Template{}, fault.New(fault.NotFound, "there is no template %q: %v", name, err)
	}
	t, err := read(s.dir(name), name)
	if errors.Is(err, fs.ErrNotExist) {
		return Template{}, fault.New(fault.NotFound, "there is no template %q on this host; `hutch template ls` shows those there are, `hutch template build` makes one", name)
	}
	return t, err
}

func read(dir, name string) (Template, error) {
	raw, err := os.ReadFile(filepath.Join(dir, templateName))
	if err != nil {
		return Template{}, fmt.Errorf("read template %s: %w", name, err)
	}
	var t Template
	if err := json.Unmarshal(raw, &t); err != nil {
		return Template{}, fmt.Errorf("read template %s: its %s is damaged: %w", name, templateName, err)
	}
	switch {
	case t.Version != Version:
		return Template{}, fmt.Errorf("read template %s: its %s has version %d, this build knows %d", name, templateName, t.Version, Version)
	case t.Name != name:
		return Template{}, fmt.Errorf("read template %s: its %s is of the template %q", name, templateName, t.Name)
	}
	if _, err := image.ParseDigest(t.ImageDigest); err != nil {
		return Template{}, fmt.Errorf("read template %s: %w", name, err)
	}
	return t, nil
}

// List returns all templates sorted by name, and apart from them why some
// cannot be read.
func (s *Store) List() (templates []Template, broken []error, err error) {
	dirs, err := os.ReadDir(s.root())
	if err != nil {
		return nil, nil, fmt.Errorf("list templates: %w", err)
	}
	for _, e := range dirs {
		if CheckName(e.Name()) != nil {
			continue // nothing of ours: it has no name that a template can have
		}
		t, err := read(s.dir(e.Name()), e.Name())
		switch {
		case errors.Is(err, fs.ErrNotExist) && !e.IsDir():
		case errors.Is(err, fs.ErrNotExist):
			// Removed since, or a directory that a crash left before its file.
			if !emptyDir(s.dir(e.Name())) {
				broken = append(broken, err)
			}
		case err != nil:
			broken = append(broken, err)
		default:
			templates = append(templates, t)
		}
	}
	slices.SortFunc(templates, func(a, b Template) int { return cmp.Compare(a.Name, b.Name) })
	return templates, broken, nil
}

// emptyDir reports whether dir holds nothing that a template could be about:
// it is not there any longer, or a crash left it before its file had a name.
func emptyDir(dir string) bool {
	es, err := os.ReadDir(dir)
	return errors.Is(err, fs.ErrNotExist) || err == nil &&
		!slices.ContainsFunc(es, func(e fs.DirEntry) bool { return !strings.HasPrefix(e.Name(), ".") })
}

// Put writes a template, over one of the same name. Its image has to be here.
func (s *Store) Put(t Template) error {
	if err := CheckName(t.Name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.images.Path(image.Digest(t.ImageDigest)); err != nil {
		return fmt.Errorf("write template %s: %w", t.Name, err)
	}
	t.Version = Version
	b, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return fmt.Errorf("write template %s: %w", t.Name, err)
	}
	if err := os.MkdirAll(s.dir(t.Name), 0o755); err != nil {
		return fmt.Errorf("write template %s: %w", t.Name, err)
	}
	if err := renameio.WriteFile(filepath.Join(s.dir(t.Name), templateName), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write template %s: %w", t.Name, err)
	}
	return errors.Join(syncDir(s.dir(t.Name)), syncDir(s.root()))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// Remove forgets a template. Sandboxes made from it are not touched; its image
// goes with the next Collect when nothing uses it. A template that cannot be
// read can be removed too. It is fault.NotFound if there is none.
func (s *Store) Remove(name string) error {
	if _, err := s.Get(name); fault.Is(err, fault.NotFound) {
		return err
	}
	t, err := s.unname(name)
	if err != nil {
		return fmt.Errorf("remove template %s: %w", name, err)
	}
	if err := os.RemoveAll(t); err != nil {
		return fmt.Errorf("remove template %s: %w", name, err)
	}
	return nil
}

// unname moves a template's directory to the trash, all at once, and returns
// where it is there.
func (s *Store) unname(name string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, err := os.MkdirTemp(s.trash(), trashPrefix+"*")
	if err != nil {
		return "", err
	}
	if err := os.Rename(s.dir(name), filepath.Join(t, name)); err != nil {
		return "", errors.Join(err, os.Remove(t))
	}
	return t, syncDir(s.root())
}

// Image returns the path of the file of an image, which a template may have
// moved on from. It is fault.NotFound if there is none.
func (s *Store) Image(digest string) (string, error) { return s.images.Path(image.Digest(digest)) }

// Resolve returns a template and the path of its image. A name that is not
// there is fault.NotFound. Who needs the image to stay uses Hold.
func (s *Store) Resolve(name string) (Template, string, error) {
	t, err := s.Get(name)
	if err != nil {
		return Template{}, "", err
	}
	p, err := s.Image(t.ImageDigest)
	if err != nil {
		return Template{}, "", fmt.Errorf("template %s: %w", name, err)
	}
	return t, p, nil
}

// Hold is Resolve, and keeps the image from being collected until release.
func (s *Store) Hold(name string) (t Template, path string, release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, path, err = s.Resolve(name); err != nil {
		return Template{}, "", nil, err
	}
	if release, err = s.images.Hold(image.Digest(t.ImageDigest)); err != nil {
		return Template{}, "", nil, fmt.Errorf("template %s: %w", name, err)
	}
	return t, path, release, nil
}

// Collect removes the images that no template names, that are not held and not
// in use, and returns their digests. used returns "sha256:..." digests. It is
// asked while nothing can be held or released, so that whoever first becomes a
// user and then releases is never missed; it must not call back into the store.
func (s *Store) Collect(ctx context.Context, used func() map[string]bool) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	templates, broken, err := s.List()
	if err != nil {
		return nil, err
	}
	if len(broken) > 0 {
		return nil, fmt.Errorf("collect images: which are used cannot be told while templates cannot be read; remove or mend them: %w", errors.Join(broken...))
	}
	named := map[string]bool{}
	for _, t := range templates {
		named[t.ImageDigest] = true
	}
	inUse := sync.OnceValue(used) // with the images locked
	gone, err := s.images.Collect(ctx, func(d image.Digest) bool { return named[string(d)] || inUse()[string(d)] })
	out := make([]string, len(gone))
	for i, d := range gone {
		out[i] = string(d)
	}
	return out, err
}
