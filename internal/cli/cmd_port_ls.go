package cli

import (
	"net"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

func (a *App) portLsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ls [SANDBOX]", Aliases: []string{"list"},
		Short: "List the ports of the host that containers and Services in sandboxes publish",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			req := &hostagentv1.ListPortsRequest{}
			if len(args) > 0 {
				req.SandboxId = args[0]
			}
			res, err := cl.ports.ListPorts(cmd.Context(), connect.NewRequest(req))
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(res.Msg, false)
			}
			return a.portTable(res.Msg.GetPorts())
		},
	}
}

func (a *App) portTable(list []*hostagentv1.PublishedPort) error {
	var rows [][]string
	for _, p := range list {
		name := p.GetName()
		if name == "" {
			name = shortID(p.GetOwner())
		}
		rows = append(rows, []string{
			p.GetSandboxId(), name, openOn(p), strconv.Itoa(int(p.GetContainerPort())) + "/" + p.GetProtocol(), orDash(p.GetProblem()),
		})
	}
	return a.table([]string{"SANDBOX", "OWNER", "HOST", "PORT", "PROBLEM"}, rows)
}

// openOn is where on the host p is open.
func openOn(p *hostagentv1.PublishedPort) string {
	port := strconv.Itoa(int(p.GetHostPort()))
	var at []string
	for _, address := range p.GetHostAddresses() {
		at = append(at, net.JoinHostPort(address, port))
	}
	if at == nil {
		return "- (" + port + ")"
	}
	return strings.Join(at, ", ")
}

// shortID is a container's id as docker shows it.
func shortID(id string) string {
	const length = 12
	if len(id) > length && !strings.Contains(id, "/") {
		return id[:length]
	}
	return id
}
