package rpc

import (
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// doors notes whose sockets were opened.
type doors struct {
	mu     sync.Mutex
	opened []sandbox.ID // guarded by mu
}

func (d *doors) Path(id sandbox.ID) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opened = append(d.opened, id)
	return "/run/" + string(id) + ".sock"
}

func (*doors) Serve(_ sandbox.ID, conn net.Conn) error { return conn.Close() }

// TestSocketIsThereAtOnce: who made a sandbox finds its Docker socket.
func TestSocketIsThereAtOnce(t *testing.T) {
	d := &doors{}
	w := newWorld(t, func(p *Params) { p.Docker = d })
	w.curl(t, "HostAgentService/CreateSandbox", `{"sandboxId":"b"}`)
	w.curl(t, "SnapshotService/ForkSandbox", `{"sandboxId":"sb-1"}`)
	if want := []sandbox.ID{"b", "sb-f"}; !slices.Equal(d.opened, want) {
		t.Errorf("opened are the sockets of %q, want %q", d.opened, want)
	}
	_, _, m := w.curl(t, "SandboxService/InspectSandbox", `{"sandboxId":"b"}`)
	if got := m["sandbox"].(map[string]any)["dockerSocket"]; got != "/run/b.sock" {
		t.Errorf("the record has %v", got)
	}
}
