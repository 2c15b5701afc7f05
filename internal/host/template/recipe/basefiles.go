package recipe

// sbin lists the applets that scripts expect in /sbin or /usr/sbin.
func sbin() []string {
	return []string{
		"acpid", "adjtimex", "arp", "blkid", "blockdev", "brctl", "chroot", "depmod", "devmem", "fdisk", "findfs", "freeramdisk",
		"fsfreeze", "fstrim", "getty", "halt", "hwclock", "i2cdetect", "i2cdump", "i2cget", "i2cset", "i2ctransfer", "ifconfig",
		"ifdown", "ifup", "insmod", "ip", "klogd", "loadkmap", "losetup", "lsmod", "mdev", "mkdosfs", "mke2fs", "mkswap",
		"modinfo", "modprobe", "nameif", "nologin", "partprobe", "pivot_root", "poweroff", "reboot", "rmmod", "route", "start-stop-daemon",
		"swapoff", "swapon", "switch_root", "sysctl", "syslogd", "ubirename", "udhcpc", "udhcpd", "uevent", "vconfig", "watchdog",
	}
}

type baseFile struct {
	mode int64
	text string
}

// The account besides root that every recipe has, for commands that should
// not run as root.
const (
	userName = "user"
	userID   = 1000
)

// baseFiles are the files that minimal has of its own.
func baseFiles() map[string]baseFile {
	return map[string]baseFile{
		"etc/passwd": {0o644, `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
user:x:1000:1000::/home/user:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`},
		"etc/group": {0o644, `root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
kmem:x:15:
www-data:x:33:
shadow:x:42:
utmp:x:43:
video:x:44:
staff:x:50:
users:x:100:
user:x:1000:
nogroup:x:65534:
`},
		"etc/shadow": {0o600, `root:*:19000:0:99999:7:::
daemon:*:19000:0:99999:7:::
bin:*:19000:0:99999:7:::
sys:*:19000:0:99999:7:::
www-data:*:19000:0:99999:7:::
user:!:19000:0:99999:7:::
nobody:*:19000:0:99999:7:::
`},
		"etc/hosts":         {0o644, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
		"etc/nsswitch.conf": {0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\n"},
		"etc/shells":        {0o644, "/bin/sh\n/bin/ash\n"},
		"etc/profile": {0o644, `export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
export PAGER="${PAGER:-less}"
if [ "$(id -u)" = 0 ]; then PS1='\h:\w# '; else PS1='\h:\w\$ '; fi
for f in /etc/profile.d/*.sh; do
	[ -r "$f" ] && . "$f"
done
unset f
`},
		"etc/ld.so.conf": {0o644, "include /etc/ld.so.conf.d/*.conf\n"},
		"etc/machine-id": {0o444, ""},
	}
}

// baseDirs are the directories that have to be there, with their modes.
func baseDirs() map[string]int64 {
	return map[string]int64{
		"boot": 0o755, "dev": 0o755, "etc/profile.d": 0o755, "home": 0o755, "media": 0o755, "mnt": 0o755, "opt": 0o755,
		"proc": 0o755, "root": 0o700, "run": 0o755, "srv": 0o755, "sys": 0o755, "tmp": 0o1777, "usr/local/bin": 0o755,
		"usr/local/lib": 0o755, "usr/local/sbin": 0o755, "var/cache": 0o755, "var/lib": 0o755, "var/log": 0o755, "var/tmp": 0o1777,
		"var/www": 0o755,
	}
}
