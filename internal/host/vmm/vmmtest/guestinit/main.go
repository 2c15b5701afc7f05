// Guestinit is the init of the conformance suite's guest: it loads the modules
// in /modules in the order of their names, finds the port of the link and
// serves testguest on it. It never returns: a test ends it by a command, or by
// ending the VM.
package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest/testguest"
)

const portName = "hutch.link"

func main() {
	fmt.Fprintln(os.Stdout, "guestinit:", run())
}

// run returns only when something is wrong.
func run() error {
	var up unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)
	for dir, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs"} {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, m := range modules {
		if err := load(m); err != nil {
			fmt.Fprintln(os.Stdout, "guestinit: load", m, err)
		}
	}
	port, err := waitPort()
	if err != nil {
		return err
	}
	memory, err := unix.Mmap(-1, 0, testguest.MaxMB<<20+4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("map memory: %w", err)
	}
	g := guest{initAt: time.Duration(up.Nano()), readyAt: uptime(), memory: memory}
	fmt.Fprintln(os.Stdout, "guestinit: ready")
	for {
		f, err := os.OpenFile(port, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		err = testguest.Serve(f, g)
		f.Close()
		if err != io.EOF {
			fmt.Fprintln(os.Stdout, "guestinit: link:", err)
		}
		// The port reads as ended while nobody is connected on the host, and
		// there is no event for the next connection that a plain open waits for.
		time.Sleep(10 * time.Millisecond)
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

func waitPort() (string, error) {
	for range 1000 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			b, _ := os.ReadFile(n)
			dev := "/dev/" + filepath.Base(filepath.Dir(n))
			if _, err := os.Stat(dev); err == nil && strings.TrimSpace(string(b)) == portName {
				return dev, nil
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	return "", fmt.Errorf("no virtio port %q", portName)
}

func uptime() time.Duration {
	var up unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)
	return time.Duration(up.Nano())
}

type guest struct {
	initAt, readyAt time.Duration
	memory          memory
}

// memory is plain memory of this process.
type memory []byte

func (m memory) ReadAt(p []byte, at int64) (int, error)  { return copy(p, m[at:]), nil }
func (m memory) WriteAt(p []byte, at int64) (int, error) { return copy(m[at:], p), nil }

func (g guest) Memory() testguest.Memory { return g.memory }

func (guest) Spam(n int) error {
	line := bytes.Repeat([]byte("spam "), 16)
	line[len(line)-1] = '\n'
	for n > 0 {
		w, err := os.Stdout.Write(line[:min(n, len(line))])
		if err != nil {
			return err
		}
		n -= w
	}
	return nil
}

func (g guest) Query(what string) (string, error) {
	switch what {
	case "cpus":
		return fmt.Sprint(runtime.NumCPU()), nil
	case "memory":
		var si unix.Sysinfo_t
		if err := unix.Sysinfo(&si); err != nil {
			return "", err
		}
		return fmt.Sprint(si.Totalram * uint64(si.Unit) >> 20), nil
	case "boot":
		return fmt.Sprintf("init=%d ready=%d", g.initAt.Milliseconds(), g.readyAt.Milliseconds()), nil
	case "disks":
		return disks()
	case "mac":
		b, err := os.ReadFile("/sys/class/net/eth0/address")
		return strings.TrimSpace(string(b)), err
	}
	return "", fmt.Errorf("unknown query %q", what)
}

// disks answers "serial=first 8 bytes,ro|rw" for every virtio disk. A writable
// disk gets "written!" into its second sector.
func disks() (string, error) {
	paths, err := filepath.Glob("/sys/block/vd*")
	if err != nil {
		return "", err
	}
	var out []string
	for _, p := range paths {
		serial, err := os.ReadFile(p + "/serial")
		if err != nil {
			return "", err
		}
		ro, err := os.ReadFile(p + "/ro")
		if err != nil {
			return "", err
		}
		mode, flags := "rw", os.O_RDWR|os.O_SYNC
		if strings.TrimSpace(string(ro)) == "1" {
			mode, flags = "ro", os.O_RDONLY
		}
		head := make([]byte, 8)
		f, err := os.OpenFile("/dev/"+filepath.Base(p), flags, 0)
		if err != nil {
			return "", err
		}
		_, err = f.ReadAt(head, 0)
		if err == nil && mode == "rw" {
			_, err = f.WriteAt([]byte("written!"), 512)
		}
		f.Close()
		if err != nil {
			return "", err
		}
		out = append(out, fmt.Sprintf("%s=%s,%s", strings.TrimRight(string(serial), "\x00"), head, mode))
	}
	return strings.Join(out, " "), nil
}

func (guest) End(how string) error {
	unix.Sync()
	switch how {
	case "poweroff":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	os.Exit(1) // the end of init is a kernel panic
	return nil
}
