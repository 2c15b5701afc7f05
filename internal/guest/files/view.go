package files

import (
	"cmp"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
)

// Params is what a Store needs.
type Params struct {
	Log      *slog.Logger
	Accounts *account.Files
	Defaults account.Defaults
	// MaxEntries bounds a listing: 100000.
	MaxEntries int
}

// Store gives users their view of the guest's files and keeps the watchers
// that are polled. All methods are safe for concurrent use.
type Store struct {
	params Params
	log    *slog.Logger

	mu       sync.Mutex
	closed   bool
	watchers map[string]*poller
	workers  sync.WaitGroup
}

// New returns a Store. Close it.
func New(params Params) (*Store, error) {
	if params.Log == nil || params.Accounts == nil || params.Defaults == nil {
		return nil, errors.New("file store: log, accounts and defaults are needed")
	}
	params.MaxEntries = cmp.Or(params.MaxEntries, 100_000)
	return &Store{params: params, log: params.Log, watchers: map[string]*poller{}}, nil
}

// View is the files as one user sees them.
type View struct {
	store *Store
	user  account.User
}

// As returns the view of the user that c chooses.
func (s *Store) As(c account.Choice) (View, error) {
	u, err := s.params.Accounts.Choose(c, s.params.Defaults)
	return View{store: s, user: u}, err
}

// User returns whose view it is.
func (v View) User() account.User { return v.user }

// maxPath is the kernel's PATH_MAX less the NUL.
const maxPath = 4095

// resolve makes path absolute and clean: "~" and relative paths are below the
// user's home, and "x/.." is nothing, even where x is a link. An empty path is
// the home where empty allows it.
func (v View) resolve(field, path string, empty bool) (string, error) {
	switch {
	case path == "" && !empty:
		return "", fault.BadField(field, "is empty: give a path")
	case strings.ContainsRune(path, 0):
		return "", fault.BadField(field, "holds a NUL byte")
	}
	abs := v.user.ExpandPath(path, "")
	if !strings.HasPrefix(abs, "/") {
		abs = "/" + abs // a home that is no absolute path
	}
	if len(abs) > maxPath {
		return "", fault.BadField(field, "is longer than %d bytes", maxPath)
	}
	return filepath.Clean(abs), nil
}

// do runs fn with the user's rights and words its error about path.
func (v View) do(path string, fn func() error) error {
	return v.explain(path, v.user.Do(fn))
}

// explain gives an error of the system its class and says what to do where
// that can be known. Errors with a class stay.
func (v View) explain(path string, err error) error {
	var classed *fault.Error
	if err == nil || errors.As(err, &classed) {
		return err
	}
	say := func(c fault.Class, words string) error {
		return &explained{fault.Error{Class: c, Field: "path", Msg: "path " + quote(path) + " " + words}, err}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return say(fault.NotFound, "does not exist")
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return say(fault.Denied, "is not open to user "+v.user.Label()+" for this")
	case errors.Is(err, unix.EEXIST):
		return say(fault.Exists, "exists already")
	case errors.Is(err, unix.ENOTDIR):
		return say(fault.Invalid, "is not a directory, or goes through something that is none")
	case errors.Is(err, unix.EISDIR):
		return say(fault.Invalid, "is a directory")
	case errors.Is(err, unix.ELOOP):
		return say(fault.Invalid, "goes through too many symbolic links")
	case errors.Is(err, unix.ENAMETOOLONG):
		return say(fault.Invalid, "has a part that is longer than the filesystem takes")
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return say(fault.Exhausted, "does not fit: no space left on its filesystem")
	case errors.Is(err, unix.EFBIG):
		return say(fault.Invalid, "would be larger than its filesystem takes")
	case errors.Is(err, unix.EROFS):
		return say(fault.Precondition, "is on a read-only filesystem")
	case errors.Is(err, unix.EXDEV):
		return say(fault.Precondition, "and the other one are on different filesystems: copy, then remove")
	case errors.Is(err, unix.EBUSY):
		return say(fault.Precondition, "is in use, or is a mount point")
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return say(fault.Exhausted, "can't be opened now: the guest has no descriptors or memory left")
	}
	return err
}

// explained shows the words, and keeps the system's error for errors.Is.
type explained struct {
	shown fault.Error
	cause error
}

func (e *explained) Error() string   { return e.shown.Msg }
func (e *explained) Unwrap() []error { return []error{&e.shown, e.cause} }

// quote shows a path that may hold anything on one line.
func quote(path string) string {
	var b strings.Builder
	b.WriteByte('\'')
	for _, r := range path {
		if r < ' ' || r == 0x7f {
			r = '?'
		}
		b.WriteRune(r)
	}
	b.WriteByte('\'')
	return b.String()
}
