package qemu

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/proc"
)

// Accel is how the guest's processors are run.
type Accel string

// The accelerators. Auto is only a wish.
const (
	Auto Accel = "auto"
	KVM  Accel = "kvm"
	TCG  Accel = "tcg" // emulation
)

// proofTime is how long a usable KVM may take to run a guest of 40 instructions.
const proofTime = 5 * time.Second

// nobody is the user that the proof runs as.
const nobody = 65534

const kvmDevice = "/dev/kvm"

// choose returns the accelerator for a wish, and why, in words. The wish for a
// KVM that does not work is a fault.Precondition.
func choose(wish Accel, kvmProblem func() error) (Accel, string, error) {
	switch wish {
	case TCG:
		return TCG, "emulation was asked for", nil
	case Auto, "":
		if err := kvmProblem(); err != nil {
			return TCG, fmt.Sprintf("emulation, because KVM cannot be used: %v", err), nil
		}
		return KVM, "a guest ran on " + kvmDevice, nil
	case KVM:
		if err := kvmProblem(); err != nil {
			return "", "", fault.New(fault.Precondition, "KVM was asked for, but cannot be used: %w (use the accelerator auto or tcg)", err)
		}
		return KVM, "it was asked for, and a guest ran on " + kvmDevice, nil
	}
	return "", "", fault.BadField("accel", "%q is none of auto, kvm, tcg", wish)
}

// kvmProblem says why KVM does not work on this host, or nil. A device node
// that opens proves nothing: on some nested hosts it even makes a VM, and
// fails at the first thing a stock kernel or QEMU needs.
func kvmProblem(ctx context.Context, j *jail.Jail, binary string) error {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	f.Close()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	if !hasVirtualization(string(info)) {
		return errors.New("the processor shows neither vmx nor svm (enable virtualization in the firmware, or nested virtualization on the outer host)")
	}
	return prove(ctx, j, binary, KVM)
}

// hasVirtualization looks for the flag of Intel's or AMD's virtualization in
// the text of /proc/cpuinfo.
func hasVirtualization(cpuinfo string) bool {
	for line := range strings.Lines(cpuinfo) {
		if name, flags, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "flags" {
			f := strings.Fields(flags)
			return slices.Contains(f, "vmx") || slices.Contains(f, "svm")
		}
	}
	return false
}

// The proof's guest: a firmware image of 64 KiB whose last 256 bytes are code.
// From the reset vector it enters protected mode and writes proofByte to port
// 0x501, where QEMU's isa-debug-exit turns it into an exit status. Made from:
//
//	     .code16
//	start: cli
//	     lgdtl %cs:(gdtr - start + 0xff00)
//	     mov %cr0,%eax ; or $1,%eax ; mov %eax,%cr0
//	     ljmpl $8,$(0xffffff00 + prot - start)
//	     .code32
//	prot: mov $0x10,%ax ; mov %ax,%ds
//	     mov $0x501,%dx ; mov $0x21,%al ; out %al,%dx
//	1:   hlt ; jmp 1b
//	     .align 8                      # at 0x30
//	gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
//	gdtr: .word 23 ; .long 0xffffff00 + gdt - start
//	     .org 0xf0
//	     .code16 ; jmp start
const proofCode = "fa2e660f011648ff0f20c06683c8010f22c066ea1affffff080066b810008ed866ba0105b021eef4ebfd8db4000066900000000000000000ffff0000009bcf00ffff00000093cf00170030ffffff"

const proofByte = 0x21

// proofExit is isa-debug-exit's status for proofByte.
const proofExit = proofByte<<1 | 1

func proofFirmware() ([]byte, error) {
	code, err := hex.DecodeString(proofCode)
	if err != nil {
		return nil, err
	}
	image := make([]byte, 64<<10)
	tail := image[len(image)-256:]
	copy(tail, code)
	copy(tail[0xf0:], []byte{0xe9, 0x0d, 0xff}) // the reset vector
	return image, nil
}

// prove runs the proof's guest on an accelerator, confined as a machine is.
func prove(ctx context.Context, j *jail.Jail, binary string, a Accel) error {
	ctx, cancel := context.WithTimeout(ctx, proofTime)
	defer cancel()
	image, err := proofFirmware()
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("proof", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make the proof's guest: %w", err)
	}
	f := os.NewFile(uintptr(fd), "proof")
	defer f.Close()
	if _, err := f.Write(image); err != nil {
		return fmt.Errorf("make the proof's guest: %w", err)
	}
	if err := f.Chmod(0o444); err != nil {
		return fmt.Errorf("make the proof's guest: %w", err)
	}
	args := append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"}, machineArgs(a)...)
	args = append(args, "-m", "16M", "-object", "memory-backend-ram,id=ram,size=16M")
	args = append(args, "-device", "isa-debug-exit,iobase=0x501", "-bios", fdPath(proc.FirstFD))
	cell := jail.Cell{
		Name: fmt.Sprintf("proof-%d", os.Getpid()), UID: nobody,
		Program: proc.Params{Path: binary, Args: args, Files: []*os.File{f}},
	}
	if a == KVM {
		cell.Devices = []string{kvmDevice}
	}
	return runProof(ctx, j, cell)
}

func runProof(ctx context.Context, j *jail.Jail, cell jail.Cell) (err error) {
	p, _, err := j.Start(ctx, cell)
	if err != nil {
		return err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), proofTime)
		defer cancel()
		err = errors.Join(err, p.Kill(clean), p.Close(), j.Remove(clean, cell.Name))
	}()
	select {
	case <-p.Done():
	case <-ctx.Done():
		return errors.New("a tiny guest did not run to its end in time")
	}
	if e := p.Exit(); e.Code != proofExit || e.Signal != 0 {
		return fmt.Errorf("a tiny guest did not run: QEMU %v: %s", e, p.LastWords())
	}
	return nil
}
