// Package version holds the version of this build.
//
// It owns the version string and nothing else; every binary prints it and the
// guest agent sends it in its hello. Tested by the golden output of the CLI.
package version

// Version is the released version, or the coming one with "-dev".
const Version = "0.1.0-dev"
