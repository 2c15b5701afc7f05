// Package golden keeps what the guest agent costs in git: its size and what it
// links. Growing is a reviewed change; "make golden" writes the files anew.
package golden
