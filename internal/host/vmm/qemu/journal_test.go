package qemu

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadJournal(t *testing.T) {
	const off = `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}` + "\r\n"
	noise := strings.Repeat(`{"event": "RTC_CHANGE", "data": {"offset": 1}}`+"\r\n", journalMax/20)
	path := filepath.Join(t.TempDir(), "journal")
	for name, tt := range map[string]struct{ text, want string }{
		"power off":           {`{"QMP": {}}` + "\r\n" + off, "guest-shutdown"},
		"nothing":             {"", ""},
		"no end":              {noise, ""},
		"a long life":         {noise + off, "guest-shutdown"},
		"cut in the middle":   {off[:40], ""},
		"the last one counts": {strings.Replace(off, "guest-shutdown", "host-signal", 1) + off, "guest-shutdown"},
		"no JSON":             {"\xff\x00[1,\n{}\n" + off, "guest-shutdown"},
		"a result like one":   {`{"return": {"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}}` + "\r\n", ""},
	} {
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readJournal(path); got != tt.want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, got, err, tt.want)
		}
	}
	if err := errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)); err != nil {
		t.Fatal(err)
	}
	if _, err := readJournal(path); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a symlink: %v", err)
	}
	if _, err := readJournal(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}

func TestJournalStaysShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	f, err := createJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := func() int64 {
		t.Helper()
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	for range 10 * journalMax / 1000 {
		if _, err := f.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if err := trimJournal(path); err != nil || size() > journalMax {
			t.Fatalf("%d bytes, %v", size(), err)
		}
	}
	if size() == 0 {
		t.Error("it is emptied before it is long")
	}
	again, err := createJournal(path) // of the next machine
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := f.Write([]byte("the one before")); err != nil || size() != 0 {
		t.Errorf("the new journal has %d bytes, %v", size(), err)
	}
	if err := trimJournal(path + "x"); err != nil {
		t.Errorf("one that is not there: %v", err)
	}
}
