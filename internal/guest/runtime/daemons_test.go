package runtime

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain plays a daemon when this program is called by the name of one.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "containerd":
		playContainerd(argument("--address"))
	case "dockerd":
		playDockerd(argument("--config-file"))
	default:
		os.Exit(m.Run())
	}
}

func argument(name string) string { return os.Args[slices.Index(os.Args, name)+1] }

// mark adds a line to a file beside a daemon's socket.
func mark(socket, file, line string) {
	f, err := os.OpenFile(filepath.Join(filepath.Dir(socket), file), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = fmt.Fprintln(f, line)
	}
	if err != nil {
		panic(err)
	}
	f.Close()
}

func listen(socket string) net.Listener {
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		panic(err)
	}
	mark(socket, "starts", filepath.Base(os.Args[0]))
	return l
}

// playContainerd answers the health service, by the library of the standard
// rather than by the code under test.
func playContainerd(socket string) {
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		if r.URL.Path != "/grpc.health.v1.Health/Check" || r.ProtoMajor != 2 || r.Header.Get("Content-Type") != "application/grpc" {
			w.Header().Set("Grpc-Status", "12")
			return
		}
		w.Write([]byte{0, 0, 0, 0, 2, 8, 1})
		w.Header().Set("Grpc-Status", "0")
	})}
	server.Protocols.SetUnencryptedHTTP2(true)
	server.Serve(listen(socket))
}

// daemonConfig is what a played dockerd understands of its configuration.
type daemonConfig struct {
	Hosts       []string
	Containerd  string
	Pidfile     string
	LiveRestore bool `json:"live-restore"`
	Timeout     int  `json:"shutdown-timeout"`
}

func readDaemonConfig(file string) daemonConfig {
	b, err := os.ReadFile(file)
	if err != nil {
		panic(err)
	}
	var c daemonConfig
	if err := json.Unmarshal(b, &c); err != nil {
		panic(err)
	}
	return c
}

// playDockerd has one container. A file "mute" beside its socket keeps it from
// answering, a file "lost" from containerd.
func playDockerd(file string) {
	c := readDaemonConfig(file)
	socket := strings.TrimPrefix(c.Hosts[0], "unix://")
	if _, err := os.Stat(c.Containerd); err != nil {
		panic(err)
	}
	live := make(chan bool, 1)
	live <- c.LiveRestore
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGHUP, unix.SIGTERM)
	go func() {
		for s := range signals {
			c := readDaemonConfig(file)
			if s == unix.SIGTERM {
				mark(socket, "ends", fmt.Sprintf("live-restore %v, %v", c.LiveRestore, c.Timeout > 0))
				os.Exit(0)
			}
			<-live
			live <- c.LiveRestore
		}
	}()
	http.Serve(listen(socket), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for exists(filepath.Join(filepath.Dir(socket), "mute")) {
			<-time.After(time.Millisecond)
		}
		if r.URL.Path == "/_ping" {
			fmt.Fprint(w, "OK")
			return
		}
		now := <-live
		live <- now
		info := dockerInfo{ServerVersion: "1.2", Driver: "played", Containers: 2, ContainersRunning: 1, LiveRestoreEnabled: now}
		if exists(filepath.Join(filepath.Dir(socket), "lost")) {
			info.ContainerdCommit.ID = "N/A"
		}
		json.NewEncoder(w).Encode(info)
	}))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
