package dockersock

import (
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// readAgain is when events are read again that could not be.
const readAgain = time.Second

// follow keeps the sockets in step with the sandboxes until Close.
func (s *Sockets) follow(r *events.Reader) {
	for {
		batch, err := r.Next(s.open)
		switch {
		case s.open.Err() != nil:
			return
		case err != nil:
			s.p.Log.Warn("Docker sockets: read events", "error", err)
			select {
			case <-s.open.Done():
				return
			case <-time.After(readAgain):
			}
			s.syncAll()
			continue
		case batch.Missed > 0:
			s.syncAll()
		}
		seen := map[sandbox.ID]bool{}
		for _, e := range batch.Events {
			if !seen[e.ID] {
				seen[e.ID] = true
				s.sync(e.ID)
			}
		}
	}
}

// syncAll brings all sockets into step.
func (s *Sockets) syncAll() {
	ids := map[sandbox.ID]bool{}
	for _, v := range s.p.Sandboxes.List() {
		ids[v.ID] = true
	}
	s.mu.Lock()
	for id := range s.doors {
		ids[id] = true
	}
	s.mu.Unlock()
	for id := range ids {
		s.sync(id)
	}
}

// sync opens or removes the socket of a sandbox, by what it is now.
func (s *Sockets) sync(id sandbox.ID) {
	switch wanted, known := s.wanted(id); {
	case !known:
	case wanted:
		s.openDoor(id)
		if again, known := s.wanted(id); known && !again {
			s.shutDoor(id) // it went meanwhile
		}
	default:
		s.shutDoor(id)
	}
}

// wanted reports whether a sandbox is to have a socket. A sandbox that boots
// keeps what it has, which is not known here.
func (s *Sockets) wanted(id sandbox.ID) (wanted, known bool) {
	v, err := s.p.Sandboxes.Get(string(id))
	switch {
	case fault.Is(err, fault.NotFound), fault.Is(err, fault.Invalid), err == nil && v.ID != id: // the beginning of others
		return false, true
	case err != nil, v.State == sandbox.Pending:
		return false, false
	case v.Spec.Purpose != "": // hutchd's own
		return false, true
	}
	switch v.State {
	case sandbox.Running, sandbox.Paused, sandbox.Hibernated, sandbox.Stopped, sandbox.Failed:
		return true, true
	case sandbox.Pending, sandbox.Broken, sandbox.Destroying, sandbox.Gone:
	}
	return false, true
}

func (s *Sockets) openDoor(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doors == nil {
		return // closed
	}
	d := s.doors[id]
	if d == nil {
		d = newDoor(s, id)
		s.doors[id] = d
	}
	if err := d.listen(s.path(id)); err != nil {
		s.p.Log.Warn("sandbox has no Docker socket", "sandbox_id", id, "error", err)
	}
}

func (s *Sockets) shutDoor(id sandbox.ID) {
	s.mu.Lock()
	d := s.doors[id]
	delete(s.doors, id)
	s.mu.Unlock()
	if d != nil {
		d.close()
	}
}
