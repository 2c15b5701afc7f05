package sandbox

import "time"

// RecordVersion is the version of the record format written by this build.
// Readers refuse a newer one; docs/on-disk.md tells the format.
const RecordVersion = 1

// Cause says who or what moved a sandbox.
type Cause string

// The causes.
const (
	ByUser  Cause = "user"  // a caller asked
	ByTTL   Cause = "ttl"   // its time of inactivity was over
	ByGuest Cause = "guest" // the guest powered off
	ByCrash Cause = "crash" // the VMM or the guest kernel died
	ByHost  Cause = "host"  // hutchd itself: start, stop, recovery
)

// Stage is how long one named stage of an operation took.
type Stage struct {
	Name string        `json:"name"`
	Took time.Duration `json:"took"`
}

// Process identifies a process beyond the reuse of its pid.
type Process struct {
	PID int `json:"pid"`
	// StartTicks is field 22 of /proc/<pid>/stat: clock ticks after boot.
	StartTicks uint64 `json:"start_ticks"`
	// BootID is the host's /proc/sys/kernel/random/boot_id at the start.
	BootID string `json:"boot_id"`
}

// Machine is what a record keeps of a live VM so that the next hutchd can
// adopt it.
type Machine struct {
	Driver  string  `json:"driver"`
	Accel   string  `json:"accel"`
	Process Process `json:"process"`
	UID     int     `json:"uid"`
}

// Record is all that hutchd keeps of one sandbox: its file is the database.
type Record struct {
	Version   int       `json:"version"`
	ID        ID        `json:"id"`
	Spec      Spec      `json:"spec"`
	State     State     `json:"state"`
	Cause     Cause     `json:"cause"`
	Reason    string    `json:"reason,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	ChangedAt time.Time `json:"changed_at"`
	ActiveAt  time.Time `json:"active_at"`

	// What the template said when the sandbox was made.
	ImageDigest string            `json:"image_digest"`
	Env         map[string]string `json:"env,omitempty"`
	User        string            `json:"user,omitempty"`
	Cwd         string            `json:"cwd,omitempty"`

	// Snapshot is what its machine was started from, or, when it booted from a
	// named snapshot's disk, that; Parent the sandbox that it was forked from.
	Snapshot string `json:"snapshot,omitempty"`
	Parent   ID     `json:"parent,omitempty"`

	KernelID string   `json:"kernel_id"`
	Slot     int      `json:"slot,omitempty"` // network slot index, 0: none
	HostIP   string   `json:"host_ip,omitempty"`
	Machine  *Machine `json:"machine,omitempty"`

	// ShareServers are the processes that serve Spec.Shares, in its order, while
	// there is a machine. One that has ended is zero.
	ShareServers []Process `json:"share_servers,omitempty"`

	MachineID     string  `json:"machine_id"`
	Boots         int     `json:"boots"`
	BootID        string  `json:"boot_id,omitempty"`
	AgentVersion  string  `json:"agent_version,omitempty"`
	KernelVersion string  `json:"kernel_version,omitempty"`
	Stages        []Stage `json:"stages,omitempty"`
}

// Event is one change of a sandbox's state.
type Event struct {
	Sequence int64     `json:"sequence"`
	Time     time.Time `json:"time"`
	ID       ID        `json:"id"`
	State    State     `json:"state"`
	Previous State     `json:"previous,omitempty"`
	Cause    Cause     `json:"cause"`
	Message  string    `json:"message,omitempty"`
}
