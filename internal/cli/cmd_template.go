package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

func (a *App) templateCommand() *cobra.Command {
	c := &cobra.Command{Use: "template", Short: "Make, show and remove templates", Args: cobra.NoArgs}
	c.AddCommand(a.templateBuild(), a.templateImport(), a.templateLs(), a.templateInspect(), a.templateWarm(), a.templateRm())
	return c
}

// templateFlags are the flags of commands that make a template.
type templateFlags struct {
	platform  string
	env       []string
	user, cwd string
	vcpus     int32
	memory    string
	disk      string
}

func (f *templateFlags) register(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVar(&f.platform, "platform", "", "platform of the image, such as linux/amd64 (default the host's)")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "environment `KEY=VALUE`, over the image's")
	fl.StringVarP(&f.user, "user", "u", "", "user of commands that name none")
	fl.StringVarP(&f.cwd, "workdir", "w", "", "working directory of commands that name none")
	fl.Int32Var(&f.vcpus, "vcpus", 0, "virtual CPUs of sandboxes that ask for none")
	fl.StringVarP(&f.memory, "memory", "m", "", "memory of sandboxes that ask for none, such as 512 or 2g")
	fl.StringVar(&f.disk, "disk", "", "size of the writable disk of sandboxes that ask for none, such as 20g")
}

func (f *templateFlags) defaults() (*hostagentv1.TemplateDefaults, error) {
	env, err := pairs("--env", f.env, nil)
	if err != nil {
		return nil, err
	}
	memory, err := megabytes("--memory", f.memory)
	if err != nil {
		return nil, err
	}
	disk, err := megabytes("--disk", f.disk)
	if err != nil {
		return nil, err
	}
	return &hostagentv1.TemplateDefaults{Env: env, User: f.user, Cwd: f.cwd, Vcpus: f.vcpus, MemoryMb: memory, DiskSizeMb: disk}, nil
}

func (a *App) templateBuild() *cobra.Command {
	var flags templateFlags
	var insecure bool
	var config string
	c := &cobra.Command{
		Use:   "build [flags] NAME [REFERENCE]",
		Short: "Make a template from a ready recipe or from an image in a registry",
		Long: "With NAME alone, NAME is a ready recipe: minimal, debian, python311, docker or\n" +
			"kubernetes.\n" +
			"With REFERENCE the image is pulled from its registry; credentials come from\n" +
			"the docker configuration of hutchd, or from --docker-config.",
		Example: "  hutch template build debian\n  hutch template build alpine docker.io/library/alpine:3",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			defaults, err := flags.defaults()
			if err != nil {
				return err
			}
			req := &hostagentv1.BuildTemplateRequest{Name: args[0], Platform: flags.platform, Defaults: defaults, InsecureRegistry: insecure}
			req.Source = &hostagentv1.BuildTemplateRequest_Recipe{Recipe: args[0]}
			if len(args) == 2 {
				req.Source = &hostagentv1.BuildTemplateRequest_Reference{Reference: args[1]}
			}
			if config != "" {
				if req.DockerConfig, err = os.ReadFile(config); err != nil {
					return err
				}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			return a.buildTemplate(cmd.Context(), cl, req)
		},
	}
	flags.register(c)
	c.Flags().BoolVar(&insecure, "insecure", false, "speak plain HTTP to the registry")
	c.Flags().StringVar(&config, "docker-config", "", "docker config.json `FILE` with credentials for the registry")
	return c
}

func (a *App) buildTemplate(ctx context.Context, c *client, req *hostagentv1.BuildTemplateRequest) error {
	stream, err := c.templates.BuildTemplate(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	bar := newProgress(a.Err)
	defer bar.end()
	for stream.Receive() {
		m := stream.Msg()
		if p := m.GetProgress(); p != nil {
			bar.update(p.GetStep(), p.GetDoneBytes(), p.GetTotalBytes())
		}
		if t := m.GetTemplate(); t != nil {
			bar.end()
			return a.printTemplate(t)
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errors.New("the build ended without a template")
}

func (a *App) templateImport() *cobra.Command {
	var flags templateFlags
	c := &cobra.Command{
		Use:     "import [flags] NAME FILE|-",
		Short:   "Make a template from an OCI archive, a docker archive or a root tar",
		Example: "  docker save app | hutch template import app -\n  hutch template import mybox rootfs.tar.zst",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			defaults, err := flags.defaults()
			if err != nil {
				return err
			}
			in, total := a.In, int64(0)
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return err
				}
				defer f.Close()
				if fi, err := f.Stat(); err == nil {
					total = fi.Size()
				}
				in = f
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			header := &hostagentv1.ImportTemplateRequest_Header{Name: args[0], Platform: flags.platform, Defaults: defaults}
			return a.importTemplate(cmd.Context(), cl, header, in, total)
		},
	}
	flags.register(c)
	return c
}

func (a *App) importTemplate(ctx context.Context, c *client, header *hostagentv1.ImportTemplateRequest_Header, in io.Reader, total int64) error {
	stream := c.templates.ImportTemplate(ctx)
	err := stream.Send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Header_{Header: header}})
	bar := newProgress(a.Err)
	defer bar.end()
	buf := make([]byte, 256<<10)
	for sent := int64(0); err == nil; {
		var n int
		n, err = in.Read(buf)
		if n > 0 {
			sent += int64(n)
			bar.update("send "+header.GetName(), sent, total)
			if sendErr := stream.Send(&hostagentv1.ImportTemplateRequest{Part: &hostagentv1.ImportTemplateRequest_Chunk{Chunk: buf[:n]}}); sendErr != nil {
				err = io.EOF // the reason comes with the answer
			}
		}
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the archive: %w", err)
	}
	res, err := stream.CloseAndReceive()
	if err != nil {
		return err
	}
	bar.end()
	return a.printTemplate(res.Msg.GetTemplate())
}

func (a *App) printTemplate(t *hostagentv1.Template) error {
	if a.json {
		return a.printJSON(t, false)
	}
	_, err := fmt.Fprintf(a.Out, "%s\t%s\t%s\n", t.GetName(), t.GetImageDigest(), size(t.GetSizeBytes()))
	return err
}

func (a *App) templateLs() *cobra.Command {
	return listCommand(a, "List templates", "print names only",
		func(ctx context.Context, cl *client) (*hostagentv1.ListTemplatesResponse, error) {
			res, err := cl.templates.ListTemplates(ctx, connect.NewRequest(&hostagentv1.ListTemplatesRequest{}))
			return answerOf(res, err)
		},
		func(m *hostagentv1.ListTemplatesResponse) (names []string) {
			for _, t := range m.GetTemplates() {
				names = append(names, t.GetName())
			}
			return names
		},
		func(m *hostagentv1.ListTemplatesResponse) error { return a.templateTable(m.GetTemplates(), time.Now()) })
}

func (a *App) templateTable(list []*hostagentv1.Template, now time.Time) error {
	var rows [][]string
	for _, t := range list {
		rows = append(rows, []string{
			t.GetName(), fmt.Sprintf("%.19s", t.GetImageDigest()), size(t.GetSizeBytes()), size(t.GetDiskBytes()),
			orDash(t.GetPlatform()), t.GetSource(), ago(time.Unix(t.GetCreatedAtUnix(), 0), now),
		})
	}
	return a.table([]string{"TEMPLATE", "IMAGE", "SIZE", "ON DISK", "PLATFORM", "SOURCE", "AGE"}, rows)
}

func (a *App) templateInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect NAME", Short: "Print a template as JSON", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			res, err := cl.templates.InspectTemplate(cmd.Context(), connect.NewRequest(&hostagentv1.InspectTemplateRequest{Name: args[0]}))
			if err != nil {
				return err
			}
			return a.printJSON(res.Msg, false)
		},
	}
}

func (a *App) templateRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME...", Short: "Remove templates; sandboxes made from them keep running", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				_, err := cl.templates.RemoveTemplate(cmd.Context(), connect.NewRequest(&hostagentv1.RemoveTemplateRequest{Name: name}))
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.Out, name)
			}
			return errors.Join(errs...)
		},
	}
}

func (a *App) templateWarm() *cobra.Command {
	var vcpus int32
	var memory, disk, ready string
	c := &cobra.Command{
		Use:   "warm [flags] NAME",
		Short: "Boot a template once, so that sandboxes of that shape are copies",
		Long: "A sandbox is booted and kept as it stands when it is ready. Creates of the same\n" +
			"template, vCPUs, memory and disk size copy it instead of booting. With --ready\n" +
			"docker or kubernetes that is up first, and so it is in every copy.",
		Example: "  hutch template warm minimal\n  hutch template warm debian --vcpus 2 -m 2g\n  hutch template warm docker --ready docker",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			mem, err := megabytes("--memory", memory)
			if err != nil {
				return err
			}
			size, err := megabytes("--disk", disk)
			if err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			res, err := cl.templates.WarmTemplate(cmd.Context(), connect.NewRequest(&hostagentv1.WarmTemplateRequest{
				Name: args[0], Vcpus: vcpus, MemoryMb: mem, DiskSizeMb: size, Ready: ready,
			}))
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res.Msg, false)
			}
			_, err = fmt.Fprintln(a.Out, res.Msg.GetSnapshotId())
			return err
		},
	}
	c.Flags().Int32Var(&vcpus, "vcpus", 0, "virtual CPUs (default the template's, or 1)")
	c.Flags().StringVarP(&memory, "memory", "m", "", "memory, such as 512 or 2g (default the template's, or 512)")
	c.Flags().StringVar(&disk, "disk", "", "size of the writable disk (default the template's, or 5g)")
	c.Flags().StringVar(&ready, "ready", "", "what must be up before: docker or kubernetes")
	return c
}
