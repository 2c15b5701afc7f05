package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// install installs those of Debian's packages that are missing, and returns all
// with their versions.
func install(ctx context.Context, packages []string) ([]string, error) {
	versions, missing := installed(ctx, packages)
	if len(missing) == 0 {
		return versions, nil
	}
	say("  installing %s", strings.Join(missing, " "))
	for _, args := range [][]string{{"update"}, append([]string{"install", "-y", "--no-install-recommends"}, missing...)} {
		c := exec.CommandContext(ctx, "apt-get", args...)
		c.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := c.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("apt-get %s: %w: %s", args[0], err, lastLine(out))
		}
	}
	versions, missing = installed(ctx, packages)
	if len(missing) > 0 {
		return nil, fmt.Errorf("%s: not installed, though apt-get says so", strings.Join(missing, " "))
	}
	return versions, nil
}

// installed returns "name version" of what is there, and the names of the rest.
func installed(ctx context.Context, packages []string) (versions, missing []string) {
	for _, p := range packages {
		out, _ := exec.CommandContext(ctx, "dpkg-query", "-W", "-f=${db:Status-Status} ${Version}", p).Output()
		if version, ok := strings.CutPrefix(string(out), "installed "); ok {
			versions = append(versions, p+" "+version)
		} else {
			missing = append(missing, p)
		}
	}
	return versions, missing
}

func lastLine(out []byte) string {
	text := strings.TrimSpace(string(out))
	return text[strings.LastIndex(text, "\n")+1:]
}
