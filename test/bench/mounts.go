package main

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// ownMounts runs functions on a thread whose mounts nobody else sees. Programs
// that they start have them too.
type ownMounts struct {
	work  chan func()
	ended chan struct{}
}

// newOwnMounts starts the thread and changes its mounts. The caller closes it.
func newOwnMounts(change func() error) (*ownMounts, error) {
	m := &ownMounts{work: make(chan func()), ended: make(chan struct{})}
	go m.serve()
	err := m.do(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("get mounts of its own: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("keep mounts to itself: %w", err)
		}
		return change()
	})
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// serve never unlocks its thread, which therefore ends with it.
func (m *ownMounts) serve() {
	runtime.LockOSThread()
	defer close(m.ended)
	for f := range m.work {
		f()
	}
}

// do runs f on the thread.
func (m *ownMounts) do(f func() error) error {
	err := errors.New("it did not return")
	done := make(chan struct{})
	m.work <- func() { err = f(); close(done) }
	<-done
	return err
}

func (m *ownMounts) close() {
	close(m.work)
	<-m.ended
}
