package agent

import (
	"testing"

	"github.com/hutch-run/hutch/internal/guest/files/filesrpc"
	"github.com/hutch-run/hutch/internal/guest/process/processrpc"
)

// TestLazyServicesAreWhereTheyBelong holds the paths of services that are
// built late to what the services themselves say.
func TestLazyServicesAreWhereTheyBelong(t *testing.T) {
	if path, _ := processrpc.New(nil).Mount(); path != processPath {
		t.Errorf("the process service belongs at %s, not %s", path, processPath)
	}
	if path, _ := filesrpc.New(nil).Mount(); path != filesPath {
		t.Errorf("the filesystem service belongs at %s, not %s", path, filesPath)
	}
}
