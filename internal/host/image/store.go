package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/google/renameio/v2"

	"github.com/hutch-run/hutch/internal/fault"
)

// Params says where a Store keeps things. All directories are made if missing
// and have to be on one filesystem, for images get their names by rename.
type Params struct {
	Images string // <root>/images
	Work   string // builds; nobody else's
	Trash  string // <root>/trash, shared with others
	Limits Limits
	Log    *slog.Logger // nil: nothing is logged
}

// Store keeps the images of a host and builds new ones. It is safe for
// concurrent use; one process at a time owns the directories.
type Store struct {
	p Params

	mu   sync.Mutex
	held map[Digest]int // guarded by mu: images that Collect leaves alone
}

// Open returns the store of the given directories.
func Open(p Params) (*Store, error) {
	p.Limits = p.Limits.withDefaults()
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	for dir, perm := range map[string]fs.FileMode{p.Images: 0o755, p.Work: 0o700, p.Trash: 0o700} {
		if err := os.MkdirAll(dir, perm); err != nil {
			return nil, fmt.Errorf("make the image store: %w", err)
		}
	}
	return &Store{p: p, held: map[Digest]int{}}, nil
}

// Reclaim removes what builds and removals of an earlier process left. Call it
// before the first build.
func (s *Store) Reclaim(context.Context) error {
	var errs []error
	for dir, prefix := range map[string]string{s.p.Work: "", s.p.Trash: trashPrefix} {
		left, err := os.ReadDir(dir)
		errs = append(errs, err)
		for _, e := range left {
			if strings.HasPrefix(e.Name(), prefix) {
				errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("reclaim image builds: %w", err)
	}
	return nil
}

const trashPrefix = "image-"

func (s *Store) dir(d Digest) string { return filepath.Join(s.p.Images, d.Hex()) }

// Path returns the path of an image's file. The file is read-only and must
// stay so: everything made from the image shares it.
func (s *Store) Path(d Digest) (string, error) {
	if _, err := s.Get(d); err != nil {
		return "", err
	}
	return filepath.Join(s.dir(d), rootfsName), nil
}

// Get returns the manifest of an image; fault.NotFound if there is none.
func (s *Store) Get(d Digest) (Manifest, error) {
	if _, err := ParseDigest(string(d)); err != nil {
		return Manifest{}, err
	}
	return readManifest(s.dir(d), d)
}

func readManifest(dir string, d Digest) (Manifest, error) {
	raw, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return Manifest{}, fault.New(fault.NotFound, "there is no image %s on this host", d)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("read image %s: %w", d, err)
	}
	var m Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return Manifest{}, fmt.Errorf("read image %s: its %s is damaged: %w", d, manifestName, err)
	}
	if m.Version != Version {
		return Manifest{}, fmt.Errorf("read image %s: its %s has version %d, this build knows %d", d, manifestName, m.Version, Version)
	}
	fi, err := os.Stat(filepath.Join(dir, rootfsName))
	if err != nil {
		return Manifest{}, fmt.Errorf("read image %s: %w", d, err)
	}
	if m.Digest != d || fi.Size() != m.Size {
		return Manifest{}, fmt.Errorf("read image %s: its %s does not fit the file beside it (%s, %d bytes; the file has %d)",
			d, manifestName, m.Digest, m.Size, fi.Size())
	}
	return m, nil
}

// List returns all images, and apart from them why some cannot be read.
func (s *Store) List() (images []Manifest, broken []error, err error) {
	digests, err := s.digests()
	if err != nil {
		return nil, nil, err
	}
	for _, d := range digests {
		m, err := readManifest(s.dir(d), d)
		if err != nil {
			broken = append(broken, err)
			continue
		}
		images = append(images, m)
	}
	return images, broken, nil
}

func (s *Store) digests() ([]Digest, error) {
	dirs, err := os.ReadDir(s.p.Images)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var out []Digest
	for _, e := range dirs {
		if d, err := ParseDigest(digestPrefix + e.Name()); err == nil {
			out = append(out, d)
		}
	}
	return out, nil
}

// Hold keeps an image from being collected until release is called, which may
// be called more than once.
func (s *Store) Hold(d Digest) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.Get(d); err != nil {
		return nil, err
	}
	return s.holdLocked(d), nil
}

func (s *Store) holdLocked(d Digest) func() {
	s.held[d]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[d]--; s.held[d] == 0 {
			delete(s.held, d)
		}
	})
}

// Collect removes the images that are not held and that keep does not want. It
// calls keep with the store locked: keep must not call back into it. It goes on
// after an error and returns what it removed.
func (s *Store) Collect(ctx context.Context, keep func(Digest) bool) ([]Digest, error) {
	gone, trash, err := s.discard(ctx, keep)
	errs := []error{err}
	for _, t := range trash {
		errs = append(errs, os.RemoveAll(t))
	}
	if err := errors.Join(errs...); err != nil {
		return gone, fmt.Errorf("collect images: %w", err)
	}
	return gone, nil
}

// discard moves unwanted images to the trash.
func (s *Store) discard(ctx context.Context, keep func(Digest) bool) (gone []Digest, trash []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	digests, err := s.digests()
	errs := []error{err}
	for _, d := range digests {
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		if s.held[d] > 0 || keep(d) {
			continue
		}
		t, err := s.trashLocked(d)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		gone, trash = append(gone, d), append(trash, t)
	}
	return gone, trash, errors.Join(errs...)
}

// trashLocked takes an image's name away and returns where it is now.
func (s *Store) trashLocked(d Digest) (string, error) {
	t, err := os.MkdirTemp(s.p.Trash, trashPrefix+"*")
	if err != nil {
		return "", err
	}
	if err := os.Rename(s.dir(d), filepath.Join(t, d.Hex())); err != nil {
		return "", errors.Join(err, os.Remove(t))
	}
	return t, nil
}

// Image is an image that is held until Release.
type Image struct {
	Manifest
	Release func()
}

// commit gives a finished directory its name. If the image is there already
// the new one is not needed; the manifest that is returned is the new one's in
// either case, for config and source are those of this build.
func (s *Store) commit(dir string, m Manifest) (*Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	final := s.dir(m.Digest)
	if _, err := readManifest(final, m.Digest); err == nil {
		return &Image{m, s.holdLocked(m.Digest)}, nil
	}
	err := os.Rename(dir, final)
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) {
		// What stands there cannot be read; make way.
		var t string
		if t, err = s.trashLocked(m.Digest); err == nil {
			s.p.Log.Warn("replacing a damaged image", "digest", m.Digest)
			err = errors.Join(os.Rename(dir, final), os.RemoveAll(t))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("name image %s: %w", m.Digest, err)
	}
	if err := syncDir(s.p.Images); err != nil {
		return nil, err
	}
	return &Image{m, s.holdLocked(m.Digest)}, nil
}

func writeManifest(dir string, m Manifest) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write image manifest: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(dir, manifestName), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write image manifest: %w", diskError(err))
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
