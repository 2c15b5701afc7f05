package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// Build makes an image from a source and returns it held. It is fault.Invalid
// with the reason if the source is refused, and leaves nothing behind on any
// error. progress may be nil.
func (s *Store) Build(ctx context.Context, src Source, progress Progress) (_ *Image, err error) {
	if err := src.check(); err != nil {
		return nil, err
	}
	began := time.Now()
	work, err := os.MkdirTemp(s.p.Work, "build-*")
	if err != nil {
		return nil, fmt.Errorf("make a work directory: %w", diskError(err))
	}
	defer func() { // done or not, nothing in there is needed any longer
		if rerr := os.RemoveAll(work); rerr != nil {
			s.p.Log.Error("remove a build's work directory", "dir", work, "err", rerr)
		}
	}()
	dir := filepath.Join(work, "image")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a work directory: %w", diskError(err))
	}
	m, err := s.write(ctx, src, work, dir, progress)
	if err != nil {
		return nil, err
	}
	if err := writeManifest(dir, m); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	img, err := s.commit(dir, m)
	if err != nil {
		return nil, err
	}
	s.p.Log.Info("image built", "digest", m.Digest, "source", m.Source, "size", m.Size, "stored", m.Stored,
		"entries", m.Entries, "duration", time.Since(began))
	return img, nil
}

// write builds rootfs.ext4 in dir.
func (s *Store) write(ctx context.Context, src Source, work, dir string, progress Progress) (Manifest, error) {
	o, err := src.open(ctx, work, s.p.Limits, progress)
	if err != nil {
		return Manifest{}, err
	}
	if o.close != nil {
		defer func() {
			if cerr := o.close(); cerr != nil {
				s.p.Log.Warn("close an image source", "source", src.String(), "err", cerr)
			}
		}()
	}
	t, spools, err := s.squash(ctx, src, o, work, progress)
	defer func() {
		for _, sp := range spools {
			if sp != nil {
				_ = sp.close() // without a name; closing is what frees it
			}
		}
	}()
	if err != nil {
		return Manifest{}, err
	}
	f, err := os.OpenFile(filepath.Join(dir, rootfsName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return Manifest{}, fmt.Errorf("make the image file: %w", diskError(err))
	}
	m := Manifest{Version: Version, Source: src.String(), Platform: o.platform, Config: o.config, Entries: t.count, Created: time.Now().UTC()}
	if src.Config != nil {
		m.Config = *src.Config
	}
	if want, err := parsePlatform(src.Platform); m.Platform == "" && err == nil {
		m.Platform = platformName(want) // a tar does not say; taken for what was asked for
	}
	err = finish(ctx, t, f, &m, progress)
	if err := errors.Join(err, f.Close()); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// finish writes the tree to f and fills in what depends on the bytes.
func finish(ctx context.Context, t *tree, f *os.File, m *Manifest, progress Progress) (err error) {
	if m.Size, err = writeImage(ctx, t, f, progress); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Chmod(0o444)); err != nil {
		return fmt.Errorf("sync the image file: %w", diskError(err))
	}
	if m.Digest, err = digestFile(ctx, f, m.Size, progress); err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat the image file: %w", err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		m.Stored = st.Blocks * 512
	}
	return nil
}

// squash reads all layers, some at once, and puts them on top of each other.
// The spools are the caller's to close, also on error.
func (s *Store) squash(ctx context.Context, src Source, o *opened, work string, progress Progress) (*tree, []*spool, error) {
	b := &budget{lim: s.p.Limits}
	spools := make([]*spool, len(o.layers))
	entries := make([][]entry, len(o.layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(s.p.Limits.Parallel)
	for i, l := range o.layers {
		g.Go(func() (err error) {
			if spools[i], err = newSpool(work); err != nil {
				return err
			}
			lr := &layerReader{layer: l, budget: b, spool: spools[i], progress: progress, dropDevices: src.DropDevices, strictEnd: o.strict}
			entries[i], err = lr.read(gctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, spools, err
	}
	t := newTree(s.p.Limits.Entries)
	for i, es := range entries {
		if err := ctx.Err(); err != nil {
			return nil, spools, context.Cause(ctx)
		}
		if err := t.apply(es); err != nil {
			return nil, spools, fmt.Errorf("%s: %w", o.layers[i].name, err)
		}
		entries[i] = nil // what the tree does not use may go
	}
	if err := t.check(); err != nil {
		return nil, spools, err
	}
	if !src.Clamp.IsZero() {
		t.clamp(src.Clamp)
	}
	return t, spools, nil
}

func digestFile(ctx context.Context, f *os.File, size int64, progress Progress) (Digest, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	r := io.NewSectionReader(f, 0, size)
	for done := int64(0); done < size; {
		if err := ctx.Err(); err != nil {
			return "", context.Cause(ctx)
		}
		n, err := io.ReadFull(r, buf[:min(size-done, int64(len(buf)))])
		if err != nil {
			return "", fmt.Errorf("read the image file: %w", err)
		}
		h.Write(buf[:n])
		done += int64(n)
		progress.tell("computing the digest", done, size)
	}
	return Digest(digestPrefix + hex.EncodeToString(h.Sum(nil))), nil
}
