package kubeconfig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read.
const maxFile = 16 << 20

// Files returns the files that kubectl reads, in its order: those that
// KUBECONFIG lists, else the one in the home directory.
func Files(getenv func(string) string) ([]string, error) {
	var files []string
	for _, f := range filepath.SplitList(getenv("KUBECONFIG")) {
		if f != "" && !slices.Contains(files, f) {
			files = append(files, f)
		}
	}
	if len(files) > 0 {
		return files, nil
	}
	home := getenv("HOME")
	if home == "" {
		return nil, errors.New("neither KUBECONFIG nor HOME says where the kubeconfig is")
	}
	return []string{filepath.Join(home, ".kube", "config")}, nil
}

// target returns the file that kubectl would write to: the first that is there,
// else the last.
func target(files []string) string {
	for _, f := range files {
		if _, err := os.Lstat(f); err == nil {
			return f
		}
	}
	return files[len(files)-1]
}

// Merge puts the entries into the file that kubectl would write to, and returns
// that. Use makes them current.
func Merge(ctx context.Context, files []string, e Entries, use bool) (string, error) {
	file := target(files)
	_, err := edit(ctx, file, func(text []byte) ([]byte, error) { return merge(text, e, use) })
	return file, err
}

// Remove takes the entries of that name out of all files, and returns those
// that changed.
func Remove(ctx context.Context, files []string, name string) (changed []string, err error) {
	var errs []error
	for _, f := range files {
		if _, err := os.Lstat(f); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		done, err := edit(ctx, f, func(text []byte) ([]byte, error) {
			if !bytes.Contains(text, []byte(name)) {
				return text, nil
			}
			return remove(text, name)
		})
		if err != nil {
			errs = append(errs, err)
		} else if done {
			changed = append(changed, f)
		}
	}
	return changed, errors.Join(errs...)
}

// edit replaces what is in a file, under kubectl's lock and our own.
func edit(ctx context.Context, file string, change func([]byte) ([]byte, error)) (changed bool, err error) {
	real, err := follow(file)
	if err != nil {
		return false, fmt.Errorf("change kubeconfig %s: %w", file, err)
	}
	if err := os.MkdirAll(filepath.Dir(real), 0o700); err != nil {
		return false, fmt.Errorf("change kubeconfig %s: %w", file, err)
	}
	unlock, err := lock(ctx, real)
	if err != nil {
		return false, fmt.Errorf("change kubeconfig %s: %w", file, err)
	}
	defer unlock()
	old, info, err := read(real)
	if err != nil {
		return false, fmt.Errorf("read kubeconfig %s: %w", file, err)
	}
	text, err := change(old)
	if err != nil {
		return false, fmt.Errorf("kubeconfig %s is not understood and was left as it is: %w", file, err)
	}
	if bytes.Equal(old, text) {
		return false, nil
	}
	if err := replace(real, text, info); err != nil {
		return false, fmt.Errorf("write kubeconfig %s: %w", file, err)
	}
	return true, nil
}

// maxLinks is how many symlinks may follow one another.
const maxLinks = 40

// follow returns the file that symlinks lead to, whether it is there or not.
func follow(file string) (string, error) {
	for range maxLinks {
		to, err := os.Readlink(file)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) {
			return file, nil
		}
		if err != nil {
			return "", err
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(file), to)
		}
		file = to
	}
	return "", errors.New("too many symlinks follow one another")
}

// read returns the content of a file; nothing when there is no file.
func read(file string) ([]byte, fs.FileInfo, error) {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, nil
	case err != nil:
		return nil, nil, err
	case !info.Mode().IsRegular():
		return nil, nil, errors.New("it is no regular file")
	case info.Mode().Perm()&0o222 == 0:
		return nil, nil, errors.New("it is read-only")
	case info.Size() > maxFile:
		return nil, nil, fmt.Errorf("it is larger than %d MiB", maxFile>>20)
	}
	text, err := os.ReadFile(file)
	return text, info, err
}

// replace writes a file beside the old one and puts it in its place. Like is
// the old one; nil: there is none.
func replace(file string, text []byte, like fs.FileInfo) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".hutch-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tmp.Close(), os.Remove(tmp.Name()))
		}
	}()
	if _, err := tmp.Write(text); err != nil {
		return err
	}
	if like != nil {
		if err := keepOwner(tmp, like); err != nil {
			return err
		}
		if err := tmp.Chmod(like.Mode().Perm()); err != nil {
			return err
		}
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return err
	}
	return tmp.Close()
}

// patience is how long a change waits for others.
const patience = 10 * time.Second

// lock keeps others from changing file: hutch by a lock of its directory, which
// ends with this process, and kubectl by the file that it makes for that.
func lock(ctx context.Context, file string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			dir.Close()
		}
	}()
	if err := again(ctx, func() (bool, error) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		return errors.Is(err, unix.EWOULDBLOCK), err
	}); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	theirs := file + ".lock"
	if err := again(ctx, func() (bool, error) {
		f, err := os.OpenFile(theirs, os.O_CREATE|os.O_EXCL, 0)
		if err == nil {
			f.Close()
		}
		return errors.Is(err, fs.ErrExist), err
	}); err != nil {
		return nil, fmt.Errorf("%w (kubectl is changing it, or left that file behind: remove it if no kubectl runs)", err)
	}
	return func() {
		os.Remove(theirs)
		dir.Close()
	}, nil
}

// again repeats try while that says that it is worth it.
func again(ctx context.Context, try func() (bool, error)) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		more, err := try()
		if !more {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}
