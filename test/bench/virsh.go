package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// virsh is one virsh that is told command after command.
type virsh struct {
	cmd *exec.Cmd
	to  io.WriteCloser
	in  *bufio.Reader
}

// virshPrompt ends what virsh says to a command.
const virshPrompt = "virsh # "

// startVirsh starts one; the caller ends it.
func startVirsh(mounts *ownMounts) (*virsh, error) {
	v := &virsh{cmd: exec.Command("virsh", "-q", "-c", "qemu:///system")}
	var err error
	if v.to, err = v.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	v.cmd.Stderr = v.cmd.Stdout
	v.in = bufio.NewReader(out)
	if err := mounts.do(v.cmd.Start); err != nil {
		return nil, err
	}
	if _, err := v.answer(); err != nil {
		return nil, errors.Join(err, v.end())
	}
	return v, nil
}

// do gives a command and returns what it says.
func (v *virsh) do(command string) (string, error) {
	if _, err := io.WriteString(v.to, command+"\n"); err != nil {
		return "", fmt.Errorf("virsh %s: %w", command, err)
	}
	said, err := v.answer()
	if err != nil {
		return "", fmt.Errorf("virsh %s: %w", command, err)
	}
	_, said, _ = strings.Cut(said, "\n") // it repeats the command
	if _, wrong, ok := strings.Cut(said, "error: "); ok {
		return "", fmt.Errorf("virsh %s: %s", command, strings.TrimSpace(wrong))
	}
	return strings.TrimSpace(said), nil
}

func (v *virsh) answer() (string, error) {
	var said strings.Builder
	for {
		c, err := v.in.ReadByte()
		if err != nil {
			return "", fmt.Errorf("it ended, saying %q: %w", said.String(), err)
		}
		said.WriteByte(c)
		if c == ' ' && strings.HasSuffix(said.String(), virshPrompt) {
			return strings.TrimSuffix(said.String(), virshPrompt), nil
		}
	}
}

func (v *virsh) end() error {
	err := v.to.Close()
	_, _ = io.Copy(io.Discard, v.in)
	return errors.Join(err, v.cmd.Wait())
}

// agentPoll is how often is asked whether the guest agent is there, and agentTime
// how long.
const (
	agentPoll = 5 * time.Millisecond
	agentTime = 2 * time.Minute
)

// execTrue runs /bin/true by the guest agent and waits for its end, which has to
// be asked for. The agent may not be there yet.
func (v *virsh) execTrue(ctx context.Context, domain string) error {
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	var started struct {
		Return struct{ Pid int }
	}
	for {
		err := v.agent(domain, `{"execute":"guest-exec","arguments":{"path":"/bin/true"}}`, &started)
		if err == nil {
			break
		}
		if !strings.Contains(err.Error(), "not connected") {
			return err
		}
		if stop := delay.For(ctx, agentPoll); stop != nil {
			return errors.Join(stop, err)
		}
	}
	for ctx.Err() == nil {
		var status struct {
			Return struct {
				Exited   bool
				Exitcode int
			}
		}
		err := v.agent(domain, fmt.Sprintf(`{"execute":"guest-exec-status","arguments":{"pid":%d}}`, started.Return.Pid), &status)
		if err != nil || status.Return.Exited {
			return err
		}
	}
	return context.Cause(ctx)
}

func (v *virsh) agent(domain, request string, answer any) error {
	said, err := v.do("qemu-agent-command " + domain + " '" + request + "'")
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(said), answer)
}
