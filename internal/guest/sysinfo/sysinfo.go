package sysinfo

import (
	"fmt"
	"net"
	"runtime"

	"golang.org/x/sys/unix"
)

// maxAddresses bounds the addresses told: a guest can make as many as it likes.
const maxAddresses = 256

// Info describes a guest.
type Info struct {
	Kernel    string // release
	OSName    string // NAME of os-release, "Linux" without one
	OSVersion string // VERSION_ID of os-release
	Arch      string // machine, as uname tells it
	Hostname  string

	TotalMemory     uint64 // bytes
	AvailableMemory uint64 // bytes
	CPUs            uint32 // online
	Load            [3]float64
	Uptime          uint64 // seconds

	// Addresses of all interfaces but loopback, without prefix length.
	Addresses []string
}

// Reader reads the facts of the machine. The zero value reads the real one.
type Reader struct {
	// Root is the directory that stands for "/". Empty: "/".
	Root string
}

// Read returns what is known now. It fails only where the kernel itself does.
func (r Reader) Read() (Info, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Info{}, fmt.Errorf("uname: %w", err)
	}
	addresses, err := addresses()
	if err != nil {
		return Info{}, fmt.Errorf("list addresses: %w", err)
	}
	t := r.tree()
	info := Info{
		Kernel:    tidy(unix.ByteSliceToString(u.Release[:])),
		Arch:      tidy(unix.ByteSliceToString(u.Machine[:])),
		Hostname:  tidy(unix.ByteSliceToString(u.Nodename[:])),
		CPUs:      cpus(t.read("/sys/devices/system/cpu/online")),
		Load:      load(t.read("/proc/loadavg")),
		Uptime:    uptime(t.read("/proc/uptime")),
		Addresses: addresses,
	}
	info.TotalMemory, info.AvailableMemory = memory(t.read("/proc/meminfo"))
	info.OSName, info.OSVersion = osRelease(t.readFirst("/etc/os-release", "/usr/lib/os-release"))
	return info, nil
}

// Memory returns the bytes that can still be used and those there are.
func (r Reader) Memory() (available, total uint64) {
	total, available = memory(r.tree().read("/proc/meminfo"))
	return available, total
}

// cpus counts the CPUs of a kernel list such as "0-3,6", or those that this
// program may run on when there is no list.
func cpus(list string) uint32 {
	if n := countList(list); n > 0 {
		return n
	}
	return uint32(runtime.NumCPU())
}

// addresses returns all addresses but those of loopback interfaces, in the
// order of the interfaces.
func addresses() ([]string, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, link := range links {
		if link.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := link.Addrs()
		if err != nil {
			continue // the interface went meanwhile
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && len(found) < maxAddresses {
				found = append(found, n.IP.String())
			}
		}
	}
	return found, nil
}
