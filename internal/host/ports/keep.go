package ports

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// fileVersion is the format of the file in a sandbox's directory, which
	// docs/on-disk.md describes.
	fileVersion = 1
	// maxFile bounds it, in bytes.
	maxFile = 4 << 20
	// saveEvery is how often it is written at most.
	saveEvery = time.Second
)

// file is what is kept of a sandbox.
type file struct {
	Version int           `json:"version"`
	Owners  []keptOwner   `json:"owners,omitempty"`
	Numbers []keptNumbers `json:"numbers,omitempty"`
}

// keptOwner is an owner as the guest told of it last.
type keptOwner struct {
	ID       string    `json:"id"`
	Name     string    `json:"name,omitempty"`
	Bindings []Binding `json:"bindings"`
}

// keptNumbers is a number that was chosen for a binding without one.
type keptNumbers struct {
	keptKey
	HostPort uint16 `json:"host_port"`
}

// keptKey is such a binding.
type keptKey struct {
	Owner         string `json:"owner"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"host_ip,omitempty"`
	ContainerPort uint16 `json:"container_port"`
}

func keptKeyOf(owner string, b Binding) keptKey {
	return keptKey{owner, b.Protocol, b.HostIP, b.ContainerPort}
}

// maxKept bounds the numbers of one sandbox.
const maxKept = MaxBindings

// keepLocked remembers the number that was chosen for bd. The table's mu is held.
func (b *box) keepLocked(bd *binding) {
	k := keptKeyOf(bd.owner.id, bd.Binding)
	if b.kept[k] == bd.port || len(b.kept) >= maxKept && b.kept[k] == 0 {
		return
	}
	b.kept[k] = bd.port
	b.saveSoonLocked()
}

// saveSoonLocked has the file written: now, or a second after the last time.
// The table's mu is held.
func (b *box) saveSoonLocked() {
	b.unsaved = true
	if b.saving != nil || b.over || b.t.closed {
		return
	}
	b.saving = time.AfterFunc(max(0, time.Until(b.savedAt.Add(saveEvery))), b.saveNow)
}

func (b *box) saveNow() {
	b.t.mu.Lock()
	b.saving = nil
	if b.over || b.t.closed {
		b.t.mu.Unlock()
		return
	}
	b.t.wg.Add(1)
	b.t.mu.Unlock()
	defer b.t.wg.Done()
	if err := b.save(); err != nil {
		b.t.p.Log.Warn("ports of a sandbox can't be written down", "sandbox_id", b.id, "error", err)
	}
}

// save writes the file if there is something new. A sandbox whose directory is
// gone needs none.
func (b *box) save() error {
	b.save1.Lock()
	defer b.save1.Unlock()
	b.t.mu.Lock()
	if !b.unsaved || b.over {
		b.t.mu.Unlock()
		return nil
	}
	f := b.fileLocked()
	b.unsaved, b.savedAt = false, time.Now()
	b.t.mu.Unlock()
	err := writeFile(b.t.p.File(b.id), f)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("keep ports of sandbox %s: %w", b.id, err)
	}
	return nil
}

// fileLocked is the box as it is kept: not its reservations. The table's mu is
// held.
func (b *box) fileLocked() file {
	f := file{Version: fileVersion}
	for _, o := range b.owners {
		if o.expire != nil {
			continue
		}
		k := keptOwner{ID: o.id, Name: o.name}
		for _, bd := range o.bindings {
			k.Bindings = append(k.Bindings, bd.Binding)
		}
		f.Owners = append(f.Owners, k)
	}
	slices.SortFunc(f.Owners, func(a, b keptOwner) int { return strings.Compare(a.ID, b.ID) })
	for k, port := range b.kept {
		f.Numbers = append(f.Numbers, keptNumbers{k, port})
	}
	slices.SortFunc(f.Numbers, func(a, b keptNumbers) int { return strings.Compare(a.Owner, b.Owner) })
	return f
}

// writeFile replaces the file. A reader sees the old or the new one. It is not
// made durable: after a crash of the host no guest runs, and what a hibernated
// one published is told when it wakes.
func writeFile(path string, f file) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// loadLocked opens what the table before kept. What can't be read is as good as
// nothing: the guest will tell. The table's mu is held.
func (b *box) loadLocked() {
	f, err := readFile(b.t.p.File(b.id))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			b.t.p.Log.Warn("kept ports of a sandbox can't be read", "sandbox_id", b.id, "error", err)
		}
		return
	}
	for _, n := range f.Numbers[:min(len(f.Numbers), maxKept)] {
		b.kept[n.keptKey] = n.HostPort
	}
	for _, k := range f.Owners {
		if o, ok := clean(Owner(k)); ok {
			b.setLocked(o)
		}
	}
}

func readFile(path string) (file, error) {
	var f file
	r, err := os.Open(path)
	if err != nil {
		return f, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxFile))
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return f, fmt.Errorf("parse %s: %w", path, err)
	}
	if f.Version != fileVersion {
		return f, fmt.Errorf("%s has version %d, this hutchd reads %d", path, f.Version, fileVersion)
	}
	return f, nil
}
