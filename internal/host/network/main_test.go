package network

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

// inOwnMounts is set in the copy of the test program that runs in a mount
// namespace of its own.
const inOwnMounts = "HUTCH_NETWORK_TEST_MOUNTS"

// TestMain runs the tests in a mount namespace of their own, so that the
// mounts of a killed test die with it. The tests make their own network
// namespaces: none touches the machine's network.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(inOwnMounts) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // the child dies with this thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inOwnMounts+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "run tests in their own mount namespace:", err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}
