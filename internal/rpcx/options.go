package rpcx

import (
	"log/slog"

	"connectrpc.com/connect"
)

// MaxMessage bounds one message in either direction, in bytes, decompressed.
// Anything larger travels as a stream. connect has no limit of its own.
const MaxMessage = 16 << 20

// compressAbove is the size from which answers are compressed for clients
// that ask for it, in bytes.
const compressAbove = 4 << 10

// HandlerOptions returns the options of every handler: the limits, the
// interceptor of NewServerInterceptor, and inside of it the given ones, first
// outermost.
func HandlerOptions(log *slog.Logger, inner ...connect.Interceptor) []connect.HandlerOption {
	return []connect.HandlerOption{
		connect.WithReadMaxBytes(MaxMessage),
		connect.WithSendMaxBytes(MaxMessage),
		connect.WithCompressMinBytes(compressAbove),
		connect.WithInterceptors(append([]connect.Interceptor{NewServerInterceptor(log)}, inner...)...),
	}
}

// ClientOptions returns the options of every client of ours: the limits, the
// interceptor of NewClientInterceptor, and inside of it the given ones. Our
// clients do not ask for compression: they talk over a socket or a link of
// the same host, where it costs more than it saves.
func ClientOptions(inner ...connect.Interceptor) []connect.ClientOption {
	return []connect.ClientOption{
		connect.WithReadMaxBytes(MaxMessage),
		connect.WithSendMaxBytes(MaxMessage),
		connect.WithAcceptCompression("gzip", nil, nil),
		connect.WithInterceptors(append([]connect.Interceptor{NewClientInterceptor()}, inner...)...),
	}
}
