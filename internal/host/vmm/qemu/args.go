package qemu

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/hutch-run/hutch/internal/link"
)

// argParams is everything that decides the command line. The numbers are
// descriptors in the child.
type argParams struct {
	Name     string
	Accel    Accel
	VCPUs    int
	MemoryMB int
	Cmdline  string
	KernelFD int // 0: a restored machine, which does not boot
	InitrdFD int // 0: none

	MemoryFD int
	// Private: the memory is a template's, and the machine writes to a copy.
	Private bool
	// Listening sockets.
	ControlFD, ConsoleFD, LinkFD int
	JournalFD                    int

	Disks  []argDisk
	NIC    *argNIC
	Shares []argShare
}

type argShare struct {
	FD  int // connected
	Tag string
}

type argDisk struct {
	FD       int
	Serial   string
	ReadOnly bool
	Discard  bool
}

type argNIC struct {
	FD  int
	MAC string
}

// What the driver itself needs of the guest's kernel, see the kernel's
// admin-guide/kernel-parameters: a console, a panic that ends the machine, and
// no self-tests of its ciphers at every boot, which are a fifth of a boot.
// When emulating, a single processor keeps its lock prefixes: they cost
// nothing there, and patching them out is a tenth of a boot.
const (
	guestCmdline = "console=ttyS0 panic=-1 cryptomgr.notests"
	tcgCmdline   = "noreplace-smp"
)

func kernelCmdline(a Accel, given string) string {
	own := guestCmdline
	if a == TCG {
		own += " " + tcgCmdline
	}
	return strings.TrimSpace(own + " " + given)
}

// buildArgs returns QEMU's arguments. It is a pure function of p.
func buildArgs(p argParams) []string {
	args := []string{
		"-name", "guest=" + quote(p.Name),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-msg", "timestamp=off,guest-name=off",
		"-monitor", "none", "-parallel", "none",
		"-rtc", "base=utc",
	}
	args = append(args, machineArgs(p.Accel)...)
	args = append(args, "-smp", strconv.Itoa(p.VCPUs))
	args = append(args, memoryArgs(p)...)
	if p.KernelFD != 0 {
		args = append(args, bootArgs(p)...)
	} else {
		args = append(args, "-incoming", "defer")
	}
	args = append(args, channelArgs(p)...)
	for i, d := range p.Disks {
		args = append(args, diskArgs(i, d)...)
	}
	if p.NIC != nil {
		args = append(args, nicArgs(*p.NIC)...)
	}
	for _, s := range p.Shares {
		args = append(args, shareArgs(s)...)
	}
	return args
}

// machineArgs leaves out of q35 what no guest of ours needs: every device is
// time at boot and a surface for the guest. A saved machine holds just its
// devices, so one that loads it must not wait for more.
func machineArgs(a Accel) []string {
	args := []string{
		"-machine", machineType + ",smm=off,hpet=off,sata=off,smbus=off,i8042=off,vmport=off,usb=off,dump-guest-core=off,suppress-vmdesc=on,memory-backend=ram",
		"-global", "migration.send-configuration=off",
		"-global", "ICH9-LPC.disable_s3=1", // a guest that wakes up goes through the firmware
	}
	if a == KVM {
		return append(args, "-accel", "kvm", "-cpu", cpuArg(a))
	}
	return append(args, "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", tcgBufferMB), "-cpu", cpuArg(a))
}

// cpuModel is the processor of a guest, and what is taken off it. Told that
// byte-wise string instructions are fast, a kernel clears and copies pages with
// them; emulated, they are the slowest way there is.
func cpuModel(a Accel) (name string, off []string) {
	if a == KVM {
		return "host", nil
	}
	return "max", []string{"erms", "fsrm"}
}

func cpuArg(a Accel) string {
	name, off := cpuModel(a)
	for _, feature := range off {
		name += ",-" + feature
	}
	return name
}

// memoryArgs is the one place that says where guest memory comes from.
func memoryArgs(p argParams) []string {
	share := "on"
	if p.Private {
		share = "off"
	}
	size := strconv.Itoa(p.MemoryMB) + "M"
	return []string{
		"-m", size,
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%s,mem-path=%s,share=%s", size, fdPath(p.MemoryFD), share),
	}
}

func bootArgs(p argParams) []string {
	args := []string{"-kernel", fdPath(p.KernelFD), "-append", kernelCmdline(p.Accel, p.Cmdline)}
	if p.InitrdFD != 0 {
		args = append(args, "-initrd", fdPath(p.InitrdFD))
	}
	return args
}

// journalSet is the number of the set of descriptors with the journal; disks
// have theirs from 1 on.
const journalSet = 0

// linkChardev names the link's end in QEMU.
const linkChardev = "link"

// channelArgs are the machine protocol, the console, the link and the source
// of randomness.
func channelArgs(p argParams) []string {
	socket := func(id string, fd int) []string {
		return []string{"-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", id, fd)}
	}
	args := socket("control", p.ControlFD)
	args[1] += fmt.Sprintf(",logfile=/dev/fdset/%d,logappend=on", journalSet)
	args = append(args, "-add-fd", fmt.Sprintf("fd=%d,set=%d", p.JournalFD, journalSet), "-mon", "chardev=control,mode=control")
	args = append(args, socket("console", p.ConsoleFD)...)
	args = append(args, "-serial", "chardev:console")
	args = append(args, socket(linkChardev, p.LinkFD)...)
	return append(args,
		"-device", "virtio-serial-pci,id=serial,max_ports=2,"+virtioPCI,
		"-device", "virtserialport,bus=serial.0,nr=1,chardev="+linkChardev+",name="+quote(link.PortName),
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng,"+virtioPCI,
	)
}

// virtioPCI is common to all virtio devices: no legacy interface, no boot ROM.
const virtioPCI = "disable-legacy=on,romfile="

func diskArgs(i int, d argDisk) []string {
	set, node := i+1, fmt.Sprintf("disk%d", i)
	mode, discard, trim := "read-only=off", "discard=ignore", "off"
	if d.ReadOnly {
		mode = "read-only=on"
	}
	if d.Discard {
		discard, trim = "discard=unmap", "on"
	}
	return []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%d", d.FD, set),
		"-blockdev", fmt.Sprintf("driver=file,node-name=%s-file,filename=/dev/fdset/%d,%s,auto-read-only=off,%s,locking=on,aio=threads,cache.direct=off", node, set, mode, discard),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=%s,file=%s-file,%s,auto-read-only=off,%s", node, node, mode, discard),
		"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s,discard=%s,werror=enospc,rerror=report,%s", node, quote(d.Serial), trim, virtioPCI),
	}
}

// nicArgs has a restored guest not announce itself: nobody on a slot's wire has
// to learn where it is now. (migration.announce-rounds=0 does that too, and has
// QEMU 7.2 crash when the guest then resets its card, as in a power-off.)
func nicArgs(n argNIC) []string {
	return []string{
		"-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", n.FD),
		"-device", "virtio-net-pci,netdev=net,mac=" + quote(n.MAC) + ",guest_announce=off," + virtioPCI,
	}
}

// shareArgs need memory that is shared, which a boot's is.
func shareArgs(s argShare) []string {
	return []string{
		"-chardev", fmt.Sprintf("socket,id=%s,fd=%d", quote(s.Tag), s.FD),
		"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=%s,tag=%s,romfile=", quote(s.Tag), quote(s.Tag)),
	}
}

// fdPath is how QEMU opens a descriptor again where it takes only a path. The
// file's own mode must let QEMU's user read it; that of its directories does
// not matter.
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// quote keeps a comma in a value from starting another option. What is checked
// before holds none; this is the second guard.
func quote(value string) string { return strings.ReplaceAll(value, ",", ",,") }
