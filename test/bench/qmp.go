package main

import (
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// monitor speaks QMP; see QEMU's interop/qmp-spec.
type monitor struct {
	conn net.Conn
	in   *json.Decoder
}

func newMonitor(conn net.Conn) (*monitor, error) {
	m := &monitor{conn, json.NewDecoder(conn)}
	var greeting map[string]any
	if err := m.in.Decode(&greeting); err != nil {
		return nil, fmt.Errorf("QMP greeting: %w", err)
	}
	return m, m.do("qmp_capabilities", nil, nil)
}

// do runs a command, and reads what it returns into result unless that is nil.
// Events are skipped.
func (m *monitor) do(command string, arguments map[string]any, result any) error {
	if err := m.conn.SetDeadline(time.Now().Add(bareTimeout)); err != nil {
		return err
	}
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(m.conn).Encode(request); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	for {
		var reply struct {
			Event  string          `json:"event"`
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := m.in.Decode(&reply); err != nil {
			return fmt.Errorf("QMP %s: %w", command, err)
		}
		switch {
		case reply.Error != nil:
			return fmt.Errorf("QMP %s: %s", command, reply.Error)
		case reply.Event != "":
			continue
		case result == nil:
			return nil
		}
		return json.Unmarshal(reply.Return, result)
	}
}
