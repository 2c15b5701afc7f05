package rpc

import (
	"maps"
	"net/netip"
	"strings"
	"time"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// MaxExecOutput caps each stream of a collected exec, in bytes.
const MaxExecOutput = 8 << 20

func idOf(s string) (sandbox.ID, error) {
	id, err := sandbox.ParseID(s)
	if err != nil {
		return "", fault.BadField("sandbox_id", "%v", err)
	}
	return id, nil
}

// specOf converts a create. Zero values stay: the template and then hutch have
// defaults for them. An empty id stays empty.
func specOf(m *hostagentv1.CreateSandboxRequest) (id sandbox.ID, spec sandbox.Spec, err error) {
	if m.GetSandboxId() != "" {
		if id, err = idOf(m.GetSandboxId()); err != nil {
			return "", spec, err
		}
	}
	policy, err := policyOf(m.GetNetwork())
	if err != nil {
		return "", spec, err
	}
	onTimeout, err := onTimeoutOf(m.GetOnTimeout())
	if err != nil {
		return "", spec, err
	}
	return id, sandbox.Spec{
		Template:    m.GetTemplate(),
		VCPUs:       int(m.GetVcpus()),
		MemoryMB:    int(m.GetMemoryMb()),
		DiskMB:      int(m.GetDiskSizeMb()),
		Timeout:     time.Duration(m.GetTimeoutSec()) * time.Second,
		OnTimeout:   onTimeout,
		AutoResume:  m.GetAutoResume(),
		DefaultUser: m.GetDefaultUser(),
		DefaultEnv:  m.GetDefaultEnv(),
		Labels:      m.GetLabels(),
		Network:     policy,
		ColdStart:   m.GetColdStart(),

		TestFeatures: m.GetTestFeatures(),
		Shares:       sharesOf(m.GetShares()),
	}, nil
}

func sharesOf(all []*hostagentv1.HostShare) (shares []sandbox.Share) {
	for _, s := range all {
		shares = append(shares, sandbox.Share{HostPath: s.GetHostPath(), GuestPath: s.GetGuestPath(), ReadOnly: s.GetReadOnly()})
	}
	return shares
}

func onTimeoutOf(m hostagentv1.OnTimeout) (sandbox.OnTimeout, error) {
	switch m {
	case hostagentv1.OnTimeout_ON_TIMEOUT_UNSPECIFIED:
		return "", nil
	case hostagentv1.OnTimeout_ON_TIMEOUT_DESTROY:
		return sandbox.DestroyOnTimeout, nil
	case hostagentv1.OnTimeout_ON_TIMEOUT_PAUSE:
		return sandbox.PauseOnTimeout, nil
	case hostagentv1.OnTimeout_ON_TIMEOUT_HIBERNATE:
		return sandbox.HibernateOnTimeout, nil
	}
	return "", fault.BadField("on_timeout", "%d is no way to end inactivity", m)
}

func onTimeoutTo(o sandbox.OnTimeout) hostagentv1.OnTimeout {
	switch o {
	case sandbox.DestroyOnTimeout:
		return hostagentv1.OnTimeout_ON_TIMEOUT_DESTROY
	case sandbox.PauseOnTimeout:
		return hostagentv1.OnTimeout_ON_TIMEOUT_PAUSE
	case sandbox.HibernateOnTimeout:
		return hostagentv1.OnTimeout_ON_TIMEOUT_HIBERNATE
	}
	return hostagentv1.OnTimeout_ON_TIMEOUT_UNSPECIFIED
}

func policyOf(m *hostagentv1.NetworkPolicy) (sandbox.Policy, error) {
	var p sandbox.Policy
	switch m.GetMode() {
	case hostagentv1.NetworkPolicy_MODE_UNSPECIFIED, hostagentv1.NetworkPolicy_MODE_INTERNET:
		p.Mode = sandbox.ModeInternet
	case hostagentv1.NetworkPolicy_MODE_NONE:
		p.Mode = sandbox.ModeNone
	case hostagentv1.NetworkPolicy_MODE_ALLOW:
		p.Mode = sandbox.ModeAllow
	default:
		return p, fault.BadField("network.mode", "%d is no mode", m.GetMode())
	}
	for _, s := range m.GetAllow() {
		if !strings.Contains(s, "/") {
			s += "/32"
		}
		prefix, err := netip.ParsePrefix(s)
		if err != nil || !prefix.Addr().Is4() {
			return p, fault.BadField("network.allow", "%q is no IPv4 address or prefix", clip(s))
		}
		p.Allow = append(p.Allow, prefix.Masked().String())
	}
	return p, nil
}

func policyTo(p sandbox.Policy) *hostagentv1.NetworkPolicy {
	m := &hostagentv1.NetworkPolicy{Allow: p.Allow}
	switch p.Mode {
	case sandbox.ModeInternet:
		m.Mode = hostagentv1.NetworkPolicy_MODE_INTERNET
	case sandbox.ModeNone:
		m.Mode = hostagentv1.NetworkPolicy_MODE_NONE
	case sandbox.ModeAllow:
		m.Mode = hostagentv1.NetworkPolicy_MODE_ALLOW
	}
	return m
}

func execOf(m *hostagentv1.ExecRequest) guestconn.Exec {
	timeout := time.Duration(m.GetTimeoutSec()) * time.Second
	if timeout == 0 {
		timeout = sandbox.DefaultExecTimeout
	}
	return guestconn.Exec{
		Cmd:       m.GetCmd(),
		Args:      m.GetArgs(),
		Env:       m.GetEnvs(),
		Cwd:       m.GetCwd(),
		User:      m.GetUser(),
		Stdin:     m.GetStdin(),
		Timeout:   timeout,
		MaxOutput: MaxExecOutput,
	}
}

func resultOf(r guestconn.Result) *hostagentv1.ExecResponse {
	return &hostagentv1.ExecResponse{
		Stdout:          r.Stdout,
		Stderr:          r.Stderr,
		ExitCode:        int32(r.ExitCode),
		Signal:          r.Signal,
		TimedOut:        r.TimedOut,
		StdoutTruncated: r.StdoutTruncated,
		StderrTruncated: r.StderrTruncated,
		OomKilled:       r.OOMKilled,
	}
}

func stagesOf(stages []sandbox.Stage) []*hostagentv1.StageTime {
	var list []*hostagentv1.StageTime
	for _, s := range stages {
		list = append(list, &hostagentv1.StageTime{Name: s.Name, Micros: s.Took.Microseconds()})
	}
	return list
}

// infoOf is what a list shows of a sandbox at the instant now.
func infoOf(v lifecycle.View, now time.Time) *hostagentv1.SandboxInfo {
	active := v.ActiveAt
	if v.InFlight > 0 {
		active = now
	}
	return &hostagentv1.SandboxInfo{
		SandboxId:        string(v.ID),
		Status:           string(v.State),
		Template:         v.Spec.Template,
		Vcpus:            int32(v.Spec.VCPUs),
		MemoryMb:         int32(v.Spec.MemoryMB),
		HostIp:           v.HostIP,
		CreatedAtUnix:    unixSeconds(v.CreatedAt),
		LastActiveAtUnix: unixSeconds(active),
		TimeoutSec:       int32(v.Spec.Timeout / time.Second),
		Reason:           v.Reason,
		DiskSizeMb:       int32(v.Spec.DiskMB),
		Labels:           v.Spec.Labels,
	}
}

// unixSeconds is t in seconds, 0 for a time that was never set.
func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func recordOf(v lifecycle.View, now time.Time) *hostagentv1.SandboxRecord {
	env := maps.Clone(v.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, v.Spec.DefaultEnv)
	user := v.Spec.DefaultUser
	if user == "" {
		user = v.User
	}
	m := &hostagentv1.SandboxRecord{
		Info:            infoOf(v, now),
		Env:             env,
		DefaultUser:     user,
		DefaultCwd:      v.Cwd,
		Network:         policyTo(v.Spec.Network),
		ImageDigest:     v.ImageDigest,
		KernelId:        v.KernelID,
		VmmPid:          int32(v.Pid),
		Slot:            int32(v.Slot),
		AgentVersion:    v.AgentVersion,
		KernelVersion:   v.KernelVersion,
		BootId:          v.BootID,
		SnapshotId:      v.Snapshot,
		ParentSandboxId: string(v.Parent),
		Boots:           int32(v.Boots),
		InFlight:        int32(v.InFlight),
		CreateStages:    stagesOf(v.Stages),
		OnTimeout:       onTimeoutTo(v.Spec.OnTimeout),
		AutoResume:      v.Spec.AutoResume,
		Shares:          sharesTo(v.Spec.Shares),
	}
	if !v.ChangedAt.IsZero() {
		m.ChangedAtMs = v.ChangedAt.UnixMilli()
	}
	if v.Machine != nil {
		m.Vmm, m.Accel = v.Machine.Driver, v.Machine.Accel
	}
	return m
}

func sharesTo(all []sandbox.Share) (shares []*hostagentv1.HostShare) {
	for _, s := range all {
		shares = append(shares, &hostagentv1.HostShare{HostPath: s.HostPath, GuestPath: s.GuestPath, ReadOnly: s.ReadOnly})
	}
	return shares
}

// statesOf converts the states to wait for; none means those in which a
// sandbox does not run any more.
func statesOf(names []string) ([]sandbox.State, error) {
	if len(names) == 0 {
		return []sandbox.State{sandbox.Stopped, sandbox.Failed, sandbox.Broken, sandbox.Hibernated}, nil
	}
	var states []sandbox.State
	for _, name := range names {
		s := sandbox.State(name)
		if !known(s) {
			return nil, fault.BadField("status", "%q is no state; there are %v and %s", clip(name), sandbox.States(), sandbox.Gone)
		}
		if s != sandbox.Gone { // that ends every wait
			states = append(states, s)
		}
	}
	return states, nil
}

func known(s sandbox.State) bool {
	for _, k := range sandbox.States() {
		if s == k {
			return true
		}
	}
	return s == sandbox.Gone
}

func eventOf(e sandbox.Event) *hostagentv1.SandboxEvent {
	return &hostagentv1.SandboxEvent{
		Sequence:  e.Sequence,
		TimeMs:    e.Time.UnixMilli(),
		SandboxId: string(e.ID),
		Status:    string(e.State),
		Previous:  string(e.Previous),
		Cause:     string(e.Cause),
		Message:   e.Message,
	}
}

func statsTo(s Stats) *hostagentv1.GetStatsResponse {
	return &hostagentv1.GetStatsResponse{
		CpuMicros:      s.CPU.Microseconds(),
		RssBytes:       s.RSS,
		PssBytes:       s.PSS,
		GuestUsedBytes: s.GuestUsed,
		DiskBytes:      s.Disk,
		RxBytes:        s.RxBytes,
		TxBytes:        s.TxBytes,
		RxPackets:      s.RxPackets,
		TxPackets:      s.TxPackets,
	}
}

func defaultsOf(m *hostagentv1.TemplateDefaults) TemplateDefaults {
	return TemplateDefaults{
		Env: m.GetEnv(), User: m.GetUser(), Cwd: m.GetCwd(),
		VCPUs: int(m.GetVcpus()), MemoryMB: int(m.GetMemoryMb()), DiskMB: int(m.GetDiskSizeMb()),
	}
}

func templateTo(t TemplateInfo) *hostagentv1.Template {
	return &hostagentv1.Template{
		Name:          t.Name,
		ImageDigest:   t.ImageDigest,
		Source:        t.Source,
		Env:           t.Env,
		User:          t.User,
		Cwd:           t.Cwd,
		Entrypoint:    t.Entrypoint,
		Cmd:           t.Cmd,
		Vcpus:         int32(t.VCPUs),
		MemoryMb:      int32(t.MemoryMB),
		DiskSizeMb:    int32(t.DiskMB),
		SizeBytes:     t.SizeBytes,
		DiskBytes:     t.DiskBytes,
		CreatedAtUnix: unixSeconds(t.CreatedAt),
		Platform:      t.Platform,
	}
}
