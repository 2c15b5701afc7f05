package filesrpc

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	filesystempb "github.com/hutch-run/hutch/gen/filesystem"
	"github.com/hutch-run/hutch/gen/filesystem/filesystempbconnect"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/files"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/testenv"
)

type rig struct {
	dir    string
	url    string
	http   *http.Client
	h      *Handler
	client filesystempbconnect.FilesystemClient
}

func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		noErr(t, os.Chmod(d, 0o711))
	}
	etc := filepath.Join(dir, "accounts/etc")
	noErr(t, os.MkdirAll(etc, 0o755))
	noErr(t, os.Mkdir(dir+"/home", 0o755))
	noErr(t, os.Chown(dir+"/home", 7000, 7000))
	noErr(t, os.WriteFile(etc+"/passwd", []byte("app:x:7000:7000::"+dir+"/home:/bin/sh\n"), 0o644))
	log := slog.New(slog.DiscardHandler)
	store, err := files.New(files.Params{Log: log, Accounts: account.NewFiles(dir + "/accounts"), Defaults: account.Fixed{UserName: "app"}})
	noErr(t, err)
	r := &rig{dir: dir, h: New(store)}
	mux := http.NewServeMux()
	mux.Handle(r.h.Mount(rpcx.HandlerOptions(log)...))
	plain := NewHTTP(store, log)
	mux.Handle("/files", plain)
	mux.Handle("/files/", plain)
	srv := httptest.NewServer(mux)
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
		noErr(t, store.Close())
	})
	r.url, r.http = srv.URL, srv.Client()
	r.client = filesystempbconnect.NewFilesystemClient(r.http, r.url)
	return r
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// do makes a request; endpoint is "/files?path=…".
func (r *rig) do(t testing.TB, method, endpoint string, body io.Reader, header http.Header) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(testenv.Context(t), method, r.url+endpoint, body)
	noErr(t, err)
	for k, v := range header {
		req.Header[k] = v
	}
	res, err := r.http.Do(req)
	noErr(t, err)
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	noErr(t, err)
	return res, data
}

func at(path string, more ...string) string {
	q := url.Values{"path": {path}}
	for i := 0; i < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return "?" + q.Encode()
}

func TestUploadAndDownload(t *testing.T) {
	r := newRig(t)
	header := http.Header{"X-Metadata-Color": {"blue", "ignored"}, "Content-Type": {"application/octet-stream"}}
	res, data := r.do(t, "POST", "/files"+at("new/file.txt"), strings.NewReader("hello world"), header)
	var got []uploaded
	noErr(t, json.Unmarshal(data, &got))
	want := []uploaded{{Path: r.dir + "/home/new/file.txt", Name: "file.txt", Type: "file", Metadata: map[string]string{"color": "blue"}}}
	if d := cmp.Diff(want, got); d != "" || res.StatusCode != 200 {
		t.Errorf("%d: %s", res.StatusCode, d)
	}
	st, err := r.client.Stat(testenv.Context(t), connect.NewRequest(&filesystempb.StatRequest{Path: "new/file.txt"}))
	noErr(t, err)
	if e := st.Msg.GetEntry(); e.GetOwner() != "app" || e.GetSize() != 11 || e.GetMetadata()["color"] != "blue" ||
		e.GetType() != filesystempb.FileType_FILE_TYPE_FILE || e.GetPermissions() != "-rw-r--r--" {
		t.Errorf("entry %v", e)
	}
	res, data = r.do(t, "GET", "/files"+at("new/file.txt"), nil, nil)
	if string(data) != "hello world" || res.Header.Get("Content-Type") != "application/octet-stream" ||
		!strings.Contains(res.Header.Get("Content-Disposition"), "file.txt") || res.ContentLength != 11 {
		t.Errorf("%q %v", data, res.Header)
	}
	res, data = r.do(t, "GET", "/files"+at("new/file.txt"), nil, http.Header{"Range": {"bytes=6-"}})
	if res.StatusCode != http.StatusPartialContent || string(data) != "world" {
		t.Errorf("range: %d %q", res.StatusCode, data)
	}
	res, _ = r.do(t, "HEAD", "/files"+at("new/file.txt"), nil, nil)
	if res.StatusCode != 200 || res.ContentLength != 11 {
		t.Errorf("head: %d %d", res.StatusCode, res.ContentLength)
	}
	res, data = r.do(t, "GET", "/files"+at("/proc/version"), nil, nil)
	if res.StatusCode != 200 || !strings.HasPrefix(string(data), "Linux version") {
		t.Errorf("made-up file: %d %q", res.StatusCode, data)
	}
	noErr(t, os.WriteFile(r.dir+"/empty", nil, 0o644))
	res, data = r.do(t, "GET", "/files"+at(r.dir+"/empty"), nil, nil)
	if res.StatusCode != 200 || len(data) != 0 || res.ContentLength != 0 {
		t.Errorf("empty file: %d %q", res.StatusCode, data)
	}
}

func TestUploadWithMode(t *testing.T) {
	r := newRig(t)
	for mode, want := range map[string]string{"755": "-rwxr-xr-x", "0600": "-rw-------", "": "-rw-r--r--"} {
		r.do(t, "PUT", "/files"+at("f"+mode, "mode", mode), strings.NewReader("x"), nil)
		st, err := r.client.Stat(testenv.Context(t), connect.NewRequest(&filesystempb.StatRequest{Path: "f" + mode}))
		noErr(t, err)
		if got := st.Msg.GetEntry().GetPermissions(); got != want {
			t.Errorf("mode %q: %s, want %s", mode, got, want)
		}
	}
	for _, bad := range []string{"0", "4755", "8", "-1", "rwx"} {
		if res, data := r.do(t, "PUT", "/files"+at("bad", "mode", bad), strings.NewReader("x"), nil); res.StatusCode != 400 || !strings.Contains(string(data), "mode") {
			t.Errorf("mode %q: %d %s", bad, res.StatusCode, data)
		}
	}
}

func form(t testing.TB, parts ...[3]string) (io.Reader, http.Header) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for _, p := range parts {
		h := textproto.MIMEHeader{}
		h.Set("Content-Disposition", fmt.Sprintf(`form-data; name=%q; filename=%q`, p[0], p[1]))
		part, err := w.CreatePart(h)
		noErr(t, err)
		_, err = io.WriteString(part, p[2])
		noErr(t, err)
	}
	noErr(t, w.Close())
	return &buf, http.Header{"Content-Type": {w.FormDataContentType()}}
}

func TestMultipart(t *testing.T) {
	r := newRig(t)
	body, header := form(t, [3]string{"file", "ignored", "one"})
	res, data := r.do(t, "POST", "/files"+at("a/one"), body, header)
	if res.StatusCode != 200 {
		t.Fatalf("%s", data)
	}
	body, header = form(t, [3]string{"file", r.dir + "/home/b/two", "two"}, [3]string{"note", "", "skipped"}, [3]string{"file", "three", "three"})
	res, data = r.do(t, "POST", "/files", body, header)
	var got []uploaded
	noErr(t, json.Unmarshal(data, &got))
	if res.StatusCode != 200 || len(got) != 2 {
		t.Fatalf("%d %s", res.StatusCode, data)
	}
	for path, want := range map[string]string{"a/one": "one", "b/two": "two", "three": "three"} {
		if data, err := os.ReadFile(r.dir + "/home/" + path); err != nil || string(data) != want {
			t.Errorf("%s: %q %v", path, data, err)
		}
	}
	body, header = form(t, [3]string{"file", "x", "1"}, [3]string{"file", "y", "2"})
	if res, data := r.do(t, "POST", "/files"+at("p"), body, header); res.StatusCode != 400 {
		t.Errorf("one path for two files: %d %s", res.StatusCode, data)
	}
	body, header = form(t, [3]string{"other", "x", "1"})
	if res, data := r.do(t, "POST", "/files"+at("p"), body, header); res.StatusCode != 400 {
		t.Errorf("no file: %d %s", res.StatusCode, data)
	}
}

func TestCompressedBodies(t *testing.T) {
	r := newRig(t)
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	_, err := io.WriteString(z, strings.Repeat("hello ", 10_000))
	noErr(t, err)
	noErr(t, z.Close())
	whole := buf.Bytes()
	for _, tc := range []struct {
		encoding string
		body     []byte
		status   int
	}{
		{"gzip", whole, 200}, {"gzip", whole[:len(whole)-4], 499}, {"gzip", []byte("not that"), 400}, {"br", whole, 400},
		{"gzip", append(whole[:len(whole)-8:len(whole)-8], 1, 2, 3, 4, 5, 6, 7, 8), 400},
	} {
		_ = os.Remove(r.dir + "/home/f")
		res, data := r.do(t, "POST", "/files"+at("f"), bytes.NewReader(tc.body), http.Header{"Content-Encoding": {tc.encoding}})
		got, err := os.ReadFile(r.dir + "/home/f")
		if res.StatusCode != tc.status || (err == nil) != (tc.status == 200) || (err == nil && len(got) != 60_000) {
			t.Errorf("%s, %d bytes: %d %s; file %d, %v", tc.encoding, len(tc.body), res.StatusCode, data, len(got), err)
		}
	}
}

func TestHTTPErrors(t *testing.T) {
	r := newRig(t)
	noErr(t, os.WriteFile(r.dir+"/secret", []byte("s"), 0o600))
	small := r.dir + "/small"
	noErr(t, os.Mkdir(small, 0o755))
	noErr(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	for name, tc := range map[string]struct {
		method, endpoint string
		body             string
		status           int
		words            string
	}{
		"missing":          {"GET", "/files" + at("none"), "", 404, "does not exist"},
		"directory":        {"GET", "/files" + at("~"), "", 400, "is a directory"},
		"no path":          {"GET", "/files", "", 400, "path: is empty"},
		"unknown user":     {"GET", "/files" + at("x", "username", "nobody-at-all"), "", 401, "unknown user"},
		"not mine":         {"GET", "/files" + at(r.dir+"/secret"), "", 403, "not open to user app"},
		"not mine to pack": {"GET", "/files/archive" + at(r.dir+"/secret"), "", 403, "not open to user app"},
		"not mine to make": {"POST", "/files" + at(r.dir+"/new"), "x", 403, "not open to user app"},
		"full":             {"POST", "/files" + at(small+"/f", "username", "root"), strings.Repeat("x", 100_000), 507, "no space left"},
		"not a tar":        {"PUT", "/files/archive" + at("d"), strings.Repeat("x", 2000), 400, "damaged"},
		"method":           {"DELETE", "/files", "", 405, "use one of"},
		"endpoint":         {"GET", "/files/other", "", 404, "no such endpoint"},
	} {
		res, data := r.do(t, tc.method, tc.endpoint, strings.NewReader(tc.body), nil)
		var e struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		}
		if err := json.Unmarshal(data, &e); err != nil || res.StatusCode != tc.status || e.Code != tc.status || !strings.Contains(e.Message, tc.words) {
			t.Errorf("%s: %d %q, want %d with %q", name, res.StatusCode, data, tc.status, tc.words)
		}
	}
}

// A client that breaks off in the middle leaves nothing, and what was there.
func TestUploadCutOff(t *testing.T) {
	r := newRig(t)
	file := r.dir + "/home/file"
	noErr(t, os.WriteFile(file, []byte("old"), 0o644))
	noErr(t, os.Chown(file, 7000, 7000))
	for _, head := range []string{"Content-Length: 100000", "Transfer-Encoding: chunked"} {
		var d net.Dialer
		conn, err := d.DialContext(testenv.Context(t), "tcp", strings.TrimPrefix(r.url, "http://"))
		noErr(t, err)
		_, err = fmt.Fprintf(conn, "PUT /files%s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n5\r\nhello\r\n", at(file), head)
		noErr(t, err)
		noErr(t, conn.(*net.TCPConn).CloseWrite())
		answer, err := io.ReadAll(conn)
		noErr(t, err)
		if bytes.Contains(answer, []byte("200 OK")) {
			t.Errorf("%s: %s", head, answer)
		}
		_ = conn.Close()
		entries, err := os.ReadDir(r.dir + "/home")
		data, _ := os.ReadFile(file)
		if err != nil || len(entries) != 1 || string(data) != "old" {
			t.Errorf("%s: left %v, content %q", head, entries, data)
		}
	}
}

// Half a GiB over HTTP each way at once with small memory and equal digests.
func TestLargeTransfer(t *testing.T) {
	r := newRig(t)
	const size = 512 << 20
	block := make([]byte, 1<<20)
	rnd := rand.NewChaCha8([32]byte{1})
	_, _ = rnd.Read(block)
	in := sha256.New()
	pr, pw := io.Pipe()
	go func() {
		w := io.MultiWriter(in, pw)
		for i := range size / len(block) {
			block[i]++
			if _, err := w.Write(block); err != nil {
				return
			}
		}
		_ = pw.Close()
	}()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	res, data := r.do(t, "PUT", "/files"+at("big"), pr, nil)
	if res.StatusCode != 200 {
		t.Fatalf("%s", data)
	}
	req, err := http.NewRequestWithContext(testenv.Context(t), "GET", r.url+"/files"+at("big"), nil)
	noErr(t, err)
	res, err = r.http.Do(req)
	noErr(t, err)
	defer res.Body.Close()
	out := sha256.New()
	n, err := io.Copy(out, res.Body)
	if err != nil || n != size || !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
		t.Errorf("%d bytes back, %v", n, err)
	}
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	if after.HeapSys > before.HeapSys+64<<20 {
		t.Errorf("the heap grew by %d MiB", (after.HeapSys-before.HeapSys)>>20)
	}
}

func TestArchiveOverHTTP(t *testing.T) {
	r := newRig(t)
	noErr(t, os.MkdirAll(r.dir+"/src/d", 0o755))
	noErr(t, os.WriteFile(r.dir+"/src/d/f", []byte("content"), 0o640))
	noErr(t, os.Symlink("d/f", r.dir+"/src/l"))
	res, data := r.do(t, "GET", "/files/archive"+at(r.dir+"/src", "username", "root"), nil, nil)
	if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/x-tar" {
		t.Fatalf("%d %v", res.StatusCode, res.Header)
	}
	res, answer := r.do(t, "PUT", "/files/archive"+at("copy"), bytes.NewReader(data), nil)
	if res.StatusCode != 200 || string(answer) != `{"bytes":7,"entries":3}` {
		t.Fatalf("%d %s", res.StatusCode, answer)
	}
	got, err := os.ReadFile(r.dir + "/home/copy/l")
	if err != nil || string(got) != "content" {
		t.Errorf("%q %v", got, err)
	}
	res, _ = r.do(t, "PUT", "/files/archive"+at("copy", "preserve", "true"), bytes.NewReader(data), nil)
	if res.StatusCode != http.StatusForbidden {
		t.Errorf("owners without root: %d", res.StatusCode)
	}
}

// An archive that goes wrong in its middle must not look whole.
func TestArchiveBreaksOff(t *testing.T) {
	r := newRig(t)
	noErr(t, os.MkdirAll(r.dir+"/src", 0o755))
	for i := range 20 {
		noErr(t, os.WriteFile(fmt.Sprintf("%s/src/%02d", r.dir, i), make([]byte, 100_000), 0o644))
	}
	noErr(t, os.WriteFile(r.dir+"/src/zz", []byte("secret"), 0o600))
	req, err := http.NewRequestWithContext(testenv.Context(t), "GET", r.url+"/files/archive"+at(r.dir+"/src"), nil)
	noErr(t, err)
	res, err := r.http.Do(req)
	noErr(t, err)
	defer res.Body.Close()
	tr := tar.NewReader(res.Body)
	for {
		_, err = tr.Next()
		if err != nil {
			break
		}
	}
	if errors.Is(err, io.EOF) || res.StatusCode != 200 {
		t.Errorf("%d: %v, as if it were whole", res.StatusCode, err)
	}
}

func TestFilesystemService(t *testing.T) {
	r := newRig(t)
	ctx := testenv.Context(t)
	made, err := r.client.MakeDir(ctx, connect.NewRequest(&filesystempb.MakeDirRequest{Path: "x/y"}))
	noErr(t, err)
	if made.Msg.GetEntry().GetType() != filesystempb.FileType_FILE_TYPE_DIRECTORY {
		t.Errorf("%v", made.Msg)
	}
	_, err = r.client.MakeDir(ctx, connect.NewRequest(&filesystempb.MakeDirRequest{Path: "x/y"}))
	if connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("again: %v", err)
	}
	moved, err := r.client.Move(ctx, connect.NewRequest(&filesystempb.MoveRequest{Source: "x/y", Destination: "x/z"}))
	noErr(t, err)
	if moved.Msg.GetEntry().GetPath() != r.dir+"/home/x/z" {
		t.Errorf("%v", moved.Msg)
	}
	noErr(t, os.Symlink("/nowhere", r.dir+"/home/x/dangling"))
	noErr(t, os.WriteFile(r.dir+"/home/x/bad\xffname", nil, 0o644))
	list, err := r.client.ListDir(ctx, connect.NewRequest(&filesystempb.ListDirRequest{Path: "", Depth: 2}))
	noErr(t, err)
	var names []string
	for _, e := range list.Msg.GetEntries() {
		names = append(names, fmt.Sprintf("%s %s %s", e.GetName(), e.GetType(), e.GetSymlinkTarget()))
	}
	want := []string{
		"x FILE_TYPE_DIRECTORY ", "bad\uFFFDname FILE_TYPE_FILE ", "dangling FILE_TYPE_SYMLINK /nowhere", "z FILE_TYPE_DIRECTORY ",
	}
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
	_, err = r.client.Remove(ctx, connect.NewRequest(&filesystempb.RemoveRequest{Path: "x"}))
	noErr(t, err)
	_, err = r.client.Stat(ctx, connect.NewRequest(&filesystempb.StatRequest{Path: "x"}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("removed: %v", err)
	}
	req := connect.NewRequest(&filesystempb.StatRequest{Path: "/"})
	req.Header().Set("Authorization", "Basic bm9zdWNodXNlcjo=")
	_, err = r.client.Stat(ctx, req)
	if connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("unknown user: %v", err)
	}
}

func TestWatchService(t *testing.T) {
	r := newRig(t)
	r.h.keepalive = 5 * time.Millisecond
	ctx, cancel := context.WithCancel(testenv.Context(t))
	defer cancel()
	stream, err := r.client.WatchDir(ctx, connect.NewRequest(&filesystempb.WatchDirRequest{Path: "~", IncludeEntry: true}))
	noErr(t, err)
	defer stream.Close()
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("no start: %v", stream.Err())
	}
	noErr(t, os.WriteFile(r.dir+"/home/f", []byte("x"), 0o644))
	alive := false
	for stream.Receive() {
		if stream.Msg().GetKeepalive() != nil {
			alive = true
			break
		}
		ev := stream.Msg().GetFilesystem()
		if ev.GetName() != "f" || ev.GetEntry().GetPath() != r.dir+"/home/f" {
			t.Errorf("event %v", ev)
		}
	}
	if !alive {
		t.Errorf("no keep-alive: %v", stream.Err())
	}
	id, err := r.client.CreateWatcher(ctx, connect.NewRequest(&filesystempb.CreateWatcherRequest{Path: "~"}))
	noErr(t, err)
	noErr(t, os.Remove(r.dir+"/home/f"))
	for removed := false; !removed; {
		res, err := r.client.GetWatcherEvents(ctx, connect.NewRequest(&filesystempb.GetWatcherEventsRequest{WatcherId: id.Msg.GetWatcherId()}))
		noErr(t, err)
		for _, ev := range res.Msg.GetEvents() {
			removed = removed || ev.GetType() == filesystempb.EventType_EVENT_TYPE_REMOVE && ev.GetName() == "f"
		}
	}
	_, err = r.client.RemoveWatcher(ctx, connect.NewRequest(&filesystempb.RemoveWatcherRequest{WatcherId: id.Msg.GetWatcherId()}))
	noErr(t, err)
	_, err = r.client.GetWatcherEvents(ctx, connect.NewRequest(&filesystempb.GetWatcherEventsRequest{WatcherId: id.Msg.GetWatcherId()}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("removed: %v", err)
	}
}
