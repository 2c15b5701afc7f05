package harness

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/testenv"
)

// TestDebiansClients has both say their version, which takes no daemon.
func TestDebiansClients(t *testing.T) {
	testenv.RequireRoot(t)
	if testing.Short() {
		t.Skip("fetches packages; -short")
	}
	out, err := exec.Command(DockerClient(t), "--version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Docker version") {
		t.Errorf("docker: %s, %v", out, err)
	}
	args, env := DockerCompose(t)
	c := exec.Command(args[0], append(args[1:], "version", "--short")...)
	c.Env = env
	if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), ".") {
		t.Errorf("docker-compose: %s, %v", out, err)
	}
}
