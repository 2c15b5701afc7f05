package process

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// input is the way into a program: its stdin pipe or its terminal. Writes of
// several callers don't mix: each is written whole before the next.
type input struct {
	file  *os.File
	owned bool // close closes the file
	turn  chan struct{}
	// gone is closed when nothing can be written any more.
	gone chan struct{}
}

func newInput(f *os.File, owned bool) *input {
	in := &input{file: f, owned: owned, turn: make(chan struct{}, 1), gone: make(chan struct{})}
	in.turn <- struct{}{}
	return in
}

var errInputClosed = fault.New(fault.Precondition, "standard input is closed, or the program has ended")

// write hands data to the program, waiting while it does not read. When ctx
// ends, part of data may have been taken.
func (in *input) write(ctx context.Context, data []byte) error {
	select {
	case <-in.turn:
	case <-in.gone:
		return errInputClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { in.turn <- struct{}{} }()
	select {
	case <-in.gone:
		return errInputClosed
	default:
	}
	interrupted := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = in.file.SetWriteDeadline(time.Unix(1, 0))
	})
	n, err := in.file.Write(data)
	if !cancel() {
		<-interrupted
		_ = in.file.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil:
		return fault.New(fault.Of(context.Cause(ctx)), "write input: %w; %d of %d bytes were taken", context.Cause(ctx), n, len(data))
	case errors.Is(err, fs.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EPIPE), errors.Is(err, unix.EIO):
		return errInputClosed
	}
	return err
}

// close lets the program read the end of its input, after what was written. A
// write that waits fails. It may be repeated.
func (in *input) close() {
	select {
	case <-in.gone:
		return
	default:
	}
	close(in.gone)
	if in.owned {
		_ = in.file.Close()
		return
	}
	_ = in.file.SetWriteDeadline(time.Unix(1, 0))
}
