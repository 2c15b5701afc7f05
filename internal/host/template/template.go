package template

import "time"

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
	VCPUs       int               `json:"vcpus,omitempty"`     // 0: hutch's default
	MemoryMB    int               `json:"memory_mb,omitempty"` // 0: hutch's default
	SizeBytes   int64             `json:"size_bytes"`          // of the image file
	CreatedAt   time.Time         `json:"created_at"`
}
