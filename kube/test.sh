#!/usr/bin/env bash
# Tests of this module. usage: test.sh PROGRAM: the built hutch-kube, which is tried on loopback.
# Those of packages that need all of Kubernetes to be compiled use the same settings as build.sh, and so what it left in Go's cache.
set -euo pipefail
binary=$(realpath "$1")
cd "$(dirname "$0")"
export CGO_ENABLED=0 GOWORK=off HUTCH_KUBE=$binary
go test -trimpath -tags grpcnotrace -vet=off ./internal/... ./test
