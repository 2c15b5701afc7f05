package share

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// ownerBase is the host's id for a guest's user or group 1, 2 being the next and
// so on. Nobody gives ids from there on to anybody.
const ownerBase = 1_900_000_000

// What one daemon may take. Each file that the guest's kernel remembers is an
// open one of the daemon.
const (
	memoryMB  = 256 // page cache of what it writes included
	openFiles = 16 << 10
	maxTasks  = 64
)

// Params makes a Virtiofs.
type Params struct {
	Jail *jail.Jail
	// Binary is the path of virtiofsd, below /usr; empty: where distributions
	// have it.
	Binary string
	// Allow lists the directories that may be shared, with all below them; none
	// when empty. Deny lists those that may not, which neither a shared one may
	// hold.
	Allow, Deny []string
	LogMax      int64 // of each daemon's log, in bytes; 0: proc.DefaultLogMax
	Logger      *slog.Logger
}

// Virtiofs is the Host of directories by virtiofsd.
type Virtiofs struct {
	p       Params
	dialect dialect
	missing error // why there is no daemon; nil: there is one
}

var _ Host = (*Virtiofs)(nil)

// New looks for the daemon. A host without one shares nothing, and says so when
// it is asked to.
func New(ctx context.Context, p Params) *Virtiofs {
	if p.Logger == nil {
		p.Logger = slog.New(slog.DiscardHandler)
	}
	v := &Virtiofs{p: p}
	if v.p.Binary == "" {
		v.p.Binary = find()
	}
	v.dialect, v.missing = ask(ctx, v.p.Binary)
	return v
}

// Missing tells why nothing can be served on this host, nil when it can.
func (v *Virtiofs) Missing() error { return v.missing }

// find returns where the daemon is, Debian's first.
func find() string {
	for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/bin/virtiofsd"} {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path
		}
	}
	return ""
}

// dialect is how a daemon wants its arguments.
type dialect string

const (
	inC    dialect = "QEMU's"      // of QEMU before 8.0
	inRust dialect = "the project" // since
)

// ask asks a daemon which it is.
func ask(ctx context.Context, binary string) (dialect, error) {
	if binary == "" {
		return "", fault.New(fault.Precondition, "this host has no virtiofsd, which shares need (on Debian 12: apt install qemu-system-common)")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Env = []string{}
	out, err := cmd.Output()
	switch {
	case err != nil:
		return "", fault.New(fault.Precondition, "ask %s for its version: %w", binary, err)
	case strings.HasPrefix(string(out), "virtiofsd version "):
		return inC, nil
	case strings.HasPrefix(string(out), "virtiofsd "):
		return inRust, nil
	}
	return "", fault.New(fault.Precondition, "ask %s for its version: it said %.80q", binary, out)
}

// sharedAt is where a daemon sees the directory.
const sharedAt = "share"

// args are a daemon's arguments; fd is its listening socket. The jail is what
// confines it: it only goes into the directory and takes seccomp and its
// capabilities by itself. Of those it keeps what writing for other users takes,
// less the making of devices. Extended attributes stay off: they would carry
// capabilities of files.
func (d dialect) args(fd int) []string {
	if d == inRust {
		return []string{
			fmt.Sprintf("--fd=%d", fd), "--shared-dir=/" + sharedAt, "--sandbox=chroot", "--seccomp=kill",
			"--rlimit-nofile=0", "--cache=auto", "--modcaps=-mknod", "--inode-file-handles=never", "--log-level=warn",
		}
	}
	return []string{
		"-f", fmt.Sprintf("--fd=%d", fd), "--rlimit-nofile=0",
		"-o", "source=/" + sharedAt + ",sandbox=chroot,cache=auto,no_xattr,no_flock,no_posix_lock,modcaps=-mknod,log_level=warn",
	}
}

// Check opens every directory, as Serve will.
func (v *Virtiofs) Check(shares []sandbox.Share) error {
	for _, s := range shares {
		d, err := v.open(s)
		if err != nil {
			return err
		}
		_ = d.Close() // a place
	}
	if len(shares) > 0 {
		return v.missing
	}
	return nil
}

// Serve starts a daemon; see Host.
func (v *Virtiofs) Serve(ctx context.Context, s sandbox.Share, at Place) (Server, *os.File, error) {
	if v.missing != nil {
		return nil, nil, v.missing
	}
	server, conn, err := v.serve(ctx, s, at)
	if err != nil {
		return nil, nil, fmt.Errorf("serve share %s: %w", s.HostPath, err)
	}
	return server, conn, nil
}

func (v *Virtiofs) serve(ctx context.Context, s sandbox.Share, at Place) (_ *server, _ *os.File, err error) {
	dir, err := v.open(s)
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	tree, err := jail.Detach(dir.File, s.ReadOnly)
	if err != nil {
		return nil, nil, err
	}
	defer tree.Close()
	listener, conn, err := connect(ctx, at)
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	p, report, err := v.p.Jail.Start(ctx, v.cell(dir, tree, listener, at))
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	for _, m := range report.Missing {
		v.p.Logger.Debug("confinement of a share is not complete", "sandbox_id", at.ID, "missing", m)
	}
	return &server{Process: p, jail: v.p.Jail, cell: at.cell()}, conn, nil
}

// cell is the jail of a daemon that acts as the owner of dir, where that is
// somebody else than root, and else as the user of the VMM, who owns nothing.
func (v *Virtiofs) cell(dir *directory, tree, listener *os.File, at Place) jail.Cell {
	owner := func(id int) int {
		if id == 0 {
			return at.UID
		}
		return id
	}
	return jail.Cell{
		Name: at.cell(), UID: owner(dir.uid),
		Owners: &jail.Owners{GID: owner(dir.gid), Base: ownerBase},
		// It looks at the number of files that the host can have open before it
		// leaves its own limit as it is.
		View:     &jail.View{Tree: tree, At: sharedAt, Settings: map[string]string{"fs/file-max": "1048576"}},
		MemoryMB: memoryMB, PIDs: maxTasks, OpenFiles: openFiles,
		Program: proc.Params{
			Path: v.p.Binary, Args: v.dialect.args(proc.FirstFD), Files: []*os.File{listener},
			Log: at.Log, LogMax: v.p.LogMax, Logger: v.p.Logger,
		},
	}
}

// Adopt takes up a daemon; see Host.
func (v *Virtiofs) Adopt(ctx context.Context, id sandbox.Process, at Place) (Server, error) {
	p, err := proc.Adopt(ctx, id, proc.AdoptParams{Log: at.Log, LogMax: v.p.LogMax, Logger: v.p.Logger})
	if err != nil {
		if fault.Is(err, fault.NotFound) {
			ctx, cancel := undo.Detach(ctx)
			defer cancel()
			err = errors.Join(err, v.p.Jail.Remove(ctx, at.cell()))
		}
		return nil, fmt.Errorf("adopt share %d of %s: %w", at.Index, at.ID, err)
	}
	return &server{Process: p, jail: v.p.Jail, cell: at.cell()}, nil
}
