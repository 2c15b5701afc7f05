package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

// logChunk is the most that one message of a log holds, in bytes.
const logChunk = 64 << 10

// olderSuffix names the older half of a capped log.
const olderSuffix = ".1"

// logFile reads a capped log: path, which grows, and path.1, which path
// becomes when it is full.
type logFile struct {
	path string
	send func([]byte) error
	buf  [logChunk]byte
}

// read sends what is there. A log that was never written is empty.
func (l *logFile) read(ctx context.Context) error {
	now, err := l.start(ctx)
	if now != nil {
		err = errors.Join(err, now.Close())
	}
	return err
}

// start sends what is there and returns the growing file at its end, nil when
// there is none yet.
func (l *logFile) start(ctx context.Context) (*os.File, error) {
	now, err := openLog(l.path)
	if err != nil {
		return nil, err
	}
	// Opened in this order, a turn in between shows the same file twice and
	// loses nothing; then the second is left out.
	older, err := openLog(l.path + olderSuffix)
	if err != nil {
		return now, err
	}
	if older != nil {
		if !sameFile(older, now) {
			err = l.drain(ctx, older)
		}
		if err = errors.Join(err, older.Close()); err != nil {
			return now, err
		}
	}
	if now != nil {
		err = l.drain(ctx, now)
	}
	return now, err
}

// follow sends what is there and what comes, until ctx ends.
func (l *logFile) follow(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("follow log: %w", err)
	}
	defer watcher.Close()
	if err := watcher.Add(filepath.Dir(l.path)); err != nil {
		return fmt.Errorf("follow log: %w", err)
	}
	now, err := l.start(ctx)
	defer func() {
		if now != nil {
			now.Close()
		}
	}()
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-watcher.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) { // then just look
				return fmt.Errorf("follow log: %w", err)
			}
		case e := <-watcher.Events:
			if e.Name != l.path {
				continue
			}
		}
		if now, err = l.catchUp(ctx, now); err != nil {
			return err
		}
	}
}

// catchUp sends what is new in now, and goes on to the file that took its
// place, if one did.
func (l *logFile) catchUp(ctx context.Context, now *os.File) (*os.File, error) {
	for {
		next, err := openLog(l.path)
		if err != nil {
			return now, err
		}
		if now != nil {
			// Opened first, read second: whatever was written to now before next
			// took its place is read here.
			if err := l.drain(ctx, now); err != nil || next == nil || sameFile(now, next) {
				if next != nil {
					err = errors.Join(err, next.Close())
				}
				return now, err
			}
			if err := now.Close(); err != nil {
				return next, fmt.Errorf("read log: %w", err)
			}
		}
		if next == nil {
			return nil, nil
		}
		now = next
	}
}

// drain sends from where f is to its end.
func (l *logFile) drain(ctx context.Context, f *os.File) error {
	for ctx.Err() == nil {
		n, err := f.Read(l.buf[:])
		if n > 0 {
			if err := l.send(l.buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
	}
	return ctx.Err()
}

// openLog opens a log, nil when there is none. Only regular files are logs.
func openLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open log %s: %w", path, err), f.Close())
	}
	return f, nil
}

func sameFile(a, b *os.File) bool {
	if a == nil || b == nil {
		return false
	}
	sa, errA := a.Stat()
	sb, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}
