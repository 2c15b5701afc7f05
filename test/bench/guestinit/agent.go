package main

import (
	"fmt"
	"os"
	"os/exec"
)

// agentWord on the kernel's command line, which hands it on, asks for QEMU's
// guest agent.
const agentWord = "qemu-ga"

// runAgent runs QEMU's guest agent, which must be in the image, on its port.
func runAgent() error {
	path, err := findPort("org.qemu.guest_agent.0")
	if err != nil {
		return err
	}
	c := exec.Command("/usr/sbin/qemu-ga", "--method=virtio-serial", "--path="+path, "--statedir=/run")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	return fmt.Errorf("the guest agent ended: %w", c.Run())
}
