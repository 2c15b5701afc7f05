package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// What the daemons are given: memory that the kernel leaves to them, in bytes,
// and a place behind containers when it must kill.
const (
	containerdMemory = 32 << 20
	dockerdMemory    = 48 << 20
	oomScore         = -500
)

func (r *Runtime) containerdUnit() supervise.Unit {
	return supervise.Unit{
		Name: Containerd,
		Argv: []string{
			"containerd", "--config", r.at(containerdConfig), "--address", r.at(ContainerdSocket),
			"--root", r.at("/var/lib/containerd"), "--state", r.at("/run/containerd"),
		},
		Path: r.p.path, Env: r.proxies(),
		MemoryMin: containerdMemory, OOMScoreAdj: oomScore,
		Prepare: r.prepareContainerd,
		Ready: func(ctx context.Context) (string, error) {
			if err := r.health.check(ctx); err != nil {
				return "", err
			}
			return "socket reachable: " + r.health.socket, nil
		},
		StopTimeout: 5 * time.Second,
	}
}

func (r *Runtime) dockerdUnit() supervise.Unit {
	return supervise.Unit{
		Name: Dockerd, Needs: []string{Containerd},
		Argv: []string{"dockerd", "--config-file", r.at(dockerdConfig)},
		Path: r.p.path, Env: r.proxies(),
		MemoryMin: dockerdMemory, OOMScoreAdj: oomScore,
		Prepare: r.prepareDockerd,
		Ready:   r.dockerReady,
		// Containers get 10 s by default, see docker stop.
		BeforeStop: r.endContainers, StopTimeout: 30 * time.Second, KillRest: true,
		CleanUp: func(context.Context) error { return r.removeStale(dockerdPID) },
	}
}

func (r *Runtime) dockerReady(ctx context.Context) (string, error) {
	if err := r.docker.ping(ctx); err != nil {
		if _, found := reach(r.docker.socket); found == mute {
			return "", fmt.Errorf("socket connectable, API initializing: %s", r.docker.socket)
		}
		return "", err
	}
	if err := r.checkConnected(ctx, r.daemons()); err != nil {
		return "", err
	}
	return "API /_ping OK: " + r.docker.socket, nil
}

func (r *Runtime) removeStale(path string) error {
	if err := os.Remove(r.at(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// endContainers has dockerd end its containers with itself, within the time
// that ctx has: it leaves them running otherwise. Each gets its own signal and
// time.
func (r *Runtime) endContainers(ctx context.Context) error {
	info, err := r.docker.info(ctx)
	if err != nil {
		return fmt.Errorf("ask dockerd for its containers: %w", err)
	}
	if info.ContainersRunning+info.ContainersPaused == 0 || !info.LiveRestoreEnabled {
		return nil
	}
	limit := time.Minute
	if deadline, ok := ctx.Deadline(); ok {
		limit = time.Until(deadline)
	}
	if err := r.writeDockerdConfig(map[string]any{
		"live-restore": false, "shutdown-timeout": max(1, int(limit/time.Second)),
	}); err != nil {
		return err
	}
	st, _ := r.sup.Status(Dockerd)
	if st.PID == 0 {
		return nil
	}
	if err := unix.Kill(st.PID, unix.SIGHUP); err != nil {
		return fmt.Errorf("have dockerd read its configuration: %w", err)
	}
	return r.awaitReload(ctx)
}

// reloadLook is how often dockerd is asked whether it has read its
// configuration, which it tells nobody.
const reloadLook = 20 * time.Millisecond

func (r *Runtime) awaitReload(ctx context.Context) error {
	tick := time.NewTicker(reloadLook)
	defer tick.Stop()
	for {
		info, err := r.docker.info(ctx)
		if err == nil && !info.LiveRestoreEnabled {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(errors.New("dockerd keeps its containers running"), err)
		}
	}
}

// proxies is what the sandbox's environment says of proxies.
func (r *Runtime) proxies() []string {
	if r.p.Env == nil {
		return nil
	}
	var env []string
	for name, value := range r.p.Env() {
		switch strings.ToUpper(name) {
		case "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY":
			env = append(env, name+"="+value)
		}
	}
	return env
}
