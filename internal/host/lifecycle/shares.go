package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"unicode"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/share"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

const (
	maxShares = 8
	maxPath   = 1024 // bytes
)

// whyBound is why a machine with shares stays where it is.
const whyBound = "the directories of the host that it has open can't be written down with its memory"

// checkShares checks shares and brings them into one order.
func checkShares(shares []sandbox.Share) ([]sandbox.Share, error) {
	const field = "shares"
	if len(shares) > maxShares {
		return nil, fault.BadField(field, "has more than %d", maxShares)
	}
	for _, s := range shares {
		for what, p := range map[string]string{"host_path": s.HostPath, "guest_path": s.GuestPath} {
			if !path.IsAbs(p) || path.Clean(p) != p || len(p) > maxPath || strings.ContainsFunc(p, unicode.IsControl) {
				return nil, fault.BadField(field, "%s %.64q is not a plain absolute path of at most %d bytes, without a slash at its end", what, p, maxPath)
			}
		}
		if isSystem(s.GuestPath) {
			return nil, fault.BadField(field, "guest_path %s belongs to the sandbox's system; choose another, such as /mnt/data", s.GuestPath)
		}
	}
	shares = slices.SortedFunc(slices.Values(shares), func(a, b sandbox.Share) int { return strings.Compare(a.GuestPath, b.GuestPath) })
	for i, s := range shares {
		for _, other := range shares[:i] {
			if below(s.GuestPath, other.GuestPath) {
				return nil, fault.BadField(field, "guest_path %s is within %s, which is another share", s.GuestPath, other.GuestPath)
			}
		}
	}
	return shares, nil
}

// isSystem tells whether a guest would break without what it has at p.
func isSystem(p string) bool {
	for _, whole := range []string{
		"/proc", "/sys", "/dev", "/run", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/boot", "/var/run",
		"/var/lib/docker", "/var/lib/containerd", "/var/lib/rancher", "/var/lib/kubelet",
	} {
		if below(p, whole) {
			return true
		}
	}
	return slices.Contains([]string{"/", "/home", "/root", "/tmp", "/var", "/var/lib", "/var/tmp"}, p)
}

// below tells whether p is dir or in it.
func below(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// allowShares asks the host whether it shares what a spec asks for.
func (m *Manager) allowShares(spec sandbox.Spec) error {
	if len(spec.Shares) == 0 {
		return nil
	}
	if m.p.Shares == nil {
		return fault.New(fault.Unimplemented, "this host shares no directories")
	}
	return m.p.Shares.Check(spec.Shares)
}

// unbound refuses what can't be done to a sandbox with shares.
func (b *box) unbound(what string) error {
	if len(b.pub.Load().rec.Spec.Shares) == 0 {
		return nil
	}
	return denied(b.id, "a sandbox with shares can't be "+what+": "+whyBound)
}

// servedShares are the servers of a machine's shares.
type servedShares struct {
	servers []share.Server // of those that have ended: nil
	lost    chan int       // has room for each
	stop    chan struct{}
	once    sync.Once
	watches sync.WaitGroup
}

func newServedShares(n int) *servedShares {
	return &servedShares{servers: make([]share.Server, n), lost: make(chan int, n), stop: make(chan struct{})}
}

// add takes up the server of the share at i, and has its end told.
func (s *servedShares) add(i int, server share.Server) {
	s.servers[i] = server
	s.watches.Go(func() {
		select {
		case <-server.Done():
			s.lost <- i
		case <-s.stop:
		}
	})
}

// ended tells which ends, by its index. Without shares that is never.
func (s *servedShares) ended() <-chan int {
	if s == nil {
		return nil
	}
	return s.lost
}

// unwatch ends the watching. It is idempotent.
func (s *servedShares) unwatch() {
	s.once.Do(func() { close(s.stop) })
	s.watches.Wait()
}

// letGo leaves the servers to the next hutchd.
func (s *servedShares) letGo(log *slog.Logger) {
	if s == nil {
		return
	}
	s.unwatch()
	for _, server := range s.servers {
		if server == nil {
			continue
		}
		if err := server.Close(); err != nil {
			log.Warn("server of a share could not be let go of", slog.Any("error", err))
		}
	}
}

// serveShares starts the servers of a sandbox's shares and puts the connections
// to them into spec. letGo closes those, also after an error.
func (o *boot) serveShares(ctx context.Context, spec *vmm.Spec) (letGo func(), err error) {
	var conns []*os.File
	letGo = func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}
	if len(o.rec.Spec.Shares) == 0 {
		return letGo, nil
	}
	if o.m.p.Shares == nil {
		return letGo, fault.New(fault.Unimplemented, "this host shares no directories")
	}
	o.shares = newServedShares(len(o.rec.Spec.Shares))
	o.rec.ShareServers = make([]sandbox.Process, len(o.rec.Spec.Shares))
	o.undos.Add("shares", o.endShares)
	for i, s := range o.rec.Spec.Shares {
		if err := o.at(ctx, o.op+" share"); err != nil {
			return letGo, err
		}
		server, conn, err := o.m.p.Shares.Serve(ctx, s, o.sharePlace(i))
		if err != nil {
			return letGo, err
		}
		conns = append(conns, conn)
		spec.Shares[i].Conn = conn
		o.shares.add(i, server)
		o.rec.ShareServers[i] = server.ID()
	}
	return letGo, nil
}

func (b *box) sharePlace(i int) share.Place {
	return share.Place{
		ID: b.id, Index: i, Dir: b.runDir(), Log: b.m.p.Records.VMMLog(b.id) + "." + share.Tag(i),
		UID: b.m.p.UIDBase + b.rec.Slot,
	}
}

// shareTags are a machine's shares, not yet connected.
func (b *box) shareTags() (tags []vmm.Share) {
	for i := range b.rec.Spec.Shares {
		tags = append(tags, vmm.Share{Tag: share.Tag(i)})
	}
	return tags
}

// mountedShares is where a guest is to have its shares.
func (b *box) mountedShares() (mounts []guestconn.Share) {
	for i, s := range b.rec.Spec.Shares {
		mounts = append(mounts, guestconn.Share{Tag: share.Tag(i), Path: s.GuestPath, ReadOnly: s.ReadOnly})
	}
	return mounts
}

// blameShares adds to err which servers have ended, and why.
func (b *box) blameShares(err error) error {
	if b.shares == nil {
		return err
	}
	for i, server := range b.shares.servers {
		if server == nil {
			continue
		}
		select {
		case <-server.Done():
			err = fmt.Errorf("%w; the server of share %s has ended: %s", err, b.rec.Spec.Shares[i].HostPath, printable(server.Why(), 300))
		default:
		}
	}
	return err
}

// adoptShares takes up the servers that an earlier hutchd started. One that is
// gone is told of once.
func (b *box) adoptShares(ctx context.Context) {
	if len(b.rec.ShareServers) == 0 {
		return
	}
	b.shares = newServedShares(len(b.rec.ShareServers))
	for i, p := range b.rec.ShareServers {
		if p == (sandbox.Process{}) {
			continue
		}
		switch server, err := b.takeShare(ctx, i); {
		case err == nil:
			b.shares.add(i, server)
		case fault.Is(err, fault.NotFound):
			b.loseShare(i, "its server ended while hutchd was not running")
		default:
			b.log.Warn("server of a share can't be watched", slog.Int("share", i), slog.Any("error", err))
		}
	}
}

func (b *box) takeShare(ctx context.Context, i int) (share.Server, error) {
	if b.m.p.Shares == nil {
		return nil, fault.New(fault.Unimplemented, "this host shares no directories")
	}
	return b.m.p.Shares.Adopt(ctx, b.rec.ShareServers[i], b.sharePlace(i))
}

// shareEnded is the driver's turn when the server of the share at i has ended.
func (b *box) shareEnded(i int) {
	server := b.shares.servers[i]
	if server == nil || b.rec.State != sandbox.Running && b.rec.State != sandbox.Paused {
		return
	}
	ctx, cancel := b.op()
	defer cancel()
	if _, err := b.vm.Running(ctx); err != nil {
		return // it ends with its machine, which will be noticed
	}
	b.shares.servers[i] = nil
	why := server.Why()
	if err := server.Kill(ctx); err != nil { // what it had is left
		b.log.Warn("server of a share can't be freed", slog.Any("error", err))
		b.shares.servers[i] = server // for the end of the sandbox
	}
	b.loseShare(i, why)
	b.saveSoon()
}

// loseShare tells that a share is of no use any more.
func (b *box) loseShare(i int, why string) {
	b.rec.ShareServers[i] = sandbox.Process{}
	lost := b.rec.Spec.Shares[i]
	b.log.Error("share is lost", slog.String("host_path", lost.HostPath), slog.String("why", why))
	b.retell(sandbox.ByHost, fmt.Sprintf("share %s at %s is lost until the sandbox boots again: %s", lost.HostPath, lost.GuestPath, printable(why, 300)))
}

// endShares ends the servers of a machine that is gone, taking up first those
// that an earlier hutchd started.
func (b *box) endShares(ctx context.Context) error {
	if b.rec.Machine != nil || b.vm != nil {
		return errors.New("end the servers of shares: the VM is still alive")
	}
	if b.shares == nil && len(b.rec.ShareServers) == 0 {
		return nil
	}
	if b.shares == nil {
		b.shares = newServedShares(len(b.rec.ShareServers))
	}
	b.shares.unwatch()
	var errs []error
	for i := range b.rec.ShareServers {
		if err := b.endShare(ctx, i); err != nil {
			errs = append(errs, fmt.Errorf("end the server of share %s: %w", b.rec.Spec.Shares[i].HostPath, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	b.shares, b.rec.ShareServers = nil, nil
	return nil
}

func (b *box) endShare(ctx context.Context, i int) error {
	server := b.shares.servers[i]
	if p := b.rec.ShareServers[i]; server == nil && p.PID != 0 && p.BootID == b.m.bootID {
		var err error
		if server, err = b.takeShare(ctx, i); err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
	}
	if server == nil {
		return nil
	}
	b.shares.servers[i] = server // should it not end now
	if err := server.Kill(ctx); err != nil {
		return err
	}
	b.shares.servers[i] = nil
	return nil
}
