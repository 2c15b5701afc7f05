package cni

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

func TestWriteReplacesWhatIsOther(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net.d")
	for range 2 {
		if err := Write(dir, "10.42.0.0/24"); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, File)
	if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, "10.42.0.0/24"); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Plugins []struct{ Type string }
	}
	if err := json.Unmarshal(data, &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Plugins) != 2 || list.Plugins[0].Type != "bridge" {
		t.Fatalf("wrote %s", data)
	}
}

func TestMissingNamesPluginsThatCannotRun(t *testing.T) {
	dir := t.TempDir()
	if got := Missing(dir); len(got) != len(Plugins()) {
		t.Fatalf("missing in an empty directory: %v", got)
	}
	for _, p := range Plugins() {
		if err := os.WriteFile(filepath.Join(dir, p), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "portmap"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := Missing(dir); len(got) != 1 || got[0] != "portmap" {
		t.Fatalf("missing: %v", got)
	}
}
