package auth

import "maps"

// Routes that are no RPC and have a rule of their own.
const (
	RouteMetrics     = "GET /metrics"
	RouteGuestHealth = "guest /health"
	RouteGuestFiles  = "guest /files"
	RouteGuestPort   = "guest port"
	RouteGuestTunnel = "guest tunnel"
	RouteGuestDocker = "guest docker"
)

// rules is the table: what role each RPC and route needs. What is not in it is
// closed. InspectSandbox is not for Read because it shows the environment of
// commands, where people keep secrets; of a guest's own APIs Read gets only
// what shows its health.
func rules() map[string]Role {
	all := hostRules()
	maps.Copy(all, guestRules())
	return all
}

// hostRules are those of hutchd's own API.
func hostRules() map[string]Role {
	return map[string]Role{
		"/hostagent.v1.HostAgentService/CreateSandbox":                   Admin,
		"/hostagent.v1.HostAgentService/DestroySandbox":                  Admin,
		"/hostagent.v1.HostAgentService/PauseSandbox":                    Admin,
		"/hostagent.v1.HostAgentService/ResumeSandbox":                   Admin,
		"/hostagent.v1.HostAgentService/Exec":                            Admin,
		"/hostagent.v1.HostAgentService/ListSandboxes":                   Read,
		"/hostagent.v1.SandboxService/InspectSandbox":                    Admin,
		"/hostagent.v1.SandboxService/KeepAlive":                         Admin,
		"/hostagent.v1.SandboxService/HibernateSandbox":                  Admin,
		"/hostagent.v1.SandboxService/TrimSandbox":                       Admin,
		"/hostagent.v1.SandboxService/WaitSandbox":                       Read,
		"/hostagent.v1.SandboxService/WatchEvents":                       Read,
		"/hostagent.v1.SandboxService/ReadLogs":                          Read,
		"/hostagent.v1.SandboxService/GetStats":                          Read,
		"/hostagent.v1.TemplateService/BuildTemplate":                    Admin,
		"/hostagent.v1.TemplateService/ImportTemplate":                   Admin,
		"/hostagent.v1.TemplateService/ListTemplates":                    Read,
		"/hostagent.v1.TemplateService/InspectTemplate":                  Read,
		"/hostagent.v1.TemplateService/RemoveTemplate":                   Admin,
		"/hostagent.v1.TemplateService/WarmTemplate":                     Admin,
		"/hostagent.v1.SnapshotService/ForkSandbox":                      Admin,
		"/hostagent.v1.SnapshotService/CreateSnapshot":                   Admin,
		"/hostagent.v1.SnapshotService/ListSnapshots":                    Read,
		"/hostagent.v1.SnapshotService/VerifySnapshot":                   Admin,
		"/hostagent.v1.SnapshotService/DeleteSnapshot":                   Admin,
		"/hostagent.v1.PortService/ListPorts":                            Read,
		"/hostagent.v1.HostService/GetHostInfo":                          Read,
		"/hostagent.v1.HostService/Diagnose":                             Read,
		"/grpc.health.v1.Health/Check":                                   Public,
		"/grpc.health.v1.Health/Watch":                                   Public,
		"/grpc.health.v1.Health/List":                                    Public,
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      Read,
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Read,

		RouteMetrics: Read,
	}
}

// guestRules are those of what a guest serves, through the proxy.
func guestRules() map[string]Role {
	return map[string]Role{
		"/arcbox.v1.AgentService/Ping":                Admin, // it may set the clock
		"/arcbox.v1.AgentService/GetSystemInfo":       Read,
		"/arcbox.v1.AgentService/EnsureRuntime":       Admin,
		"/arcbox.v1.AgentService/GetRuntimeStatus":    Read,
		"/arcbox.v1.AgentService/StartKubernetes":     Admin,
		"/arcbox.v1.AgentService/StopKubernetes":      Admin,
		"/arcbox.v1.AgentService/DeleteKubernetes":    Admin,
		"/arcbox.v1.AgentService/GetKubernetesStatus": Read,
		"/arcbox.v1.AgentService/GetKubeconfig":       Admin,
		"/arcbox.v1.AgentService/Shutdown":            Admin,
		"/arcbox.v1.AgentService/DiskTrim":            Admin,
		"/arcbox.v1.AgentService/MmapReadFile":        Admin,
		"/arcbox.v1.AgentService/WatchPorts":          Read,
		"/arcbox.v1.AgentService/FollowServiceLog":    Read,

		"/process.Process/List":        Admin,
		"/process.Process/Connect":     Admin,
		"/process.Process/Start":       Admin,
		"/process.Process/Update":      Admin,
		"/process.Process/StreamInput": Admin,
		"/process.Process/SendInput":   Admin,
		"/process.Process/SendSignal":  Admin,
		"/process.Process/CloseStdin":  Admin,

		"/filesystem.Filesystem/Stat":             Admin,
		"/filesystem.Filesystem/MakeDir":          Admin,
		"/filesystem.Filesystem/Move":             Admin,
		"/filesystem.Filesystem/ListDir":          Admin,
		"/filesystem.Filesystem/Remove":           Admin,
		"/filesystem.Filesystem/WatchDir":         Admin,
		"/filesystem.Filesystem/CreateWatcher":    Admin,
		"/filesystem.Filesystem/GetWatcherEvents": Admin,
		"/filesystem.Filesystem/RemoveWatcher":    Admin,

		RouteGuestHealth: Read,
		RouteGuestFiles:  Admin,
		RouteGuestPort:   Admin,
		RouteGuestTunnel: Admin,
		RouteGuestDocker: Admin,
	}
}
