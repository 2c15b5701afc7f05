package link

import (
	"errors"
	"os"
	"testing"
)

func TestFindPort(t *testing.T) {
	root := t.TempDir()
	if _, err := findPort(root, PortName); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no port: %v, want ErrNotExist", err)
	}
	for dev, name := range map[string]string{"vport1p1": "other\n", "vport1p2": PortName + "\n"} {
		dir := root + "/sys/class/virtio-ports/" + dev
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/name", []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPort(root, PortName); err != nil || got != root+"/dev/vport1p2" {
		t.Errorf("by /sys: %q, %v", got, err)
	}
	if err := os.MkdirAll(root+"/dev/virtio-ports", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/dev/virtio-ports/"+PortName, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := findPort(root, PortName); err != nil || got != root+"/dev/virtio-ports/"+PortName {
		t.Errorf("by udev: %q, %v", got, err)
	}
	if _, err := findPort(root, "../x"); err == nil {
		t.Error("a name with a slash must be refused")
	}
}
