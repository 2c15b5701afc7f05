package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

func (a *App) forkCommand() *cobra.Command {
	var count int32
	var timing bool
	c := &cobra.Command{
		Use:   "fork [flags] SANDBOX",
		Short: "Make running copies of a sandbox, programs and all",
		Long: "The sandbox stands still for a moment and goes on; each copy goes on from the same\n" +
			"moment, with an id, an address, randomness and a disk of its own. The ids of the\n" +
			"copies are printed.",
		Example: "  hutch fork sb-1\n  hutch fork --count 10 sb-1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			res, err := cl.snapshots.ForkSandbox(cmd.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: id, Count: count}))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res.Msg, false)
			}
			for _, f := range res.Msg.GetForks() {
				fmt.Fprintln(a.Out, f.GetSandboxId())
				if timing {
					a.printStages(f.GetStages(), sum(f.GetStages()))
				}
			}
			if timing {
				a.printStopped(id, res.Msg.GetStoppedMicros())
			}
			return nil
		},
	}
	c.Flags().Int32VarP(&count, "count", "n", 1, "how many copies")
	c.Flags().BoolVar(&timing, "timing", false, "print where the time went to standard error")
	return c
}

func sum(stages []*hostagentv1.StageTime) time.Duration {
	var all time.Duration
	for _, s := range stages {
		all += time.Duration(s.GetMicros()) * time.Microsecond
	}
	return all
}

// printStopped tells how long a sandbox stood still.
func (a *App) printStopped(id string, micros int64) {
	fmt.Fprintf(a.Err, "%s stood still for %.1f ms\n", id, float64(micros)/1000)
}

func (a *App) snapshotCommand() *cobra.Command {
	c := &cobra.Command{Use: "snapshot", Short: "Write sandboxes down, and keep what was written", Args: cobra.NoArgs}
	c.AddCommand(a.snapshotCreate(), a.snapshotLs(), a.snapshotVerify(), a.snapshotRm())
	return c
}

func (a *App) snapshotCreate() *cobra.Command {
	return &cobra.Command{
		Use:   "create SANDBOX NAME",
		Short: "Write a sandbox down; NAME is a template from then on",
		Long: "The sandbox stands still for a moment and goes on. Sandboxes created from NAME go\n" +
			"on where it was, programs and all; with --cold they boot from its disk instead.",
		Example: "  hutch snapshot create sb-1 ready\n  hutch create ready",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			res, err := cl.snapshots.CreateSnapshot(cmd.Context(), connect.NewRequest(&hostagentv1.CreateSnapshotRequest{SandboxId: id, Name: args[1]}))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res.Msg, false)
			}
			a.printStopped(id, res.Msg.GetStoppedMicros())
			_, err = fmt.Fprintln(a.Out, res.Msg.GetSnapshot().GetSnapshotId())
			return err
		},
	}
}

func (a *App) snapshotLs() *cobra.Command {
	c := listCommand(a, "List snapshots", "print ids only",
		func(ctx context.Context, cl *client) (*hostagentv1.ListSnapshotsResponse, error) {
			res, err := cl.snapshots.ListSnapshots(ctx, connect.NewRequest(&hostagentv1.ListSnapshotsRequest{}))
			return answerOf(res, err)
		},
		func(m *hostagentv1.ListSnapshotsResponse) (ids []string) {
			for _, s := range m.GetSnapshots() {
				ids = append(ids, s.GetSnapshotId())
			}
			return ids
		},
		func(m *hostagentv1.ListSnapshotsResponse) error { return a.snapshotTable(m.GetSnapshots(), time.Now()) })
	c.Long = "Lists snapshots that have a name, templates that are kept warm, and the memories of\n" +
		"hibernated sandboxes. USERS are the sandboxes that were made from each."
	return c
}

func (a *App) snapshotTable(list []*hostagentv1.Snapshot, now time.Time) error {
	var rows [][]string
	for _, s := range list {
		from := s.GetTemplate()
		if s.GetSourceSandboxId() != "" {
			from = s.GetSourceSandboxId() + " of " + from
		}
		state := "on disk"
		switch {
		case s.GetProblem() != "":
			state = s.GetProblem()
		case s.GetInMemory():
			state = "in memory"
		}
		rows = append(rows, []string{
			s.GetSnapshotId(), orDash(s.GetName()), s.GetKind(), orDash(s.GetReady()), from, strconv.Itoa(int(s.GetVcpus())),
			size(int64(s.GetMemoryMb()) << 20), size(s.GetDiskBytes()), strconv.Itoa(len(s.GetSandboxIds())),
			ago(time.Unix(s.GetCreatedAtUnix(), 0), now), state,
		})
	}
	return a.table([]string{"SNAPSHOT", "NAME", "KIND", "READY", "FROM", "VCPUS", "MEMORY", "SIZE", "USERS", "AGE", "STATE"}, rows)
}

func (a *App) snapshotVerify() *cobra.Command {
	return a.eachSnapshot("verify SNAPSHOT...", "Read every byte of snapshots and compare it with their digests", func(cmd *cobra.Command, cl *client, name string) error {
		_, err := cl.snapshots.VerifySnapshot(cmd.Context(), connect.NewRequest(&hostagentv1.VerifySnapshotRequest{Snapshot: name}))
		return err
	})
}

func (a *App) snapshotRm() *cobra.Command {
	var force bool
	c := a.eachSnapshot("rm SNAPSHOT...", "Remove snapshots", func(cmd *cobra.Command, cl *client, name string) error {
		_, err := cl.snapshots.DeleteSnapshot(cmd.Context(), connect.NewRequest(&hostagentv1.DeleteSnapshotRequest{Snapshot: name, Force: force}))
		return err
	})
	c.Flags().BoolVarP(&force, "force", "f", false, "also while there are sandboxes that were made from them")
	return c
}

// eachSnapshot is a command that does one thing to each snapshot named, by id
// or name, prints those it did it to, and fails at the end if any failed.
func (a *App) eachSnapshot(use, short string, do func(*cobra.Command, *client, string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				if err := do(cmd, cl, name); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.Out, name)
			}
			return errors.Join(errs...)
		},
	}
}
