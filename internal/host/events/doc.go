// Package events keeps what happened to the sandboxes of a host, numbered.
//
// It owns the sequence, which rises by one with every event and never goes
// back, not even when the host loses power, and the files that hold the latest
// events: at most two segments of JSON lines in one directory,
//
//	events-<first sequence, 20 digits>.jsonl
//	    {"hutch_events":1,"first":4711}      header with the format's version
//	    {"sequence":4711,...}                one sandbox.Event a line
//	cursor.json                              up to where numbers were given out
//
// Readers have a cursor each and read from the files: any number of them see
// the same events, nothing is taken away by reading, and a slow one holds
// nobody up. What is older than the files go back is told as a count.
//
// It never makes up an event and never refuses one: while the disk is full the
// latest are kept in memory and written later.
//
// Tested by its own unit tests, with torn, foreign and newer files, a full file
// system and a writer that is killed in a loop.
package events
