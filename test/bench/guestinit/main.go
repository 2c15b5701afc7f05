// Guestinit is the bare guest that hutch is measured against: a PID 1 that
// does no more than a guest must before it can run a program. It loads the
// modules in /modules, mounts the image and the data disk as an overlay, moves
// there, opens the port of the link, and answers one line with one line.
//
// Told so on the kernel's command line it starts QEMU's guest agent instead of
// that loop, which is the guest of libvirt's in the benchmark.
//
// It owns nothing and protects nothing: no cgroups, no users, no restart. It
// never runs outside the benchmark. Tested by the benchmark, which fails when
// an answer is not the expected one.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// portName is the name of the virtio-serial port, the same as of hutch's link.
const portName = "hutch.link"

// chunk is how much is copied at a time, in bytes.
const chunk = 64 << 10

func main() {
	fmt.Fprintln(os.Stdout, "guestinit:", run())
	// The end of PID 1 is a kernel panic, which ends the machine.
}

// run returns only when something is wrong.
func run() error {
	times := []time.Duration{uptime()}
	for _, step := range []func() error{mountSystem, loadModules, mountRoot} {
		if err := step(); err != nil {
			return err
		}
		times = append(times, uptime())
	}
	if slices.Contains(os.Args, agentWord) {
		return runAgent()
	}
	path, err := findPort(portName)
	if err != nil {
		return err
	}
	port, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	times = append(times, uptime())
	return serve(port, times)
}

func uptime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Duration(t.Nano())
}

func mount(source, target, kind, data string, flags uintptr) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

func mountSystem() error {
	for dir, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs"} {
		if err := mount(kind, dir, kind, "", 0); err != nil {
			return err
		}
	}
	return nil
}

// loadModules loads the modules in the order of their names, as a boot of
// hutch does.
func loadModules() error {
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, m := range modules {
		f, err := os.Open(m)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST && err != unix.ENODEV {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	return nil
}

// mountRoot makes the overlay of image and data disk the root.
func mountRoot() error {
	image, err := findDisk("root")
	if err != nil {
		return err
	}
	data, err := findDisk("data")
	if err != nil {
		return err
	}
	if err := mount(image, "/image", "ext4", "noload", unix.MS_RDONLY|unix.MS_NOATIME); err != nil {
		return err
	}
	if err := mount(data, "/data", "ext4", "", unix.MS_NOATIME); err != nil {
		return err
	}
	for _, d := range []string{"/data/upper", "/data/work"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := mount("overlay", "/newroot", "overlay", "lowerdir=/image,upperdir=/data/upper,workdir=/data/work", unix.MS_NOATIME); err != nil {
		return err
	}
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll("/newroot"+d, 0o755); err != nil {
			return err
		}
		if err := mount(d, "/newroot"+d, "", "", unix.MS_MOVE); err != nil {
			return err
		}
	}
	if err := os.Chdir("/newroot"); err != nil {
		return err
	}
	if err := mount(".", "/", "", "", unix.MS_MOVE); err != nil {
		return err
	}
	return unix.Chroot(".")
}

func findDisk(serial string) (string, error) {
	files, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimRight(string(b), "\x00\n") == serial {
			return "/dev/" + filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", fmt.Errorf("no disk %q", serial)
}

// findPort waits for the port: its name comes by a message from the host.
func findPort(port string) (string, error) {
	for range 5000 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return "", err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err == nil && strings.TrimSpace(string(b)) == port {
				return "/dev/" + filepath.Base(filepath.Dir(n)), nil
			}
		}
		time.Sleep(time.Millisecond) // nothing to wait for without a netlink socket
	}
	return "", fmt.Errorf("no virtio port %q", port)
}

// serve answers requests until something breaks. While no host is connected
// the port reads as ended; the host of the benchmark is there before the guest
// and stays, so that is short.
func serve(port *os.File, times []time.Duration) error {
	in := bufio.NewReader(port)
	for {
		line, err := in.ReadString('\n')
		if err == io.EOF && line == "" {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		if err := answer(port, strings.Fields(line), times); err != nil {
			return err
		}
	}
}

func answer(port *os.File, request []string, times []time.Duration) error {
	if len(request) == 0 {
		return nil
	}
	switch args := request[1:]; request[0] {
	case "ping":
		_, err := fmt.Fprintln(port, "pong")
		return err
	case "times": // microseconds since the kernel's start, after each step
		var b strings.Builder
		for _, t := range times {
			b.WriteString(strconv.FormatInt(t.Microseconds(), 10) + " ")
		}
		_, err := fmt.Fprintln(port, b.String())
		return err
	case "exec":
		c := exec.Command(args[0], args[1:]...)
		err := c.Run()
		if c.ProcessState == nil {
			_, err = fmt.Fprintln(port, "error", err)
			return err
		}
		_, err = fmt.Fprintln(port, "exit", c.ProcessState.ExitCode())
		return err
	case "copy": // a program's output onto the port, then its end
		return copyOut(port, args)
	}
	_, err := fmt.Fprintln(port, "unknown")
	return err
}

// copyOut runs a program and copies what it prints to the port.
func copyOut(port *os.File, args []string) error {
	c := exec.Command(args[0], args[1:]...)
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	if _, err := io.CopyBuffer(plain{port}, plainReader{out}, make([]byte, chunk)); err != nil {
		return err
	}
	return c.Wait()
}

// plain and plainReader hide what would let io.Copy choose another way than
// reading and writing.
type plain struct{ io.Writer }

type plainReader struct{ io.Reader }
