package kubernetes

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// API is a cluster's API, with the rights of an administrator, from the moment
// that it was ready until that cluster ends. Safe for concurrent use.
type API struct {
	base   *url.URL
	client *http.Client
	gone   chan struct{}
	end    sync.Once
}

// connectAPI reads the credentials, which are there once the API answers.
func connectAPI(a Access) (*API, error) {
	base, err := url.Parse(a.URL)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(a.CA)
	if err != nil {
		return nil, fmt.Errorf("read the certificate of the cluster: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", a.CA)
	}
	pair, err := tls.LoadX509KeyPair(a.Cert, a.Key)
	if err != nil {
		return nil, fmt.Errorf("read the administrator's certificate: %w", err)
	}
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2: true, IdleConnTimeout: time.Minute, TLSHandshakeTimeout: 20 * time.Second, // under emulation
	}
	return &API{base: base, client: &http.Client{Transport: transport}, gone: make(chan struct{})}, nil
}

// Do sends r, whose URL has a path and a query only, to the API. Time is
// bounded by the context of r alone: a watch may last.
func (a *API) Do(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL = a.base.ResolveReference(r.URL)
	r.Host = ""
	return a.client.Do(r)
}

// Get asks for path, which may have a query. Time is bounded by ctx alone.
func (a *API) Get(ctx context.Context, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, err
	}
	return a.Do(r)
}

// Gone is closed when the cluster ended, was stopped or deleted. The next one
// may have other certificates.
func (a *API) Gone() <-chan struct{} { return a.gone }

// close ends the API and its connections.
func (a *API) close() {
	a.end.Do(func() { close(a.gone) })
	a.client.CloseIdleConnections()
}

// has reports whether u belongs to this API.
func (a *API) has(u string) bool {
	return strings.HasPrefix(u, strings.TrimSuffix(a.base.String(), "/")+"/")
}

// maxAnswer bounds what is read of an answer.
const maxAnswer = 4 << 20

// call gets path, and reads the answer into out unless that is nil.
func (a *API) call(ctx context.Context, path string, out any) error {
	res, err := a.Get(ctx, path)
	if err != nil {
		return plain(err)
	}
	return readAnswer(res, out)
}

// readAnswer takes 2xx for success.
func readAnswer(res *http.Response, out any) error {
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		b, _ := io.ReadAll(io.LimitReader(res.Body, 4<<10))
		return fmt.Errorf("HTTP %d: %s", res.StatusCode, shorten(message(b)))
	}
	if out == nil {
		_, err := io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswer))
		return err
	}
	return json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(out)
}

// message returns what a Status of the API says, what of a list of checks went
// wrong, or the body itself.
func message(body []byte) string {
	var status struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &status) == nil && status.Message != "" {
		return status.Message
	}
	var wrong []string
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "[-]") {
			wrong = append(wrong, strings.TrimSuffix(strings.TrimSpace(line[len("[-]"):]), " failed: reason withheld"))
		}
	}
	if len(wrong) > 0 {
		return "not ok: " + strings.Join(wrong, ", ")
	}
	return string(body)
}

// plain takes the request's URL off an error: the reader knows what was asked.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// maxText bounds what is told of somebody else's text.
const maxText = 300

// shorten returns s on one line, of a length that fits into a detail.
func shorten(s string) string {
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "?")), " ")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "..."
	}
	return s
}
