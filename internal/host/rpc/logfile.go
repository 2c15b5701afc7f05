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
// becomes when it is full, replacing the one before.
type logFile struct {
	path string
	send func([]byte) error
	buf  [logChunk]byte

	// now is the file that is read, nil before there was one; older is the one
	// that was read before it. Both stay open, so that no other file can get
	// their inodes and be taken for one that was read.
	now, older *os.File
}

// read sends what is there. A log that was never written is empty.
func (l *logFile) read(ctx context.Context) error {
	defer l.close()
	return l.catchUp(ctx)
}

// follow sends what is there and what comes, until ctx ends.
func (l *logFile) follow(ctx context.Context) error {
	defer l.close()
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("follow log: %w", err)
	}
	defer watcher.Close()
	if err := watcher.Add(filepath.Dir(l.path)); err != nil {
		return fmt.Errorf("follow log: %w", err)
	}
	for {
		if err := l.catchUp(ctx); err != nil {
			return err
		}
		if err := l.await(ctx, watcher); err != nil {
			return err
		}
	}
}

// await returns when something happened to the log.
func (l *logFile) await(ctx context.Context, watcher *fsnotify.Watcher) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-watcher.Errors:
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				return nil // so much happened that some of it may be ours
			}
			return fmt.Errorf("follow log: %w", err)
		case e := <-watcher.Events:
			if e.Name == l.path || e.Name == l.path+olderSuffix {
				return nil
			}
		}
	}
}

// catchUp sends all that was not sent yet, through any number of turns as long
// as the file is there.
func (l *logFile) catchUp(ctx context.Context) error {
	for {
		// Opened first and now read second: what was written to now before next
		// took its place is read here.
		next, err := openLog(l.path)
		if err != nil {
			return err
		}
		if l.now != nil {
			if err = l.drain(ctx, l.now); err != nil || sameFile(l.now, next) {
				return errors.Join(err, closeLog(next))
			}
		}
		if err := l.skipped(ctx, next); err != nil {
			return errors.Join(err, closeLog(next))
		}
		if next == nil {
			return nil
		}
		if l.now != nil {
			if err := closeLog(l.older); err != nil {
				return errors.Join(err, closeLog(next))
			}
			l.older = l.now
		}
		l.now = next
	}
}

// skipped sends the older half when it is a file that was not read: the first
// time, and when the log turned twice since the last look.
func (l *logFile) skipped(ctx context.Context, next *os.File) error {
	f, err := openLog(l.path + olderSuffix)
	if err != nil || f == nil {
		return err
	}
	if sameFile(f, l.now) || sameFile(f, l.older) || sameFile(f, next) {
		return closeLog(f)
	}
	old := l.older
	l.older = f
	return errors.Join(closeLog(old), l.drain(ctx, f))
}

// close closes what was read from; reading has no errors to tell then.
func (l *logFile) close() {
	_ = closeLog(l.now)
	_ = closeLog(l.older)
}

func closeLog(f *os.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
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
