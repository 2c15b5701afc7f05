package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/template"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/delay"
)

// libvirt runs machines by a libvirtd of the benchmark's own, with the kernel and
// the files that hutch's have, driven by QEMU's guest agent.
type libvirt struct {
	dir    string
	mounts *ownMounts
	cmd    *exec.Cmd
	ended  chan struct{}
	virsh  *virsh
}

// The domains: one that is booted again and again, one that goes on.
const (
	domainBoot = "hutch-bench-boot"
	domainStay = "hutch-bench-stay"
)

// libvirtTime bounds libvirtd's start: it asks every QEMU for all that it can do.
const libvirtTime = 2 * time.Minute

//go:embed domain.xml
var domainXML string

func (b *bench) prepareLibvirt(ctx context.Context, told *rivalReport) (_ *rival, err error) {
	l := &libvirt{dir: filepath.Join(b.scratch, "libvirt"), ended: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.end())
		}
	}()
	if err := os.Mkdir(l.dir, 0o711); err != nil {
		return nil, err
	}
	image, err := agentImage(ctx, b.bare.disks["root"], l.dir)
	if err != nil {
		return nil, fmt.Errorf("make an image with a guest agent: %w", err)
	}
	if err := l.start(ctx); err != nil {
		return nil, err
	}
	for _, name := range []string{domainBoot, domainStay} {
		if err := l.define(b.bare, name, image); err != nil {
			return nil, err
		}
	}
	told.Commands = l.commands()
	boot := func(ctx context.Context) ([]time.Duration, error) { return l.boot(ctx, b.bare.disks["data"]) }
	if _, err := boot(ctx); err != nil {
		return nil, err
	}
	if err := l.blank(ctx, domainStay, b.bare.disks["data"]); err != nil {
		return nil, err
	}
	if _, err := l.virsh.do("start " + domainStay); err != nil {
		return nil, err
	}
	if err := l.virsh.execTrue(ctx, domainStay); err != nil {
		return nil, err
	}
	return &rival{
		starts: []side{{name: "libvirt, boot", every: 2, do: boot}},
		execs: []side{{name: "libvirt, guest-exec", do: func(ctx context.Context) ([]time.Duration, error) {
			took, err := clocked(func() error { return l.virsh.execTrue(ctx, domainStay) })
			return []time.Duration{took}, err
		}}},
		sleeps: []side{{name: "libvirt, save and restore", do: l.saveAndRestore}},
		end:    l.end,
	}, nil
}

// start starts libvirtd in directories of its own, where it finds no bus to tell
// anybody of its machines, and without a network.
func (l *libvirt) start(ctx context.Context) error {
	etc := filepath.Join(l.dir, "etc")
	if err := l.configure(etc); err != nil {
		return err
	}
	var err error
	l.mounts, err = newOwnMounts(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		for _, dir := range []string{"/run", "/var/lib", "/var/cache", "/var/log"} {
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
				return fmt.Errorf("hide %s: %w", dir, err)
			}
		}
		for from, to := range map[string]string{etc: "/etc/libvirt", etc + "/passwd": "/etc/passwd", etc + "/group": "/etc/group"} {
			if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("replace %s: %w", to, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(l.dir, "libvirtd.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command("libvirtd")
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := l.mounts.do(c.Start); err != nil {
		return err
	}
	l.cmd = c
	go func() { _ = c.Wait(); close(l.ended) }() // waited for in end
	return l.await(ctx)
}

// configure writes what libvirtd reads below /etc, with the user that the
// package of its system service would have made.
func (l *libvirt) configure(etc string) error {
	if err := os.Mkdir(etc, 0o755); err != nil {
		return err
	}
	files := map[string]string{
		"libvirtd.conf": "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0700\"\n",
		"qemu.conf": "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\nsecurity_driver = \"none\"\n" +
			"namespaces = []\ncgroup_controllers = []\nstdio_handler = \"file\"\n",
	}
	for name, user := range map[string]string{
		"passwd": "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n", "group": "libvirt-qemu:x:64055:\n",
	} {
		have, err := os.ReadFile("/etc/" + name)
		if err != nil {
			return err
		}
		if !strings.Contains("\n"+string(have), "\nlibvirt-qemu:") {
			have = append(have, user...)
		}
		files[name] = string(have)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// await waits until libvirtd answers.
func (l *libvirt) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, libvirtTime)
	defer cancel()
	for {
		var err error
		if l.virsh, err = startVirsh(l.mounts); err == nil {
			if _, err = l.virsh.do("version"); err == nil {
				return nil
			}
			err = errors.Join(err, l.virsh.end())
			l.virsh = nil
		}
		select {
		case <-l.ended:
			log, _ := os.ReadFile(filepath.Join(l.dir, "libvirtd.log"))
			return fmt.Errorf("libvirtd ended: %s", lastLine(log))
		default:
		}
		if stop := delay.For(ctx, 50*time.Millisecond); stop != nil {
			return fmt.Errorf("libvirtd does not answer: %w", err)
		}
	}
}

// define defines a domain that boots what the bare machine boots, but for its
// image and the word that asks for the guest agent.
func (l *libvirt) define(p barePlan, name, image string) error {
	after := func(flag string) string {
		if i := slices.Index(p.argv, flag); i >= 0 && i+1 < len(p.argv) {
			return p.argv[i+1]
		}
		return ""
	}
	t, err := template.New("domain").Parse(domainXML)
	if err != nil {
		return err
	}
	path := filepath.Join(l.dir, name+".xml")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	err = t.Execute(f, map[string]any{
		"Name": name, "MiB": p.memory >> 20, "Emulator": p.argv[0], "Kernel": p.kernel, "Initrd": p.initrd, "Cmdline": after("-append") + " qemu-ga",
		"KVM":  strings.HasPrefix(after("-accel"), "kvm"),
		"Root": image, "Data": l.data(name), "Console": filepath.Join(l.dir, name+".console"),
	})
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	_, err = l.virsh.do("define " + path)
	return err
}

func (l *libvirt) data(domain string) string { return filepath.Join(l.dir, domain+".data") }

func (l *libvirt) saved() string { return filepath.Join(l.dir, "saved") }

// blank gives a domain a data disk that is blank.
func (l *libvirt) blank(ctx context.Context, domain, blank string) error {
	return runIn(ctx, l.dir, "cp", "--sparse=always", blank, l.data(domain))
}

// boot starts a machine, to the result of its first program, and ends it.
func (l *libvirt) boot(ctx context.Context, blank string) ([]time.Duration, error) {
	if err := l.blank(ctx, domainBoot, blank); err != nil {
		return nil, err
	}
	took, err := clocked(func() error {
		if _, err := l.virsh.do("start " + domainBoot); err != nil {
			return err
		}
		return l.virsh.execTrue(ctx, domainBoot)
	})
	if err != nil {
		return nil, err
	}
	_, err = l.virsh.do("destroy " + domainBoot)
	return []time.Duration{took}, err
}

// saveAndRestore saves the machine that stays, which ends it, and brings it back
// to the result of a program.
func (l *libvirt) saveAndRestore(ctx context.Context) ([]time.Duration, error) {
	saved, err := clocked(func() error {
		_, err := l.virsh.do("save " + domainStay + " " + l.saved())
		return err
	})
	if err != nil {
		return nil, err
	}
	woke, err := clocked(func() error {
		if _, err := l.virsh.do("restore " + l.saved()); err != nil {
			return err
		}
		return l.virsh.execTrue(ctx, domainStay)
	})
	return []time.Duration{saved, woke}, err
}

func (l *libvirt) commands() [][]string {
	agent := []string{"qemu-agent-command", domainStay, `{"execute":"guest-exec","arguments":{"path":"/bin/true"}}`}
	return [][]string{{"libvirtd"}, {"virsh", "start", domainBoot}, append([]string{"virsh"}, agent...), {"virsh", "save", domainStay, l.saved()}, {"virsh", "restore", l.saved()}}
}

// end ends the machines and libvirtd.
func (l *libvirt) end() error {
	var err error
	if l.virsh != nil {
		for _, name := range []string{domainBoot, domainStay} {
			_, _ = l.virsh.do("destroy " + name) // it may not run
		}
		err = l.virsh.end()
	}
	if l.cmd != nil {
		if gone := l.cmd.Process.Signal(unix.SIGTERM); gone != nil && !errors.Is(gone, os.ErrProcessDone) {
			err = errors.Join(err, gone)
		}
		<-l.ended
	}
	if l.mounts != nil {
		l.mounts.close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), rivalEnd)
	defer cancel()
	return errors.Join(err, awaitNoProcess(ctx, l.dir), os.RemoveAll(l.dir))
}
