package image

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// layer is one tar of an image as its source offers it.
type layer struct {
	name   string // for messages and progress: "layer 2 of 5 (sha256:0123...)"
	digest string // "alg:hex" of the stored bytes, "" if the source names none
	diffID string // "alg:hex" of the unpacked bytes, "" if the source names none
	size   int64  // of the stored bytes, -1 if not known
	// again tells that open can be called again after a source failed.
	again bool
	open  func(context.Context) (io.ReadCloser, error)
}

// layerAttempts is how often a layer is fetched whose source breaks off.
const layerAttempts = 3

// sourceError is a failure to get bytes, not one of their meaning.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// layerReader reads one layer: it checks the digests of its bytes, every
// header by itself and that no path comes twice, and puts the contents into a
// spool. What an entry means for the image is the tree's to say.
//
// Duplicates: a directory may come twice, the last one counts, as in layers
// that were put together from several tars; anything else twice is refused,
// for readers disagree on which one counts.
type layerReader struct {
	layer       layer
	budget      *budget
	spool       *spool
	progress    Progress
	dropDevices bool
	strictEnd   bool // no digest vouches for the end, so the end mark has to be there

	entries []entry
	seen    map[string]int // path to its place in entries
	charged int64          // bytes taken from the budget
	counted int64          // entries taken from the budget
}

// read reads the layer, again if the source broke off.
func (lr *layerReader) read(ctx context.Context) ([]entry, error) {
	for attempt := 1; ; attempt++ {
		err := lr.once(ctx)
		if err == nil {
			lr.seen = nil
			return lr.entries, lr.spool.seal()
		}
		var src *sourceError
		if !errors.As(err, &src) || !lr.layer.again || attempt == layerAttempts || ctx.Err() != nil ||
			fault.Of(src.err) != fault.Internal && fault.Of(src.err) != fault.Unavailable {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return nil, fmt.Errorf("%s: %w", lr.layer.name, err)
		}
		lr.budget.giveBack(lr.counted, lr.charged)
		if err := lr.spool.reset(); err != nil {
			return nil, fmt.Errorf("%s: start its spool again: %w", lr.layer.name, err)
		}
	}
}

func (lr *layerReader) once(ctx context.Context) (err error) {
	lr.entries, lr.seen, lr.charged, lr.counted = nil, map[string]int{}, 0, 0
	rc, err := lr.layer.open(ctx)
	if err != nil {
		return &sourceError{err}
	}
	defer func() {
		// A reader that checks itself may complain at its close about what we
		// already refused; only without an error of our own it is news.
		if cerr := rc.Close(); cerr != nil && err == nil {
			err = &sourceError{cerr}
		}
	}()
	raw := &rawReader{ctx: ctx, r: rc, lr: lr}
	if raw.sum, err = newHash(lr.layer.digest); err != nil {
		return err
	}
	br := bufio.NewReaderSize(raw, 64<<10)
	z, _, closeZ, err := decompress(br)
	if err != nil {
		return err
	}
	defer closeZ()
	tarred := &tarStream{r: z, raw: raw, lim: lr.budget.lim}
	if tarred.sum, err = newHash(lr.layer.diffID); err != nil {
		return err
	}
	if err := lr.readTar(ctx, tarred); err != nil {
		return err
	}
	return lr.verify(raw, tarred)
}

// verify compares lengths and digests once everything was read.
func (lr *layerReader) verify(raw *rawReader, tarred *tarStream) error {
	if _, err := io.Copy(io.Discard, raw); err != nil {
		return err
	}
	if lr.layer.size >= 0 && raw.n != lr.layer.size {
		return fault.New(fault.Invalid, "it is %d bytes long, its manifest says %d", raw.n, lr.layer.size)
	}
	if got := digestOf(lr.layer.digest, raw.sum); got != lr.layer.digest {
		return fault.New(fault.Invalid, "its digest is %s, its manifest says %s", got, lr.layer.digest)
	}
	if got := digestOf(lr.layer.diffID, tarred.sum); got != lr.layer.diffID {
		return fault.New(fault.Invalid, "its unpacked digest is %s, the image's config says %s", got, lr.layer.diffID)
	}
	lr.progress.tell(lr.layer.name, raw.n, raw.n)
	return nil
}

func (lr *layerReader) readTar(ctx context.Context, tarred *tarStream) error {
	tr := tar.NewReader(tarred)
	buf := make([]byte, spoolBuffer)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return tarError(err, tarred.n)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		lr.counted++
		if err := lr.budget.addEntry(); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := lr.take(ctx, tarred, tr, h, buf); err != nil {
			return err
		}
	}
	if lr.strictEnd && tarred.ended {
		return fault.New(fault.Invalid, "the archive has no end mark: it is cut short")
	}
	return tarred.drain(buf)
}

// take checks one entry and spools what it holds.
func (lr *layerReader) take(ctx context.Context, tarred *tarStream, tr *tar.Reader, h *tar.Header, buf []byte) error {
	e, err := lr.newEntry(h)
	if err != nil || e == nil {
		return err
	}
	key := e.path
	if e.kind == kindWhiteout || e.kind == kindOpaque {
		key = e.kind.String() + "\x00" + string(rune('0'+e.kind)) + e.path // never equal to a path: those have no zero byte
	}
	if i, ok := lr.seen[key]; ok {
		old := lr.entries[i]
		switch {
		case e.kind == kindDir && old.kind == kindDir:
			lr.entries[i] = *e
		case e.kind != kindWhiteout && e.kind != kindOpaque:
			return refuse(h.Name, "the layer has it twice, as a %v and as a %v", old.kind, e.kind)
		}
		return nil
	}
	if e.kind == kindFile {
		if err := lr.copyFile(ctx, tarred, tr, e, buf); err != nil {
			return err
		}
	}
	lr.seen[key] = len(lr.entries)
	lr.entries = append(lr.entries, *e)
	return nil
}

// copyFile spools the contents of a file. Sparse files come expanded and go
// back to holes in the spool, and count with their full size.
func (lr *layerReader) copyFile(ctx context.Context, tarred *tarStream, tr *tar.Reader, e *entry, buf []byte) error {
	lr.charged += e.ino.size
	if err := lr.budget.addBytes(e.ino.size); err != nil {
		return err
	}
	e.ino.spool, e.ino.off = lr.spool, lr.spool.at()
	for left := e.ino.size; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(tr, buf[:min(int64(len(buf)), left)])
		if err != nil {
			return tarError(err, tarred.n)
		}
		if _, err := lr.spool.Write(buf[:n]); err != nil {
			return fmt.Errorf("spool %s: %w", quote(e.path), err)
		}
		left -= int64(n)
		tarred.contents += int64(n)
		if err := tarred.checkRatio(tarred.contents); err != nil {
			return err
		}
	}
	return nil
}

// tarError makes a complaint of the tar reader a refusal.
func tarError(err error, at int64) error {
	var f *fault.Error
	var src *sourceError
	switch {
	case errors.As(err, &f), errors.As(err, &src):
		return err
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fault.New(fault.Invalid, "the archive is cut short after %d bytes", at)
	}
	return fault.New(fault.Invalid, "the archive is no valid tar near byte %d: %v", at, err)
}

// rawReader counts and digests the stored bytes, stops when ctx is done, and
// marks errors as the source's own.
type rawReader struct {
	ctx context.Context
	r   io.Reader
	lr  *layerReader
	sum hash.Hash
	n   int64
}

func (r *rawReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	r.n += int64(n)
	if r.sum != nil {
		r.sum.Write(p[:n])
	}
	if size := r.lr.layer.size; size >= 0 && r.n > size {
		return n, fault.New(fault.Invalid, "it is longer than the %d bytes its manifest says", size)
	}
	r.lr.progress.tell(r.lr.layer.name, r.n, max(r.lr.layer.size, 0))
	if err != nil && !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = &sourceError{err}
	}
	return n, err
}

// tarStream digests the unpacked bytes, holds them to the limits and notes
// whether the end was run into: an archive with its end mark, two blocks of
// zeros, is over before that.
type tarStream struct {
	r        io.Reader
	raw      *rawReader
	lim      Limits
	sum      hash.Hash
	n        int64
	contents int64 // logical bytes of the files so far
	ended    bool
}

// slack is what an archive may hold besides the contents of files, for each
// entry: its header, its PAX records, padding.
const slack = 4 << 10

func (t *tarStream) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.n += int64(n)
	if t.sum != nil {
		t.sum.Write(p[:n])
	}
	if n == 0 && errors.Is(err, io.EOF) {
		t.ended = true
	}
	if t.n > t.lim.UnpackedBytes+t.lim.Entries*slack {
		return n, fault.New(fault.Invalid, "the archive unpacks to more than %d bytes, the limit", t.lim.UnpackedBytes)
	}
	if rerr := t.checkRatio(t.n); rerr != nil {
		return n, rerr
	}
	if err != nil {
		err = streamError(err)
	}
	return n, err
}

// checkRatio looks at how far n unpacked bytes are from the stored ones.
func (t *tarStream) checkRatio(n int64) error { return checkRatio(t.lim, n, t.raw.n) }

func checkRatio(lim Limits, unpacked, stored int64) error {
	if unpacked > lim.RatioFloor && unpacked/lim.Ratio > stored {
		return fault.New(fault.Invalid, "it unpacks to more than %d times its stored size (%d of %d bytes so far); real files do not",
			lim.Ratio, unpacked, stored)
	}
	return nil
}

// drain reads on behind the end mark, where only zeros may be.
func (t *tarStream) drain(buf []byte) error {
	at := t.n
	for {
		n, err := t.Read(buf)
		if !isZero(buf[:n]) {
			return fault.New(fault.Invalid, "there is something behind the end of the archive at byte %d", at)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// newHash returns the hash that a digest wants, nil for an empty one.
func newHash(digest string) (hash.Hash, error) {
	alg, _, _ := strings.Cut(digest, ":")
	switch alg {
	case "":
		return nil, nil
	case "sha256":
		return sha256.New(), nil
	case "sha512":
		return sha512.New(), nil
	}
	return nil, fault.New(fault.Invalid, "digest %s: only sha256 and sha512 are known", quote(digest))
}

// digestOf writes sum as want is written; it is "" if nothing is wanted.
func digestOf(want string, sum hash.Hash) string {
	if sum == nil {
		return ""
	}
	alg, _, _ := strings.Cut(want, ":")
	return alg + ":" + hex.EncodeToString(sum.Sum(nil))
}
