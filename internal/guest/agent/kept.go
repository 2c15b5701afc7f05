package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/hutch-run/hutch/internal/guest/identity"
)

// defaultsFile hands the defaults of commands to the next server of this boot.
// It is on a tmpfs that only root may enter.
const defaultsFile = "/run/hutch/defaults.json"

// defaults is the content of defaultsFile, version 1.
type defaults struct {
	Version int               `json:"version"`
	Env     map[string]string `json:"env"`
	User    string            `json:"user"`
	Cwd     string            `json:"cwd"`
}

// keptIdentity is an identity whose defaults outlive a crash of the server:
// the host configures a guest once, and knows nothing of a restart inside.
type keptIdentity struct {
	*identity.Identity
	file string

	mu   sync.Mutex
	kept *defaults // guarded by mu; nil once this server was configured
}

func keepIdentity(i *identity.Identity, file string, log *slog.Logger) *keptIdentity {
	k := &keptIdentity{Identity: i, file: file}
	b, err := os.ReadFile(k.file)
	if errors.Is(err, os.ErrNotExist) {
		return k
	}
	var d defaults
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err == nil && d.Version != 1 {
		err = fmt.Errorf("format %d is unknown", d.Version)
	}
	if err != nil {
		log.Warn("read the defaults that the server before left", "error", err)
		return k
	}
	k.kept = &d
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
	if err := writeDefaults(k.file, defaults{1, c.Env, c.User, c.Cwd}); err != nil {
		facts.Warnings = append(facts.Warnings, err.Error())
	}
	return facts, nil
}

func writeDefaults(file string, d defaults) error {
	b, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("keep defaults: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("keep defaults: %w", err)
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
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
		return d.Env
	}
	return k.Identity.Env()
}

// User returns the user of calls that name none.
func (k *keptIdentity) User() string {
	if d := k.before(); d != nil {
		return d.User
	}
	return k.Identity.User()
}

// Cwd returns the working directory of calls that name none.
func (k *keptIdentity) Cwd() string {
	if d := k.before(); d != nil {
		return d.Cwd
	}
	return k.Identity.Cwd()
}
