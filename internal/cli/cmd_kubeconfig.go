package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/cli/kubeconfig"
)

const (
	// kubeOwner is who publishes the API of a sandbox's cluster.
	kubeOwner = "kubernetes"
	// kubePort is the port of that API in the guest.
	kubePort = 6443
)

// kubeEntry is the name of a sandbox's cluster, user and context in files of
// users.
func kubeEntry(id string) string { return "hutch-" + id }

// kubeconfigFlags are the flags of hutch kubeconfig.
type kubeconfigFlags struct {
	merge, use, remove bool
	server             string
}

func (a *App) kubeconfigCommand() *cobra.Command {
	var flags kubeconfigFlags
	c := &cobra.Command{
		Use:   "kubeconfig [flags] SANDBOX",
		Short: "Print or merge the credentials of a sandbox's Kubernetes",
		Long: "The cluster, user and context are named hutch-SANDBOX. With --merge they go into the\n" +
			"file that kubectl would write to ($KUBECONFIG, else ~/.kube/config), in the place of\n" +
			"those of that name that are there; everything else in it stays as it is, and the\n" +
			"current context too unless --use is given.",
		Example: "  hutch kubeconfig sb-12 > config\n  hutch kubeconfig --merge sb-12 && kubectl --context hutch-sb-12 get nodes\n  hutch kubeconfig --remove sb-12",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if flags.remove {
				return a.removeKubeconfig(cmd.Context(), args[0])
			}
			return a.giveKubeconfig(cmd.Context(), args[0], flags)
		},
	}
	fl := c.Flags()
	fl.BoolVar(&flags.merge, "merge", false, "merge into the file that kubectl uses, rather than printing")
	fl.BoolVar(&flags.use, "use", false, "with --merge: make it the current context")
	fl.BoolVar(&flags.remove, "remove", false, "take the entries out of the files that kubectl uses; works without the sandbox")
	fl.StringVar(&flags.server, "server", "", "`URL` of the API as seen from here, such as that of a tunnel")
	c.MarkFlagsMutuallyExclusive("merge", "remove")
	c.MarkFlagsMutuallyExclusive("use", "remove")
	return c
}

func (a *App) giveKubeconfig(ctx context.Context, arg string, flags kubeconfigFlags) error {
	if flags.use && !flags.merge {
		return errors.New("--use changes a file: give --merge too")
	}
	c, id, err := a.sandbox(ctx, arg)
	if err != nil {
		return err
	}
	entries, err := c.kubeEntries(ctx, id, func() (string, error) {
		if flags.server != "" {
			return flags.server, nil
		}
		return c.kubeServer(ctx, id)
	})
	if err != nil {
		return err
	}
	if !flags.merge {
		b, err := entries.YAML()
		if err == nil {
			_, err = a.Out.Write(b)
		}
		return err
	}
	files, err := kubeconfig.Files(a.Getenv)
	if err != nil {
		return err
	}
	file, err := kubeconfig.Merge(ctx, files, entries, flags.use)
	if err == nil {
		_, err = fmt.Fprintf(a.Out, "context %s is in %s\n", entries.Name, file)
	}
	return err
}

// kubeEntries returns what a kubeconfig for the sandbox's cluster holds. Server
// is asked once it is known that there are credentials.
func (c *client) kubeEntries(ctx context.Context, id string, server func() (string, error)) (kubeconfig.Entries, error) {
	given, err := answerOf(c.guest(id).GetKubeconfig(ctx, connect.NewRequest(&arcboxv1.KubernetesKubeconfigRequest{})))
	if err != nil {
		return kubeconfig.Entries{}, err
	}
	at, err := server()
	if err != nil {
		return kubeconfig.Entries{}, err
	}
	name := "" // the certificate has 127.0.0.1 and localhost
	if !strings.HasPrefix(at, "https://127.0.0.1:") && !strings.HasPrefix(at, "https://localhost:") {
		name = "localhost"
	}
	return kubeconfig.New([]byte(given.GetKubeconfig()), given.GetContextName(), kubeEntry(id), at, name)
}

// removeKubeconfig takes entries out, also those of a sandbox that is no more.
func (a *App) removeKubeconfig(ctx context.Context, arg string) error {
	_, id, unknown := a.sandbox(ctx, arg)
	if unknown != nil {
		id = arg
	}
	files, err := kubeconfig.Files(a.Getenv)
	if err != nil {
		return err
	}
	changed, err := kubeconfig.Remove(ctx, files, kubeEntry(id))
	for _, f := range changed {
		fmt.Fprintf(a.Out, "context %s is out of %s\n", kubeEntry(id), f)
	}
	if err == nil && len(changed) == 0 && unknown != nil {
		return fmt.Errorf("no kubeconfig has a context %s: %s", kubeEntry(id), explain(unknown, a.hostName()))
	}
	return err
}

// isLocal reports whether hutchd is on this machine, as far as its address
// tells.
func (t target) isLocal() bool {
	if t.network == "unix" {
		return true
	}
	host, _, err := net.SplitHostPort(t.address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// publishTime is how long a port that was just published may take to be open.
const publishTime = 10 * time.Second

// kubeServer returns the URL of the port of this machine that leads to the
// cluster's API.
func (c *client) kubeServer(ctx context.Context, id string) (string, error) {
	if !c.target.isLocal() {
		return "", fmt.Errorf("hutchd at %s opens the API's port on its own loopback, not here: "+
			"have a tunnel (hutch port %s 16443:%d) and give --server https://127.0.0.1:16443, or use hutch kubectl", c.target.address, id, kubePort)
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(publishTime); ; {
		address, problem, err := c.kubeAddress(ctx, id)
		if err != nil || address != "" {
			return "https://" + address, err
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("the API of %s is on no port of this host: %s", id, problem)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// kubeAddress returns where the API is on this host, or why it is nowhere.
func (c *client) kubeAddress(ctx context.Context, id string) (address, problem string, err error) {
	list, err := answerOf(c.ports.ListPorts(ctx, connect.NewRequest(&hostagentv1.ListPortsRequest{SandboxId: id})))
	if err != nil {
		return "", "", err
	}
	problem = "the cluster does not run, or is not ready yet (hutch kube status " + id + ")"
	for _, p := range list.GetPorts() {
		if p.GetOwner() != kubeOwner || p.GetProtocol() != "tcp" || p.GetContainerPort() != kubePort {
			continue
		}
		if p.GetProblem() != "" {
			problem = p.GetProblem()
		}
		if host := reachable(p.GetHostAddresses()); host != "" && p.GetHostPort() != 0 {
			return net.JoinHostPort(host, strconv.Itoa(int(p.GetHostPort()))), "", nil
		}
	}
	return "", problem, nil
}

// reachable returns the address to use of those on which a port is open.
func reachable(addresses []string) string {
	best := ""
	for _, s := range addresses {
		ip, err := netip.ParseAddr(s)
		switch {
		case err != nil:
		case ip == netip.AddrFrom4([4]byte{127, 0, 0, 1}) || ip == netip.IPv4Unspecified():
			return "127.0.0.1"
		case ip == netip.IPv6Unspecified():
			best = "::1"
		case best == "":
			best = s
		}
	}
	return best
}
