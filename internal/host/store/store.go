package store

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Names inside a root.
const (
	lockName      = "lock"
	sandboxesName = "sandboxes"
	eventsName    = "events"
	snapshotsName = "snapshots"

	hibernationName = "hibernation"
	spentSuffix     = ".spent"
	blankName       = "blank"
	trashName       = "trash"

	recordName  = "record.json"
	tempName    = ".record.json.new"
	diskName    = "data.img"
	consoleName = "console.log"
	vmmLogName  = "vmm.log"
	portsName   = "ports.json"

	newPrefix   = ".new-"
	trashPrefix = "sandbox."
	// memoryPrefix begins those of memories that were used, or not needed.
	memoryPrefix = "memory."
)

// Store is an open root. It is safe for concurrent use, but for one sandbox
// only one caller writes at a time.
type Store struct {
	root string
	log  *slog.Logger
	lock *os.File

	trashed []sandbox.ID // found in the trash by Open

	kick    chan struct{} // tells the sweeper that the trash has something
	done    chan struct{}
	sweeper sync.WaitGroup
	close   sync.Once
	closed  error

	// step, when a test sets it, runs before each step that changes the disk;
	// its error ends the operation there, as a stop of the machine would.
	step func(name string) error
}

// Open takes a root for this process, makes what is missing of its layout and
// starts emptying its trash. A root that another process holds is a
// fault.Precondition that names the process.
func Open(root string, log *slog.Logger) (*Store, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, fmt.Errorf("make root directory: %w", fault.DiskFull(err))
	}
	lock, err := takeLock(filepath.Join(root, lockName))
	if err != nil {
		return nil, err
	}
	s := &Store{
		root: root, log: log, lock: lock,
		kick: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if err := s.prepare(); err != nil {
		_ = lock.Close() // the error that matters is the first
		return nil, err
	}
	s.sweeper.Go(s.sweep)
	s.wake()
	return s, nil
}

// Close empties the trash, if that is quick, and gives up the root.
func (s *Store) Close() error {
	s.close.Do(func() {
		close(s.done)
		s.sweeper.Wait()
		s.closed = s.lock.Close()
	})
	return s.closed
}

// Root returns the absolute path of the root.
func (s *Store) Root() string { return s.root }

// Dir returns the directory of a sandbox.
func (s *Store) Dir(id sandbox.ID) string {
	return filepath.Join(s.root, sandboxesName, string(id))
}

// DataDisk returns the path of a sandbox's writable disk.
func (s *Store) DataDisk(id sandbox.ID) string { return filepath.Join(s.Dir(id), diskName) }

// ConsoleLog returns the path of the log of a sandbox's serial console.
func (s *Store) ConsoleLog(id sandbox.ID) string { return filepath.Join(s.Dir(id), consoleName) }

// Ports returns the path of what package ports keeps of a sandbox.
func (s *Store) Ports(id sandbox.ID) string { return filepath.Join(s.Dir(id), portsName) }

// VMMLog returns the path of the log of what a sandbox's VMM says.
func (s *Store) VMMLog(id sandbox.ID) string { return filepath.Join(s.Dir(id), vmmLogName) }

// SnapshotsDir returns the directory for package snapshot.
func (s *Store) SnapshotsDir() string { return filepath.Join(s.root, snapshotsName) }

// EventsDir returns the directory for package events.
func (s *Store) EventsDir() string { return filepath.Join(s.root, eventsName) }

// BlankDir returns the directory for package disk's blank images.
func (s *Store) BlankDir() string { return filepath.Join(s.root, blankName) }

func (s *Store) sandboxesDir() string { return filepath.Join(s.root, sandboxesName) }
func (s *Store) trashDir() string     { return filepath.Join(s.root, trashName) }

// prepare makes the layout, sets its modes and puts away what an earlier
// process left half made.
func (s *Store) prepare() error {
	if err := os.Chmod(s.root, 0o711); err != nil {
		return fmt.Errorf("set mode of root directory: %w", err)
	}
	for _, name := range []string{sandboxesName, eventsName, blankName, trashName} {
		dir := filepath.Join(s.root, name)
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make %s directory: %w", name, fault.DiskFull(err))
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return fmt.Errorf("set mode of %s directory: %w", name, err)
		}
	}
	if err := syncDir(s.root); err != nil {
		return err
	}
	names, err := readNames(s.sandboxesDir())
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, newPrefix) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.sandboxesDir(), name)); err != nil {
			return fmt.Errorf("remove half-made sandbox: %w", err)
		}
	}
	return s.readTrash()
}

// takeLock opens and locks path, or says who holds it.
func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", fault.DiskFull(err))
	}
	err = retryEINTR(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fault.New(fault.Precondition,
				"%s is in use by another hutchd (%s); stop it, or give this one another root", filepath.Dir(path), holder(f))
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// The pid is for people only: the lock itself is what counts, so a disk
	// too full to hold the pid keeps nobody from starting.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

func holder(f *os.File) string {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	pid, convErr := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || convErr != nil || pid <= 0 {
		return "unknown pid"
	}
	return "pid " + strconv.Itoa(pid)
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", fault.DiskFull(err))
	}
	return nil
}

func readNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list directory: %w", err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}
