package rpc

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/http"
	"time"
)

// Limits of the server. There is none on the time of a request: streams last.
const (
	maxHeaderBytes    = 64 << 10
	maxStreams        = 1000
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 5 * time.Minute
)

// NewServer returns the server for all listeners of hutchd. A handler with a
// Drain method, as API has, is told when Shutdown begins. The server sends no
// HTTP/2 pings: a client that was stopped with Ctrl-Z is no dead client, and
// dead ones are found by TCP keepalive, see Listen.
func NewServer(handler http.Handler, log *slog.Logger) *http.Server {
	s := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // strangers can write these lines
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
	}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetHTTP2(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	if d, ok := handler.(interface{ Drain() }); ok {
		s.RegisterOnShutdown(d.Drain)
	}
	return s
}

// LoadTLS reads the certificate and key that TCP listeners use, in PEM.
func LoadTLS(certFile, keyFile string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("load TLS certificate: %w", err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{cert},
		NextProtos:   []string{"h2", "http/1.1"},
	}, nil
}
