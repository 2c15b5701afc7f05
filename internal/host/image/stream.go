package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hutch-run/hutch/internal/fault"
)

// streamParams is a stream and what reading it needs.
type streamParams struct {
	r        io.Reader
	raw      *ctxReader // r, counted
	file     *os.File   // r as a file, if it is a regular one
	size     int64      // of file
	dir      string
	want     v1.Platform
	lim      Limits
	progress Progress
}

// peekBytes is how much of a stream is looked at to tell what it holds: enough
// for the first block of any packer, which holds the first header.
const peekBytes = 256 << 10

// openStream tells what a stream holds and prepares it: a root tar is read on
// as it comes, an archive of an image has to be put down first, unless it is a
// file that can be read anywhere.
func openStream(ctx context.Context, s Source, p streamParams) (*opened, error) {
	raw := &ctxReader{ctx: ctx, r: p.r}
	p.raw = raw
	br := bufio.NewReaderSize(raw, peekBytes)
	head, err := br.Peek(peekBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", s, err)
	}
	if len(head) == 0 {
		return nil, fault.New(fault.Invalid, "%s is empty", s)
	}
	comp := sniff(head)
	if s.Kind == RootTar {
		return s.rootTar(br, p.size), nil
	}
	first, err := firstName(head)
	if err != nil {
		return nil, fault.New(fault.Invalid, "%s is neither a tar (plain, gzip, zstd or xz) nor an OCI layout: %w", s, err)
	}
	if s.Kind == Auto && !imageFirst.MatchString(first) {
		return s.rootTar(br, p.size), nil
	}
	at, size, closeFn, err := random(ctx, br, comp, p)
	if err != nil {
		return nil, err
	}
	o, err := openArchive(ctx, s, at, size, p)
	if err != nil {
		return nil, errors.Join(err, closeFn())
	}
	o.close = closeFn
	return o, nil
}

// imageFirst matches the first entry of any archive of an image. Root tars
// begin with "./", "bin" and the like; what matches and is none after all is
// found out in openArchive.
var imageFirst = regexp.MustCompile(`^(\./)?(oci-layout|index\.json|manifest\.json|repositories|blobs(/.*)?|(sha256:)?[0-9a-f]{64}(/.*|\.json|\.tar|\.tar\.gz)?)$`)

// firstName reads the name of a tar's first entry out of the head of a stream.
func firstName(head []byte) (string, error) {
	r, _, closeFn, err := decompress(bufio.NewReaderSize(bytes.NewReader(head), 4096))
	if err != nil {
		return "", err
	}
	defer closeFn()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return "", errors.New("it has no entries")
		case err != nil:
			return "", err
		case h.Typeflag != tar.TypeXGlobalHeader:
			return h.Name, nil
		}
	}
}

// random makes the unpacked stream readable anywhere.
func random(ctx context.Context, br *bufio.Reader, comp compression, p streamParams) (io.ReaderAt, int64, func() error, error) {
	if p.file != nil && comp == plain {
		return p.file, p.size, func() error { return nil }, nil
	}
	sp, err := newSpool(p.dir)
	if err != nil {
		return nil, 0, nil, err
	}
	fail := func(err error) (io.ReaderAt, int64, func() error, error) {
		return nil, 0, nil, errors.Join(err, sp.close())
	}
	z, _, closeZ, err := decompress(br)
	if err != nil {
		return fail(err)
	}
	defer closeZ()
	buf := make([]byte, spoolBuffer)
	for n := int64(0); ; {
		m, err := z.Read(buf)
		if _, werr := sp.Write(buf[:m]); werr != nil {
			return fail(fmt.Errorf("spool the archive: %w", werr))
		}
		if n += int64(m); n > p.lim.UnpackedBytes {
			return fail(fault.New(fault.Invalid, "the archive unpacks to more than %d bytes, the limit", p.lim.UnpackedBytes))
		}
		if err := checkRatio(p.lim, n, p.raw.n); err != nil {
			return fail(err)
		}
		p.progress.tell("reading the archive", n, 0)
		if cerr := ctx.Err(); cerr != nil {
			return fail(context.Cause(ctx))
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fail(streamError(err))
		}
	}
	if err := sp.seal(); err != nil {
		return fail(fmt.Errorf("spool the archive: %w", err))
	}
	return sp.f, sp.sf.high, sp.close, nil
}

// openArchive opens a tar as what it turns out to be. An archive that is both
// an OCI layout and docker save's (as docker writes since version 25) is taken
// as a layout, whose digests cover the layers as they are stored.
func openArchive(ctx context.Context, s Source, at io.ReaderAt, size int64, p streamParams) (*opened, error) {
	a, err := indexArchive(ctx, at, size)
	if err != nil {
		if s.Kind == Auto && fault.Is(err, fault.Invalid) {
			return nil, fmt.Errorf("%s looks like the archive of an image (give the kind %q if it is not): %w", s, RootTar, err)
		}
		return nil, err
	}
	_, hasIndex := a.find(layoutIndex)
	_, hasMark := a.find(layoutMark)
	_, hasSave := a.find(saveIndex)
	switch {
	case s.Kind == OCI, s.Kind == Auto && hasIndex && hasMark:
		return openLayout(ctx, s, a, p.want, p.lim)
	case s.Kind == DockerSave, hasSave:
		return openSaved(s, a, p.want, p.lim)
	}
	return nil, fault.New(fault.Invalid, "%s begins like the archive of an image but has neither %s nor %s; give the kind %q if it is a root filesystem",
		s, layoutIndex, saveIndex, RootTar)
}

// rootTar is an image of one layer without any manifest.
func (s Source) rootTar(br *bufio.Reader, size int64) *opened {
	if size <= 0 {
		size = -1
	}
	return &opened{strict: true, layers: []layer{{
		name: "root filesystem", size: size,
		open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(br), nil },
	}}}
}

// ctxReader counts, and stops reading when ctx is done.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
	n   int64
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
