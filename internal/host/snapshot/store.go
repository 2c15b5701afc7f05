package snapshot

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// goingPrefix begins the names of snapshots that are being removed.
const goingPrefix = ".old-"

// Store is a directory of snapshots, each below its id. It is safe for
// concurrent use, but for one id at a time.
type Store struct{ dir string }

// NewStore opens the store in dir, and removes what a hutchd that was killed
// left half written or half removed.
func NewStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), draftPrefix) && !strings.HasPrefix(e.Name(), goingPrefix) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return nil, fmt.Errorf("open snapshots: %w", err)
		}
	}
	return &Store{dir: dir}, nil
}

// NewID returns a fresh id: "sn-" and 16 hex digits.
func NewID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return "sn-" + hex.EncodeToString(b[:])
}

// Begin begins the snapshot with an id of NewID.
func (s *Store) Begin(id string) (*Draft, error) { return Begin(filepath.Join(s.dir, id)) }

// Get returns the snapshot with an id; unknown is fault.NotFound.
func (s *Store) Get(id string) (*Snapshot, error) {
	if !validID(id) {
		return nil, fault.New(fault.NotFound, "there is no snapshot %q", id)
	}
	snap, err := Open(filepath.Join(s.dir, id))
	if fault.Is(err, fault.NotFound) {
		return nil, fault.New(fault.NotFound, "there is no snapshot %q", id)
	}
	return snap, err
}

func validID(id string) bool {
	rest, ok := strings.CutPrefix(id, "sn-")
	return ok && rest != "" && strings.Trim(rest, "0123456789abcdef") == ""
}

// List returns all snapshots that can be opened, and why others can't.
func (s *Store) List() (all []*Snapshot, damaged error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !validID(e.Name()) {
			continue
		}
		snap, err := s.Get(e.Name())
		switch {
		case err == nil:
			all = append(all, snap)
		case !fault.Is(err, fault.NotFound): // else it went meanwhile
			errs = append(errs, err)
		}
	}
	return all, errors.Join(errs...)
}

// Remove removes a snapshot: its name goes at once. An unknown id is no error.
// Whoever has memory or disks of it keeps them.
func (s *Store) Remove(id string) error {
	if !validID(id) {
		return nil
	}
	going := filepath.Join(s.dir, goingPrefix+id)
	err := os.RemoveAll(going)
	if err == nil {
		err = os.Rename(filepath.Join(s.dir, id), going)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = errors.Join(syncDir(s.dir), os.RemoveAll(going))
	}
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id, err)
	}
	return nil
}
