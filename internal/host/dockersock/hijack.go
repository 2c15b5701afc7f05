package dockersock

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"regexp"
	"strings"

	"github.com/hutch-run/hutch/internal/host/relay"
)

// maxHead bounds the head of an answer to a request that may turn its
// connection into something else, in bytes.
const maxHead = 64 << 10

// hijackPath matches what Docker's daemon hijacks without being asked to by an
// Upgrade header, as old clients do.
var hijackPath = regexp.MustCompile(`^(?:/v[0-9.]+)?/(?:containers/[^/]+/attach|exec/[^/]+/start)$`)

// hijacks reports whether a request may turn its connection into one of bytes.
func hijacks(r *http.Request) bool {
	return r.Header.Get("Upgrade") != "" || r.Method == http.MethodPost && hijackPath.MatchString(r.URL.Path)
}

// hijack carries a request that may turn its connection into one of bytes.
func (d *door) hijack(w http.ResponseWriter, r *http.Request, conn net.Conn) {
	defer context.AfterFunc(r.Context(), func() { _ = conn.Close() })()
	head := &io.LimitedReader{R: conn, N: maxHead}
	from := bufio.NewReaderSize(head, 32<<10)
	res, err := ask(r, conn, from)
	if err != nil {
		d.lost(w, r, err)
		return
	}
	defer res.Body.Close()
	head.N = math.MaxInt64
	if !hijacked(res) {
		answer(w, res)
		return
	}
	caller, err := relay.Hijack(w, headOf(res))
	if err != nil {
		d.log.DebugContext(r.Context(), "connection not hijacked", "path", r.URL.Path, "error", err)
		return
	}
	defer context.AfterFunc(r.Context(), func() { _ = caller.Close() })()
	relay.Join(caller, relay.NewConn(conn, from), &d.s.buffers)
}

// ask sends r and reads the head of its answer.
func ask(r *http.Request, to io.Writer, from *bufio.Reader) (*http.Response, error) {
	out := r.Clone(r.Context())
	out.Header.Del("Expect") // this server answers it
	if out.Host == "" {
		out.Host = "docker"
	}
	if err := out.Write(to); err != nil {
		return nil, err
	}
	for {
		res, err := http.ReadResponse(from, out)
		if err != nil || res.StatusCode >= http.StatusOK || res.StatusCode == http.StatusSwitchingProtocols {
			return res, err
		}
	}
}

// hijacked reports whether bytes follow res, both ways.
func hijacked(res *http.Response) bool {
	if res.StatusCode == http.StatusSwitchingProtocols {
		return true
	}
	kind := res.Header.Get("Content-Type")
	return res.StatusCode == http.StatusOK && res.ContentLength < 0 && len(res.TransferEncoding) == 0 &&
		(kind == "application/vnd.docker.raw-stream" || kind == "application/vnd.docker.multiplexed-stream")
}

// headOf returns the head of res as it was.
func headOf(res *http.Response) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %s\r\n", res.Status)
	_ = res.Header.Write(&b) // a buffer takes all
	b.WriteString("\r\n")
	return b.Bytes()
}

// answer passes on an answer that is one and no more.
func answer(w http.ResponseWriter, res *http.Response) {
	for name, values := range res.Header {
		if !strings.EqualFold(name, "Connection") && !strings.EqualFold(name, "Keep-Alive") {
			w.Header()[name] = values
		}
	}
	w.WriteHeader(res.StatusCode)
	control := http.NewResponseController(w)
	b := make([]byte, 8<<10)
	for {
		n, err := res.Body.Read(b)
		if n > 0 {
			if _, err := w.Write(b[:n]); err != nil || control.Flush() != nil {
				return
			}
		}
		if err == io.EOF {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler) // no part is taken for the whole
		}
	}
}
