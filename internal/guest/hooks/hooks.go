package hooks

import (
	"bytes"
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
	// maxOutput is how much of a hook's output is told, its end, in bytes.
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
	output, exit, err := follow(ctx, sub)
	output = bytes.TrimSpace(output)
	if len(output) > 0 {
		p.Log.Warn("restore hook wrote", "hook", path, "output", string(output))
	}
	switch {
	case err != nil:
		return err
	case exit.TimedOut:
		return fmt.Errorf("killed after %v", p.timeLimit)
	case exit.Signal != 0:
		return fmt.Errorf("killed by %v", exit.Signal)
	case exit.Code != 0:
		return errors.New(strings.TrimSuffix(fmt.Sprintf("exit code %d: %s", exit.Code, lastLine(output)), ": "))
	}
	return nil
}

// follow returns the end of the output, of both streams as it came.
func follow(ctx context.Context, sub *process.Subscription) ([]byte, process.Exit, error) {
	var tail []byte
	for {
		ev, err := sub.Next(ctx, 0)
		if err != nil {
			return tail, process.Exit{}, err
		}
		switch ev.Kind {
		case process.Data:
			tail = append(tail, ev.Data...)
			if len(tail) > maxOutput {
				tail = append(tail[:0], tail[len(tail)-maxOutput:]...)
			}
		case process.End:
			return tail, ev.Exit, nil
		case process.Idle:
		}
	}
}

func lastLine(b []byte) []byte { return b[bytes.LastIndexByte(b, '\n')+1:] }
