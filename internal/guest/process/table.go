package process

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/undo"
)

// Params is what a Table needs. Zero numbers mean the defaults told with them.
type Params struct {
	Log      *slog.Logger
	Accounts *account.Files
	Defaults account.Defaults
	// CgroupRoot is the directory on a cgroup2 filesystem below which every
	// tree gets its own, /sys/fs/cgroup/hutch in a guest. Empty: none, see the
	// package's words on trees.
	CgroupRoot string
	// Gate says when programs may start. Nil: at any time.
	Gate Gate
	// Retain is the output kept of each stream, in bytes: 256 KiB.
	Retain int
	// RetainAll bounds the retained output of all programs together: 32 MiB.
	// Beyond it the ended programs lose theirs, and running ones keep less.
	RetainAll int64
	// RetainEnded and MaxEnded bound how long, and how many, ended programs
	// can be found: 10 minutes, 64.
	RetainEnded time.Duration
	MaxEnded    int
	// MaxLive bounds the running programs: 1024.
	MaxLive int
	// Stall is how long a subscription may hold a program up without taking
	// anything: 5 minutes. A pager that somebody left open is no reason to cut
	// it off earlier; connections that are dead end by themselves.
	Stall time.Duration
}

// Gate holds starts up.
type Gate interface {
	// Enter waits until a program may start. A nil error is followed by Leave
	// when it has, or has failed to.
	Enter(ctx context.Context) error
	Leave()
}

// openGate is a Gate that holds nothing up.
type openGate struct{}

func (openGate) Enter(context.Context) error { return nil }
func (openGate) Leave()                      {}

func (p *Params) setDefaults() error {
	if p.Log == nil || p.Accounts == nil || p.Defaults == nil {
		return errors.New("process table: log, accounts and defaults are needed")
	}
	if p.Gate == nil {
		p.Gate = openGate{}
	}
	p.Retain = cmp.Or(p.Retain, 256<<10)
	p.RetainAll = cmp.Or(p.RetainAll, 32<<20)
	p.RetainEnded = cmp.Or(p.RetainEnded, 10*time.Minute)
	p.MaxEnded = cmp.Or(p.MaxEnded, 64)
	p.MaxLive = cmp.Or(p.MaxLive, 1024)
	p.Stall = cmp.Or(p.Stall, 5*time.Minute)
	return nil
}

// Table holds the programs that run or lately ended. All methods are safe for
// concurrent use.
type Table struct {
	params   Params
	log      *slog.Logger
	groups   *groups // nil: no cgroups here
	budget   *budget
	bufs     *buffers
	resetOOM bool

	stop    chan struct{}
	wake    chan struct{} // ended changed
	workers sync.WaitGroup
	// launches counts the starts under way; none begins once closing is set.
	launches sync.WaitGroup

	mu      sync.Mutex
	closing bool
	tags    map[string]struct{}   // of programs being started or running
	places  int                   // programs being started or running
	live    map[*Process]struct{} // End not told yet
	open    map[*Process]struct{} // streams still open, live or not
	ended   []*Process            // oldest first
}

// New returns an empty table. Close it. An out-of-memory score of the agent's
// own must be set before: programs get an ordinary one only if it differs.
func New(params Params) (*Table, error) {
	if err := params.setDefaults(); err != nil {
		return nil, err
	}
	t := &Table{
		params: params, log: params.Log,
		budget: &budget{max: params.RetainAll}, bufs: &buffers{},
		stop: make(chan struct{}), wake: make(chan struct{}, 1),
		tags: map[string]struct{}{}, live: map[*Process]struct{}{}, open: map[*Process]struct{}{},
	}
	if params.CgroupRoot != "" {
		g, err := openGroups(params.CgroupRoot, params.Log)
		if err != nil {
			return nil, err
		}
		t.groups = g
	}
	// What the agent was born with must not pass on to programs; what it opens
	// itself never does. Kernels before 5.11 can't.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	adj, err := os.ReadFile("/proc/self/oom_score_adj")
	t.resetOOM = err == nil && strings.TrimSpace(string(adj)) != "0"
	t.workers.Go(t.expire)
	return t, nil
}

// Start runs the program of spec and returns it with a subscription that sees
// its output from the first byte. Close the subscription; the program goes on.
// ctx bounds the start only.
func (t *Table) Start(ctx context.Context, spec Spec) (*Process, *Subscription, error) {
	if err := t.params.Gate.Enter(ctx); err != nil {
		return nil, nil, err
	}
	defer t.params.Gate.Leave()
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	if err := t.reserve(spec.Tag); err != nil {
		return nil, nil, err
	}
	defer t.launches.Done()
	p, sub, err := t.launch(ctx, spec)
	if err != nil {
		t.unreserve(spec.Tag)
		return nil, nil, err
	}
	return p, sub, nil
}

func (t *Table) reserve(tag string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closing {
		return fault.New(fault.Unavailable, "the guest is shutting down: no new programs")
	}
	if t.places >= t.params.MaxLive {
		return fault.New(fault.Exhausted, "%d programs are running, the limit of the guest agent: wait for one to end", t.places)
	}
	if tag != "" {
		if _, dup := t.tags[tag]; dup {
			return fault.New(fault.Exists, "a running program has the tag %q already", tag)
		}
		t.tags[tag] = struct{}{}
	}
	t.places++
	t.launches.Add(1)
	return nil
}

func (t *Table) unreserve(tag string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.places--
	delete(t.tags, tag)
}

func (t *Table) launch(ctx context.Context, spec Spec) (_ *Process, _ *Subscription, err error) {
	plan, err := t.plan(spec)
	if err != nil {
		return nil, nil, err
	}
	var undos undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, undos.Run(ctx))
		}
	}()
	var w *wires
	if spec.Size != nil {
		w, err = openTerminal(*spec.Size, plan.user)
	} else {
		w, err = openPipes(spec.NoStdin)
	}
	if err != nil {
		return nil, nil, t.explainFiles(err)
	}
	defer w.closeTheirs()
	undos.Add("close pipes", func(context.Context) error { w.closeOurs(); return nil })
	var gr *group
	if t.groups != nil {
		if gr, err = t.groups.create(); err != nil {
			return nil, nil, t.explainFiles(err)
		}
		undos.Add("remove cgroup", func(context.Context) error { gr.release(); return nil })
	}
	p := &Process{table: t, limit: spec.Timeout, group: gr, wires: w, exited: make(chan struct{})}
	p.attach(spec.Size != nil)
	sub := p.hub.subscribe()
	if p.child, err = fork(plan, w, spec.Size != nil, gr); err != nil {
		sub.Close()
		return nil, nil, err
	}
	if t.resetOOM {
		equalizeOOM(p.child.pid)
	}
	undos.Release()
	p.info = Info{
		Pid: p.child.pid, Tag: spec.Tag, Cmd: spec.Cmd, Args: slices.Clone(spec.Args), Env: maps.Clone(spec.Env),
		Cwd: plan.cwd, User: plan.user.Label(), Started: time.Now(),
	}
	t.enter(p)
	return p, sub, nil
}

// attach gives p its hub, its pumps and its input.
func (p *Process) attach(terminal bool) {
	t := p.table
	streams := []Stream{Stdout, Stderr}
	if terminal {
		streams = []Stream{Terminal}
	}
	p.hub = newHub(streams, t.params.Retain, t.params.Stall, t.budget)
	for _, s := range streams {
		p.pumps = append(p.pumps, &pump{
			stream: s, file: p.wires.outs[s], hub: p.hub, bufs: t.bufs, stop: t.stop, drained: make(chan struct{}),
		})
	}
	if p.wires.in != nil {
		p.in = newInput(p.wires.in, !terminal)
	}
}

// explainFiles tells a lack of descriptors or memory from a defect.
func (t *Table) explainFiles(err error) error {
	for _, full := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOSPC, unix.EAGAIN} {
		if errors.Is(err, full) {
			return fault.As(fault.Exhausted, err)
		}
	}
	return err
}

// enter makes a started program known.
func (t *Table) enter(p *Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live[p] = struct{}{}
	t.open[p] = struct{}{}
	t.workers.Go(p.run)
}

// Find returns the program that sel names: a running one before an ended one,
// and of several ended ones the last.
func (t *Table) Find(sel Selector) (*Process, error) {
	match := func(p *Process) bool {
		if sel.Tag != "" {
			return p.info.Tag == sel.Tag
		}
		return p.info.Pid == sel.Pid
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var found *Process
	for p := range t.live {
		// Two can match for a moment: a pid is free again before the output of
		// its last owner is all delivered.
		if match(p) && (found == nil || p.info.Started.After(found.info.Started)) {
			found = p
		}
	}
	if found != nil {
		return found, nil
	}
	for _, p := range slices.Backward(t.ended) {
		if match(p) {
			return p, nil
		}
	}
	if sel.Tag != "" {
		return nil, fault.New(fault.NotFound, "no program with the tag %q", sel.Tag)
	}
	return nil, fault.New(fault.NotFound, "no program with pid %d", sel.Pid)
}

// List returns all programs of the table, in the order of their start.
func (t *Table) List() []Info {
	t.mu.Lock()
	all := slices.AppendSeq(slices.Clone(t.ended), maps.Keys(t.live))
	t.mu.Unlock()
	infos := make([]Info, 0, len(all))
	for _, p := range all {
		infos = append(infos, p.Info())
	}
	slices.SortStableFunc(infos, func(a, b Info) int { return a.Started.Compare(b.Started) })
	return infos
}

// retire moves a program that has told its End to the ended ones.
func (t *Table) retire(p *Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.ended = time.Now()
	delete(t.live, p)
	delete(t.tags, p.info.Tag)
	t.places--
	t.ended = append(t.ended, p)
	for len(t.ended) > t.params.MaxEnded {
		t.dropOldest()
	}
	// The bytes go before the exit codes do.
	for _, old := range t.ended {
		if t.budget.used.Load() <= t.budget.max {
			break
		}
		old.hub.release()
	}
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// dropOldest is called with the lock held.
func (t *Table) dropOldest() {
	t.ended[0].hub.abandon()
	t.ended[0] = nil
	t.ended = t.ended[1:]
}

// forget is told that the last stream of p is closed.
func (t *Table) forget(p *Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open, p)
}

// expire drops ended programs when their time is over.
func (t *Table) expire() {
	timer := time.NewTimer(t.params.RetainEnded)
	defer timer.Stop()
	for {
		t.mu.Lock()
		now := time.Now()
		for len(t.ended) > 0 && now.Sub(t.ended[0].ended) >= t.params.RetainEnded {
			t.dropOldest()
		}
		var next <-chan time.Time
		if len(t.ended) > 0 {
			timer.Reset(t.params.RetainEnded - now.Sub(t.ended[0].ended))
			next = timer.C
		}
		t.mu.Unlock()
		select {
		case <-next:
		case <-t.wake:
		case <-t.stop:
			return
		}
	}
}

// Shutdown refuses new programs, asks all trees to end with SIGTERM, waits for
// them for up to grace, and then kills the rest. It returns when no process is
// left, or when ctx ends, with an error that says how many are.
func (t *Table) Shutdown(ctx context.Context, grace time.Duration) error {
	t.mu.Lock()
	t.closing = true
	t.mu.Unlock()
	t.launches.Wait()
	if grace > 0 {
		t.askAll()
		short, cancel := context.WithTimeout(ctx, grace)
		left := t.waitAll(short)
		cancel()
		if left == 0 {
			return nil
		}
	}
	t.signalAll(unix.SIGKILL)
	if left := t.waitAll(ctx); left > 0 {
		return fmt.Errorf("shut down: %d programs are still there: %w", left, context.Cause(ctx))
	}
	return nil
}

// askAll ends what ends by itself: interactive shells ignore SIGTERM but not a
// lost terminal, and a stopped program must go on to hear anything.
func (t *Table) askAll() {
	for _, p := range t.running() {
		if p.wires.control != nil {
			_ = p.Signal(unix.SIGHUP, false)
		}
	}
	t.signalAll(unix.SIGTERM)
	t.signalAll(unix.SIGCONT)
}

func (t *Table) signalAll(sig unix.Signal) {
	if t.groups == nil {
		for _, p := range t.running() {
			if err := p.Signal(sig, true); err != nil && !fault.Is(err, fault.NotFound) {
				t.log.Warn("program not signalled", "pid", p.info.Pid, "signal", int(sig), "err", err)
			}
		}
		return
	}
	// Also the trees whose first process is gone, and those of an earlier
	// agent.
	for _, gr := range t.groups.all() {
		send := func() error { return gr.signal(sig) }
		if sig == unix.SIGKILL {
			send = gr.kill
		}
		if err := send(); err != nil {
			t.log.Warn("tree not signalled", "cgroup", gr.dir, "signal", int(sig), "err", err)
		}
	}
}

func (t *Table) running() []*Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.live))
}

// waitAll returns how many programs or trees are left when ctx ends.
func (t *Table) waitAll(ctx context.Context) int {
	left := 0
	for _, p := range t.running() {
		select {
		case <-p.exited:
		case <-ctx.Done():
			left++
		}
	}
	if t.groups == nil {
		return left
	}
	for _, gr := range t.groups.all() {
		if gr.wait(ctx) != nil {
			left++
		}
	}
	return left
}

// Close kills everything that runs and ends the table's own work. The table
// can't be used afterwards. What could not be killed is told in the error.
func (t *Table) Close(ctx context.Context) error {
	err := t.Shutdown(ctx, 0)
	t.mu.Lock()
	stopped := false
	select {
	case <-t.stop:
		stopped = true
	default:
		close(t.stop)
	}
	for p := range t.open {
		p.wires.closeOurs()
	}
	t.mu.Unlock()
	if stopped {
		return err
	}
	if err == nil {
		t.workers.Wait()
	}
	if t.groups != nil {
		t.groups.close()
	}
	return err
}
