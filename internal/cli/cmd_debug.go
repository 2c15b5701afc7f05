package cli

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/version"
)

// debugLimit bounds each file of a bundle.
const debugLimit = 16 << 20

func (a *App) debugCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "debug [flags] [SANDBOX...]",
		Short: "Collect what a bug report needs in one file",
		Long: "The bundle holds versions, the checks of doctor, events, and for each sandbox\n" +
			"its record and logs. It holds no file of a sandbox and no token; environment\n" +
			"variables of the record are in it, so read it before you share it.",
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			if output == "" {
				output = "hutch-debug-" + time.Now().UTC().Format("20060102-150405") + ".tar.gz"
			}
			f, err := os.OpenFile(output, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			b := newBundle(f)
			b.collect(cmd.Context(), cl, args)
			if err := errors.Join(b.close(), f.Close()); err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Out, output)
			return err
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "`FILE` to write (default hutch-debug-<time>.tar.gz)")
	return c
}

// bundle is a tar.gz being written. What can't be got is told in its place.
type bundle struct {
	gz  *gzip.Writer
	tar *tar.Writer
	err error
}

func newBundle(f *os.File) *bundle {
	gz := gzip.NewWriter(f)
	return &bundle{gz: gz, tar: tar.NewWriter(gz)}
}

func (b *bundle) close() error { return errors.Join(b.err, b.tar.Close(), b.gz.Close()) }

func (b *bundle) file(name string, content []byte, err error) {
	if err != nil {
		name, content = name+".error.txt", []byte(err.Error()+"\n")
	}
	h := &tar.Header{Name: "hutch-debug/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: time.Now()}
	if b.err == nil {
		b.err = b.tar.WriteHeader(h)
	}
	if b.err == nil {
		_, b.err = b.tar.Write(content)
	}
}

func (b *bundle) message(name string, m proto.Message, err error) {
	if err == nil {
		var content []byte
		content, err = protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Marshal(m)
		b.file(name, content, err)
		return
	}
	b.file(name, nil, err)
}

// collect adds everything. ids empty means all sandboxes.
func (b *bundle) collect(ctx context.Context, c *client, ids []string) {
	b.file("cli-version.txt", []byte(version.Version+"\n"), nil)
	add(b, "host.json", c.machine.GetHostInfo, ctx, &hostagentv1.GetHostInfoRequest{})
	add(b, "doctor.json", c.machine.Diagnose, ctx, &hostagentv1.DiagnoseRequest{})
	add(b, "templates.json", c.templates.ListTemplates, ctx, &hostagentv1.ListTemplatesRequest{})
	list := add(b, "sandboxes.json", c.host.ListSandboxes, ctx, &hostagentv1.ListSandboxesRequest{})
	if len(ids) == 0 {
		for _, s := range list.GetSandboxes() {
			ids = append(ids, s.GetSandboxId())
		}
	}
	events, err := readEvents(ctx, c)
	b.file("events.jsonl", events, err)
	for _, arg := range ids {
		id, err := c.resolve(ctx, arg)
		if err != nil {
			b.file("sandboxes/"+arg, nil, err)
			continue
		}
		add(b, "sandboxes/"+id+"/record.json", c.sandboxes.InspectSandbox, ctx, &hostagentv1.InspectSandboxRequest{SandboxId: id})
		add(b, "sandboxes/"+id+"/stats.json", c.sandboxes.GetStats, ctx, &hostagentv1.GetStatsRequest{SandboxId: id})
		for name, source := range map[string]hostagentv1.ReadLogsRequest_Source{
			"console.log": hostagentv1.ReadLogsRequest_SOURCE_CONSOLE,
			"vmm.log":     hostagentv1.ReadLogsRequest_SOURCE_VMM,
		} {
			content, err := readLog(ctx, c, id, source)
			b.file("sandboxes/"+id+"/"+name, content, err)
		}
	}
}

// message is a pointer to a generated message.
type message[T any] interface {
	*T
	proto.Message
}

// add makes one call and adds its answer.
func add[Req, Res any, P message[Res]](b *bundle, name string, call func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), ctx context.Context, req *Req) P {
	res, err := call(ctx, connect.NewRequest(req))
	if err != nil {
		b.file(name, nil, err)
		return nil
	}
	b.message(name, P(res.Msg), nil)
	return P(res.Msg)
}

func readEvents(ctx context.Context, c *client) ([]byte, error) {
	stream, err := c.sandboxes.WatchEvents(ctx, connect.NewRequest(&hostagentv1.WatchEventsRequest{NoFollow: true}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var out bytes.Buffer
	for stream.Receive() && out.Len() < debugLimit {
		line, err := protojson.Marshal(stream.Msg())
		if err != nil {
			return nil, err
		}
		out.Write(append(line, '\n'))
	}
	return out.Bytes(), stream.Err()
}

func readLog(ctx context.Context, c *client, id string, source hostagentv1.ReadLogsRequest_Source) ([]byte, error) {
	stream, err := c.sandboxes.ReadLogs(ctx, connect.NewRequest(&hostagentv1.ReadLogsRequest{SandboxId: id, Source: source}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var out bytes.Buffer
	for stream.Receive() && out.Len() < debugLimit {
		out.Write(stream.Msg().GetData())
	}
	return out.Bytes(), stream.Err()
}
