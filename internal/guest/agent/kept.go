package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hutch-run/hutch/internal/guest/identity"
)

// defaultsFile hands the defaults of commands to the next server of this boot.
// It is on a tmpfs that only root may enter.
const defaultsFile = "/run/hutch/defaults"

// defaults is the content of defaultsFile.
type defaults struct {
	user, cwd string
	env       map[string]string
	test      bool // test features are on
}

// defaultsFormat names the first of the strings in defaultsFile, each ended by
// a NUL byte: the format, user, directory, "test" or nothing for test features,
// and the variables as KEY=VALUE. (No JSON: a create waits for the file, and
// would wait for the library.)
const (
	defaultsFormat = "hutch-defaults-2"
	testWord       = "test"
)

func (d defaults) encode() []byte {
	b := append([]byte(defaultsFormat), 0)
	b = append(append(b, d.user...), 0)
	b = append(append(b, d.cwd...), 0)
	if d.test {
		b = append(b, testWord...)
	}
	b = append(b, 0)
	for k, v := range d.env {
		b = append(append(append(append(b, k...), '='), v...), 0)
	}
	return b
}

func parseDefaults(b []byte) (*defaults, error) {
	parts := strings.Split(string(b), "\x00")
	if parts[0] != defaultsFormat {
		return nil, fmt.Errorf("the format is not %s", defaultsFormat)
	}
	if len(parts) < 5 || parts[len(parts)-1] != "" {
		return nil, errors.New("the file is cut")
	}
	d := &defaults{user: parts[1], cwd: parts[2], test: parts[3] == testWord, env: map[string]string{}}
	for _, p := range parts[4 : len(parts)-1] {
		k, v, _ := strings.Cut(p, "=")
		d.env[k] = v
	}
	return d, nil
}

// keptIdentity is an identity whose defaults outlive a crash of the server:
// the host configures a guest once, and knows nothing of a restart inside.
type keptIdentity struct {
	*identity.Identity
	file string
	// restarted: a server of this boot was configured before this one.
	restarted bool

	mu      sync.Mutex
	kept    *defaults // guarded by mu; nil once this server was configured
	written *defaults // guarded by mu; what this server wrote last, nil: nothing
}

func keepIdentity(i *identity.Identity, file string, log *slog.Logger) *keptIdentity {
	k := &keptIdentity{Identity: i, file: file}
	b, err := os.ReadFile(k.file)
	if errors.Is(err, os.ErrNotExist) {
		return k
	}
	k.restarted = true
	if err == nil {
		k.kept, err = parseDefaults(b)
	}
	if err != nil {
		log.Warn("read the defaults that the server before left", "error", err)
	}
	return k
}

// Configure configures the guest and keeps its defaults.
func (k *keptIdentity) Configure(ctx context.Context, c identity.Config) (identity.Facts, error) {
	facts, err := k.Identity.Configure(ctx, c)
	if err != nil {
		return facts, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = nil
	if d := (defaults{c.User, c.Cwd, c.Env, c.TestFeatures}); k.written == nil || !d.equal(*k.written) {
		if err := writeDefaults(k.file, d); err != nil {
			facts.Warnings = append(facts.Warnings, err.Error())
			return facts, nil
		}
		k.written = &defaults{d.user, d.cwd, maps.Clone(d.env), d.test}
	}
	return facts, nil
}

func (d defaults) equal(other defaults) bool {
	return d.user == other.user && d.cwd == other.cwd && d.test == other.test && maps.Equal(d.env, other.env)
}

func writeDefaults(file string, d defaults) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("keep defaults: %w", err)
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, d.encode(), 0o600); err != nil {
		return fmt.Errorf("keep defaults: %w", err)
	}
	return os.Rename(tmp, file)
}

func (k *keptIdentity) before() *defaults {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.kept
}

// Env returns the environment of every command.
func (k *keptIdentity) Env() map[string]string {
	if d := k.before(); d != nil {
		return d.env
	}
	return k.Identity.Env()
}

// User returns the user of calls that name none.
func (k *keptIdentity) User() string {
	if d := k.before(); d != nil {
		return d.user
	}
	return k.Identity.User()
}

// Cwd returns the working directory of calls that name none.
func (k *keptIdentity) Cwd() string {
	if d := k.before(); d != nil {
		return d.cwd
	}
	return k.Identity.Cwd()
}

// TestFeatures reports whether what only tests need is on.
func (k *keptIdentity) TestFeatures() bool {
	if d := k.before(); d != nil {
		return d.test
	}
	return k.Identity.TestFeatures()
}
