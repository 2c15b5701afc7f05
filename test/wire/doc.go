// Package wire checks that hutch's protos keep every fact of the given ones:
// testdata/given.binpb (the two given interfaces) and testdata/e2b.binpb
// (E2B's guest protocol), as descriptor sets.
package wire
