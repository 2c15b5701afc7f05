package vmm

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
)

func good() Spec {
	return Spec{
		ID: "sb-1", VCPUs: 1, MemoryMB: 128, UID: 1000, Kernel: "/k", Dir: "/d", ConsoleLog: "/c", VMMLog: "/v",
		Disks: []Disk{{Serial: "root", Path: "/r"}}, NIC: &NIC{Tap: os.Stdin, MAC: "02:00:00:00:00:01"},
		Shares: []Share{{Tag: "share0", Conn: os.Stdin}},
	}
}

func TestCheck(t *testing.T) {
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		field  string
		change func(*Spec)
	}{
		"comma in id":      {"id", func(s *Spec) { s.ID = "a,b" }},
		"no vcpu":          {"vcpus", func(s *Spec) { s.VCPUs = 0 }},
		"many vcpus":       {"vcpus", func(s *Spec) { s.VCPUs = MaxVCPUs + 1 }},
		"little memory":    {"memory_mb", func(s *Spec) { s.MemoryMB = MinMemoryMB - 1 }},
		"much memory":      {"memory_mb", func(s *Spec) { s.MemoryMB = MaxMemoryMB + 1 }},
		"root":             {"uid", func(s *Spec) { s.UID = 0 }},
		"relative kernel":  {"kernel", func(s *Spec) { s.Kernel = "k" }},
		"no kernel":        {"kernel", func(s *Spec) { s.Kernel = "" }},
		"relative initrd":  {"initrd", func(s *Spec) { s.Initrd = "i" }},
		"relative netns":   {"netns", func(s *Spec) { s.Netns = "n" }},
		"relative log":     {"vmm_log", func(s *Spec) { s.VMMLog = "n" }},
		"no console log":   {"console_log", func(s *Spec) { s.ConsoleLog = "" }},
		"long dir":         {"dir", func(s *Spec) { s.Dir = "/" + strings.Repeat("d", maxDir) }},
		"newline":          {"cmdline", func(s *Spec) { s.Cmdline = "a\nb" }},
		"not ASCII":        {"cmdline", func(s *Spec) { s.Cmdline = "ä" }},
		"long cmdline":     {"cmdline", func(s *Spec) { s.Cmdline = strings.Repeat("a", maxCmdline+1) }},
		"no serial":        {"disks", func(s *Spec) { s.Disks[0].Serial = "" }},
		"option in serial": {"disks", func(s *Spec) { s.Disks[0].Serial = "a,readonly=off" }},
		"long serial":      {"disks", func(s *Spec) { s.Disks[0].Serial = strings.Repeat("a", 21) }},
		"relative disk":    {"disks", func(s *Spec) { s.Disks[0].Path = "r" }},
		"serial twice":     {"disks", func(s *Spec) { s.Disks = append(s.Disks, s.Disks[0]) }},
		"many disks":       {"disks", func(s *Spec) { s.Disks = make([]Disk, maxDisks+1) }},
		"no tap":           {"nic", func(s *Spec) { s.NIC.Tap = nil }},
		"no MAC":           {"nic", func(s *Spec) { s.NIC.MAC = "" }},
		"option in MAC":    {"nic", func(s *Spec) { s.NIC.MAC = "02:00:00:00:00:01,mq=on" }},
		"multicast MAC":    {"nic", func(s *Spec) { s.NIC.MAC = "03:00:00:00:00:01" }},
		"long MAC":         {"nic", func(s *Spec) { s.NIC.MAC = "02:00:00:00:00:00:00:01" }},
		"no tag":           {"shares", func(s *Spec) { s.Shares[0].Tag = "" }},
		"option in tag":    {"shares", func(s *Spec) { s.Shares[0].Tag = "a,queue-size=1" }},
		"long tag":         {"shares", func(s *Spec) { s.Shares[0].Tag = strings.Repeat("a", maxTag+1) }},
		"tag twice":        {"shares", func(s *Spec) { s.Shares = append(s.Shares, s.Shares[0]) }},
		"no connection":    {"shares", func(s *Spec) { s.Shares[0].Conn = nil }},
		"many shares":      {"shares", func(s *Spec) { s.Shares = make([]Share, maxShares+1) }},
		"MAC with dashes":  {"nic", func(s *Spec) { s.NIC.MAC = "02-00-00-00-00-01" }},
	} {
		s := good()
		tt.change(&s)
		err := s.Check()
		var bad *fault.Error
		if !errors.As(err, &bad) || bad.Class != fault.Invalid || bad.Field != tt.field {
			t.Errorf("%s: %v, want field %s", name, err, tt.field)
		}
	}
}

func TestCheckAdopted(t *testing.T) {
	s := Spec{ID: "sb-1", Dir: "/d", ConsoleLog: "/c", VMMLog: "/v"}
	if err := s.CheckAdopted(); err != nil {
		t.Error(err)
	}
	s.Dir = "d"
	if err := s.CheckAdopted(); !fault.Is(err, fault.Invalid) {
		t.Errorf("relative dir: %v", err)
	}
}
