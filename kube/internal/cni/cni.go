// Package cni writes the one network that pods have: a bridge, addresses from a file, ports of the node.
//
// It owns one file, 10-hutch.conflist, in containerd's directory of networks. It runs no plugin: containerd does. Tests need nothing.
package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hutch-run/hutch/kube/internal/pki"
)

// File is the name of the network's file; the first in order counts for containerd.
const File = "10-hutch.conflist"

// Bridge is the interface on which all pods are.
const Bridge = "cni0"

// Plugins are the programs that the network uses.
func Plugins() []string { return []string{"bridge", "host-local", "portmap", "loopback"} }

// Write puts the network of subnet into dir, unless it is there.
func Write(dir, subnet string) error {
	want, err := conflist(subnet)
	if err != nil {
		return fmt.Errorf("describe the network of pods: %w", err)
	}
	path := filepath.Join(dir, File)
	switch have, err := os.ReadFile(path); {
	case err == nil && bytes.Equal(have, want):
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read the network of pods: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the directory of networks: %w", err)
	}
	return pki.WriteFile(path, want, 0o644)
}

// Missing lists the plugins that dir lacks.
func Missing(dir string) []string {
	var out []string
	for _, p := range Plugins() {
		if st, err := os.Stat(filepath.Join(dir, p)); err != nil || st.Mode()&0o111 == 0 {
			out = append(out, p)
		}
	}
	return out
}

type object = map[string]any

func conflist(subnet string) ([]byte, error) {
	b, err := json.MarshalIndent(object{
		"cniVersion": "1.0.0",
		"name":       "hutch",
		"plugins": []object{{
			"type": "bridge", "bridge": Bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
			"ipam": object{
				"type":   "host-local",
				"ranges": [][]object{{{"subnet": subnet}}},
				"routes": []object{{"dst": "0.0.0.0/0"}},
			},
		}, {
			"type": "portmap", "capabilities": object{"portMappings": true},
		}},
	}, "", "  ")
	return append(b, '\n'), err
}
