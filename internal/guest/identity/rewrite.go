package identity

import "golang.org/x/sys/unix"

// made is a file in /etc that this process made, and its text, or one that it
// found to be somebody else's, and when that was changed last.
type made struct {
	dev, ino uint64
	text     string
	foreign  bool
	changed  unix.Timespec // when foreign
}

// rewrite gives a file that this process made another text in its place, and
// reports whether nothing is left to do: it has the text, or is not ours. A rename, which write does, has the
// kernel make a file, remove another and write it to the disk at once; in a
// copy of a guest that stands still, where nobody can see half of a text, a
// create would wait for that. A file that anybody has touched is left to write.
func (i *Identity) rewrite(name, text string, mode uint32) bool {
	was, ok := i.made[name]
	if !ok {
		return false
	}
	etc, err := i.openEtc()
	if err != nil {
		return false
	}
	defer unix.Close(etc)
	fd, err := unix.Openat(etc, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Dev != was.dev || st.Ino != was.ino {
		return false
	}
	if was.foreign {
		return st.Ctim == was.changed
	}
	if !was.is(fd, st, mode) {
		return false
	}
	if was.text == text {
		return true
	}
	if n, err := unix.Pwrite(fd, []byte(text), 0); err != nil || n != len(text) {
		return false
	}
	if len(text) < len(was.text) && unix.Ftruncate(fd, int64(len(text))) != nil {
		return false
	}
	was.text = text
	i.made[name] = was
	return true
}

// is reports whether the file at fd, which has the number of the one that was
// made, is as it was made.
func (m made) is(fd int, st unix.Stat_t, mode uint32) bool {
	if st.Mode != unix.S_IFREG|mode || st.Nlink != 1 || st.Size != int64(len(m.text)) {
		return false
	}
	buf := make([]byte, len(m.text))
	n, err := unix.Pread(fd, buf, 0)
	return err == nil && n == len(buf) && string(buf) == m.text
}
