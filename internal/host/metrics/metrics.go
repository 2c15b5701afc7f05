package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// resultOK is the result label of what succeeded.
const resultOK = "ok"

// stageTotal is the stage label of a whole create.
const stageTotal = "total"

// maxStages bounds the stage label: names beyond it are counted as "other", so
// that no mistake elsewhere can make the registry grow without end.
const maxStages = 32

// Levels is what is so at one instant.
type Levels struct {
	// Sandboxes counts the sandboxes of each state. States that are missing are 0.
	Sandboxes map[sandbox.State]int
	// SlotsUsed and SlotsTotal are network slots.
	SlotsUsed, SlotsTotal int
}

// Params is what New needs.
type Params struct {
	// Version is the version of this build.
	Version string
	// Snapshot reads the levels. It is called once a scrape, from any
	// goroutine, and must not block.
	Snapshot func() Levels
}

// Metrics holds every metric of hutchd. It is safe for concurrent use.
type Metrics struct {
	registry *prometheus.Registry

	creates      *prometheus.CounterVec
	createStages *stages
	execs        *prometheus.CounterVec
	execSeconds  prometheus.Histogram
	proxied      prometheus.Gauge
	events       *prometheus.CounterVec
}

// New makes the metrics and their registry.
func New(p Params) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		creates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hutch_create_total",
			Help: "Creates that ended, by result: ok, or the class of the error.",
		}, []string{"result"}),
		createStages: newStages(prometheus.HistogramOpts{
			Name:    "hutch_create_seconds",
			Help:    "Time of each stage of a create that succeeded; stage total is the whole.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}),
		execs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hutch_exec_total",
			Help: "Collected execs that ended, by result: ok (whatever the exit code), or the class of the error.",
		}, []string{"result"}),
		execSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "hutch_exec_seconds",
			Help:    "Time of collected execs that ran to their end.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800},
		}),
		proxied: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hutch_proxy_connections",
			Help: "Requests, streams and tunnels to guests in flight.",
		}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hutch_events_total",
			Help: "Changes of the state of sandboxes, by cause.",
		}, []string{"cause"}),
	}
	m.touch()
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		buildInfo(p.Version), newLevels(p.Snapshot),
		m.creates, m.createStages.vec, m.execs, m.execSeconds, m.proxied, m.events,
	)
	return m
}

// touch makes every series that can be named in advance appear with 0, so that
// rates and alerts work from the first scrape on.
func (m *Metrics) touch() {
	for _, result := range results() {
		m.creates.WithLabelValues(result)
		m.execs.WithLabelValues(result)
	}
	for _, cause := range causes() {
		m.events.WithLabelValues(string(cause))
	}
}

// CreateEnded counts a create that took the given time. stages are where the
// time of a successful one went.
func (m *Metrics) CreateEnded(err error, took time.Duration, stages []sandbox.Stage) {
	m.creates.WithLabelValues(resultOf(err)).Inc()
	if err != nil {
		return
	}
	m.createStages.observe(stageTotal, took)
	for _, s := range stages {
		m.createStages.observe(s.Name, s.Took)
	}
}

// ExecEnded counts a collected exec that took the given time.
func (m *Metrics) ExecEnded(err error, took time.Duration) {
	m.execs.WithLabelValues(resultOf(err)).Inc()
	if err == nil {
		m.execSeconds.Observe(took.Seconds())
	}
}

// EventHappened counts a change of state. A cause that hutch does not know is
// not counted.
func (m *Metrics) EventHappened(cause sandbox.Cause) {
	for _, known := range causes() {
		if cause == known {
			m.events.WithLabelValues(string(cause)).Inc()
		}
	}
}

// ProxyStarted and ProxyEnded bracket one request, stream or tunnel to a guest.
func (m *Metrics) ProxyStarted() { m.proxied.Inc() }

// ProxyEnded ends what ProxyStarted began.
func (m *Metrics) ProxyEnded() { m.proxied.Dec() }

// Handler serves the metrics in the formats that Prometheus reads. Who may
// read them is the caller's business.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		// One broken collector must not hide the others.
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
	})
}

func resultOf(err error) string {
	if err == nil {
		return resultOK
	}
	return fault.Of(err).String()
}

func results() []string {
	list := []string{resultOK}
	for _, c := range fault.Classes() {
		list = append(list, c.String())
	}
	return list
}

func causes() []sandbox.Cause {
	return []sandbox.Cause{sandbox.ByUser, sandbox.ByTTL, sandbox.ByGuest, sandbox.ByCrash, sandbox.ByHost}
}
