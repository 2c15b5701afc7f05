package lifecycle

import (
	"fmt"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// source is what a create is made from: a template, or a snapshot, which is a
// template of its own.
type source struct {
	template template.Template
	image    string // path
	still    *still // of a snapshot; nil: a template
	// release lets go of it. Until then neither image nor snapshot goes away.
	release func()
}

// hold finds what a spec names.
func (m *Manager) hold(spec sandbox.Spec) (source, error) {
	name := orElse(spec.Template, sandbox.DefaultTemplate)
	if s := m.stock.named(name); s != nil {
		return m.holdSnapshot(s)
	}
	var src source
	var err error
	if src.template, src.image, src.release, err = m.p.Templates.Hold(name); err != nil {
		return source{}, fmt.Errorf("find template %s: %w", name, err)
	}
	return src, nil
}

func (m *Manager) holdSnapshot(s *still) (source, error) {
	release, ok := s.hold()
	if !ok {
		return source{}, fault.New(fault.NotFound, "snapshot %s is being removed", s.snap.Name)
	}
	path, err := m.p.Templates.Image(s.snap.ImageDigest)
	if err != nil {
		release()
		return source{}, fmt.Errorf("find the image of snapshot %s: %w", s.snap.Name, err)
	}
	t := template.Template{
		Name: s.snap.Name, ImageDigest: s.snap.ImageDigest, Env: s.snap.Env, User: s.snap.User, Cwd: s.snap.Cwd,
		VCPUs: s.snap.Fits.VCPUs, MemoryMB: s.snap.Fits.MemoryMB, DiskMB: s.snap.DiskMB,
	}
	return source{template: t, image: path, still: s, release: release}, nil
}

// complete fills in what a spec leaves open, from the source first.
func (src source) complete(s sandbox.Spec) sandbox.Spec {
	s.VCPUs = orElse(s.VCPUs, src.template.VCPUs)
	s.MemoryMB = orElse(s.MemoryMB, src.template.MemoryMB)
	s.DiskMB = orElse(s.DiskMB, src.template.DiskMB)
	return s.WithDefaults()
}

// check refuses a shape that a snapshot can't have: its machine is what it is,
// and so is its disk.
func (src source) check(s sandbox.Spec) error {
	if src.still == nil {
		return nil
	}
	snap := src.still.snap
	const help = "leave it out, or ask for a cold start, which boots from the snapshot's disk"
	switch {
	case s.DiskMB != snap.DiskMB:
		return fault.BadField("disk_size_mb", "snapshot %s has a disk of %d MiB; leave it out", snap.Name, snap.DiskMB)
	case s.ColdStart:
		return nil
	case len(s.Shares) > 0:
		return fault.BadField("shares", "a copy of snapshot %s can't have any: %s; ask for a cold start, which boots from its disk", snap.Name, whyBound)
	case s.VCPUs != snap.Fits.VCPUs:
		return fault.BadField("vcpus", "snapshot %s has %d; %s", snap.Name, snap.Fits.VCPUs, help)
	case s.MemoryMB != snap.Fits.MemoryMB:
		return fault.BadField("memory_mb", "snapshot %s has %d; %s", snap.Name, snap.Fits.MemoryMB, help)
	}
	return nil
}
