package processrpc

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// call makes the call as the link does.
func call(t *testing.T, ctx context.Context, r *rig, req *processpb.StartRequest, each func(*processpb.ProcessEvent)) error {
	t.Helper()
	b, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	return Call(ctx, r.table, b, func(reply []byte) error {
		var m processpb.StartResponse
		if err := proto.Unmarshal(reply, &m); err != nil {
			return err
		}
		each(m.GetEvent())
		return nil
	})
}

func TestCallIsStart(t *testing.T) {
	r := newRig(t)
	var s seen
	if err := call(t, testenv.Context(t), r, sh("echo out; echo err >&2; exit 3"), s.add); err != nil {
		t.Fatal(err)
	}
	if s.pid == 0 || s.out.String() != "out\n" || s.err.String() != "err\n" || s.end.GetExitCode() != 3 {
		t.Errorf("seen %+v", &s)
	}
	err := call(t, testenv.Context(t), r, &processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: "/nothing"}}, s.add)
	if !fault.Is(err, fault.NotFound) {
		t.Errorf("missing program: %v", err)
	}
	if err := Call(testenv.Context(t), r.table, []byte{0xff}, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("garbage: %v", err)
	}
}

// TestCallGivenUp leaves the program alone, as Start does.
func TestCallGivenUp(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	err := call(t, ctx, r, sh("sleep 60"), func(*processpb.ProcessEvent) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	if list := r.table.List(); len(list) != 1 || list[0].Ended {
		t.Errorf("programs %+v", list)
	}
}
