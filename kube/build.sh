#!/usr/bin/env bash
# Builds hutch-kube, once for what it is made of: the result is kept by the hash of its sources, its modules and Go.
# usage: build.sh [DIRECTORY]   puts hutch-kube and hutch-kube.json there; "build.sh --hash" prints the hash only.
set -euo pipefail
cd "$(dirname "$0")"
export CGO_ENABLED=0 GOWORK=off LC_ALL=C

sources() { find . -type f \( -name '*.go' ! -name '*_test.go' -o -name go.mod -o -name go.sum -o -name build.sh \) | sort; }
hash=$({ go version; go env GOOS GOARCH; sources; sources | xargs cat; } | sha256sum | cut -c1-32)
if [[ ${1:-} == --hash ]]; then
	echo "$hash"
	exit
fi
out=${1:-../bin}
mkdir -p "$out"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/hutch/kube
mkdir -p "$cache"

build() {
	local dir version
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	dir=$(mktemp -d "$cache/.build.XXXXXX")
	trap 'rm -rf "$dir"' EXIT
	echo "building hutch-kube ($version): 10 minutes of two processors when nothing of it is in Go's cache" >&2
	go build -trimpath -buildvcs=false -ldflags='-s -w' -o internal/pause/bin/pause ./internal/pause/program
	local v=k8s.io/component-base/version
	go build -trimpath -buildvcs=false -tags grpcnotrace -o "$dir/hutch-kube" \
		-ldflags="-s -w -X $v.gitVersion=$version -X $v.gitMajor=$(cut -d. -f1 <<<"${version#v}") -X $v.gitMinor=$(cut -d. -f2 <<<"$version") -X $v.gitTreeState=clean" .
	(cd "$dir" && sha256sum hutch-kube >hutch-kube.sha256)
	rm -rf "${cache:?}/$hash"
	mv "$dir" "$cache/$hash"
	trap - EXIT
	# The builds of older sources are of no use to anybody.
	find "$cache" -mindepth 1 -maxdepth 1 -type d ! -name "$hash" -mtime +7 -exec rm -rf {} +
}

exec 9>"$cache/lock"
flock 9
if ! (cd "$cache/$hash" 2>/dev/null && sha256sum --quiet -c hutch-kube.sha256); then
	build
fi
install -p -m 0755 "$cache/$hash/hutch-kube" "$out/.hutch-kube.new"
mv "$out/.hutch-kube.new" "$out/hutch-kube"
install -m 0644 kubernetes.json "$out/hutch-kube.json"
