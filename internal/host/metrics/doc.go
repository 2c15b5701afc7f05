// Package metrics is what hutchd tells Prometheus.
//
// It owns the names, help texts, labels and buckets of every metric, and the
// registry and handler that serve them. It never measures by itself: counts
// come in by the methods of Metrics, which other packages receive as small
// interfaces of their own, and levels are read from a Snapshot function at
// scrape time. There are no globals, and no label takes a value that a caller
// or a guest chooses. Tested by a golden file that holds every name, type and
// help text, and by reading values back over HTTP.
//
// The metrics, besides those of the Go runtime (go_*) and of the process
// (process_*):
//
//	name                                     type       labels   meaning
//	hutch_build_info                         gauge      version  always 1
//	hutch_sandboxes                          gauge      state    sandboxes in that state
//	hutch_slots_used, hutch_slots_total      gauge               network slots taken, and there are
//	hutch_create_total                       counter    result   creates that ended, by class of result ("ok", or a fault class)
//	hutch_create_seconds                     histogram  stage    time of each stage of a create, "total" for the whole
//	hutch_exec_total                         counter    result   collected execs that ended, by class of result
//	hutch_exec_seconds                       histogram           time of collected execs that ran to their end
//	hutch_proxy_connections                  gauge               requests, streams and tunnels to guests in flight
//	hutch_events_total                       counter    cause    changes of state, by who caused them
package metrics
