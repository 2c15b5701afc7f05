package process

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
)

// defaultPath is the PATH of programs when nothing else sets one.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// plan is a Spec with everything looked up.
type plan struct {
	user account.User
	path string // of the program, relative ones from cwd
	argv []string
	env  []string
	cwd  string
}

// plan looks up user, environment, directory and program, each with an error
// that names the field at fault.
func (t *Table) plan(spec Spec) (plan, error) {
	if err := checkStrings(spec); err != nil {
		return plan{}, err
	}
	user, err := t.params.Accounts.Choose(account.Choice{Field: spec.User, Header: spec.HeaderUser}, t.params.Defaults)
	if err != nil {
		return plan{}, err
	}
	p := plan{user: user, argv: append([]string{spec.Cmd}, spec.Args...)}
	env := buildEnv(t.params.Defaults.Env(), user, spec)
	for _, k := range slices.Sorted(maps.Keys(env)) {
		p.env = append(p.env, k+"="+env[k])
	}
	if p.cwd, err = chooseCwd(spec.Cwd, t.params.Defaults.Cwd(), user); err != nil {
		return plan{}, err
	}
	p.path, err = account.Check(user, func() (string, error) { return findProgram(spec.Cmd, env["PATH"], p.cwd) })
	return p, err
}

func checkStrings(spec Spec) error {
	if spec.Cmd == "" {
		return fault.BadField("process.cmd", "is empty: name a program")
	}
	if strings.ContainsRune(spec.Cmd, 0) {
		return fault.BadField("process.cmd", "holds a NUL byte")
	}
	for i, a := range spec.Args {
		if strings.ContainsRune(a, 0) {
			return fault.BadField(fmt.Sprintf("process.args[%d]", i), "holds a NUL byte")
		}
	}
	for k, v := range spec.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") {
			return fault.BadField("process.envs", "bad name %q: must not be empty nor hold '=' or NUL", k)
		}
		if strings.ContainsRune(v, 0) {
			return fault.BadField("process.envs", "the value of %q holds a NUL byte", k)
		}
	}
	if spec.Cwd != nil && strings.ContainsRune(*spec.Cwd, 0) {
		return fault.BadField("process.cwd", "holds a NUL byte")
	}
	return nil
}

// buildEnv lays the call's environment over the user's over the sandbox's.
func buildEnv(sandbox map[string]string, user account.User, spec Spec) map[string]string {
	env := map[string]string{"PATH": defaultPath}
	maps.Copy(env, sandbox)
	env["HOME"] = user.Home
	env["USER"] = user.Label()
	env["LOGNAME"] = user.Label()
	env["SHELL"] = user.Shell
	if spec.Size != nil && env["TERM"] == "" {
		env["TERM"] = "xterm-256color"
	}
	maps.Copy(env, spec.Env)
	return env
}

// chooseCwd takes the call's directory, else the configured one, else the
// user's home, else "/". Only a missing home is passed over: the others were
// asked for.
func chooseCwd(asked *string, configured string, user account.User) (string, error) {
	switch {
	case asked != nil && *asked != "":
		dir := user.ExpandPath(*asked, "")
		if err := usableDir(dir, user); err != nil {
			return "", fault.BadField("process.cwd", "%v", err)
		}
		return dir, nil
	case configured != "":
		dir := user.ExpandPath(configured, "")
		if err := usableDir(dir, user); err != nil {
			return "", fault.New(fault.Precondition, "the sandbox's default working directory: %v; give a cwd in the call", err)
		}
		return dir, nil
	}
	if usableDir(user.Home, user) == nil {
		return user.Home, nil
	}
	return "/", nil
}

// usableDir asks the kernel whether the user may change to dir.
func usableDir(dir string, user account.User) error {
	err := user.Do(func() error {
		fd, err := openDir(dir)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		sub, err := unix.Openat(fd, ".", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return unix.Close(sub)
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("directory %q does not exist", dir)
	case errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%q is not a directory", dir)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("user %s may not enter directory %q", user.Label(), dir)
	case err != nil:
		return fmt.Errorf("directory %q: %w", dir, err)
	}
	return nil
}

func openDir(dir string) (int, error) {
	for {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// findProgram resolves cmd as a shell would. It runs with the user's rights.
func findProgram(cmd, path, cwd string) (string, error) {
	if strings.Contains(cmd, "/") {
		return cmd, explain(cmd, runnable(inDir(cwd, cmd)))
	}
	var denied error
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		candidate := dir + "/" + cmd
		err := runnable(inDir(cwd, candidate))
		if err == nil {
			return candidate, nil
		}
		if errors.Is(err, fs.ErrPermission) && denied == nil {
			denied = explain(candidate, err)
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", notFound(fmt.Sprintf("program %q not found in PATH %q", cmd, path))
}

func inDir(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return dir + "/" + path
}

func runnable(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return unix.EISDIR
	case info.Mode()&0o111 == 0:
		return unix.EACCES
	}
	return nil
}

func notFound(msg string) error {
	return &fault.Error{Class: fault.NotFound, Field: "process.cmd", Msg: "process.cmd: " + msg}
}

// explain words an error of looking up or executing the program.
func explain(cmd string, err error) error {
	deny := func(class fault.Class, why string) error {
		return &fault.Error{Class: class, Field: "process.cmd", Msg: fmt.Sprintf("process.cmd: %q %s", cmd, why)}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return notFound(fmt.Sprintf("%q does not exist, or the interpreter in its first line does not", cmd))
	case errors.Is(err, unix.ENOTDIR):
		return notFound(fmt.Sprintf("%q: part of the path is not a directory", cmd))
	case errors.Is(err, unix.EISDIR):
		return deny(fault.Denied, "is a directory")
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return deny(fault.Denied, "may not be executed by this user: check its mode and the path to it")
	case errors.Is(err, unix.ENOEXEC):
		return deny(fault.Invalid, "is not a program for this machine, nor a script that begins with #!")
	case errors.Is(err, unix.E2BIG):
		return fault.BadField("process", "arguments and environment together are larger than the kernel takes")
	case errors.Is(err, unix.ETXTBSY):
		return deny(fault.Precondition, "is open for writing: close it first")
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return fault.New(fault.Exhausted, "start %q: no room for another process: %v", cmd, err)
	}
	return fmt.Errorf("start %q: %w", cmd, err)
}
