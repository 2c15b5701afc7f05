package cli

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	filesystempb "github.com/hutch-run/hutch/gen/filesystem"
)

func (a *App) cpCommand() *cobra.Command {
	var user string
	c := &cobra.Command{
		Use:   "cp [flags] SOURCE DESTINATION",
		Short: "Copy files and directories to or from a sandbox",
		Long: "One of SOURCE and DESTINATION is SANDBOX:PATH, the other a local path, or \"-\"\n" +
			"for a tar archive on standard input or output.",
		Example: "  hutch cp data.csv sb-12:/srv/\n  hutch cp sb-12:/var/log ./logs\n  hutch cp - sb-12:/srv < tree.tar",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, to := parsePlace(args[0]), parsePlace(args[1])
			if (from.sandbox == "") == (to.sandbox == "") {
				return errors.New("exactly one of SOURCE and DESTINATION must be SANDBOX:PATH")
			}
			cl, id, err := a.sandbox(cmd.Context(), from.sandbox+to.sandbox)
			if err != nil {
				return err
			}
			cp := &copier{app: a, client: cl, id: id, user: user, bar: newProgress(a.Err)}
			defer cp.bar.end()
			if from.sandbox == "" {
				return cp.upload(cmd.Context(), from.path, to.path)
			}
			return cp.download(cmd.Context(), from.path, to.path)
		},
	}
	c.Flags().StringVarP(&user, "user", "u", "", "user in the sandbox whose rights apply and who owns new files")
	return c
}

// place is one end of a copy: in a sandbox, or local.
type place struct{ sandbox, path string }

// parsePlace reads SANDBOX:PATH or a local path. A local path that has a colon
// is written with a slash before it, such as ./a:b.
func parsePlace(s string) place {
	id, p, ok := strings.Cut(s, ":")
	if !ok || id == "" || strings.ContainsAny(id, "/\\.") {
		return place{path: s}
	}
	return place{sandbox: id, path: p}
}

type copier struct {
	app    *App
	client *client
	id     string
	user   string
	bar    *progress
}

// upload copies a local file, directory, or tar on standard input.
func (c *copier) upload(ctx context.Context, local, remote string) error {
	if local == "-" {
		return c.put(ctx, "/files/archive", remote, 0, c.app.In, -1)
	}
	fi, err := os.Stat(local)
	if err != nil {
		return err
	}
	there, err := c.look(ctx, remote)
	if err != nil {
		return err
	}
	if isDir(there) || !fi.IsDir() && strings.HasSuffix(remote, "/") {
		abs, err := filepath.Abs(local)
		if err != nil {
			return err
		}
		remote = path.Join(remote, filepath.Base(abs))
	}
	if fi.IsDir() {
		pr, pw := io.Pipe()
		packed := make(chan struct{})
		go func() {
			defer close(packed)
			pw.CloseWithError(packTree(pw, local))
		}()
		err := c.put(ctx, "/files/archive", remote, 0, pr, -1)
		pr.CloseWithError(errors.New("upload ended"))
		<-packed
		return err
	}
	f, err := os.Open(local)
	if err != nil {
		return err
	}
	defer f.Close()
	return c.put(ctx, "/files", remote, fi.Mode().Perm(), f, fi.Size())
}

// download copies a file or directory of the sandbox to a local path, or as a
// tar to standard output.
func (c *copier) download(ctx context.Context, remote, local string) error {
	there, err := c.look(ctx, remote)
	if err != nil {
		return err
	}
	if local == "-" {
		return c.get(ctx, "/files/archive", remote, func(r io.Reader, _ int64) error {
			_, err := io.Copy(c.app.Out, r)
			return err
		})
	}
	if fi, err := os.Stat(local); err == nil && fi.IsDir() || strings.HasSuffix(local, string(filepath.Separator)) {
		local = filepath.Join(local, path.Base(path.Clean("/"+remote)))
	}
	if isDir(there) {
		return c.get(ctx, "/files/archive", remote, func(r io.Reader, _ int64) error { return unpackTree(r, local) })
	}
	mode, err := c.modeOf(ctx, there)
	if err != nil {
		return err
	}
	return c.get(ctx, "/files", remote, func(r io.Reader, total int64) error {
		return c.saveFile(local, mode, r, total)
	})
}

// saveFile writes r to a new file beside local and then gives it its name, so
// that a copy that breaks off leaves what was there. Of mode it has what the
// umask leaves, as an unpacked tree has.
func (c *copier) saveFile(local string, mode fs.FileMode, r io.Reader, total int64) error {
	name := filepath.Join(filepath.Dir(local), ".hutch-cp-"+rand.Text())
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, mode.Perm())
	if err != nil {
		return err
	}
	defer os.Remove(name)
	_, err = io.Copy(f, c.counted(r, local, total))
	if err == nil && total >= 0 {
		var n int64
		if n, err = f.Seek(0, io.SeekCurrent); err == nil && n != total {
			err = fmt.Errorf("got %d of %d bytes", n, total)
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("copy to %s: %w", local, err)
	}
	return os.Rename(name, local)
}

// look returns what the sandbox has at remote, nil when that is nothing.
func (c *copier) look(ctx context.Context, remote string) (*filesystempb.EntryInfo, error) {
	req := connect.NewRequest(&filesystempb.StatRequest{Path: remote})
	if c.user != "" {
		req.Header().Set("Authorization", basicUser(c.user))
	}
	res, err := c.client.files(c.id).Stat(ctx, req)
	if connect.CodeOf(err) == connect.CodeNotFound && err != nil && !isHutchError(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return res.Msg.GetEntry(), nil
}

// isDir reports whether e, which may be nil, is a directory or a link to one.
func isDir(e *filesystempb.EntryInfo) bool {
	return e.GetType() == filesystempb.FileType_FILE_TYPE_DIRECTORY
}

// modeOf returns the permissions of the file that e is or, as a link, leads
// to.
func (c *copier) modeOf(ctx context.Context, e *filesystempb.EntryInfo) (fs.FileMode, error) {
	if e.GetSymlinkTarget() != "" {
		target, err := c.look(ctx, e.GetSymlinkTarget())
		if err != nil {
			return 0, err
		}
		e = target
	}
	return cmp.Or(fs.FileMode(e.GetMode())&fs.ModePerm, 0o600), nil
}

// isHutchError tells an error of hutchd about the sandbox from one of the
// guest about a file.
func isHutchError(err error) bool {
	var ce *connect.Error
	return errors.As(err, &ce) && ce.Meta().Get("Hutch-Error") != ""
}

// url is the address of remote; mode is that of a file to be written, 0: none.
func (c *copier) url(endpoint, remote string, mode fs.FileMode) string {
	q := url.Values{"path": {remote}}
	if mode != 0 {
		q.Set("mode", strconv.FormatUint(uint64(mode), 8))
	}
	if c.user != "" {
		q.Set("username", c.user)
	}
	return c.client.guestURL(c.id) + endpoint + "?" + q.Encode()
}

func (c *copier) put(ctx context.Context, endpoint, remote string, mode fs.FileMode, body io.Reader, size int64) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, c.url(endpoint, remote, mode), io.NopCloser(c.counted(body, remote, size)))
	if err != nil {
		return err
	}
	req.ContentLength = size
	req.Header.Set("Content-Type", "application/octet-stream")
	if endpoint == "/files/archive" {
		req.Header.Set("Content-Type", "application/x-tar")
	}
	return c.do(req, func(io.Reader, int64) error { return nil })
}

func (c *copier) get(ctx context.Context, endpoint, remote string, use func(io.Reader, int64) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url(endpoint, remote, 0), nil)
	if err != nil {
		return err
	}
	return c.do(req, use)
}

func (c *copier) do(req *http.Request, use func(io.Reader, int64) error) error {
	res, err := c.client.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		return httpError(res)
	}
	return use(res.Body, res.ContentLength)
}

// counted shows the progress of what is read from r.
func (c *copier) counted(r io.Reader, name string, total int64) io.Reader {
	if !c.bar.terminal {
		return r
	}
	return &countingReader{r: r, update: func(n int64) { c.bar.update(name, n, max(total, 0)) }}
}

type countingReader struct {
	r      io.Reader
	n      int64
	update func(int64)
}

// Read reads and tells how much was read so far.
func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.update(c.n)
	return n, err
}
