package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Where cgroups are.
const (
	CgroupRoot = "/sys/fs/cgroup"
	// AgentCgroup holds PID 1 and the server. Its memory is protected.
	AgentCgroup = CgroupRoot + "/" + AgentCgroupName
	// AgentCgroupName is its name in CgroupRoot.
	AgentCgroupName = "agent"
	// ProcessCgroup is the parent of one cgroup for each process tree that a
	// caller started.
	ProcessCgroup = CgroupRoot + "/hutch"
	// ServiceCgroup is the parent of one cgroup for each service. It is made by
	// the first.
	ServiceCgroup = CgroupRoot + "/hutch-services"
)

// agentMemoryMin is what the kernel may not take from the agent under memory
// pressure.
const agentMemoryMin = 24 << 20

// makeAgentCgroup makes the cgroup that the server is born into.
func makeAgentCgroup() error { return os.Mkdir(AgentCgroup, 0o755) }

// delegateCgroups moves PID 1 to the agent's cgroup and makes the parent of all
// others, with every controller that the kernel has handed down.
func delegateCgroups() error {
	b, err := os.ReadFile(CgroupRoot + "/cgroup.controllers")
	if err != nil {
		return err
	}
	enable := "+" + strings.Join(strings.Fields(string(b)), " +")
	if err := writeCgroup(CgroupRoot, "cgroup.subtree_control", enable); err != nil {
		return err
	}
	if err := os.Mkdir(ProcessCgroup, 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	if err := writeCgroup(ProcessCgroup, "cgroup.subtree_control", enable); err != nil {
		return err
	}
	if err := writeCgroup(AgentCgroup, "cgroup.procs", "1"); err != nil {
		return err
	}
	return writeCgroup(AgentCgroup, "memory.min", fmt.Sprint(agentMemoryMin))
}

func writeCgroup(dir, file, value string) error {
	if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s to %q: %w", file, value, err)
	}
	return nil
}
