package processrpc

import (
	"context"
	"fmt"
	"net/http"

	"google.golang.org/protobuf/proto"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/process"
)

// Call answers the link's call link.CallStart: Start without HTTP and without
// keep-alives, for the host's own commands.
func Call(ctx context.Context, table *process.Table, request []byte, send func([]byte) error) error {
	var msg processpb.StartRequest
	if err := proto.Unmarshal(request, &msg); err != nil {
		return fault.New(fault.Invalid, "read StartRequest: %w", err)
	}
	spec, err := startSpec(&msg, 0)
	if err != nil {
		return err
	}
	p, sub, err := table.Start(ctx, spec)
	if err != nil {
		return err
	}
	defer sub.Close()
	h := Handler{table: table}
	var buf []byte
	return h.follow(ctx, p, sub, http.Header{}, func(ev *processpb.ProcessEvent) error {
		var err error
		buf, err = proto.MarshalOptions{}.MarshalAppend(buf[:0], &processpb.StartResponse{Event: ev})
		if err != nil {
			return fmt.Errorf("write StartResponse: %w", err)
		}
		return send(buf)
	})
}
