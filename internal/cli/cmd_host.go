package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/version"
)

func (a *App) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check what hutch needs of its host, and say what to do", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			res, err := cl.machine.Diagnose(cmd.Context(), connect.NewRequest(&hostagentv1.DiagnoseRequest{}))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res.Msg, false)
			}
			return a.printChecks(res.Msg.GetChecks())
		},
	}
}

func (a *App) printChecks(checks []*hostagentv1.Check) error {
	problems := 0
	for _, c := range checks {
		code := green
		switch c.GetResult() {
		case "warning":
			code = yellow
		case "problem":
			code = red
			problems++
		}
		fmt.Fprintf(a.Out, "%s  %s: %s\n", a.colour(a.Out, code, fmt.Sprintf("%-7s", c.GetResult())), c.GetName(), c.GetDetail())
		if c.GetAdvice() != "" {
			fmt.Fprintf(a.Out, "         %s\n", c.GetAdvice())
		}
	}
	if problems > 0 {
		return exitStatus{1, fmt.Sprintf("%d problems found", problems)}
	}
	return nil
}

func (a *App) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the versions of hutch and of hutchd", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			res, err := cl.machine.GetHostInfo(cmd.Context(), connect.NewRequest(&hostagentv1.GetHostInfoRequest{}))
			if a.json && err == nil {
				return a.printJSON(res.Msg, false)
			}
			fmt.Fprintf(a.Out, "hutch   %s\n", version.Version)
			if err != nil {
				return err
			}
			i := res.Msg
			fmt.Fprintf(a.Out, "hutchd  %s (%s %s, accelerator %s: %s)\nkernel  %s\nhost    %s, %d CPUs, %s memory (%s free), %d sandboxes\n",
				i.GetVersion(), i.GetVmm(), i.GetVmmVersion(), i.GetAccel(), i.GetAccelReason(), i.GetKernelId(),
				i.GetKernel(), i.GetCpus(), size(i.GetMemoryBytes()), size(i.GetMemoryAvailableBytes()), i.GetSandboxes())
			return nil
		},
	}
}

// setupCommand runs "hutchd setup": preparing a host is local work that no API
// offers.
func (a *App) setupCommand() *cobra.Command {
	return &cobra.Command{
		Use: "setup [hutchd setup flags]", Short: "Prepare this host: packages, kernel pack, minimal template",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := siblingDaemon()
			if err != nil {
				return err
			}
			c := exec.CommandContext(cmd.Context(), path, append([]string{"setup"}, args...)...)
			c.Stdin, c.Stdout, c.Stderr = a.In, a.Out, a.Err
			err = c.Run()
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				return exitStatus{code: exit.ExitCode()}
			}
			return err
		},
	}
}

// siblingDaemon finds hutchd beside this program, or in PATH.
func siblingDaemon() (string, error) {
	if self, err := os.Executable(); err == nil {
		path := filepath.Join(filepath.Dir(self), "hutchd")
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath("hutchd")
	if err != nil {
		return "", errors.New("no hutchd beside hutch or in PATH: setup runs on the host itself")
	}
	return path, nil
}
