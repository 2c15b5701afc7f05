package lifecycle

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/image"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

var _ Templates = (*template.Store)(nil)

// shop is a real template store with a template that is removed, and its image
// collected if nothing uses it, at a moment of a create.
type shop struct {
	*template.Store
	t    *testing.T
	h    *host
	path string // of its one image
}

func newShop(t *testing.T, w *world) *shop {
	t.Helper()
	store, err := template.Open(template.Params{Root: w.root})
	if err != nil {
		t.Fatal(err)
	}
	s := &shop{Store: store, t: t}
	if s.path, err = s.Image(s.build()); err != nil {
		t.Fatal(err)
	}
	return s
}

// build makes the default template, whose image is always the same.
func (s *shop) build() (digest string) {
	s.t.Helper()
	var root bytes.Buffer
	tw := tar.NewWriter(&root)
	if err := errors.Join(tw.WriteHeader(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}), tw.Close()); err != nil {
		s.t.Fatal(err)
	}
	made, err := s.Import(testenv.Context(s.t), template.ImportParams{Name: sandbox.DefaultTemplate, Source: image.Source{Stream: &root}})
	if err != nil {
		s.t.Fatal(err)
	}
	return made.ImageDigest
}

// clear removes the template and collects; it tells whether the image went.
func (s *shop) clear() bool {
	s.t.Helper()
	if err := s.Remove(sandbox.DefaultTemplate); err != nil && !fault.Is(err, fault.NotFound) {
		s.t.Error(err)
	}
	gone, err := s.Collect(testenv.Context(s.t), func() map[string]bool {
		used, _ := s.h.ImagesInUse()
		return used
	})
	if err != nil {
		s.t.Error(err)
	}
	return len(gone) > 0
}

// TestCollectionInTheMiddleOfACreate removes the template of a create, and
// collects, at every moment from its look-up to the launch of its VM. The image
// stays for the sandbox, also when the create fails, until that is told.
func TestCollectionInTheMiddleOfACreate(t *testing.T) {
	testenv.CheckGoroutines(t)
	for _, when := range []string{"look-up", "record", "queue", "launch"} {
		for _, fails := range []bool{false, true} {
			w, moment := newWorld(t), when
			s := newShop(t, w)
			at := func(here string) error {
				if here != moment {
					return nil
				}
				if s.clear() {
					t.Errorf("%s: the image was collected", moment)
				}
				if fails {
					return errInjected
				}
				return nil
			}
			s.h = start(t, w, func(p *Params) {
				p.Templates = s
				pack := p.Kernel
				p.Kernel = func() (kernel.Pack, error) {
					k, _ := pack()
					return k, at("look-up")
				}
				p.Break = func(_ context.Context, _ sandbox.ID, step string) error { return at(step[len("create "):]) }
			})
			_, err := s.h.Create(s.h.c, "sb-1", plain)
			if (err != nil) != fails {
				t.Fatalf("%s: create: %v", moment, err)
			}
			if !fails {
				if s.clear() {
					t.Errorf("%s: the image of a sandbox was collected", moment)
				}
				moment = "done"
				s.h.must(s.h.Destroy(s.h.c, "sb-1"))
			}
			if !s.clear() {
				t.Errorf("%s, fails %v: the image of nothing was kept", moment, fails)
			}
			s.h.stop(true)
		}
	}
}

// TestCollectionsBesideCreates lets creates and collections run as they come:
// every create that succeeds has its image.
func TestCollectionsBesideCreates(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	s := newShop(t, w)
	s.h = start(t, w, func(p *Params) { p.Templates = s })
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				s.clear()
			}
		}
	}()
	defer func() {
		close(stop)
		<-stopped
		s.h.stop(true)
	}()
	for made := 0; made < 30; {
		s.build()
		v, err := s.h.Create(s.h.c, "", plain)
		if fault.Is(err, fault.NotFound) {
			continue // it came too late
		}
		s.h.must(err)
		made++
		if _, err := os.Stat(s.path); err != nil {
			t.Fatalf("after %d creates: %v", made, err)
		}
		s.h.must(s.h.Destroy(s.h.c, v.ID))
	}
}
