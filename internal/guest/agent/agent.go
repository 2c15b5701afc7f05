package agent

import (
	"fmt"
	"os"
	"time"
)

func Serve() error {
	b, _ := os.ReadFile("/proc/mounts")
	up, _ := os.ReadFile("/proc/uptime")
	fmt.Fprintf(os.Stderr, "SERVE UP uptime %s\n%s\n", up, b)
	time.Sleep(time.Hour)
	return nil
}
