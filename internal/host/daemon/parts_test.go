package daemon

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/testenv"
)

// TestStartThatCannotBeSaysWhy starts hutchd on a root that another one holds,
// and on one that nobody has prepared.
func TestStartThatCannotBeSaysWhy(t *testing.T) {
	testenv.CheckGoroutines(t)
	log := slog.New(slog.DiscardHandler)
	c := DefaultConfig()
	c.Root, c.RunDir = t.TempDir(), t.TempDir()
	c, err := c.finish()
	if err != nil {
		t.Fatal(err)
	}
	if err := Run(testenv.Context(t), c, log); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "hutchd setup") {
		t.Errorf("unprepared root: %v", err)
	}
	other, err := store.Open(c.Root, log)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := Run(testenv.Context(t), c, log); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), c.Root) {
		t.Errorf("root of another: %v", err)
	}
}
