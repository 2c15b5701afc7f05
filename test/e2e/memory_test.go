package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/test/harness"
)

// TestGuestsOutOfMemory has programs take all the memory of a guest: its kernel
// kills them and not the agent, and callers are told that it was for that.
func TestGuestsOutOfMemory(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	id := d.Create("-m", "128")
	const server = "ps | awk '/[h]utch-agent serve/ {print $1}'"
	agent := d.Hutch("exec", id, "--", "sh", "-c", server)
	works := func(t *testing.T) {
		t.Helper()
		if got := d.Hutch("exec", id, "--", "sh", "-c", server); got != agent || agent == "" {
			t.Errorf("the agent was process %s and is %s", agent, got)
		}
	}
	const told = "the guest ran out of memory"
	t.Run("the program", func(t *testing.T) {
		if r := d.Try("exec", id, "--", "tail", "/dev/zero"); r.Code != 137 || !strings.Contains(r.Stderr, told) {
			t.Errorf("%+v", r)
		}
		works(t)
	})
	t.Run("a child of the program", func(t *testing.T) {
		if r := d.Try("exec", id, "--", "sh", "-c", "tail /dev/zero; echo after"); r.Code != 0 || r.Stdout != "after\n" || !strings.Contains(r.Stderr, told) {
			t.Errorf("%+v", r)
		}
		works(t)
	})
	t.Run("another reason", func(t *testing.T) {
		if r := d.Try("exec", id, "--", "sh", "-c", "kill -9 $$"); r.Code != 137 || strings.Contains(r.Stderr, told) {
			t.Errorf("%+v", r)
		}
	})
	t.Run("collected", func(t *testing.T) {
		res, err := http.Post("http://"+d.TCP+"/hostagent.v1.HostAgentService/Exec", "application/json",
			strings.NewReader(`{"sandbox_id":"`+id+`","cmd":"tail","args":["/dev/zero"]}`))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var ran struct {
			ExitCode  int    `json:"exitCode"`
			Signal    string `json:"signal"`
			OOMKilled bool   `json:"oomKilled"`
		}
		if err := json.NewDecoder(res.Body).Decode(&ran); err != nil || ran.ExitCode != 137 || ran.Signal != "SIGKILL" || !ran.OOMKilled {
			t.Errorf("%s: %+v, %v", res.Status, ran, err)
		}
		works(t)
	})
	if r := inspect(t, d, id); r.Info.Status != "running" || r.Boots != 1 {
		t.Errorf("%+v", r)
	}
}
