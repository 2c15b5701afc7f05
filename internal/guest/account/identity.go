package account

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Do runs fn with the file rights of u and of nobody else: the kernel checks
// every path that fn walks as it would for a program of that user, and what fn
// creates belongs to u. For root fn simply runs.
//
// fn runs on a goroutine and thread of its own, must not hand work to other
// goroutines, and may keep open files: what is open stays usable by anyone. A
// panic in fn is passed on.
func (u User) Do(fn func() error) error {
	if u.UID == 0 && u.GID == 0 {
		return fn()
	}
	type outcome struct {
		err   error
		panic any
	}
	done := make(chan outcome, 1)
	go func() {
		var out outcome
		defer func() { done <- out }()
		runtime.LockOSThread()
		saved, err := takeIdentity(u)
		if err == nil {
			out.panic = catch(func() { out.err = fn() })
		} else {
			out.err = fmt.Errorf("take the file rights of user %s: %w", u.Label(), err)
		}
		// A thread that did not get its old identity back stays locked, and
		// dies with this goroutine.
		if saved.restore() == nil {
			runtime.UnlockOSThread()
		}
	}()
	out := <-done
	if out.panic != nil {
		panic(out.panic)
	}
	return out.err
}

// Check runs fn as Do does and returns its value.
func Check[T any](u User, fn func() (T, error)) (T, error) {
	var v T
	err := u.Do(func() error {
		var err error
		v, err = fn()
		return err
	})
	return v, err
}

func catch(fn func()) (p any) {
	defer func() { p = recover() }()
	fn()
	return nil
}

type identity struct {
	groups []uint32
	fsuid  int
	fsgid  int
	caps   [2]unix.CapUserData
}

// takeIdentity changes the calling thread only. The effective capabilities go
// too: changing the file user drops those about files, but not the ones that
// open other doors (tracing, administration).
func takeIdentity(u User) (identity, error) {
	var old identity
	var err error
	if old.groups, err = threadGroups(); err != nil {
		return old, err
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &old.caps[0]); err != nil {
		return old, fmt.Errorf("read capabilities: %w", err)
	}
	if err := setThreadGroups(u.Groups); err != nil {
		return old, err
	}
	if old.fsgid, err = unix.SetfsgidRetGid(int(u.GID)); err != nil {
		return old, fmt.Errorf("set file group: %w", err)
	}
	if old.fsuid, err = unix.SetfsuidRetUid(int(u.UID)); err != nil {
		return old, fmt.Errorf("set file user: %w", err)
	}
	// The calls above report the old value, never an error: ask again.
	if now, _ := unix.SetfsuidRetUid(-1); now != int(u.UID) {
		return old, errors.New("set file user: not permitted")
	}
	if now, _ := unix.SetfsgidRetGid(-1); now != int(u.GID) {
		return old, errors.New("set file group: not permitted")
	}
	if u.UID == 0 {
		return old, nil
	}
	none := old.caps
	none[0].Effective, none[1].Effective = 0, 0
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return old, fmt.Errorf("drop effective capabilities: %w", err)
	}
	return old, nil
}

func (old identity) restore() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&hdr, &old.caps[0]); err != nil {
		return err
	}
	_, _ = unix.SetfsuidRetUid(old.fsuid)
	_, _ = unix.SetfsgidRetGid(old.fsgid)
	if err := setThreadGroups(old.groups); err != nil {
		return err
	}
	// Going back to file user 0 raises the file capabilities, which the saved
	// set may not have had.
	if err := unix.Capset(&hdr, &old.caps[0]); err != nil {
		return err
	}
	uid, _ := unix.SetfsuidRetUid(-1)
	gid, _ := unix.SetfsgidRetGid(-1)
	groups, err := threadGroups()
	if err != nil || uid != old.fsuid || gid != old.fsgid || !slices.Equal(groups, old.groups) {
		return errors.New("identity not restored")
	}
	return nil
}

// The raw calls, because the wrappers of the standard library change every
// thread of the process.

func threadGroups() ([]uint32, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_GETGROUPS, 0, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("count groups: %w", errno)
	}
	if n == 0 {
		return nil, nil
	}
	groups := make([]uint32, n)
	n, _, errno = unix.RawSyscall(unix.SYS_GETGROUPS, n, uintptr(unsafe.Pointer(&groups[0])), 0)
	if errno != 0 {
		return nil, fmt.Errorf("read groups: %w", errno)
	}
	return groups[:n], nil
}

func setThreadGroups(groups []uint32) error {
	var p unsafe.Pointer
	if len(groups) > 0 {
		p = unsafe.Pointer(&groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(p), 0); errno != 0 {
		return fmt.Errorf("set groups: %w", errno)
	}
	return nil
}
