package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// plan is how much is measured.
type plan struct {
	// Rows are the rows that are measured; empty: all.
	Rows  []string `json:"rows,omitempty"`
	Quick bool     `json:"quick,omitempty"`

	Creates    int   `json:"creates"`
	Execs      int   `json:"execs"`
	CLIExecs   int   `json:"cli_execs"`
	Copies     int   `json:"copies"`
	CopyBytes  int64 `json:"copy_bytes"`
	Pauses     int   `json:"pauses"`
	Deaths     int   `json:"deaths"`
	Sandboxes  []int `json:"idle_sandboxes"`
	IdleSec    int   `json:"idle_seconds"`
	MemoryMB   int   `json:"memory_mb"`
	DiskSizeMB int   `json:"disk_size_mb"`

	Warm   int   `json:"warm_creates"`
	Spares int   `json:"spare_creates"`
	Sleeps int   `json:"hibernations"`
	Forks  int   `json:"forks"`
	Bursts int   `json:"bursts"`
	AtOnce int   `json:"at_once"`
	Alone  int   `json:"alone_beside_a_burst"`
	Clones []int `json:"idle_clones"`
	Ready  int   `json:"creates_with_docker_up"`

	Rivals     int `json:"rounds_beside_others"`
	RivalExecs int `json:"execs_beside_others"`
}

func fullPlan() plan {
	return plan{
		Creates: 12, Execs: 150, CLIExecs: 30, Copies: 7, CopyBytes: 32 << 20, Pauses: 200, Deaths: 5,
		Sandboxes: []int{0, 1, 10, 20}, IdleSec: 30, MemoryMB: 128, DiskSizeMB: 5120,
		Warm: 40, Spares: 20, Sleeps: 12, Forks: 12, Bursts: 5, AtOnce: 20, Alone: 8, Clones: []int{1, 10, 40}, Ready: 6,
		Rivals: 10, RivalExecs: 30,
	}
}

// quickPlan is enough to see that the benchmark itself works.
func quickPlan() plan {
	return plan{
		Quick: true, Creates: 2, Execs: 10, CLIExecs: 2, Copies: 2, CopyBytes: 8 << 20, Pauses: 10, Deaths: 2,
		Sandboxes: []int{0, 1}, IdleSec: 3, MemoryMB: 128, DiskSizeMB: 5120,
		Warm: 4, Spares: 4, Sleeps: 2, Forks: 2, Bursts: 1, AtOnce: 5, Alone: 2, Clones: []int{1, 3}, Ready: 2,
		Rivals: 2, RivalExecs: 3,
	}
}

// row is something that can be measured by itself.
type row struct {
	name    string
	measure func(context.Context) error
}

func (b *bench) rows() []row {
	return []row{
		{"create", b.measureCreate},
		{"running", b.measureRunning},
		{"deaths", b.measureDeaths},
		{"idle", b.measureIdle},
		{"warm", b.measureWarm},
		{"spare", b.measureSpare},
		{"sleep", b.measureSleep},
		{"fork", b.measureFork},
		{"burst", b.measureBurst},
		{"memory", b.measureClones},
		{"docker", b.measureDocker},
		{"kubernetes", b.measureKubernetes},
		{"others", b.measureRivals},
	}
}

// chosen are the rows of the plan, in their order here.
func (b *bench) chosen() ([]row, error) {
	all := b.rows()
	if len(b.plan.Rows) == 0 {
		return all, nil
	}
	var names []string
	for _, r := range all {
		names = append(names, r.name)
	}
	for _, name := range b.plan.Rows {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("there is no row %q, only %s", name, strings.Join(names, ", "))
		}
	}
	return slices.DeleteFunc(all, func(r row) bool { return !slices.Contains(b.plan.Rows, r.name) }), nil
}
