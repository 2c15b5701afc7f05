#!/usr/bin/env bash
# Writes THIRD_PARTY.md: the modules that are compiled into hutch-kube, with their versions and licences.
set -euo pipefail
cd "$(dirname "$0")"
export CGO_ENABLED=0 GOWORK=off LC_ALL=C

# licence names what a module's licence file says.
licence() {
	local file text
	file=$(find "$1" -maxdepth 1 -type f \( -iname 'LICEN[SC]E*' -o -iname 'COPYING*' \) | sort | head -1)
	[[ -n $file ]] || { echo "none found"; return; }
	text=$(tr -s '[:space:]' ' ' <"$file")
	case $text in
	*"Apache License"*"Version 2.0"*) echo Apache-2.0 ;;
	*"Mozilla Public License"*) echo MPL-2.0 ;;
	*"Permission to use, copy, modify, and/or distribute"* | *"Permission to use, copy, modify, and distribute"*) echo ISC ;;
	*"Permission is hereby granted, free of charge"*) echo MIT ;;
	*"Redistribution and use in source and binary forms"*"either the names"* | *"Redistribution and use in source and binary forms"*"either the name"*) echo BSD-3-Clause ;;
	*"Redistribution and use in source and binary forms"*) echo BSD-2-Clause ;;
	*) echo "see $(basename "$file")" ;;
	esac
}

{
	echo "# What is compiled into hutch-kube"
	echo
	echo "Written by \`third-party.sh\`. Modules are unmodified; their sources are what the Go module proxy serves by these names, checked by go.sum. The Go standard library is BSD-3-Clause."
	echo
	echo "| module | version | licence |"
	echo "|---|---|---|"
	go list -deps -tags grpcnotrace -f '{{with .Module}}{{if not .Main}}{{with .Replace}}{{.Path}} {{.Version}} {{.Dir}}{{else}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}{{end}}' . ./internal/pause/program |
		sort -u | while read -r path version dir; do
		echo "| $path | $version | $(licence "$dir") |"
	done
} >THIRD_PARTY.md
