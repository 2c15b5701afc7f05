package filesrpc

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"mime/multipart"
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/files"
	"github.com/hutch-run/hutch/internal/rpcx"
)

// maxParts bounds the files of one multipart upload.
const maxParts = 1000

// metadataHeader begins the headers that become metadata.
const metadataHeader = "X-Metadata-"

// HTTP serves /files and /files/archive.
type HTTP struct {
	store *files.Store
	log   *slog.Logger
}

// NewHTTP returns the plain HTTP side of store. Mount it at "/files" and
// "/files/".
func NewHTTP(store *files.Store, log *slog.Logger) *HTTP { return &HTTP{store: store, log: log} }

// ServeHTTP implements http.Handler.
func (h *HTTP) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var serve func(http.ResponseWriter, *http.Request, files.View) error
	allowed := "GET, HEAD, POST, PUT"
	reading := r.Method == http.MethodGet || r.Method == http.MethodHead
	writing := r.Method == http.MethodPost || r.Method == http.MethodPut
	switch {
	case r.URL.Path == "/files" && reading:
		serve = h.download
	case r.URL.Path == "/files" && writing:
		serve = h.upload
	case r.URL.Path == "/files/archive" && reading:
		serve = h.pack
	case r.URL.Path == "/files/archive" && writing:
		serve = h.unpack
	case r.URL.Path == "/files" || r.URL.Path == "/files/archive":
		w.Header().Set("Allow", allowed)
		writeError(w, http.StatusMethodNotAllowed, "use one of "+allowed)
		return
	default:
		writeError(w, http.StatusNotFound, "no such endpoint: there are /files and /files/archive")
		return
	}
	err := func() error {
		v, err := h.user(r)
		if err != nil {
			return err
		}
		return serve(w, r, v)
	}()
	if err != nil {
		h.fail(w, r, err)
	}
}

func (h *HTTP) user(r *http.Request) (files.View, error) {
	name := r.URL.Query().Get("username")
	if name == "" {
		name = account.HeaderUser(r.Header)
	}
	return h.store.As(account.Choice{Header: name})
}

// download serves the content of a file. It is handed out as an attachment of
// no known type: behind a proxy it must not run in anybody's browser.
func (h *HTTP) download(w http.ResponseWriter, r *http.Request, v files.View) error {
	c, err := v.Open(r.URL.Query().Get("path"))
	if err != nil {
		return err
	}
	defer c.Close()
	header := w.Header()
	header.Set("Content-Type", "application/octet-stream")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Disposition", disposition(c.Name()))
	if c.Size() >= 0 {
		http.ServeContent(w, r, "", c.Modified(), c)
		return nil
	}
	if r.Method == http.MethodHead {
		return nil
	}
	first := make([]byte, 32<<10)
	n, err := c.Read(first)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if n == 0 {
		header.Set("Content-Length", "0")
		return nil
	}
	if _, err := w.Write(first[:n]); err != nil {
		return nil // nobody is there to be told
	}
	if _, err := io.Copy(w, struct{ io.Reader }{c}); err != nil {
		h.abort(r, err)
	}
	return nil
}

func disposition(name string) string {
	if d := mime.FormatMediaType("attachment", map[string]string{"filename": utf8(name)}); d != "" {
		return d
	}
	return "attachment"
}

// uploaded is E2B's description of an uploaded file.
type uploaded struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// decode takes the compression off a body: stored as it came, it would be
// another file than the one meant.
func decode(r *http.Request) error {
	switch encoding := strings.ToLower(r.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
		return nil
	case "gzip":
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			return fault.New(fault.Invalid, "the body is not gzip, as its Content-Encoding says: %v", err)
		}
		r.Body = z
		return nil
	default:
		return fault.New(fault.Invalid, "Content-Encoding %q is not known: send the body as it is, or with gzip", encoding)
	}
}

func (h *HTTP) upload(w http.ResponseWriter, r *http.Request, v files.View) error {
	if err := decode(r); err != nil {
		return err
	}
	mode, err := modeOf(r.URL.Query().Get("mode"))
	if err != nil {
		return err
	}
	options := files.CreateOptions{Metadata: metadataOf(r.Header), Mode: mode}
	path := r.URL.Query().Get("path")
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		kind = ""
	}
	var done []uploaded
	if kind == "multipart/form-data" {
		done, err = uploadParts(r, v, path, options)
	} else {
		var one uploaded
		one, err = store(v, path, r.Body, options)
		done = []uploaded{one}
	}
	if err != nil {
		return err
	}
	return writeJSON(w, done)
}

// modeOf reads permission bits as chmod takes them; empty: none are given.
func modeOf(text string) (uint32, error) {
	if text == "" {
		return 0, nil
	}
	mode, err := strconv.ParseUint(text, 8, 32)
	if err != nil || mode == 0 || mode > 0o777 {
		return 0, fault.BadField("mode", "%.20q is no octal number from 1 to 777", text)
	}
	return uint32(mode), nil
}

func uploadParts(r *http.Request, v files.View, path string, options files.CreateOptions) ([]uploaded, error) {
	mr, err := r.MultipartReader()
	if err != nil {
		return nil, fault.New(fault.Invalid, "multipart body: %v", err)
	}
	var done []uploaded
	for {
		part, err := mr.NextRawPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, bodyError(err)
		}
		if part.FormName() != "file" {
			continue
		}
		if len(done) == maxParts {
			return nil, fault.New(fault.Invalid, "more than %d files in one upload: send several", maxParts)
		}
		name := path
		if name == "" {
			name = partPath(part)
		} else if len(done) > 0 {
			return nil, fault.BadField("path", "names one file, but several came: leave it out and name each part")
		}
		one, err := store(v, name, part, options)
		if err != nil {
			return nil, err
		}
		done = append(done, one)
	}
	if len(done) == 0 {
		return nil, fault.New(fault.Invalid, `multipart body without a part named "file"`)
	}
	return done, nil
}

// partPath is the whole name of a part; Part.FileName keeps its last element
// only.
func partPath(part *multipart.Part) string {
	_, params, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
	if err != nil {
		return ""
	}
	return params["filename"]
}

func store(v files.View, path string, body io.Reader, options files.CreateOptions) (uploaded, error) {
	u, err := v.Create(path, options)
	if err != nil {
		return uploaded{}, err
	}
	if _, err := u.ReadFrom(body); err != nil {
		u.Abort()
		return uploaded{}, bodyError(err)
	}
	e, err := u.Commit()
	if err != nil {
		return uploaded{}, err
	}
	return uploaded{Path: utf8(e.Path), Name: utf8(e.Name), Type: "file", Metadata: options.Metadata}, nil
}

// bodyError tells a body that the client did not send whole from a failure of
// ours.
func bodyError(err error) error {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fault.New(fault.Canceled, "the body was cut off: nothing of this file was kept")
	case errors.As(err, &tooLarge):
		return fault.New(fault.Invalid, "the body is larger than %d bytes", tooLarge.Limit)
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader):
		return fault.New(fault.Invalid, "the body is damaged: %v", err)
	case errors.Is(err, multipart.ErrMessageTooLarge):
		return fault.New(fault.Invalid, "multipart body: headers too large")
	}
	return err
}

func metadataOf(header http.Header) map[string]string {
	var m map[string]string
	for name, values := range header {
		if key, ok := strings.CutPrefix(name, metadataHeader); ok && len(values) > 0 {
			if m == nil {
				m = map[string]string{}
			}
			m[strings.ToLower(key)] = values[0]
		}
	}
	return m
}

func (h *HTTP) pack(w http.ResponseWriter, r *http.Request, v files.View) error {
	tree, err := v.OpenTree(r.URL.Query().Get("path"))
	if err != nil {
		return err
	}
	defer tree.Close()
	w.Header().Set("Content-Type", "application/x-tar")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.Method == http.MethodHead {
		return nil
	}
	out := &counter{w: w}
	if err := tree.Pack(out); err != nil {
		if out.n == 0 {
			return err
		}
		h.abort(r, err)
	}
	return nil
}

// counter knows whether an answer has begun.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// abort breaks an answer off so that the client sees that it is not whole: an
// orderly end would look like success.
func (h *HTTP) abort(r *http.Request, err error) {
	h.log.DebugContext(r.Context(), "answer broken off", "path", r.URL.Path, "err", err)
	panic(http.ErrAbortHandler)
}

func (h *HTTP) unpack(w http.ResponseWriter, r *http.Request, v files.View) error {
	if err := decode(r); err != nil {
		return err
	}
	q := r.URL.Query()
	done, err := v.Unpack(q.Get("path"), r.Body, files.UnpackOptions{Preserve: q.Get("preserve") == "true"})
	if err != nil {
		return err
	}
	return writeJSON(w, map[string]int64{"entries": done.Entries, "bytes": done.Bytes})
}

// fail answers with err. The body of an upload that was refused is not read to
// its end, so the connection is not used again.
func (h *HTTP) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && !fault.Is(err, fault.Canceled) {
		err = fault.As(fault.Canceled, err) // whatever it was, the client was gone
	}
	status := rpcx.HTTPStatus(err)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		status = http.StatusInsufficientStorage
	}
	level := slog.LevelDebug
	if status == http.StatusInternalServerError {
		level = slog.LevelWarn
	}
	h.log.Log(r.Context(), level, "file request failed", "method", r.Method, "path", r.URL.Path, "status", status, "err", err)
	writeError(w, status, err.Error())
}

func writeJSON(w http.ResponseWriter, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(data) // a client that left can't be told
	return nil
}

func writeError(w http.ResponseWriter, status int, message string) {
	header := w.Header()
	for _, name := range []string{"Content-Disposition", "Content-Length", "Last-Modified"} {
		header.Del(name)
	}
	header.Set("Content-Type", "application/json")
	header.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	data, _ := json.Marshal(struct { // strings and numbers always work
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, utf8(message)})
	_, _ = w.Write(data)
}

// utf8 makes a name fit for messages; names of files are any bytes.
func utf8(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
