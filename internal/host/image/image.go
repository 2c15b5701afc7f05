package image

import (
	"encoding/hex"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// Version is the version of the manifest.json format written by this build.
const Version = 1

// File names inside images/<hex digest>/.
const (
	rootfsName   = "rootfs.ext4"
	manifestName = "manifest.json"
)

// Digest names an image: "sha256:" and the 64 lower-case hex digits of the
// SHA-256 of its file.
type Digest string

const digestPrefix = "sha256:"

// ParseDigest checks that s is a digest.
func ParseDigest(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, digestPrefix)
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != 32 || strings.ToLower(h) != h {
		return "", fault.New(fault.Invalid, "%q is no image digest: want sha256: and 64 hex digits", s)
	}
	return Digest(s), nil
}

// Hex returns the hex digits, which are also the name of the image's directory.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), digestPrefix) }

// Config is what an image says about running it. It comes from the source as
// it is; nothing in it was checked to exist inside the image.
type Config struct {
	Env        map[string]string `json:"env,omitempty"`
	User       string            `json:"user,omitempty"` // "name", "uid", "name:group", "uid:gid"
	Cwd        string            `json:"cwd,omitempty"`
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
}

// Manifest describes an image. It is manifest.json beside the file.
type Manifest struct {
	Version int    `json:"version"`
	Digest  Digest `json:"digest"`
	// Size is the length of the file in bytes; Stored is what it took on disk
	// when it was written, less where there are holes.
	Size   int64 `json:"size"`
	Stored int64 `json:"stored"`
	// Entries is the number of paths in the image.
	Entries int64 `json:"entries"`
	// Source says where it came from, for people.
	Source   string    `json:"source"`
	Platform string    `json:"platform"` // "linux/amd64"
	Config   Config    `json:"config"`
	Created  time.Time `json:"created"` // when this host built it
}

// Progress is told what a build is doing: the step in words for people, and
// how far it is, in bytes unless the step says otherwise; total is 0 while it
// is not known. It is called often and from several goroutines; it must be
// quick and safe for that, and slow down what it draws itself.
type Progress func(step string, done, total int64)

func (p Progress) tell(step string, done, total int64) {
	if p != nil {
		p(step, done, total)
	}
}
