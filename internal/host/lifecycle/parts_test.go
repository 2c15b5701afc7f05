package lifecycle

import (
	"log/slog"
	"os"
	"os/exec"
	"testing"

	"github.com/hutch-run/hutch/internal/host/disk"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

var (
	_ Records = (*store.Store)(nil)
	_ Events  = (*events.Log)(nil)
	_ Disks   = (*disk.Disks)(nil)
)

// TestWithRealFiles runs a life on the real store, events and disks.
func TestWithRealFiles(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	log := slog.New(slog.DiscardHandler)
	var told *events.Log
	var disks *disk.Disks
	h := start(t, w, func(p *Params) {
		s := p.Records.(fakeRecords).s.store
		var err error
		if told, err = events.Open(events.Params{Dir: s.EventsDir(), Log: log}); err != nil {
			t.Fatal(err)
		}
		disks = disk.New(disk.Params{BlankDir: s.BlankDir(), Log: log})
		p.Records, p.Events, p.Disks = s, told, disks
	})
	v := h.create("sb-1", plain)
	path := h.s.store.DataDisk(v.ID)
	if info, err := os.Stat(path); err != nil || info.Size() != 64<<20 {
		t.Errorf("disk: %v, %v", info, err)
	}
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	h.must(h.Pause(h.c, v.ID))
	l, err := h.s.store.Load()
	h.must(err)
	if len(l.Records) != 1 || l.Records[0].State != sandbox.Paused || l.Records[0].Machine == nil || len(l.Quarantined) != 0 {
		t.Errorf("on disk: %+v", l)
	}
	h.must(h.Destroy(h.c, v.ID))
	w.checkEmpty(t)
	b, err := told.Since(0)
	h.must(err)
	if n := len(b.Events); n != 5 || b.Events[n-1].State != sandbox.Gone || b.Events[n-1].Sequence != 5 {
		t.Errorf("events: %+v", b.Events)
	}
	h.stop(true)
	disks.Close()
	h.must(told.Close())
}
