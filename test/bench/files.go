package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// write writes samples.json and what is made of it, each whole or not at all.
func (r *report) write(dir string) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "benchmarks"), 0o755); err != nil {
		return err
	}
	if err := writeWhole(filepath.Join(dir, "benchmarks/samples.json"), append(raw, '\n')); err != nil {
		return err
	}
	return r.writeText(dir)
}

// writeText writes benchmarks.md and its chart.
func (r *report) writeText(dir string) error {
	if err := writeWhole(filepath.Join(dir, chartFile), []byte(r.chart())); err != nil {
		return err
	}
	return writeWhole(filepath.Join(dir, "benchmarks.md"), []byte(r.text()))
}

func writeWhole(path string, content []byte) error {
	tmp := path + ".new"
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	_, _ = w.Write(content) // Flush tells
	if err := w.Flush(); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// rewrite writes benchmarks.md and its chart from the samples that are there.
func rewrite(dir string) error {
	raw, err := os.ReadFile(filepath.Join(dir, "benchmarks/samples.json"))
	if err != nil {
		return err
	}
	var r report
	if err := json.Unmarshal(raw, &r); err != nil {
		return fmt.Errorf("read samples.json: %w", err)
	}
	if r.Version != 1 {
		return fmt.Errorf("samples.json has format %d, want 1", r.Version)
	}
	return r.writeText(dir)
}
