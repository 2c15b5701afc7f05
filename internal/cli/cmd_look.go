package cli

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

func (a *App) lsCommand() *cobra.Command {
	c := listCommand(a, "List sandboxes", "print ids only",
		func(ctx context.Context, cl *client) (*hostagentv1.ListSandboxesResponse, error) {
			res, err := cl.host.ListSandboxes(ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
			return answerOf(res, err)
		},
		func(m *hostagentv1.ListSandboxesResponse) (ids []string) {
			for _, s := range m.GetSandboxes() {
				ids = append(ids, s.GetSandboxId())
			}
			return ids
		},
		func(m *hostagentv1.ListSandboxesResponse) error { return a.listTable(m.GetSandboxes(), time.Now()) })
	c.Aliases = append(c.Aliases, "ps")
	return c
}

func (a *App) listTable(list []*hostagentv1.SandboxInfo, now time.Time) error {
	var rows [][]string
	for _, s := range list {
		state := s.GetStatus()
		if s.GetReason() != "" {
			state += " (" + s.GetReason() + ")"
		}
		idle := "-"
		if s.GetTimeoutSec() > 0 {
			idle = (time.Duration(s.GetTimeoutSec()) * time.Second).String()
		}
		rows = append(rows, []string{
			s.GetSandboxId(), s.GetTemplate(), strconv.Itoa(int(s.GetVcpus())), size(int64(s.GetMemoryMb()) << 20), s.GetHostIp(),
			ago(time.Unix(s.GetCreatedAtUnix(), 0), now), ago(time.Unix(s.GetLastActiveAtUnix(), 0), now), idle, state,
		})
	}
	return a.table([]string{"SANDBOX", "TEMPLATE", "VCPUS", "MEMORY", "ADDRESS", "AGE", "ACTIVE", "IDLE LIMIT", "STATE"}, rows)
}

func (a *App) inspectCommand() *cobra.Command {
	return &cobra.Command{
		Use: "inspect SANDBOX", Short: "Print the whole record of a sandbox as JSON", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			r, err := cl.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.printJSON(r, false)
		},
	}
}

func (a *App) logsCommand() *cobra.Command {
	var follow, vmm bool
	c := &cobra.Command{
		Use: "logs [flags] SANDBOX", Short: "Print the console of a sandbox", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			req := &hostagentv1.ReadLogsRequest{SandboxId: id, Follow: follow, Source: hostagentv1.ReadLogsRequest_SOURCE_CONSOLE}
			if vmm {
				req.Source = hostagentv1.ReadLogsRequest_SOURCE_VMM
			}
			stream, err := cl.sandboxes.ReadLogs(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			defer stream.Close()
			for stream.Receive() {
				if _, err := a.Out.Write(stream.Msg().GetData()); err != nil {
					return err
				}
			}
			return stream.Err()
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "keep printing as it grows")
	c.Flags().BoolVar(&vmm, "vmm", false, "print what the VMM itself said")
	return c
}

func (a *App) eventsCommand() *cobra.Command {
	var after int64
	var once bool
	var id string
	c := &cobra.Command{
		Use: "events", Short: "Follow what happens to sandboxes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			stream, err := cl.sandboxes.WatchEvents(cmd.Context(), connect.NewRequest(&hostagentv1.WatchEventsRequest{After: after, SandboxId: id, NoFollow: once}))
			if err != nil {
				return err
			}
			defer stream.Close()
			for stream.Receive() {
				if err := a.printEvent(stream.Msg()); err != nil {
					return err
				}
			}
			return stream.Err()
		},
	}
	c.Flags().Int64Var(&after, "after", 0, "print events after this sequence number; -1: only new ones")
	c.Flags().BoolVar(&once, "no-follow", false, "end when the events of now are printed")
	c.Flags().StringVar(&id, "sandbox", "", "only events of this sandbox")
	return c
}

func (a *App) printEvent(m *hostagentv1.WatchEventsResponse) error {
	if a.json {
		return a.printJSON(m, true)
	}
	if m.GetMissed() > 0 {
		fmt.Fprintf(a.Out, "(%d events are not retained any more)\n", m.GetMissed())
	}
	e := m.GetEvent()
	if e == nil {
		return nil
	}
	previous := e.GetPrevious()
	if previous == "" {
		previous = "(new)"
	}
	_, err := fmt.Fprintf(a.Out, "%d\t%s\t%s\t%s -> %s\t%s\t%s\n", e.GetSequence(), time.UnixMilli(e.GetTimeMs()).Format(time.RFC3339),
		e.GetSandboxId(), previous, e.GetStatus(), e.GetCause(), e.GetMessage())
	return err
}

func (a *App) statsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "stats [SANDBOX...]", Short: "Show what sandboxes use now",
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				list, err := cl.host.ListSandboxes(cmd.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
				if err != nil {
					return err
				}
				for _, s := range list.Msg.GetSandboxes() {
					args = append(args, s.GetSandboxId())
				}
			}
			var rows [][]string
			for _, arg := range args {
				id, err := cl.resolve(cmd.Context(), arg)
				if err != nil {
					return err
				}
				res, err := cl.sandboxes.GetStats(cmd.Context(), connect.NewRequest(&hostagentv1.GetStatsRequest{SandboxId: id}))
				if err != nil {
					return err
				}
				if a.json {
					if err := a.printJSON(res.Msg, true); err != nil {
						return err
					}
					continue
				}
				s := res.Msg
				rows = append(rows, []string{
					id, (time.Duration(s.GetCpuMicros()) * time.Microsecond).Round(10 * time.Millisecond).String(),
					size(s.GetPssBytes()), size(s.GetGuestUsedBytes()), size(s.GetDiskBytes()), size(s.GetRxBytes()), size(s.GetTxBytes()),
				})
			}
			if a.json {
				return nil
			}
			return a.table([]string{"SANDBOX", "CPU TIME", "HOST MEMORY", "GUEST MEMORY", "DISK", "RECEIVED", "SENT"}, rows)
		},
	}
}
