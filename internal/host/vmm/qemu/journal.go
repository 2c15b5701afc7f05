package qemu

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/proc"
)

// journalMax is how long a journal may get, and how much of its end is read,
// in bytes. The last thing in it is what counts.
const journalMax = 64 << 10

// journalPath is where QEMU itself writes down what it says on the machine
// protocol, whether or not somebody listens: the one witness of how a machine
// ended while there was no hutchd. It lies beside the log that it is like, on
// the disk of the sandbox, and stays until the next launch.
func journalPath(spec vmm.Spec) string { return spec.VMMLog + ".qmp" }

// createJournal makes an empty journal in place of an earlier machine's.
func createJournal(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("make journal: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make journal: %w", err)
	}
	return f, nil
}

// trimJournal empties a journal that has grown too long. QEMU appends, so that
// it goes on at the beginning.
func trimJournal(path string) error {
	fi, err := os.Lstat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() <= journalMax {
		return nil // one that is not there tells nothing, later
	}
	if err := os.Truncate(path, 0); err != nil {
		return fmt.Errorf("trim journal: %w", err)
	}
	return nil
}

// readJournal returns the reason of the last SHUTDOWN event in a journal, empty
// when there is none. It is fs.ErrNotExist without a journal.
func readJournal(path string) (shutdown string, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("read journal: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("read journal: %w", err)
	}
	text, err := io.ReadAll(io.NewSectionReader(f, max(0, fi.Size()-journalMax), journalMax))
	if err != nil {
		return "", fmt.Errorf("read journal: %w", err)
	}
	for line := range bytes.Lines(text) {
		var e qmp.Event
		if json.Unmarshal(line, &e) != nil {
			continue // the first may be half a line
		}
		if reason := shutdownReason(e); reason != "" {
			shutdown = reason
		}
	}
	return shutdown, nil
}

// lost tells how a machine ended that is gone already, from what it left.
func (d *Driver) lost(spec vmm.Spec) (vmm.Exit, error) {
	shutdown, err := readJournal(journalPath(spec))
	if err != nil {
		return vmm.Exit{}, err
	}
	return classify(ending{
		unseen: true, shutdown: shutdown, words: endOfLog(spec.VMMLog),
		oomKills: d.params.Jail.OOMKills(string(spec.ID)),
		memoryMB: spec.MemoryMB + d.caps.MemoryOverheadMB,
	}), nil
}

// endOfLog returns the last lines of a log, empty when it has none.
func endOfLog(path string) string {
	log, err := proc.OpenCapped(path)
	if err != nil {
		return ""
	}
	defer log.Close()
	var tail proc.Tail
	_, _ = io.Copy(&tail, log) // what could be read is what there is
	return tail.Lines(3)
}
