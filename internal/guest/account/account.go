package account

import (
	"fmt"
	"maps"
	"net/http"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// User is an account of the guest with everything that a process or a file
// operation of it needs.
type User struct {
	// Name is empty when a numeric id has no entry.
	Name string
	UID  uint32
	GID  uint32
	// Groups are the supplementary groups, GID not repeated.
	Groups []uint32
	// Home and Shell are never empty.
	Home  string
	Shell string
}

// Label returns the name, or the number where there is none.
func (u User) Label() string {
	if u.Name != "" {
		return u.Name
	}
	return fmt.Sprint(u.UID)
}

// Defaults are the values of a sandbox that calls fall back to. The answers
// may change between calls: the host can configure the guest again.
type Defaults interface {
	// Env is the environment of every command. Callers don't change the map.
	Env() map[string]string
	// User is the user of calls that name none. Empty: root.
	User() string
	// Cwd is the working directory of calls that name none. Empty: the home of
	// the user.
	Cwd() string
}

// Fixed is a Defaults that never changes. The zero value is valid.
type Fixed struct {
	EnvMap   map[string]string
	UserName string
	Dir      string
}

// Env returns a copy of EnvMap.
func (f Fixed) Env() map[string]string { return maps.Clone(f.EnvMap) }

// User returns UserName.
func (f Fixed) User() string { return f.UserName }

// Cwd returns Dir.
func (f Fixed) Cwd() string { return f.Dir }

// Choice is what a call says about its user, strongest first.
type Choice struct {
	// Field is the user named in the request itself.
	Field string
	// Header is the user of the Authorization header.
	Header string
}

// HeaderUser returns the user part of a Basic authorization, or "". E2B's
// clients name the user of a call this way; the password part means nothing.
func HeaderUser(h http.Header) string {
	r := http.Request{Header: h}
	name, _, ok := r.BasicAuth()
	if !ok {
		return ""
	}
	return name
}

// Choose looks up the user that c asks for, else the default user, else root.
// An unknown user in the request field is Invalid, in the header
// Unauthenticated.
func (f *Files) Choose(c Choice, d Defaults) (User, error) {
	switch {
	case c.Field != "":
		u, err := f.Lookup(c.Field)
		if err != nil {
			return User{}, fault.BadField("user", "%v", err)
		}
		return u, nil
	case c.Header != "":
		u, err := f.Lookup(c.Header)
		if err != nil {
			return User{}, fault.As(fault.Unauthenticated, err)
		}
		return u, nil
	}
	name := d.User()
	if name == "" {
		name = "root"
	}
	u, err := f.Lookup(name)
	if err != nil {
		return User{}, fault.New(fault.Precondition, "the sandbox's default user: %v; name a user in the call", err)
	}
	return u, nil
}

// ExpandPath makes path absolute as the user's shell would: "~" and "~/x" are
// below the home, a relative path starts at base, or at the home when base is
// empty. The result is not cleaned; the kernel walks it.
func (u User) ExpandPath(path, base string) string {
	switch {
	case path == "~":
		return u.Home
	case strings.HasPrefix(path, "~/"):
		return join(u.Home, path[2:])
	case strings.HasPrefix(path, "/"):
		return path
	case base != "":
		return join(base, path)
	}
	return join(u.Home, path)
}

func join(dir, rest string) string {
	if rest == "" {
		return dir
	}
	return strings.TrimSuffix(dir, "/") + "/" + rest
}
