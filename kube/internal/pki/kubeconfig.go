package pki

import (
	"encoding/base64"
	"fmt"
	"os"
)

// Config says what a kubeconfig file points to.
type Config struct {
	Path   string
	Server string // https://HOST:PORT
	Leaf   string // the user's leaf
	Name   string // of cluster, user and context
}

// WriteConfig writes a kubeconfig that names the files of the leaf: its reader sees renewals.
func (d *Dir) WriteConfig(c Config) error {
	return d.writeConfig(c,
		fmt.Sprintf("certificate-authority: %q", d.Cert("ca")),
		fmt.Sprintf("client-certificate: %q, client-key: %q", d.Cert(c.Leaf), d.Key(c.Leaf)))
}

// ExportConfig writes a kubeconfig that carries the leaf itself: it can be copied elsewhere, and must be written again after a renewal.
func (d *Dir) ExportConfig(c Config) error {
	cert, err := os.ReadFile(d.Cert(c.Leaf))
	if err != nil {
		return fmt.Errorf("write %s: %w", c.Path, err)
	}
	key, err := os.ReadFile(d.Key(c.Leaf))
	if err != nil {
		return fmt.Errorf("write %s: %w", c.Path, err)
	}
	b64 := base64.StdEncoding.EncodeToString
	return d.writeConfig(c,
		"certificate-authority-data: "+b64(d.ca.pem),
		"client-certificate-data: "+b64(cert)+", client-key-data: "+b64(key))
}

func (d *Dir) writeConfig(c Config, authority, user string) error {
	return WriteFile(c.Path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: %[1]s, cluster: {server: %[2]q, %[3]s}}]
users: [{name: %[1]s, user: {%[4]s}}]
contexts: [{name: %[1]s, context: {cluster: %[1]s, user: %[1]s}}]
current-context: %[1]s
`, c.Name, c.Server, authority, user), 0o600)
}
