package hooks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/process"
)

const (
	// Dir is where an image keeps its hooks.
	Dir = "/etc/hutch/restore.d"
	// timeLimit is what each hook gets.
	timeLimit = 10 * time.Second
	// maxOutput is how much of each stream of a hook is told, its end, in bytes.
	maxOutput = 2 << 10
	// closeLimit is what killing everything that hooks left gets.
	closeLimit = 5 * time.Second
)

// Params are what hooks are run with. All are needed but the last.
type Params struct {
	Dir string
	// Cgroup is made below a cgroup that is not frozen, for hooks alone.
	Cgroup   string
	Accounts *account.Files
	Log      *slog.Logger

	timeLimit time.Duration // tests only; 0: timeLimit
}

// Run runs the hooks and returns what went wrong with them. The error is for
// ctx, which ended before the last hook did.
func Run(ctx context.Context, p Params) (warnings []string, err error) {
	p.timeLimit = cmp.Or(p.timeLimit, timeLimit)
	warn := func(err error) { warnings = append(warnings, strings.ToValidUTF8(err.Error(), "?")) }
	hooks := choose(p.Dir, warn)
	if len(hooks) == 0 {
		return warnings, nil
	}
	table, err := process.New(process.Params{
		Log: p.Log, Accounts: p.Accounts, Defaults: account.Fixed{}, CgroupRoot: p.Cgroup,
	})
	if err != nil {
		warn(fmt.Errorf("restore hooks: %w", err))
		return warnings, nil
	}
	for _, path := range hooks {
		if err := p.run(ctx, table, path); err != nil {
			warn(fmt.Errorf("restore hook %s: %w", filepath.Base(path), err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	if err := table.Close(end); err != nil {
		warn(fmt.Errorf("restore hooks: %w", err))
	}
	return warnings, context.Cause(ctx)
}

// run runs one hook and logs what it wrote.
func (p Params) run(ctx context.Context, table *process.Table, path string) error {
	_, sub, err := table.Start(ctx, process.Spec{Cmd: path, NoStdin: true, Timeout: p.timeLimit})
	if err != nil {
		return err
	}
	defer sub.Close()
	out, exit, err := follow(ctx, sub)
	if text := out.all(); text != "" {
		p.Log.Warn("restore hook wrote", "hook", path, "output", text)
	}
	switch {
	case err != nil:
		return err
	case exit.TimedOut:
		return fmt.Errorf("killed after %v", p.timeLimit)
	case exit.Signal != 0:
		return fmt.Errorf("killed by %v", exit.Signal)
	case exit.Code != 0:
		return errors.New(strings.TrimSuffix(fmt.Sprintf("exit code %d: %s", exit.Code, out.lastLine()), ": "))
	}
	return nil
}

// output is the end of what a hook wrote, by stream: which of two wrote first
// can't be told.
type output map[process.Stream][]byte

// follow takes what the hook writes until it ends.
func follow(ctx context.Context, sub *process.Subscription) (output, process.Exit, error) {
	out := output{}
	for {
		ev, err := sub.Next(ctx, 0)
		if err != nil {
			return out, process.Exit{}, err
		}
		switch ev.Kind {
		case process.Data:
			tail := append(out[ev.Stream], ev.Data...)
			out[ev.Stream] = append(tail[:0], tail[max(0, len(tail)-maxOutput):]...)
		case process.End:
			return out, ev.Exit, nil
		case process.Idle:
		}
	}
}

func (o output) all() string {
	return strings.TrimSpace(string(o[process.Stdout]) + string(o[process.Stderr]))
}

// lastLine is what the hook said at the end, of errors if it named any.
func (o output) lastLine() string {
	for _, s := range []process.Stream{process.Stderr, process.Stdout} {
		if text := strings.TrimSpace(string(o[s])); text != "" {
			return text[strings.LastIndexByte(text, '\n')+1:]
		}
	}
	return ""
}
