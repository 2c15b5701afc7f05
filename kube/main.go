package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	"k8s.io/klog/v2"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"

	"github.com/hutch-run/hutch/kube/internal/reset"
	"github.com/hutch-run/hutch/kube/internal/server"
	"github.com/hutch-run/hutch/kube/internal/status"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
	exitLeft   = 3 // something was left behind
)

const usage = `hutch-kube: a Kubernetes of one node

  hutch-kube server    run it until SIGTERM, then end its pods and take away what they left
  hutch-kube status    tell how its parts are
  hutch-kube reset     take away what a server that was killed left
  hutch-kube renew-ca  forget all keys: the next server makes new ones
  hutch-kube kubectl   the client; also when called by the name kubectl
  hutch-kube version

"hutch-kube COMMAND -h" lists the flags.
`

func main() {
	if filepath.Base(os.Args[0]) == "kubectl" {
		runKubectl()
		return
	}
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(exitUsage)
	}
	os.Exit(run(os.Args[1], os.Args[2:]))
}

func run(command string, args []string) int {
	switch command {
	case "server":
		return runServer(args)
	case "reset":
		return runReset(args)
	case "status":
		return runStatus(args)
	case "renew-ca":
		return runRenew(args)
	case "kubectl":
		os.Args = os.Args[1:]
		runKubectl()
		return 0
	case "version":
		fmt.Println(server.Version())
		return 0
	}
	fmt.Fprint(os.Stderr, usage)
	return exitUsage
}

// adminConfig is the administrator's kubeconfig of a cluster at its usual place.
const adminConfig = "/var/lib/hutch-kube/admin.kubeconfig"

func runKubectl() {
	useAdminConfig()
	logs.GlogSetter(kubectl.GetLogVerbosity(os.Args))
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
}

// useAdminConfig has kubectl talk to the cluster of this machine when nobody said which: in a guest root needs no configuration.
func useAdminConfig() {
	if _, set := os.LookupEnv("KUBECONFIG"); set {
		return
	}
	if home, err := os.UserHomeDir(); err == nil {
		if _, err := os.Stat(filepath.Join(home, ".kube", "config")); err == nil {
			return
		}
	}
	if f, err := os.Open(adminConfig); err == nil {
		_ = f.Close() // only whether it can be read was asked
		_ = os.Setenv("KUBECONFIG", adminConfig)
	}
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "hutch-kube:", err)
	return exitFailed
}

// flags parses the flags of a command.
func flags(command string, args []string, register func(*flag.FlagSet)) error {
	fs := flag.NewFlagSet("hutch-kube "+command, flag.ContinueOnError)
	register(fs)
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("hutch-kube %s takes no arguments: %q", command, fs.Arg(0))
	}
	return nil
}

func runServer(args []string) int {
	o := &server.Options{}
	if err := flags("server", args, o.Server); err != nil {
		return exitUsage
	}
	if err := o.Check(); err != nil {
		return fail(err)
	}
	unlock, err := server.Lock(o.Data)
	if err != nil {
		return fail(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := server.Run(ctx, o); err != nil {
		klog.Flush()
		return fail(err)
	}
	if o.KeepPods || o.WithoutNode {
		return 0
	}
	unlock()
	return becomeReset(o)
}

// becomeReset replaces the process, and with it all that can't be ended in it.
func becomeReset(o *server.Options) int {
	self, err := os.Executable()
	if err != nil {
		return fail(fmt.Errorf("find this program: %w", err))
	}
	argv := []string{"hutch-kube", "reset", "--data", o.Data, "--kubelet-dir", o.Kubelet, "--cri", o.CRI, "--grace", o.Grace.String(), "--stop-timeout", o.StopTimeout.String()}
	return fail(fmt.Errorf("become reset: %w", syscall.Exec(self, argv, os.Environ())))
}

func runReset(args []string) int {
	o := &server.Options{}
	if err := flags("reset", args, func(fs *flag.FlagSet) {
		o.Places(fs)
		fs.BoolVar(&o.JSON, "json", false, "tell the result as JSON on stdout")
	}); err != nil {
		return exitUsage
	}
	unlock, err := server.Lock(o.Data)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.Background(), o.StopTimeout)
	defer cancel()
	return report(o, doReset(ctx, o))
}

func doReset(ctx context.Context, o *server.Options) reset.Result {
	try, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	cri, err := reset.DialCRI(try, o.CRI, o.Grace)
	if err != nil {
		fmt.Fprintln(os.Stderr, "hutch-kube: pods are killed:", err)
		return reset.Do(ctx, o.ResetPlaces(), nil, reset.Linux{})
	}
	defer cri.Close()
	return reset.Do(ctx, o.ResetPlaces(), cri, reset.Linux{})
}

func report(o *server.Options, r reset.Result) int {
	if o.JSON {
		_ = json.NewEncoder(os.Stdout).Encode(r) // nobody to tell
	}
	for _, s := range r.Done {
		fmt.Fprintln(os.Stderr, "removed:", s)
	}
	for _, s := range r.Left {
		fmt.Fprintln(os.Stderr, "left:", s)
	}
	if len(r.Left) > 0 {
		return exitLeft
	}
	return 0
}

func runStatus(args []string) int {
	address, asJSON := status.Address, false
	if err := flags("status", args, func(fs *flag.FlagSet) {
		fs.StringVar(&address, "status", address, "where the server tells its state")
		fs.BoolVar(&asJSON, "json", false, "as JSON")
	}); err != nil {
		return exitUsage
	}
	r, err := status.Get(context.Background(), address)
	if err != nil {
		return fail(err)
	}
	if asJSON {
		if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
			return fail(err)
		}
	} else {
		for _, c := range r.Components {
			fmt.Printf("%-20s %-6v %s\n", c.Name, c.Ready, c.Error)
		}
	}
	if !r.Ready {
		return exitFailed
	}
	return 0
}

func runRenew(args []string) int {
	o := &server.Options{}
	if err := flags("renew-ca", args, o.Places); err != nil {
		return exitUsage
	}
	unlock, err := server.Lock(o.Data)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	err = errors.Join(os.RemoveAll(filepath.Join(o.Data, "pki")), os.RemoveAll(filepath.Join(o.Data, "kubeconfig")), os.RemoveAll(filepath.Join(o.Data, "admin.kubeconfig")))
	if err != nil {
		return fail(fmt.Errorf("forget the keys: %w", err))
	}
	return 0
}
