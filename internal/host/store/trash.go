package store

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// errStopped is what tests return from a step to play a machine that stops
// there: nothing may be cleaned up after it.
var errStopped = errors.New("stopped here")

func (s *Store) at(step string) error {
	if s.step == nil {
		return nil
	}
	return s.step(step)
}

// Remove moves the directory of a sandbox to the trash, in one step and for
// good, and has it deleted in the background. Removing what is not there is no
// error.
func (s *Store) Remove(id sandbox.ID) error {
	if _, err := sandbox.ParseID(string(id)); err != nil {
		return err
	}
	to := s.inTrash(trashPrefix + string(id))
	if err := s.at("remove: rename"); err != nil {
		return err
	}
	err := os.Rename(s.Dir(id), to)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove sandbox directory: %w", fault.DiskFull(err))
	}
	defer s.wake()
	if err := s.at("remove: sync"); err != nil {
		return err
	}
	return errors.Join(syncDir(s.trashDir()), syncDir(s.sandboxesDir()))
}

// inTrash returns a new name in the trash.
func (s *Store) inTrash(what string) string {
	var nonce [8]byte
	rand.Read(nonce[:]) // never fails, see crypto/rand
	return filepath.Join(s.trashDir(), what+"."+hex.EncodeToString(nonce[:]))
}

// readTrash notes which sandboxes are in the trash.
func (s *Store) readTrash() error {
	names, err := readNames(s.trashDir())
	if err != nil {
		return err
	}
	for _, name := range names {
		rest, ok := strings.CutPrefix(name, trashPrefix)
		if !ok {
			continue
		}
		id, _, _ := strings.Cut(rest, ".")
		if id, err := sandbox.ParseID(id); err == nil {
			s.trashed = append(s.trashed, id)
		}
	}
	return nil
}

// wake tells the sweeper that there is something in the trash.
func (s *Store) wake() {
	select {
	case s.kick <- struct{}{}:
	default: // it knows already
	}
}

// lastSweep is what Close gives to what is in the trash then. The rest goes at
// the next start.
const lastSweep = 5 * time.Second

// sweep empties the trash whenever it is told to, and once more at Close.
func (s *Store) sweep() {
	for {
		select {
		case <-s.done:
			end := time.Now().Add(lastSweep)
			s.emptyTrash(func() bool { return time.Now().After(end) })
			return
		case <-s.kick:
			s.emptyTrash(func() bool {
				select {
				case <-s.done:
					return true
				default:
					return false
				}
			})
		}
	}
}

// emptyTrash deletes what was a sandbox or its memory. Others put their things into the same
// directory, and need them there for a moment. It stops between two when enough
// says so.
func (s *Store) emptyTrash(enough func() bool) {
	names, err := readNames(s.trashDir())
	if err != nil {
		s.log.Warn("trash can't be listed", slog.Any("error", err))
		return
	}
	for _, name := range names {
		if enough() {
			return
		}
		if !strings.HasPrefix(name, trashPrefix) && !strings.HasPrefix(name, memoryPrefix) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.trashDir(), name)); err != nil {
			s.log.Warn("trash can't be deleted, will try again", slog.String("name", name), slog.Any("error", err))
		}
	}
}
