package ports

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
)

// MaxBindings bounds what one owner may publish, and MaxOwners how many there
// are. What is beyond is left out, and logged.
const (
	MaxBindings = 1024
	MaxOwners   = 1024
)

// Binding is one published port.
type Binding struct {
	ContainerPort uint16
	HostPort      uint16 // 0: any that is free
	Protocol      string // "tcp" or "udp"
	HostIP        string // empty: every address
	// Way is where in this machine a connection to HostPort is to go when that is
	// not its usual way. It is told to nobody but Board.Way.
	Way netip.AddrPort
}

// Owner is who publishes, and all of what.
type Owner struct {
	ID       string
	Name     string // for people
	Bindings []Binding
}

// equal reports whether o publishes what other does.
func (o Owner) equal(other Owner) bool {
	return o.ID == other.ID && o.Name == other.Name && slices.Equal(o.Bindings, other.Bindings)
}

// Source tells what one daemon of this machine publishes.
type Source interface {
	// Run tells to until ctx ends.
	Run(ctx context.Context, to *Sink)
}

// Board is what is published now. It is safe for concurrent use.
type Board struct {
	log *slog.Logger

	mu       sync.Mutex // guards what follows
	sequence uint64
	owners   map[string]*entry
	sources  map[string]*source
	watches  map[*Watch]struct{}
	started  chan struct{} // closed by the first Start
	ever     bool
}

// entry is one owner on the board.
type entry struct {
	Owner
	source   string
	sequence uint64
}

// source is one that runs.
type source struct {
	cancel  context.CancelFunc
	done    chan struct{}
	settled bool // it has told all that it found at its start
}

// New returns an empty board.
func New(log *slog.Logger) *Board {
	return &Board{
		log: log, owners: map[string]*entry{}, sources: map[string]*source{},
		watches: map[*Watch]struct{}{}, started: make(chan struct{}),
	}
}

// Start runs a source under a name. While one of that name runs it does
// nothing.
func (b *Board) Start(name string, s Source) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sources[name] != nil {
		return
	}
	if !b.ever {
		b.ever = true
		close(b.started)
	}
	ctx, cancel := context.WithCancel(context.Background())
	run := &source{cancel: cancel, done: make(chan struct{})}
	b.sources[name] = run
	go func() {
		defer close(run.done)
		s.Run(ctx, &Sink{board: b, source: name, run: run})
	}()
}

// Stop ends the source of a name, and what it told is published no more. It
// returns when that is done.
func (b *Board) Stop(name string) {
	b.mu.Lock()
	run := b.sources[name]
	b.mu.Unlock()
	if run == nil {
		return
	}
	run.cancel()
	<-run.done
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sources[name] != run {
		return
	}
	delete(b.sources, name)
	b.replaceLocked(name, nil)
}

// Close stops all sources.
func (b *Board) Close() {
	b.mu.Lock()
	names := slices.Collect(maps.Keys(b.sources))
	b.mu.Unlock()
	for _, name := range names {
		b.Stop(name)
	}
}

// Way returns where a connection to a published port of this machine is to go,
// if that is not where the machine itself would look.
func (b *Board) Way(protocol string, port uint16) (way netip.AddrPort, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.owners {
		for _, bd := range o.Bindings {
			if bd.Protocol != protocol || bd.HostPort != port {
				continue
			}
			if !bd.Way.IsValid() {
				return netip.AddrPort{}, false // the usual way is there
			}
			way = bd.Way
		}
	}
	return way, way.IsValid()
}

// AwaitStart returns when the first source was started.
func (b *Board) AwaitStart(ctx context.Context) error {
	b.mu.Lock()
	started := b.started
	b.mu.Unlock()
	select {
	case <-started:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// setLocked puts an owner's full set on the board. b.mu is held.
func (b *Board) setLocked(source string, o Owner) {
	if len(o.Bindings) == 0 {
		b.removeLocked(source, o.ID)
		return
	}
	if len(o.Bindings) > MaxBindings {
		b.log.Warn("owner publishes too many ports, the rest is left out", "owner", o.ID, "ports", len(o.Bindings))
		o.Bindings = o.Bindings[:MaxBindings]
	}
	old := b.owners[o.ID]
	switch {
	case old == nil && len(b.owners) >= MaxOwners:
		b.log.Warn("too many owners of ports, one is left out", "owner", o.ID)
		return
	case old != nil && old.source == source && old.equal(o):
		return
	}
	b.sequence++
	b.owners[o.ID] = &entry{Owner: o, source: source, sequence: b.sequence}
	for w := range b.watches {
		w.changedLocked(o.ID)
	}
}

// removeLocked takes an owner off the board, unless it is another source's.
// b.mu is held.
func (b *Board) removeLocked(source, id string) {
	old := b.owners[id]
	if old == nil || old.source != source {
		return
	}
	b.sequence++
	delete(b.owners, id)
	for w := range b.watches {
		w.removedLocked(id, b.sequence)
	}
}

// replaceLocked makes all the whole of what a source publishes. b.mu is held.
func (b *Board) replaceLocked(source string, all []Owner) {
	kept := map[string]bool{}
	for _, o := range all {
		kept[o.ID] = true
	}
	for id, e := range b.owners {
		if e.source == source && !kept[id] {
			b.removeLocked(source, id)
		}
	}
	for _, o := range all {
		b.setLocked(source, o)
	}
}

// settledLocked reports whether every source has told what it found at its
// start. b.mu is held.
func (b *Board) settledLocked() bool {
	for _, s := range b.sources {
		if !s.settled {
			return false
		}
	}
	return true
}

// Sink is where one source tells what it knows.
type Sink struct {
	board  *Board
	source string
	run    *source
}

// Set tells the full set of one owner. None is a Remove.
func (s *Sink) Set(o Owner) {
	s.board.mu.Lock()
	defer s.board.mu.Unlock()
	s.board.setLocked(s.source, o)
}

// Remove tells that an owner publishes nothing any more.
func (s *Sink) Remove(id string) {
	s.board.mu.Lock()
	defer s.board.mu.Unlock()
	s.board.removeLocked(s.source, id)
}

// Replace tells all owners of the source.
func (s *Sink) Replace(all []Owner) {
	s.board.mu.Lock()
	defer s.board.mu.Unlock()
	s.board.replaceLocked(s.source, all)
	s.settleLocked()
}

// Settle tells that what the source told until now is all there is. Replace
// does so too.
func (s *Sink) Settle() {
	s.board.mu.Lock()
	defer s.board.mu.Unlock()
	s.settleLocked()
}

// settleLocked is Settle. The board's mu is held.
func (s *Sink) settleLocked() {
	if s.run.settled {
		return
	}
	s.run.settled = true
	for w := range s.board.watches {
		w.wake()
	}
}
