package sandbox

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"regexp"
	"time"
)

// Defaults of a spec.
const (
	DefaultTemplate    = "minimal"
	DefaultVCPUs       = 1
	DefaultMemoryMB    = 512
	DefaultDiskMB      = 5120
	DefaultExecTimeout = 30 * time.Second
)

// MaxIDLen is the longest id, in bytes. It leaves room for a port number and a
// dash in one DNS label.
const MaxIDLen = 40

// ID names a sandbox on its host: lower-case letters, digits and dashes, with
// a letter or digit at both ends, at most MaxIDLen bytes. It is safe as a file
// name, a host name and part of a cgroup name.
type ID string

// NewID returns a fresh id: "sb-" and 16 hex digits.
func NewID() ID {
	var b [8]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return ID("sb-" + hex.EncodeToString(b[:]))
}

// ParseID checks that s is a valid id.
func ParseID(s string) (ID, error) {
	if len(s) > MaxIDLen || !regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`).MatchString(s) {
		return "", fmt.Errorf("%q is no sandbox id: 1 to %d lower-case letters, digits and dashes, not starting or ending with a dash", s, MaxIDLen)
	}
	return ID(s), nil
}

// Mode is the basic rule of a network policy.
type Mode string

// The modes.
const (
	ModeInternet Mode = "internet" // public addresses only
	ModeNone     Mode = "none"     // nothing
	ModeAllow    Mode = "allow"    // only the listed prefixes
)

// Policy says what a sandbox may reach. Allow holds IPv4 prefixes in CIDR form
// that are open besides what the mode gives.
type Policy struct {
	Mode  Mode     `json:"mode"`
	Allow []string `json:"allow,omitempty"`
}

// OnTimeout is what becomes of a sandbox at the end of its time of inactivity.
type OnTimeout string

// What can become of it.
const (
	DestroyOnTimeout   OnTimeout = "destroy"
	PauseOnTimeout     OnTimeout = "pause"     // it stays so until resumed or destroyed
	HibernateOnTimeout OnTimeout = "hibernate" // as well when it is paused then
)

// Share is a directory of the host that a sandbox sees as one of its own.
type Share struct {
	HostPath  string `json:"host_path"`
	GuestPath string `json:"guest_path"`
	ReadOnly  bool   `json:"read_only,omitempty"`
}

// Spec is what a caller asked for, with all defaults filled in. Two creates
// with the same id are the same request exactly when their specs are equal.
type Spec struct {
	Template    string            `json:"template"`
	VCPUs       int               `json:"vcpus"`
	MemoryMB    int               `json:"memory_mb"`
	DiskMB      int               `json:"disk_mb"`
	Timeout     time.Duration     `json:"timeout"`              // inactivity, 0: never
	OnTimeout   OnTimeout         `json:"on_timeout,omitempty"` // empty exactly when Timeout is 0
	DefaultUser string            `json:"default_user,omitempty"`
	DefaultEnv  map[string]string `json:"default_env,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Network     Policy            `json:"network"`
	// Shares is sorted by path in the guest. Such a sandbox always boots, and its
	// memory can't be written down.
	Shares []Share `json:"shares,omitempty"`
	// AutoResume has a use resume it when it is paused or hibernated.
	AutoResume bool `json:"auto_resume,omitempty"`
	// ColdStart asks for a boot, also where there is a warm template.
	ColdStart bool `json:"cold_start,omitempty"`
	// TestFeatures turns on what only tests need in the guest.
	TestFeatures bool `json:"test_features,omitempty"`
	// Purpose says what hutchd itself made it for; empty: a caller did. Such a
	// sandbox is not listed, and the next hutchd destroys it.
	Purpose string `json:"purpose,omitempty"`
}

// WithDefaults returns s with every zero value replaced by its default.
func (s Spec) WithDefaults() Spec {
	if s.Template == "" {
		s.Template = DefaultTemplate
	}
	if s.VCPUs == 0 {
		s.VCPUs = DefaultVCPUs
	}
	if s.MemoryMB == 0 {
		s.MemoryMB = DefaultMemoryMB
	}
	if s.DiskMB == 0 {
		s.DiskMB = DefaultDiskMB
	}
	if s.OnTimeout == "" && s.Timeout != 0 {
		s.OnTimeout = DestroyOnTimeout
	}
	if s.Network.Mode == "" {
		s.Network.Mode = ModeInternet
	}
	return s
}
