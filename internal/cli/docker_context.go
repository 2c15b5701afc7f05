package cli

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func (a *App) dockerContextCommand() *cobra.Command {
	var use, remove bool
	c := &cobra.Command{
		Use:   "context [flags] SANDBOX",
		Short: "Make a context of the docker client for a sandbox's Docker",
		Long: "The context is called hutch-SANDBOX. The current context stays what it is, but\n" +
			"with --use. With --rm the context is removed; the id must be whole then, for the\n" +
			"sandbox may be gone already.",
		Example: "  hutch docker context sb-12\n  docker --context hutch-sb-12 ps",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := a.dockerConfig()
			if err != nil {
				return err
			}
			if remove {
				return a.removeContext(dir, contextPrefix+args[0])
			}
			_, record, err := a.dockerOf(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			host, err := localSocket(record)
			if err != nil {
				return err
			}
			name := contextPrefix + record.GetInfo().GetSandboxId()
			if err := writeContext(dir, name, host); err != nil {
				return err
			}
			if use {
				if err := setCurrentContext(dir, func(string) string { return name }); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintln(a.Out, name)
			return err
		},
	}
	c.Flags().BoolVar(&use, "use", false, "make it the current context")
	c.Flags().BoolVar(&remove, "rm", false, "remove the context")
	c.MarkFlagsMutuallyExclusive("use", "rm")
	return c
}

// contextPrefix begins the names of our contexts.
const contextPrefix = "hutch-"

// dockerConfig returns the directory of the docker client's configuration.
func (a *App) dockerConfig() (string, error) {
	if dir := a.Getenv("DOCKER_CONFIG"); dir != "" {
		return dir, nil
	}
	if home := a.Getenv("HOME"); home != "" {
		return filepath.Join(home, ".docker"), nil
	}
	return "", errors.New("find the docker client's configuration: set HOME or DOCKER_CONFIG")
}

// dockerContext is the file of a context, in the format of docker's client.
type dockerContext struct {
	Name      string
	Metadata  map[string]string
	Endpoints map[string]dockerEndpoint
}

type dockerEndpoint struct {
	Host          string
	SkipTLSVerify bool
}

// contextDir is where docker's client keeps the context of a name, below kind
// "meta" or "tls".
func contextDir(dir, kind, name string) string {
	sum := sha256.Sum256([]byte(name))
	return filepath.Join(dir, "contexts", kind, hex.EncodeToString(sum[:]))
}

// writeContext makes a context, or changes the one of that name.
func writeContext(dir, name, host string) error {
	b, err := json.Marshal(dockerContext{
		Name: name, Metadata: map[string]string{"Description": "Docker in the hutch sandbox " + name[len(contextPrefix):]},
		Endpoints: map[string]dockerEndpoint{"docker": {Host: host}},
	})
	if err != nil {
		return err
	}
	meta := contextDir(dir, "meta", name)
	if err := os.MkdirAll(meta, 0o755); err != nil {
		return fmt.Errorf("make docker context: %w", err)
	}
	return replaceFile(filepath.Join(meta, "meta.json"), b, 0o644)
}

// removeContext removes a context of ours. Where it is the current one, the
// default is that from then on.
func (a *App) removeContext(dir, name string) error {
	meta := contextDir(dir, "meta", name)
	if _, err := os.Stat(meta); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no docker context %s", name)
	}
	was := false
	if err := setCurrentContext(dir, func(current string) string {
		if was = current == name; was {
			return ""
		}
		return current
	}); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(meta), os.RemoveAll(contextDir(dir, "tls", name))); err != nil {
		return fmt.Errorf("remove docker context: %w", err)
	}
	if was {
		fmt.Fprintln(a.Err, "hutch: it was the current context; docker's default is that now")
	}
	_, err := fmt.Fprintln(a.Out, name)
	return err
}

// setCurrentContext changes which context is the current one, and nothing else
// in the client's configuration.
func setCurrentContext(dir string, change func(current string) string) error {
	const key = "currentContext"
	path := filepath.Join(dir, "config.json")
	config := map[string]json.RawMessage{}
	b, err := os.ReadFile(path)
	if err == nil && len(b) > 0 {
		err = json.Unmarshal(b, &config)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read docker's configuration %s: %w", path, err)
	}
	var current string
	if raw, ok := config[key]; ok {
		if err := json.Unmarshal(raw, &current); err != nil {
			return fmt.Errorf("read docker's configuration %s: %s: %w", path, key, err)
		}
	}
	next := change(current)
	if next == current {
		return nil
	}
	delete(config, key)
	if next != "" {
		config[key], _ = json.Marshal(next) // a string
	}
	if b, err = json.MarshalIndent(config, "", "\t"); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return replaceFile(path, b, 0o600)
}

// replaceFile replaces a file at once. It keeps the mode of the one before, and
// links to it.
func replaceFile(path string, content []byte, mode fs.FileMode) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("replace %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}
