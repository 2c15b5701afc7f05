package qemu

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
)

func testState() stateHeader {
	return stateHeader{
		platform: platform{Version: "7.2.22", Machine: "pc-q35-7.2", Accel: "tcg", CPU: "max aes avx"},
		VCPUs:    2, MemoryMB: 128,
	}
}

func TestState(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	devices := bytes.Repeat([]byte("device "), 1000)
	n, err := writeState(f, testState(), devices)
	if err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadFile(f.Name())
	if err != nil || int64(len(all)) != n {
		t.Fatalf("%d bytes are told, %d there, %v", n, len(all), err)
	}
	for range 2 { // the first reader leaves it as it was
		h, got, err := readState(f)
		if err != nil || !bytes.Equal(got, devices) {
			t.Fatalf("%d bytes of devices, %v", len(got), err)
		}
		if diff := cmp.Diff(testState().platform, h.platform); diff != "" || h.VCPUs != 2 || h.MemoryMB != 128 {
			t.Errorf("%+v %s", h, diff)
		}
	}
	// Every bit counts, and every byte.
	for i := range all {
		if i > 600 && i%97 != 0 && i < len(all)-20 {
			continue
		}
		bad := bytes.Clone(all)
		bad[i] ^= 1
		if h, got, err := readBytes(t, bad); err == nil && h.fits(testSpec(), testCaps()) == nil && !bytes.Equal(got, devices) {
			t.Errorf("bit of byte %d is flipped: nobody minds", i)
		}
		if _, _, err := readBytes(t, all[:i]); err == nil {
			t.Errorf("cut to %d bytes: nobody minds", i)
		}
	}
	if _, _, err := readBytes(t, append(bytes.Clone(all), 0)); err == nil {
		t.Error("a byte more: nobody minds")
	}
}

func readBytes(t *testing.T, b []byte) (stateHeader, []byte, error) {
	t.Helper()
	f, err := sealedFile("state", b)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return readState(f)
}

func testSpec() vmm.Spec { return vmm.Spec{VCPUs: 2, MemoryMB: 128} }

func testCaps() vmm.Caps {
	return vmm.Caps{Version: "7.2.23", Machine: "pc-q35-7.2", Accel: "tcg", CPU: "max aes avx"}
}

func TestStateFits(t *testing.T) {
	if err := testState().fits(testSpec(), testCaps()); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*vmm.Spec, *vmm.Caps){
		"machine type is pc-q35-7.2, here it is pc-q35-8.0": func(_ *vmm.Spec, c *vmm.Caps) { c.Machine = "pc-q35-8.0" },
		"accelerator is tcg": func(_ *vmm.Spec, c *vmm.Caps) { c.Accel = "kvm" },
		`has ["avx"] that this one has not, and not ["bmi"]`: func(_ *vmm.Spec, c *vmm.Caps) { c.CPU = "max aes bmi" },
		"vcpus is 2, here it is 1":                           func(s *vmm.Spec, _ *vmm.Caps) { s.VCPUs = 1 },
		"MB is 128, here it is 256":                          func(s *vmm.Spec, _ *vmm.Caps) { s.MemoryMB = 256 },
	} {
		spec, caps := testSpec(), testCaps()
		change(&spec, &caps)
		if err := testState().fits(spec, caps); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestSealedFile(t *testing.T) {
	f, err := sealedFile("state", []byte("words"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write: %v", err)
	}
	b := make([]byte, 10)
	if n, _ := f.Read(b); string(b[:n]) != "words" {
		t.Errorf("from its beginning: %q", b[:n])
	}
}

func TestLoadEnd(t *testing.T) {
	for data, want := range map[string]string{
		`{"status": "completed"}`: "completed", `{"status": "failed"}`: "failed",
		`{"status": "active"}`: "", `{}`: "", ``: "", `[]`: "", `{"status": 1}`: "",
	} {
		if got := loadEnd(qmp.Event{Name: "MIGRATION", Data: []byte(data)}); got != want {
			t.Errorf("%s: %q, want %q", data, got, want)
		}
	}
	if got := loadEnd(qmp.Event{Name: "STOP", Data: []byte(`{"status": "completed"}`)}); got != "" {
		t.Errorf("another event: %q", got)
	}
}
