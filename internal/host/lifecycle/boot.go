package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/network"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// The serials by which a guest finds its disks.
const (
	rootDisk    = "root"
	modulesDisk = "modules"
	dataDisk    = "data"
)

// boot is one attempt to bring a sandbox up.
type boot struct {
	*box
	op    string // "create" or "resume", for names of steps
	why   string // told with the states on the way
	image string // path
	// release lets go of the image of a create: from its record on, the
	// sandbox itself says that it uses it.
	release func()
	after   func() // called when it worked; nil: nothing
	kernel  kernel.Pack
	// still is what a copy is started from, and from the same in RAM, once it is
	// there. A fork has only from; a boot neither.
	still *still
	from  *origin
	// onlyCopy says that a copy that does not work out must not become a boot.
	onlyCopy bool
	// data makes the data disk of a boot. Nil: a blank one.
	data   func(ctx context.Context, path string) error
	bootID string // of a copy
	// unuse lets go of from.
	unuse  func()
	spent  bool // the memory of a hibernation is used
	turn   *turn
	synced chan error // result of the data disk's sync; nil: none
	undos  undo.Stack
	stages []sandbox.Stage
	tried  time.Time // when the last list of steps began
}

type step struct {
	name string
	do   func(context.Context) error
}

// firstSteps, copySteps or bootSteps, and lastSteps make a new sandbox: what any
// needs, then a copy of a machine or one that boots.
func (o *boot) firstSteps() []step {
	return []step{
		{"record", o.writeFirst},
		{"queue", o.waitForTurn},
		{"slot", o.takeSlot},
	}
}

func (o *boot) copySteps() []step {
	return []step{
		{"memory", o.findMemory},
		{"disk", o.makeDisk},
		{"restore", o.launch},
		{"hello", o.waitForHello},
		{"configure", o.configure},
	}
}

func (o *boot) bootSteps() []step {
	return []step{
		{"disk", o.makeDisk},
		{"launch", o.launch},
		{"hello", o.waitForHello},
		{"configure", o.configure},
	}
}

func (o *boot) lastSteps() []step { return []step{{"running", o.becomeRunning}} }

// create does the steps of a new sandbox. A copy that does not work out becomes
// a boot, where that makes no difference: the caller asked for a sandbox, and
// not for a way to it.
func (o *boot) create() (failed, left error) {
	defer o.turn.end()
	defer func() {
		if o.unuse != nil {
			o.unuse()
		}
	}()
	if failed, left = o.run(o.firstSteps()); failed != nil {
		return failed, left
	}
	if o.still != nil || o.from != nil {
		before := o.undos.Len()
		failed, left = o.try(o.copySteps(), before)
		switch {
		case failed == nil:
			return o.run(o.lastSteps())
		case o.onlyCopy || left != nil || o.life.Err() != nil || o.m.closing.Err() != nil:
			return failed, errors.Join(left, o.undos.Run(o.life))
		}
		o.log.Warn("warm start failed, booting instead", slog.Any("error", failed))
		o.still, o.from, o.bootID = nil, nil, ""
		o.stages = append(o.stages, sandbox.Stage{Name: "warm start failed", Took: time.Since(o.tried)})
	}
	if failed, left = o.run(o.bootSteps()); failed != nil {
		return failed, left
	}
	return o.run(o.lastSteps())
}

// rebootSteps bring up a sandbox from the disk it has.
func (o *boot) rebootSteps() []step {
	return []step{
		{"record", o.writePending},
		{"queue", o.waitForTurn},
		{"slot", o.takeSlot},
		{"launch", o.launch},
		{"hello", o.waitForHello},
		{"configure", o.configure},
		{"running", o.becomeRunning},
	}
}

// run does the steps. When one fails it takes back what was acquired, all but
// the record, and returns the failure and what could not be taken back.
func (o *boot) run(steps []step) (failed, left error) { return o.try(steps, 0) }

// try is run, which takes back only what came after the first keep undos.
func (o *boot) try(steps []step, keep int) (failed, left error) {
	o.tried = time.Now()
	ctx, cancel := context.WithCancelCause(o.life)
	defer cancel(nil)
	stop := context.AfterFunc(o.m.closing, func() { cancel(context.Cause(o.m.closing)) })
	defer stop()
	for _, s := range steps {
		began := time.Now()
		err := context.Cause(ctx)
		if err == nil {
			err = o.at(ctx, o.op+" "+s.name)
		}
		if err == nil {
			err = s.do(ctx)
		}
		if err != nil {
			// A step that was cancelled may not know by what.
			if asked := (cancelCause{}); errors.As(context.Cause(ctx), &asked) {
				err = asked
			}
			o.log.Info("start failed", slog.String("step", s.name), slog.Any("error", err))
			return fmt.Errorf("%s sandbox %s: %w", o.op, o.id, err), o.undos.RunTo(ctx, keep)
		}
		o.stages = append(o.stages, sandbox.Stage{Name: s.name, Took: time.Since(began)})
	}
	return nil, nil
}

// writeFirst writes the record before anything else is there. No undo here:
// the record goes last, when all else was taken back.
func (o *boot) writeFirst(context.Context) error {
	if err := o.m.p.Records.Create(o.rec); err != nil {
		return err
	}
	o.release()
	o.savedAt, o.savedAct = time.Now(), o.rec.ActiveAt
	o.show("")
	return nil
}

// writePending says in the record that the sandbox boots again.
func (o *boot) writePending(context.Context) error {
	return o.commit(change{to: sandbox.Pending, cause: sandbox.ByUser, reason: o.why, must: true})
}

func (o *boot) waitForTurn(ctx context.Context) error { return o.turn.wait(ctx) }

// makeDisk makes the data disk, and has it synced meanwhile.
func (o *boot) makeDisk(ctx context.Context) error {
	path, data := o.m.p.Records.DataDisk(o.id), o.data
	if o.from != nil {
		data = o.from.data
	}
	if data == nil {
		data = o.blankDisk
	}
	if err := data(ctx, path); err != nil {
		return err
	}
	o.undos.Add("disk", func(context.Context) error { return o.m.p.Disks.Remove(path) })
	o.syncDisk(path)
	return nil
}

func (o *boot) blankDisk(ctx context.Context, path string) error {
	return o.m.p.Disks.Create(ctx, path, o.rec.Spec.DiskMB)
}

// syncDisk has the data disk synced meanwhile.
func (o *boot) syncDisk(path string) {
	o.synced = make(chan error, 1)
	o.m.wg.Go(func() { o.synced <- o.m.p.Disks.Sync(path) })
	o.undos.Add("disk sync", func(context.Context) error {
		if o.synced != nil {
			<-o.synced // its result is of no use any more
		}
		o.synced = nil
		return nil
	})
}

// findMemory has what the copy is made of in RAM.
func (o *boot) findMemory(ctx context.Context) error {
	o.bootID = newUUID()
	if o.from != nil {
		return nil
	}
	if err := o.still.snap.Fits.Check(o.m.fits(o.kernel.ID, o.rec.Spec.VCPUs, o.rec.Spec.MemoryMB)); err != nil {
		return err
	}
	from, err := o.m.stock.load(ctx, o.still)
	if err != nil {
		return err
	}
	unuse, ok := from.use()
	if !ok {
		return fault.New(fault.Unavailable, "snapshot %s is just being removed", o.still.snap.ID)
	}
	o.from, o.unuse = from, unuse
	return nil
}

func (o *boot) takeSlot(ctx context.Context) error {
	slot, err := o.m.p.Slots.Acquire(ctx, o.rec.Spec.Network)
	if err != nil {
		return fmt.Errorf("take network slot: %w", err)
	}
	o.slot, o.rec.Slot, o.rec.HostIP = slot, slot.Index, slot.HostIP.String()
	o.undos.Add("network slot", o.freeSlot)
	return nil
}

// launch starts the VM and writes down which process it is.
func (o *boot) launch(ctx context.Context) error {
	dir := o.runDir()
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	if err := clearRunDir(dir); err != nil { // of a life that ended badly
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make run directory: %w", err)
	}
	o.undos.Add("run directory", o.dropSockets)
	tap, err := o.m.p.Slots.OpenTap(ctx, o.slot)
	if err != nil {
		return fmt.Errorf("open tap: %w", err)
	}
	defer tap.Close()
	o.rec.KernelID = o.kernel.ID
	spec := o.vmSpec(o.image, o.kernel, o.slot.Netns)
	spec.NIC = &vmm.NIC{Tap: tap, MAC: network.GuestMAC}
	letGo, err := o.serveShares(ctx, &spec)
	defer letGo()
	if err != nil {
		return err
	}
	vm, err := o.start(ctx, spec)
	if err != nil {
		return o.blameShares(fmt.Errorf("launch VM: %w", err))
	}
	machine := vm.Machine()
	o.vm, o.rec.Machine = vm, &machine
	o.undos.Add("VM", o.killVM)
	err = o.save()
	o.publish()
	if err != nil || o.from == nil {
		return err
	}
	if err := o.spend(); err != nil {
		return err
	}
	return vm.Resume(ctx)
}

// start starts the VM: a boot, or a copy that stands until it is resumed.
func (o *boot) start(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	if o.from == nil {
		return o.m.p.Driver.Launch(ctx, spec)
	}
	driver, ok := o.m.p.Driver.(vmm.Snapshotter)
	if !ok {
		return nil, fault.New(fault.Unimplemented, "%s can't start a VM from what was written down", o.m.p.Driver.Caps().Name)
	}
	return driver.Restore(ctx, spec, o.from.saved())
}

// waitForHello waits for the guest agent. When it does not come, the error
// tells how the VMM ended, or the console's last words.
func (o *boot) waitForHello(ctx context.Context) error {
	o.guest = o.m.p.Connect(o.vm, o.log)
	o.undos.Add("guest connection", o.dropGuest)
	ctx, cancel := context.WithTimeoutCause(ctx, o.m.p.ReadyTimeout, errSlow)
	defer cancel()
	ctx, stop := whileAlive(ctx, o.vm)
	defer stop()
	hello, err := o.guest.Ready(ctx)
	if err != nil {
		return o.explain(ctx, "wait for guest agent", err)
	}
	o.rec.AgentVersion = printable(hello.AgentVersion, 128)
	return nil
}

func (o *boot) configure(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, o.m.p.ReadyTimeout, errSlow)
	defer cancel()
	ctx, stop := whileAlive(ctx, o.vm)
	defer stop()
	config := o.guestConfig()
	config.BootID = o.bootID
	if o.from == nil {
		config.Shares = o.mountedShares()
	}
	facts, err := o.guest.Configure(ctx, config)
	if err != nil {
		return o.explain(ctx, "configure guest", err)
	}
	if len(facts.ShareErrors) > 0 {
		return o.blameShares(fault.New(fault.Unavailable, "mount shares in the guest: %s", printable(strings.Join(facts.ShareErrors, "; "), 600)))
	}
	for _, w := range facts.Warnings[:min(len(facts.Warnings), 20)] {
		o.log.Warn("guest configured with a warning", slog.String("warning", printable(w, 300)))
	}
	o.rec.AgentVersion = printable(orElse(facts.AgentVersion, o.rec.AgentVersion), 128)
	o.rec.KernelVersion = printable(facts.KernelVersion, 256)
	o.rec.BootID = printable(facts.BootID, 64)
	return nil
}

// becomeRunning makes the sandbox one that survives a restart of hutchd.
func (o *boot) becomeRunning(ctx context.Context) error {
	if o.synced != nil {
		select {
		case err := <-o.synced:
			o.synced = nil
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	o.active()
	o.rec.Boots++
	o.rec.Stages = o.stages
	if o.still != nil {
		o.rec.Snapshot = o.still.snap.ID
	}
	err := o.commit(change{to: sandbox.Running, cause: sandbox.ByUser, reason: o.why, must: true})
	if err != nil {
		o.rec.Boots--
		return err
	}
	o.undos.Release()
	o.grant.booted()
	o.startClock(syncFirst)
	return nil
}

var errSlow = errors.New("it did not answer in time")

// explain says why a guest could not be talked to.
func (o *boot) explain(ctx context.Context, act string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	select {
	case <-o.vm.Done():
		return fault.New(fault.Unavailable, "%s: %w", act, vmDied{o.vm.Exit()})
	default:
	}
	if errors.Is(err, errDiskFull) {
		return fmt.Errorf("%s: %w", act, err)
	}
	words := orElse(lastWords(o.m.p.Records.ConsoleLog(o.id)), "(nothing)")
	return fault.New(fault.Unavailable, "%s: %w; its console's last words: %s", act, err, words)
}

// whileAlive returns a context that ends when the VMM does, or stops the guest
// for want of room on the host. stop must be called.
func whileAlive(ctx context.Context, vm vmm.VM) (alive context.Context, stop func()) {
	alive, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() { // ends with stop, which waits for it
		defer close(watched)
		select {
		case <-vm.Done():
			cancel(vmDied{vm.Exit()})
		case <-vm.DiskFull():
			cancel(errDiskFull)
		case <-alive.Done():
		}
	}()
	return alive, func() { cancel(nil); <-watched }
}

// exitReason tells how a VMM ended, for people.
func exitReason(e vmm.Exit) string {
	if e.Detail == "" {
		return string(e.Reason)
	}
	return string(e.Reason) + ": " + printable(e.Detail, 1024)
}

func (b *box) runDir() string {
	return filepath.Join(b.m.sandboxRunDir(), string(b.id))
}

// vmSpec describes the sandbox's machine, without its network interface.
func (b *box) vmSpec(image string, k kernel.Pack, netns string) vmm.Spec {
	r := b.m.p.Records
	return vmm.Spec{
		ID: b.id, VCPUs: b.rec.Spec.VCPUs, MemoryMB: b.rec.Spec.MemoryMB,
		Kernel: k.Kernel, Initrd: k.Initrd, Cmdline: b.m.p.Cmdline,
		Disks: []vmm.Disk{
			{Serial: rootDisk, Path: image, ReadOnly: true},
			{Serial: modulesDisk, Path: k.Modules, ReadOnly: true},
			{Serial: dataDisk, Path: r.DataDisk(b.id), Discard: true},
		},
		Shares: b.shareTags(), Netns: netns, Dir: b.runDir(), ConsoleLog: r.ConsoleLog(b.id), VMMLog: r.VMMLog(b.id),
		UID: b.m.p.UIDBase + b.rec.Slot,
	}
}

func (b *box) guestConfig() guestconn.Config {
	c := guestDefaults(b.rec)
	c.ID, c.MachineID, c.TestFeatures = string(b.id), b.rec.MachineID, b.rec.Spec.TestFeatures
	c.Address, c.Gateway, c.DNS, c.MTU = network.GuestAddr, network.GatewayIP, b.m.p.DNS, network.MTU
	return c
}

// guestDefaults are the defaults of commands in a sandbox: its template's, and
// over them its own.
func guestDefaults(rec sandbox.Record) guestconn.Config {
	env := make(map[string]string, len(rec.Env)+len(rec.Spec.DefaultEnv))
	maps.Copy(env, rec.Env)
	maps.Copy(env, rec.Spec.DefaultEnv)
	return guestconn.Config{Env: env, DefaultUser: orElse(rec.Spec.DefaultUser, rec.User), DefaultCwd: rec.Cwd}
}
