package metrics

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// buildInfo is the constant series that carries the version.
func buildInfo(version string) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "hutch_build_info",
		Help:        "The version of this hutchd; always 1.",
		ConstLabels: prometheus.Labels{"version": version},
	}, func() float64 { return 1 })
}

// levels reads a Snapshot at each scrape.
type levels struct {
	snapshot                    func() Levels
	sandboxes, used, totalSlots *prometheus.Desc
}

func newLevels(snapshot func() Levels) *levels {
	return &levels{
		snapshot:   snapshot,
		sandboxes:  prometheus.NewDesc("hutch_sandboxes", "Sandboxes, by state.", []string{"state"}, nil),
		used:       prometheus.NewDesc("hutch_slots_used", "Network slots that are taken.", nil, nil),
		totalSlots: prometheus.NewDesc("hutch_slots_total", "Network slots there are.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (l *levels) Describe(out chan<- *prometheus.Desc) {
	out <- l.sandboxes
	out <- l.used
	out <- l.totalSlots
}

// Collect implements prometheus.Collector.
func (l *levels) Collect(out chan<- prometheus.Metric) {
	now := l.snapshot()
	for _, state := range sandbox.States() {
		out <- prometheus.MustNewConstMetric(l.sandboxes, prometheus.GaugeValue, float64(now.Sandboxes[state]), string(state))
	}
	out <- prometheus.MustNewConstMetric(l.used, prometheus.GaugeValue, float64(now.SlotsUsed))
	out <- prometheus.MustNewConstMetric(l.totalSlots, prometheus.GaugeValue, float64(now.SlotsTotal))
}

// stages is a histogram by stage with a bound on the number of stages.
type stages struct {
	vec *prometheus.HistogramVec

	mu    sync.Mutex
	names map[string]bool // guarded by mu
}

func newStages(opts prometheus.HistogramOpts) *stages {
	return &stages{vec: prometheus.NewHistogramVec(opts, []string{"stage"}), names: map[string]bool{}}
}

func (s *stages) observe(name string, took time.Duration) {
	s.vec.WithLabelValues(s.bounded(name)).Observe(took.Seconds())
}

func (s *stages) bounded(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.names[name] {
		if len(s.names) >= maxStages {
			return "other"
		}
		s.names[name] = true
	}
	return name
}
