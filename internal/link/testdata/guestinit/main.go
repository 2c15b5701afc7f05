// Command guestinit is PID 1 of the virtual machine in which the link is
// tested: it loads the modules, and runs itself again as the agent, which it
// starts anew whenever that ends.
package main

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/link"
)

func main() {
	if os.Getpid() != 1 {
		serve()
		return
	}
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if err := unix.Mount(m[1], m[0], m[1], 0, ""); err != nil {
			fmt.Println("mount", m, err)
		}
	}
	for _, m := range strings.Fields("virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_console") {
		f, err := os.Open("/modules/" + m + ".ko")
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
		}
		if err != nil {
			fmt.Println("module", m, err)
		}
	}
	for {
		cmd := exec.Command("/proc/self/exe")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		fmt.Println("agent ended:", cmd.Run())
	}
}

func serve() {
	log := slog.New(slog.NewTextHandler(os.Stdout, nil))
	l, err := link.Listen(link.ListenParams{Open: link.OpenPort, Hello: link.Hello{AgentVersion: "test"}, Log: log})
	if err != nil {
		fmt.Println(err)
		time.Sleep(time.Second)
		return
	}
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Println(err)
			return
		}
		go handle(c.(*link.Stream))
	}
}

// handle does what the first byte of the stream says.
func handle(c *link.Stream) {
	defer c.Close()
	r := bufio.NewReader(c)
	what, err := r.ReadByte()
	if err != nil {
		return
	}
	switch what {
	case 'E':
		_, _ = io.Copy(struct{ io.Writer }{c}, r)
		_ = c.CloseWrite()
	case 'X': // die with streams open
		os.Exit(3)
	case 'C': // what the agent and the kernel have spent, in clock ticks
		_ = cpu(c)
	}
}

func cpu(c net.Conn) error {
	self, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return err
	}
	f := strings.Fields(string(self))
	_, err = fmt.Fprintln(c, f[13], f[14])
	return err
}
