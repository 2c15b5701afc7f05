package template

import (
	"regexp"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// Version is the version of the template.json format written by this build.
const Version = 1

// Template is what sandboxes are made from: an image plus defaults.
type Template struct {
	Version     int               `json:"version"`
	Name        string            `json:"name"`
	ImageDigest string            `json:"image_digest"` // "sha256:..." of the image file
	Source      string            `json:"source"`       // "recipe:minimal", a reference, "import"
	Platform    string            `json:"platform"`     // "linux/amd64"
	Env         map[string]string `json:"env,omitempty"`
	User        string            `json:"user,omitempty"`
	Cwd         string            `json:"cwd,omitempty"`
	Entrypoint  []string          `json:"entrypoint,omitempty"`
	Cmd         []string          `json:"cmd,omitempty"`
	VCPUs       int               `json:"vcpus,omitempty"`        // 0: hutch's default
	MemoryMB    int               `json:"memory_mb,omitempty"`    // 0: hutch's default
	DiskMB      int               `json:"disk_mb,omitempty"`      // 0: hutch's default
	SizeBytes   int64             `json:"size_bytes"`             // of the image file
	StoredBytes int64             `json:"stored_bytes,omitempty"` // what it takes on disk, less where it has holes
	CreatedAt   time.Time         `json:"created_at"`
}

// MaxNameLen is the longest name of a template, in bytes.
const MaxNameLen = 128

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)

// CheckName refuses what is no name of a template: names are directories, so
// they are held to what is safe as one.
func CheckName(name string) error {
	if len(name) > MaxNameLen || !namePattern.MatchString(name) {
		return fault.BadField("name", "%q is no template name: 1 to %d lower-case letters, digits, dots, dashes and underscores, starting with a letter or digit",
			name, MaxNameLen)
	}
	return nil
}
