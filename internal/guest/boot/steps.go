package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Where things are, in the initramfs and later.
const (
	modulesDir = "/modules" // boot's own modules, in load order
	imageDir   = "/image"
	dataDir    = "/data"
	newRoot    = "/newroot"
	runDir     = "/run/hutch" // after the switch; keeps the data disk visible
)

// DataDir is where the data disk is seen after the boot.
const DataDir = runDir + "/data"

// BoundDirs are kept on the data disk itself rather than on the overlay,
// because an overlay can't be the upper layer of another one, and Docker and
// Kubernetes make overlays there.
func BoundDirs() []string {
	return []string{
		"/var/lib/docker", "/var/lib/containerd", "/var/lib/rancher", "/var/lib/kubelet", "/var/lib/hutch-kube", "/var/lib/cni",
	}
}

// step is one named piece of the boot.
type step struct {
	name string
	run  func() error
	// optional steps may fail: the machine is of use without them.
	optional bool
}

// stageOne runs in the initramfs and leaves the overlay as "/".
func stageOne() []step {
	return []step{
		{"mount /proc", mountStep("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""), false},
		{"mount /sys", mountStep("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""), false},
		{"mount /dev", mountStep("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"), false},
		{"mount /run", mountStep("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"), false},
		{"load modules", loadModules, false},
		{"mount image", mountImage, false},
		{"mount data disk", mountData, false},
		{"mount overlay", mountOverlay, false},
		{"move mounts", moveMounts, false},
		{"switch root", switchRoot, false},
	}
}

// stageTwo runs with the overlay as "/", and is all that the server needs to
// talk to the host.
func stageTwo() []step {
	return []step{
		{"mount cgroup2", mountStep("cgroup2", CgroupRoot, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "nsdelegate,memory_recursiveprot"), false},
		{"make agent's cgroup", makeAgentCgroup, false},
		{"raise limits", raiseLimits, true},
	}
}

// stageThree is what programs need. It runs while the server meets the host;
// the server serves nothing that could see a piece of it missing before it is
// over.
func stageThree() []step {
	return []step{
		{"mount /dev/pts", mountStep("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"), false},
		{"mount /dev/shm", mountStep("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"), true},
		{"mount /dev/mqueue", mountStep("mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""), true},
		{"link /dev", linkDev, true},
		{"delegate cgroups", delegateCgroups, false},
		{"bind data directories", bindDataDirs, true},
		{"mount kernel modules", mountKernelModules, true},
		{"make /tmp", makeTmp, true},
		{"seed sysctls", seedSysctls, true},
	}
}

// runSteps runs steps in order. It returns the first failure of a step that
// the machine needs, and tells warn of the others.
func runSteps(steps []step, warn func(string)) error {
	for _, s := range steps {
		if err := guard(s.run); err != nil {
			if !s.optional {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			warn(fmt.Sprintf("%s: %v", s.name, err))
		}
	}
	return nil
}

// guard runs fn and turns a panic into an error.
func guard(fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return fn()
}

func mountStep(source, target, fstype string, flags uintptr, data string) func() error {
	return func() error { return mount(source, target, fstype, flags, data) }
}

// mount makes the target directory and mounts on it.
func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return &os.PathError{Op: "mount " + fstype, Path: target, Err: err}
	}
	return nil
}

func mountImage() error {
	dev, err := waitDisk("root")
	if err != nil {
		return err
	}
	return mount(dev, imageDir, "ext4", unix.MS_RDONLY|unix.MS_NOATIME, "noload")
}

// mountData mounts the data disk. It never makes a filesystem: the host hands
// over a formatted disk, and anything else may be somebody's data.
func mountData() error {
	dev, err := waitDisk("data")
	if err != nil {
		return err
	}
	if err := mount(dev, dataDir, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("%w (the data disk holds no usable ext4 filesystem; it was left untouched)", err)
	}
	return nil
}

func mountOverlay() error {
	for _, d := range []string{"upper", "work", "bind"} {
		if err := os.MkdirAll(filepath.Join(dataDir, d), 0o755); err != nil {
			return err
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work,redirect_dir=on,index=off", imageDir, dataDir, dataDir)
	return mount("overlay", newRoot, "overlay", unix.MS_NOATIME, opts)
}

// moveMounts takes what is mounted already along to the new root.
func moveMounts() error {
	for _, d := range []string{"/dev", "/proc", "/sys", "/run"} {
		target := newRoot + d
		if err := makeMountPoint(target); err != nil {
			return err
		}
		if err := unix.Mount(d, target, "", unix.MS_MOVE, ""); err != nil {
			return &os.PathError{Op: "move mount", Path: d, Err: err}
		}
	}
	data := newRoot + DataDir
	if err := os.MkdirAll(data, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(dataDir, data, "", unix.MS_MOVE, ""); err != nil {
		return &os.PathError{Op: "move mount", Path: dataDir, Err: err}
	}
	return os.Chmod(newRoot+runDir, 0o700)
}

// makeMountPoint makes path a directory. An image may carry a symlink there;
// following it could lead out of the new root, so it is replaced.
func makeMountPoint(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case err == nil && fi.IsDir():
		return nil
	case err == nil:
		if err := os.Remove(path); err != nil {
			return err
		}
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	return os.Mkdir(path, 0o755)
}

// switchRoot makes the overlay "/" and frees what the initramfs held, the
// running program aside.
func switchRoot() error {
	if err := os.RemoveAll(modulesDir); err != nil {
		return err
	}
	if err := os.Remove("/init"); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Unmount(imageDir, unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "detach", Path: imageDir, Err: err}
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return &os.PathError{Op: "move mount", Path: newRoot, Err: err}
	}
	if err := unix.Chroot("."); err != nil {
		return &os.PathError{Op: "chroot", Path: newRoot, Err: err}
	}
	return os.Chdir("/")
}

func linkDev() error {
	var errs []error
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
		"/dev/core": "/proc/kcore",
	} {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			errs = append(errs, err)
		}
	}
	if err := os.Remove("/dev/ptmx"); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	errs = append(errs, os.Symlink("pts/ptmx", "/dev/ptmx"))
	return errors.Join(errs...)
}

func bindDataDirs() error {
	var errs []error
	for _, d := range BoundDirs() {
		source := filepath.Join(runDir, "data/bind", strings.ReplaceAll(strings.Trim(d, "/"), "/", "-"))
		errs = append(errs, bind(source, d))
	}
	return errors.Join(errs...)
}

// bind mounts source on target. What the image has in target is copied by
// nobody: images keep these directories empty.
func bind(source, target string) error {
	if err := os.MkdirAll(source, 0o711); err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o711); err != nil {
		return err
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind mount", Path: target, Err: err}
	}
	return nil
}

func mountKernelModules() error {
	dev, err := waitDisk("modules")
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	target := "/lib/modules/" + unix.ByteSliceToString(u.Release[:])
	return mount(dev, target, "ext4", unix.MS_RDONLY|unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, "noload")
}

// makeTmp makes the directories that programs take for granted.
func makeTmp() error {
	var errs []error
	for _, d := range []string{"/tmp", "/var/tmp"} {
		if err := os.MkdirAll(d, 0o1777); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, unix.Chmod(d, 0o1777))
	}
	return errors.Join(errs...)
}

func raiseLimits() error {
	const files = 1 << 20
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files}); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return nil
}

// seedSysctls sets what differs from the kernel's defaults, each for a reason.
func seedSysctls() error {
	var errs []error
	for key, value := range map[string]string{
		"kernel/panic":                "-1",     // reboot at once: the VMM ends and the host is told
		"kernel/panic_on_oops":        "1",      // a kernel that lost its way must not go on
		"kernel/hung_task_panic":      "0",      // a paused VM looks hung to the watchdog
		"vm/overcommit_memory":        "1",      // runtimes map far more than they touch
		"fs/inotify/max_user_watches": "524288", // recursive watches of big trees
	} {
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
