package rpc

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/testenv"
)

func TestParseAddress(t *testing.T) {
	for s, want := range map[string]Address{
		"unix:/run/h.sock":      {Path: "/run/h.sock"},
		"unix:///run//h.sock":   {Path: "/run/h.sock"},
		"tcp:127.0.0.1:7777":    {Host: "127.0.0.1", Port: 7777},
		"tcp://localhost:0":     {Host: "localhost"},
		"tcp:[::1]:80":          {Host: "::1", Port: 80},
		"tcp::80":               {Port: 80},
		"tcp://hutch.example:1": {Host: "hutch.example", Port: 1},
	} {
		got, err := ParseAddress(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if again, err := ParseAddress(got.String()); err != nil || again != got {
			t.Errorf("%s: String %s reads as %+v, %v", s, got, again, err)
		}
	}
	for _, s := range []string{"", "unix", "unix:", "unix:relative", "tcp:", "tcp:host", "tcp:host:", "tcp:host:x", "tcp:host:70000", "tcp:::1:80", "http:host:80", "/run/h.sock", "unix:/" + strings.Repeat("x", 107)} {
		if got, err := ParseAddress(s); err == nil || !strings.Contains(err.Error(), "listen address") {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
}

func listenOn(t *testing.T, p ListenParams) (net.Listener, error) {
	l, err := Listen(testenv.Context(t), p)
	if err == nil {
		t.Cleanup(func() { l.Close() })
	}
	return l, err
}

func TestSocket(t *testing.T) {
	old := syscall.Umask(0o027) // takes a bit of what is wanted
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "h.sock")
	p := ListenParams{Address: Address{Path: path}}
	l, err := listenOn(t, p)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := listenOn(t, p); err == nil || !strings.Contains(err.Error(), "another process answers") {
		t.Errorf("a second one: %v", err)
	}
	// What a killed hutchd leaves: the file, and nobody behind it.
	l.(*socketListener).Listener.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("nothing left over to replace: %v", err)
	}
	next, err := listenOn(t, p)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	l.Close() // the first one's late Close
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("it took its successor's socket away: %v", err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket after Close: %v", err)
	}
}

func TestSocketKeepsOtherFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenOn(t, ListenParams{Address: Address{Path: path}}); err == nil {
		t.Error("listens over a file")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := listenOn(t, ListenParams{Address: Address{Path: path + "x"}, Group: "no-such-group"}); err == nil || !strings.Contains(err.Error(), "group") {
		t.Errorf("unknown group: %v", err)
	}
}

func TestSocketGroup(t *testing.T) {
	testenv.RequireRoot(t)
	path := filepath.Join(t.TempDir(), "h.sock")
	if _, err := listenOn(t, ListenParams{Address: Address{Path: path}, Group: "12345"}); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Sys().(*syscall.Stat_t).Gid != 12345 {
		t.Errorf("%v, %v", st, err)
	}
}

// TestBeyondLoopback: the table of who may listen where.
func TestBeyondLoopback(t *testing.T) {
	config := testTLS(t)
	for _, x := range []struct {
		host   string
		tls    *tls.Config
		tokens bool
		want   string
	}{
		{"127.0.0.1", nil, false, ""},
		{"127.9.9.9", nil, false, ""},
		{"localhost", nil, false, ""},
		{"127.0.0.1", config, true, ""},
		{"0.0.0.0", nil, false, "TLS and a token file"},
		{"0.0.0.0", config, false, "token file"},
		{"0.0.0.0", nil, true, "certificate"},
		{"0.0.0.0", config, true, ""},
		{"", nil, false, "TLS and a token file"},
		{"::", nil, true, "certificate"},
		{"192.0.2.1", nil, false, "TLS and a token file"},
	} {
		_, err := listenOn(t, ListenParams{Address: Address{Host: x.host}, TLS: x.tls, HasTokens: x.tokens})
		if (err == nil) != (x.want == "") || (err != nil && !strings.Contains(err.Error(), x.want)) {
			t.Errorf("%q, TLS %v, tokens %v: %v, want %q", x.host, x.tls != nil, x.tokens, err, x.want)
		}
	}
}

func testTLS(t *testing.T) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	config, err := LoadTLS(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// TestEveryListener serves one handler over all kinds of listener, by both
// versions of HTTP.
func TestEveryListener(t *testing.T) {
	testenv.CheckGoroutines(t)
	server := NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Proto", r.Proto)
	}), slog.New(slog.DiscardHandler))
	path := filepath.Join(t.TempDir(), "h.sock")
	served := make(chan error, 3)
	var listeners []net.Listener
	for _, p := range []ListenParams{
		{Address: Address{Path: path}}, {Address: Address{Host: "127.0.0.1"}}, {Address: Address{Host: "127.0.0.1"}, TLS: testTLS(t)},
	} {
		l, err := listenOn(t, p)
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		go func() { served <- server.Serve(l) }()
	}
	for i, l := range listeners {
		for _, http2 := range []bool{false, true} {
			tr := &http.Transport{
				Protocols: new(http.Protocols), TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, l.Addr().Network(), l.Addr().String())
				},
			}
			tr.Protocols.SetHTTP1(!http2)
			tr.Protocols.SetHTTP2(http2)
			tr.Protocols.SetUnencryptedHTTP2(http2)
			url := "http://127.0.0.1/"
			if i == 2 {
				url = "https://127.0.0.1/"
			}
			res, err := (&http.Client{Transport: tr}).Get(url)
			if err != nil {
				t.Errorf("listener %d, HTTP/2 %v: %v", i, http2, err)
				continue
			}
			res.Body.Close()
			want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]
			if diff := cmp.Diff(want, res.Header.Get("Proto")); diff != "" {
				t.Errorf("listener %d: %s", i, diff)
			}
			tr.CloseIdleConnections()
		}
	}
	if err := server.Shutdown(testenv.Context(t)); err != nil {
		t.Error(err)
	}
	for range listeners {
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}
}
