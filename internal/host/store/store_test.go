package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// writerEnv makes the test binary write records until it is killed.
const writerEnv = "HUTCH_STORE_TEST_WRITER"

func TestMain(m *testing.M) {
	if root := os.Getenv(writerEnv); root != "" {
		writeForEver(root)
	}
	os.Exit(m.Run())
}

func open(t *testing.T, root string) *Store {
	t.Helper()
	s, err := Open(root, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func load(t *testing.T, s *Store) Loaded {
	t.Helper()
	l, err := s.Load()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func record(id sandbox.ID, reason string) sandbox.Record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	return sandbox.Record{
		Version: sandbox.RecordVersion, ID: id, State: sandbox.Running, Cause: sandbox.ByUser, Reason: reason,
		Spec:      sandbox.Spec{Template: "minimal", VCPUs: 1, Labels: map[string]string{"a": "b"}},
		CreatedAt: at, ChangedAt: at, ActiveAt: at, Slot: 7,
		Machine: &sandbox.Machine{Driver: "fake", Process: sandbox.Process{PID: 42, StartTicks: 1, BootID: "b"}, UID: 9},
		Stages:  []sandbox.Stage{{Name: "disk", Took: time.Second}},
	}
}

func TestRecordsSurviveReopening(t *testing.T) {
	testenv.CheckGoroutines(t)
	root := filepath.Join(t.TempDir(), "root")
	s := open(t, root)
	first, second := record("sb-1", "first"), record("sb-2", "second")
	second.CreatedAt = first.CreatedAt.Add(-time.Hour)
	for _, r := range []sandbox.Record{first, second} {
		if err := s.Create(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Create(first); !fault.Is(err, fault.Exists) {
		t.Errorf("second create: %v, want exists", err)
	}
	first.Reason = "changed"
	if err := s.Put(first); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got := load(t, open(t, root))
	if diff := cmp.Diff([]sandbox.Record{second, first}, got.Records); diff != "" {
		t.Errorf("records, oldest first (-want +got):\n%s", diff)
	}
	if len(got.Quarantined) != 0 {
		t.Errorf("quarantined: %v", got.Quarantined)
	}
}

func TestPutNeedsASandbox(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.Put(record("sb-none", "")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
	for _, id := range []sandbox.ID{"", "..", "a/b", ".new-x"} {
		if err := s.Create(record(id, "")); !fault.Is(err, fault.Invalid) {
			t.Errorf("create %q: %v, want invalid", id, err)
		}
		if err := s.Put(record(id, "")); !fault.Is(err, fault.Invalid) {
			t.Errorf("put %q: %v, want invalid", id, err)
		}
		if err := s.Remove(id); err == nil {
			t.Errorf("remove %q: no error", id)
		}
	}
}

func TestModes(t *testing.T) {
	root := t.TempDir()
	if err := os.Chmod(root, 0o777); err != nil {
		t.Fatal(err)
	}
	s := open(t, root)
	if err := s.Create(record("sb-1", "")); err != nil {
		t.Fatal(err)
	}
	want := map[string]fs.FileMode{
		"": 0o711, "lock": 0o600, "sandboxes": 0o700, "trash": 0o700, "events": 0o700, "blank": 0o700,
		"sandboxes/sb-1": 0o700, "sandboxes/sb-1/record.json": 0o600,
	}
	for name, mode := range want {
		info, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if info.Mode().Perm() != mode {
			t.Errorf("%q has mode %v, want %v", name, info.Mode().Perm(), mode)
		}
	}
}

func TestOneOwnerPerRoot(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	_, err := Open(root, slog.New(slog.DiscardHandler))
	if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) {
		t.Errorf("second open: %v, want a precondition that names the pid", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, root)
}

func TestQuarantine(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	if err := s.Create(record("good", "")); err != nil {
		t.Fatal(err)
	}
	bad := map[string]string{
		"garbage":   "\x00\xff{",
		"empty":     "",
		"truncated": `{"version": 1, "id": "trunca`,
		"newer":     `{"version": 99, "id": "newer", "state": "levitating", "slot": 12, "machine": {"uid": 5}, "image_digest": "sha256:1"}`,
		"unmarked":  `{"id": "unmarked", "state": "running"}`,
		"stranger":  `{"version": 1, "id": "good", "state": "running"}`,
		"unstated":  `{"version": 1, "id": "unstated", "state": "gone"}`,
		"missing":   "-",
		"Bad_Name":  `{"version": 1, "id": "Bad_Name", "state": "running"}`,
	}
	for name, content := range bad {
		if err := os.Mkdir(s.Dir(sandbox.ID(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if content == "-" {
			continue
		}
		if err := os.WriteFile(filepath.Join(s.Dir(sandbox.ID(name)), recordName), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l := load(t, s)
	if len(l.Records) != 1 || l.Records[0].ID != "good" {
		t.Errorf("records: %v, want just the good one", l.Records)
	}
	seen := map[string]Quarantined{}
	for _, q := range l.Quarantined {
		seen[q.Name] = q
	}
	for name := range bad {
		q, ok := seen[name]
		if !ok || q.Err == nil {
			t.Errorf("%s is not in quarantine", name)
		}
		if _, err := os.Stat(s.Dir(sandbox.ID(name))); err != nil {
			t.Errorf("directory of %s: %v", name, err)
		}
	}
	if c := seen["newer"].Claims; c == nil || c.Slot != 12 || c.ImageDigest != "sha256:1" || c.Machine == nil || c.Machine.UID != 5 {
		t.Errorf("claims of a newer record: %+v", c)
	}
	for _, name := range []string{"garbage", "empty", "truncated", "unmarked", "missing"} {
		if c := seen[name].Claims; c != nil {
			t.Errorf("claims of %s: %+v, want unknown", name, c)
		}
	}
}

// A record that is no plain file must neither be followed nor block the start.
func TestHostileRecordFiles(t *testing.T) {
	s := open(t, t.TempDir())
	secret := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(secret, []byte(`{"version":1,"id":"link","state":"running"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(path string) error{
		"link": func(p string) error { return os.Symlink(secret, p) },
		"fifo": func(p string) error { return unix.Mkfifo(p, 0o600) },
		"dir":  func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		if err := os.Mkdir(s.Dir(sandbox.ID(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := make(filepath.Join(s.Dir(sandbox.ID(name)), recordName)); err != nil {
			t.Fatal(err)
		}
	}
	if l := load(t, s); len(l.Quarantined) != 3 || len(l.Records) != 0 {
		t.Errorf("got %+v, want three in quarantine", l)
	}
}

func TestRemove(t *testing.T) {
	testenv.CheckGoroutines(t)
	root := t.TempDir()
	s := open(t, root)
	if err := s.Create(record("sb-1", "")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.DataDisk("sb-1"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("sb-1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("sb-1"); err != nil {
		t.Errorf("second remove: %v", err)
	}
	if err := s.Create(record("sb-1", "again")); err != nil {
		t.Errorf("create after remove: %v", err)
	}
	waitEmpty(t, filepath.Join(root, trashName))
}

// waitEmpty waits for the sweeper; that a directory became empty is no event
// that a test could wait for.
// waitEmpty waits until a directory has nothing but what stays in it.
func waitEmpty(t *testing.T, dir string, stays ...string) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ctx := testenv.Context(t); ; {
		names, err := readNames(dir)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Equal(names, stays) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s still has %v", dir, names)
		case <-tick.C:
		}
	}
}

func TestTrashIsEmptiedAtStart(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	const others = "image-123" // another package is about to put something there
	for _, name := range []string{"sandbox.sb-left.0123456789abcdef", others, "sandbox.BAD.1", "memory.sb-left.0123456789abcdef"} {
		dir := filepath.Join(root, trashName, name, "sub")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, root)
	if diff := cmp.Diff([]sandbox.ID{"sb-left"}, load(t, s).Trashed); diff != "" {
		t.Errorf("trashed (-want +got):\n%s", diff)
	}
	waitEmpty(t, filepath.Join(root, trashName), others)
}

// TestStopBetweenSteps stops every write after each of its steps and reopens
// the root, as after a crash of the host at that point.
func TestStopBetweenSteps(t *testing.T) {
	old, next := record("sb-1", "old"), record("sb-1", "new")
	ops := map[string]struct {
		prepare, run func(*Store) error
		before       []sandbox.Record
		after        []sandbox.Record
	}{
		"create": {
			prepare: func(*Store) error { return nil },
			run:     func(s *Store) error { return s.Create(next) },
			after:   []sandbox.Record{next},
		},
		"put": {
			prepare: func(s *Store) error { return s.Create(old) },
			run:     func(s *Store) error { return s.Put(next) },
			before:  []sandbox.Record{old}, after: []sandbox.Record{next},
		},
		"remove": {
			prepare: func(s *Store) error { return s.Create(old) },
			run:     func(s *Store) error { return s.Remove("sb-1") },
			before:  []sandbox.Record{old},
		},
	}
	for name, op := range ops {
		t.Run(name, func(t *testing.T) {
			for n := 0; ; n++ {
				root := t.TempDir()
				s := open(t, root)
				if err := op.prepare(s); err != nil {
					t.Fatal(err)
				}
				count, at := 0, ""
				s.step = func(step string) error {
					if count == n {
						at = step
						return errStopped
					}
					count++
					return nil
				}
				err := op.run(s)
				if at == "" {
					if err != nil || n < 2 {
						t.Fatalf("after %d steps: %v", n, err)
					}
					return
				}
				if !errors.Is(err, errStopped) {
					t.Fatalf("stopped at %q: got %v", at, err)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = open(t, root)
				got := load(t, s)
				if len(got.Quarantined) != 0 {
					t.Errorf("stopped at %q: quarantined %v", at, got.Quarantined)
				}
				if !cmp.Equal(got.Records, op.before) && !cmp.Equal(got.Records, op.after) {
					t.Errorf("stopped at %q: neither old nor new but %v", at, got.Records)
				}
				names, err := readNames(s.sandboxesDir())
				if err != nil || len(names) != len(got.Records) {
					t.Errorf("stopped at %q: left %v (%v)", at, names, err)
				}
				if len(got.Records) == 0 {
					err = s.Create(next)
				} else {
					err = s.Put(next)
				}
				if err != nil {
					t.Errorf("stopped at %q: the next write: %v", at, err)
				}
			}
		})
	}
}

// writeForEver writes a record again and again, and tells the number of each
// write that was confirmed.
func writeForEver(root string) {
	s, err := Open(root, slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	l, err := s.Load()
	if err != nil || len(l.Quarantined) > 0 {
		fmt.Println("error", err, l.Quarantined)
		os.Exit(1)
	}
	n := 0
	write := s.Create
	if len(l.Records) > 0 {
		n, write = l.Records[0].Boots, s.Put
	}
	for {
		n++
		r := record("sb-1", strings.Repeat(strconv.Itoa(n%10), 20000))
		r.Boots = n
		if err := write(r); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		write = s.Put
		fmt.Println(n)
	}
}

func TestKilledWriterLeavesOldOrNew(t *testing.T) {
	root := t.TempDir()
	for round := range 20 {
		confirmed := killWriter(t, root, 1+round*3)
		s := open(t, root)
		l := load(t, s)
		if len(l.Quarantined) != 0 || len(l.Records) != 1 {
			t.Fatalf("round %d: %+v", round, l)
		}
		r := l.Records[0]
		if r.Boots != confirmed && r.Boots != confirmed+1 {
			t.Errorf("round %d: record %d, confirmed was %d", round, r.Boots, confirmed)
		}
		if want := strings.Repeat(strconv.Itoa(r.Boots%10), 20000); r.Reason != want {
			t.Errorf("round %d: record %d is mixed", round, r.Boots)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// killWriter runs a writer, kills it after some confirmed writes and returns
// the number of the last one.
func killWriter(t *testing.T, root string, writes int) int {
	t.Helper()
	last, seen := 0, 0
	testenv.KillAfter(t, writerEnv+"="+root, func(text string) bool {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Errorf("writer: %s", text)
			return true
		}
		last = n
		seen++
		return seen >= writes
	})
	if t.Failed() {
		t.FailNow()
	}
	return last
}

func TestFullDiskLeavesTheOldRecord(t *testing.T) {
	root := testenv.SmallDisk(t, "256k")
	s := open(t, root)
	old := record("sb-1", "old")
	if err := s.Create(old); err != nil {
		t.Fatal(err)
	}
	big := record("sb-1", strings.Repeat("x", 300<<10))
	err := s.Put(big)
	if !fault.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), "full") {
		t.Errorf("put: %v, want exhausted", err)
	}
	big.ID = "sb-2"
	if err := s.Create(big); !fault.Is(err, fault.Exhausted) {
		t.Errorf("create: %v, want exhausted", err)
	}
	l := load(t, s)
	if diff := cmp.Diff([]sandbox.Record{old}, l.Records); diff != "" || len(l.Quarantined) != 0 {
		t.Errorf("after the full disk: %v (-want +got):\n%s", l.Quarantined, diff)
	}
	if err := s.Put(record("sb-1", "small")); err != nil {
		t.Errorf("put of a small record: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
