package rpc

import (
	"context"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/mapped"
)

// MmapReadFile reads a file through a shared mapping, in sandboxes that were
// created with test features.
func (s *agentService) MmapReadFile(ctx context.Context, r *connect.Request[arcboxv1.MmapReadFileRequest],
) (*connect.Response[arcboxv1.MmapReadFileResponse], error) {
	if s.p.TestFeatures == nil || !s.p.TestFeatures() {
		return nil, fault.New(fault.Unimplemented, "MmapReadFile is a test feature, which this sandbox was not created with "+
			"(test_features of a create): read files by GET /files")
	}
	b, err := s.p.Mapped.Read(ctx, r.Msg.GetPath(), r.Msg.GetOffset(), r.Msg.GetLength())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.MmapReadFileResponse{Data: b, BytesRead: uint64(len(b))}), nil
}

// mappedLimit lets the answers of MmapReadFile be as long as it may read.
func mappedLimit() connect.HandlerOption {
	return connect.WithConditionalHandlerOptions(func(spec connect.Spec) []connect.HandlerOption {
		if spec.Procedure != arcboxv1connect.AgentServiceMmapReadFileProcedure {
			return nil
		}
		return []connect.HandlerOption{connect.WithSendMaxBytes(mapped.MaxLength + 1<<10)}
	})
}
