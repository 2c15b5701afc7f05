package rpc

import (
	"context"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/hutch-run/hutch/internal/guest/quiesce"
)

// Quieter holds the guest still; a *quiesce.Quiet.
type Quieter interface {
	Quiesce(ctx context.Context) (quiesce.Report, error)
}

// Quiesce returns the answer to the link's call link.CallQuiesce. Its request
// says nothing. See Configure for how it writes.
func Quiesce(to Quieter) func(context.Context, []byte, func([]byte) error) error {
	return func(ctx context.Context, _ []byte, send func([]byte) error) error {
		r, err := to.Quiesce(ctx)
		if err != nil {
			return err
		}
		return send(appendReport(nil, r))
	}
}

// Numbers of fields.
const (
	fieldFlush  = 1
	fieldFreeze = 2
	fieldSync   = 3
	fieldFrozen = 4
)

// maxFrozen bounds the names in a reply: programs may make any number of groups.
const maxFrozen = 64

// appendReport appends a QuiesceResponse.
func appendReport(b []byte, r quiesce.Report) []byte {
	b = appendNanos(b, fieldFlush, r.Flush)
	b = appendNanos(b, fieldFreeze, r.Freeze)
	b = appendNanos(b, fieldSync, r.Sync)
	for _, name := range r.Frozen[:min(len(r.Frozen), maxFrozen)] {
		name = strings.ToValidUTF8(name, "?")
		b = protowire.AppendString(protowire.AppendTag(b, fieldFrozen, protowire.BytesType), name)
	}
	return b
}

func appendNanos(b []byte, number protowire.Number, d time.Duration) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), uint64(d.Nanoseconds()))
}
