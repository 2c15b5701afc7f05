package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// maxRecord is the largest record file that is read or written, in bytes.
const maxRecord = 16 << 20

// Quarantined is a sandbox whose record cannot be read. Nothing of it is
// touched.
type Quarantined struct {
	Name string // of its directory
	Dir  string
	Err  error
	// Claims is what could be made out of what the sandbox holds; nil when
	// nothing could, and then anything on the host may belong to it.
	Claims *Claims
}

// Claims is what a record says a sandbox holds.
type Claims struct {
	Slot    int              `json:"slot"`
	Machine *sandbox.Machine `json:"machine"`
	Spec    sandbox.Spec     `json:"spec"`
	// ImageDigest names the image below its disk.
	ImageDigest string `json:"image_digest"`
	// KernelID names the kernel pack that it booted.
	KernelID string `json:"kernel_id"`
}

// Loaded is what a root holds.
type Loaded struct {
	Records     []sandbox.Record // oldest first
	Quarantined []Quarantined
	// Trashed are the sandboxes whose removal the process before this one may
	// not have lived to tell.
	Trashed []sandbox.ID
}

// Create makes the directory of a sandbox with its first record. On error
// nothing is left. A directory that is there already is fault.Exists.
func (s *Store) Create(r sandbox.Record) error {
	b, err := encode(r)
	if err != nil {
		return err
	}
	temp := filepath.Join(s.sandboxesDir(), newPrefix+string(r.ID))
	if err := s.create(r.ID, temp, b); err != nil {
		if !errors.Is(err, errStopped) {
			err = errors.Join(err, os.RemoveAll(temp))
		}
		return fmt.Errorf("create record of %s: %w", r.ID, err)
	}
	return nil
}

func (s *Store) create(id sandbox.ID, temp string, b []byte) error {
	if err := s.at("create: make directory"); err != nil {
		return err
	}
	if err := os.RemoveAll(temp); err != nil { // of an earlier attempt
		return err
	}
	if err := os.Mkdir(temp, 0o700); err != nil {
		return fault.DiskFull(err)
	}
	if err := s.writeSynced("create", filepath.Join(temp, recordName), b); err != nil {
		return err
	}
	if err := s.at("create: sync directory"); err != nil {
		return err
	}
	if err := syncDir(temp); err != nil {
		return err
	}
	if err := s.at("create: rename"); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, s.Dir(id), unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return fault.New(fault.Exists, "%s exists", s.Dir(id))
	}
	if err != nil {
		return fault.DiskFull(fmt.Errorf("rename to %s: %w", s.Dir(id), err))
	}
	err = s.at("create: sync sandboxes")
	if err == nil {
		err = syncDir(s.sandboxesDir())
	}
	if err != nil && !errors.Is(err, errStopped) {
		err = errors.Join(err, os.RemoveAll(s.Dir(id))) // it was not there before
	}
	return err
}

// Put replaces the record of a sandbox that exists. Readers, also after a
// crash, see either the old or the new one. After an error the old one stands,
// unless only the last step, making the new one's name durable, went wrong.
func (s *Store) Put(r sandbox.Record) error {
	b, err := encode(r)
	if err != nil {
		return err
	}
	temp := filepath.Join(s.Dir(r.ID), tempName)
	if err := s.put(r.ID, temp, b); err != nil {
		if !errors.Is(err, errStopped) {
			if rmErr := os.Remove(temp); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
				err = errors.Join(err, rmErr)
			}
		}
		return fmt.Errorf("write record of %s: %w", r.ID, err)
	}
	return nil
}

func (s *Store) put(id sandbox.ID, temp string, b []byte) error {
	if err := s.writeSynced("put", temp, b); err != nil {
		return err
	}
	if err := s.at("put: rename"); err != nil {
		return err
	}
	if err := os.Rename(temp, filepath.Join(s.Dir(id), recordName)); err != nil {
		return fault.DiskFull(err)
	}
	if err := s.at("put: sync directory"); err != nil {
		return err
	}
	return syncDir(s.Dir(id))
}

// writeSynced writes a whole file and makes its content durable.
func (s *Store) writeSynced(op, path string, b []byte) error {
	if err := s.at(op + ": open"); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fault.DiskFull(err)
	}
	defer f.Close()
	for half := range slices.Chunk(b, max(1, (len(b)+1)/2)) {
		if err := s.at(op + ": write"); err != nil {
			return err
		}
		if _, err := f.Write(half); err != nil {
			return fault.DiskFull(err)
		}
	}
	if err := s.at(op + ": sync"); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fault.DiskFull(err)
	}
	return f.Close()
}

// Load reads all records. Only a root whose directory cannot be listed is an
// error.
func (s *Store) Load() (Loaded, error) {
	names, err := readNames(s.sandboxesDir())
	if err != nil {
		return Loaded{}, fmt.Errorf("load records: %w", err)
	}
	l := Loaded{Trashed: s.trashed}
	for _, name := range names {
		if strings.HasPrefix(name, newPrefix) {
			continue // a create in flight
		}
		dir := filepath.Join(s.sandboxesDir(), name)
		r, claims, err := readRecord(dir, name)
		if err != nil {
			l.Quarantined = append(l.Quarantined, Quarantined{Name: name, Dir: dir, Err: err, Claims: claims})
			continue
		}
		l.Records = append(l.Records, r)
	}
	slices.SortStableFunc(l.Records, func(a, b sandbox.Record) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return l, nil
}

// readRecord reads and checks one record. With an error, claims is what could
// still be read of it.
func readRecord(dir, name string) (r sandbox.Record, claims *Claims, err error) {
	f, err := os.OpenFile(filepath.Join(dir, recordName), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return r, nil, fmt.Errorf("read record: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return r, nil, fmt.Errorf("read record: %w", err)
	}
	if len(b) > maxRecord {
		return r, nil, fmt.Errorf("read record: it is larger than %d bytes", maxRecord)
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return r, nil, fmt.Errorf("parse record: %w", err)
	}
	if head.Version < 1 {
		return r, nil, fmt.Errorf("record has no version")
	}
	claims = readClaims(b)
	if head.Version > sandbox.RecordVersion {
		return r, claims, fmt.Errorf("record has version %d, this hutchd reads up to %d: run a newer hutchd", head.Version, sandbox.RecordVersion)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, claims, fmt.Errorf("parse record: %w", err)
	}
	return r, claims, check(r, name)
}

func readClaims(b []byte) *Claims {
	var c Claims
	if json.Unmarshal(b, &c) != nil {
		return nil
	}
	return &c
}

func check(r sandbox.Record, name string) error {
	if string(r.ID) != name {
		return fmt.Errorf("record of %q is in the directory of %q", r.ID, name)
	}
	if _, err := sandbox.ParseID(name); err != nil {
		return err
	}
	if !slices.Contains(sandbox.States(), r.State) {
		return fmt.Errorf("record has the unknown state %q", r.State)
	}
	return nil
}

func encode(r sandbox.Record) ([]byte, error) {
	if _, err := sandbox.ParseID(string(r.ID)); err != nil {
		return nil, fault.As(fault.Invalid, err)
	}
	r.Version = sandbox.RecordVersion
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return nil, fmt.Errorf("encode record of %s: %w", r.ID, err)
	}
	if b.Len() > maxRecord {
		return nil, fault.New(fault.Invalid, "record of %s is larger than %d bytes", r.ID, maxRecord)
	}
	return b.Bytes(), nil
}
