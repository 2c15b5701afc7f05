package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// The files of a directory.
const (
	manifestFile = "manifest.json"
	stateFile    = "state"
	memoryFile   = "memory"
	dataFile     = "data"
)

// maxManifest bounds a manifest, in bytes.
const maxManifest = 1 << 20

// Snapshot is a finished snapshot on disk.
type Snapshot struct {
	Manifest
	Dir string
}

// Draft is a snapshot that is being written. Publish or Drop it.
type Draft struct {
	// Dir is where it is written.
	Dir   string
	final string
}

// Begin begins a snapshot that will appear at dir, which must not exist. What
// is in the way of the draft, left by a hutchd that was killed, is removed.
func Begin(dir string) (*Draft, error) {
	d := &Draft{Dir: filepath.Join(filepath.Dir(dir), draftPrefix+filepath.Base(dir)), final: dir}
	if err := os.RemoveAll(d.Dir); err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	if err := os.Mkdir(d.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", fault.DiskFull(err))
	}
	return d, nil
}

// draftPrefix begins the names of drafts, and of nothing else.
const draftPrefix = ".new-"

func create(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// Data is where a copy of the data disk belongs, if the snapshot has one.
func (d *Draft) Data() string { return filepath.Join(d.Dir, dataFile) }

// Publish copies state and memory, measures all parts, writes the manifest,
// syncs everything and gives the directory its name. On error nothing is left.
func (d *Draft) Publish(ctx context.Context, m Manifest, state, memory *os.File) (*Snapshot, error) {
	s, err := d.publish(ctx, m, state, memory)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write snapshot: %w", fault.DiskFull(err)), d.Drop())
	}
	return s, nil
}

func (d *Draft) publish(ctx context.Context, m Manifest, state, memory *os.File) (*Snapshot, error) {
	m.Version = Version
	var err error
	if m.State, err = d.take(ctx, stateFile, state); err != nil {
		return nil, err
	}
	if m.Memory, err = d.take(ctx, memoryFile, memory); err != nil {
		return nil, err
	}
	if m.Data, err = d.finishData(ctx); err != nil {
		return nil, err
	}
	if err := d.writeManifest(m); err != nil {
		return nil, err
	}
	if err := syncDir(d.Dir); err != nil {
		return nil, err
	}
	if err := os.Rename(d.Dir, d.final); err != nil {
		return nil, err
	}
	if err := syncDir(filepath.Dir(d.final)); err != nil {
		return nil, err
	}
	return &Snapshot{Manifest: m, Dir: d.final}, nil
}

// take copies src to a part, measures it on the way and makes it durable.
func (d *Draft) take(ctx context.Context, name string, src *os.File) (Part, error) {
	info, err := src.Stat()
	if err != nil {
		return Part{}, err
	}
	f, err := create(filepath.Join(d.Dir, name))
	if err != nil {
		return Part{}, err
	}
	defer f.Close()
	if err := f.Truncate(info.Size()); err != nil {
		return Part{}, err
	}
	p, err := measure(ctx, src, f, info.Size())
	if err != nil {
		return Part{}, err
	}
	return p, f.Sync()
}

// finishData measures the data disk, if there is one, and makes it durable.
func (d *Draft) finishData(ctx context.Context) (*Part, error) {
	f, err := os.Open(d.Data())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	p, err := measure(ctx, f, nil, info.Size())
	if err != nil {
		return nil, err
	}
	return &p, f.Sync()
}

func (d *Draft) writeManifest(m Manifest) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if _, err := parse(b); err != nil {
		return err
	}
	f, err := create(filepath.Join(d.Dir, manifestFile))
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Sync(), f.Close())
}

// Drop removes what was written. After Publish it does nothing.
func (d *Draft) Drop() error {
	if err := os.RemoveAll(d.Dir); err != nil {
		return fmt.Errorf("drop snapshot: %w", err)
	}
	return nil
}

// Open opens the snapshot at dir and makes the cheap checks. A directory that
// is not there is fault.NotFound.
func Open(dir string) (*Snapshot, error) {
	b, err := readLimited(filepath.Join(dir, manifestFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "there is no snapshot in %s", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open snapshot: %w", err)
	}
	m, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("open snapshot %s: %w", dir, err)
	}
	s := &Snapshot{Manifest: m, Dir: dir}
	for name, p := range s.parts() {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("open snapshot: %w", err)
		}
		if !info.Mode().IsRegular() || info.Size() != p.Size {
			return nil, fmt.Errorf("open snapshot %s: %s has %d bytes, its manifest says %d", dir, name, info.Size(), p.Size)
		}
	}
	return s, nil
}

func (s *Snapshot) parts() map[string]Part {
	parts := map[string]Part{stateFile: s.State, memoryFile: s.Memory}
	if s.Data != nil {
		parts[dataFile] = *s.Data
	}
	return parts
}

// Verify reads every byte and compares it with the digests.
func (s *Snapshot) Verify(ctx context.Context) error {
	for name, p := range s.parts() {
		if err := s.copyPart(ctx, name, p, nil); err != nil {
			return err
		}
	}
	return nil
}

// CopyState returns the state in a memory file that nobody else has, every byte
// compared with the digest.
func (s *Snapshot) CopyState(ctx context.Context) (*os.File, error) {
	f, err := NewMemory("hutch-state", s.State.Size)
	if err != nil {
		return nil, err
	}
	if err := s.copyPart(ctx, stateFile, s.State, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// CopyData makes path, which must not exist, a copy of the data disk, every byte
// compared with the digest. On error nothing is left. It outlives a crash of
// the host only once it is synced.
func (s *Snapshot) CopyData(ctx context.Context, path string) error {
	if s.Data == nil {
		return fault.New(fault.Precondition, "snapshot %s has no data disk", s.ID)
	}
	f, err := create(path)
	if err != nil {
		return fmt.Errorf("copy data disk: %w", fault.DiskFull(err))
	}
	err = f.Truncate(s.Data.Size)
	if err == nil {
		err = s.copyPart(ctx, dataFile, *s.Data, f)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("copy data disk: %w", fault.DiskFull(err)), os.Remove(path))
	}
	return nil
}

// copyPart copies a part to dst, or only reads it when dst is nil, and says
// when it is not what the manifest says.
func (s *Snapshot) copyPart(ctx context.Context, name string, want Part, dst *os.File) error {
	f, err := os.OpenFile(filepath.Join(s.Dir, name), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("read snapshot %s: %w", s.ID, err)
	}
	defer f.Close()
	got, err := measure(ctx, f, dst, want.Size)
	if err != nil {
		return fmt.Errorf("read snapshot %s: %w", s.ID, err)
	}
	if got.Digest != want.Digest {
		return fault.New(fault.Internal, "snapshot %s is damaged: the digest of %s is %s, not %s", s.ID, name, got.Digest, want.Digest)
	}
	return nil
}

func readLimited(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxManifest {
		return nil, fmt.Errorf("%s is no manifest", path)
	}
	return os.ReadFile(path)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
