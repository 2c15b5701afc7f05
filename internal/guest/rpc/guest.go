package rpc

import (
	"context"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/guest/identity"
	"github.com/hutch-run/hutch/internal/guest/shares"
)

// Configure returns the answer to the link's call link.CallConfigure, which
// makes the guest a sandbox.
//
// It reads and writes hutch.guest.v1 by hand, field by field: the library's way
// begins with the descriptions of all messages, and a create would wait for
// that. A test holds it to the generated code.
func Configure(version string, to Identity) func(context.Context, []byte, func([]byte) error) error {
	return func(ctx context.Context, request []byte, send func([]byte) error) error {
		c, err := parseConfig(request)
		if err != nil {
			return fault.New(fault.Invalid, "read ConfigureRequest: %w", err)
		}
		facts, err := to.Configure(ctx, c)
		if err != nil {
			return err
		}
		return send(appendFacts(nil, version, facts))
	}
}

// Numbers of fields.
const (
	fieldSandboxID    = 1
	fieldMachineID    = 2
	fieldNetwork      = 3
	fieldUnixNanos    = 4
	fieldEntropy      = 5
	fieldEnv          = 6
	fieldDefaultUser  = 7
	fieldDefaultCwd   = 8
	fieldSetBootID    = 9
	fieldTestFeatures = 10
	fieldShares       = 11

	fieldTag      = 1
	fieldPath     = 2
	fieldReadOnly = 3

	fieldAddress = 1
	fieldGateway = 2
	fieldDNS     = 3
	fieldMTU     = 4

	fieldKey   = 1
	fieldValue = 2

	fieldAgentVersion  = 1
	fieldKernelVersion = 2
	fieldBootID        = 3
	fieldWarnings      = 4
	fieldShareErrors   = 5
)

// field is one field of a message: its number and its value, in one of two
// forms.
type field struct {
	number protowire.Number
	varint uint64
	bytes  []byte
}

// walk calls take for every field of b. Fields in forms that none of ours has
// are skipped.
func walk(b []byte, take func(field) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		f := field{number: number}
		switch kind {
		case protowire.VarintType:
			f.varint, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(b)
		default:
			f.number, n = 0, protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := take(f); err != nil {
			return err
		}
	}
	return nil
}

func parseConfig(b []byte) (identity.Config, error) {
	var c identity.Config
	err := walk(b, func(f field) error {
		switch f.number {
		case fieldSandboxID:
			c.ID = string(f.bytes)
		case fieldMachineID:
			c.MachineID = string(f.bytes)
		case fieldNetwork:
			return parseNetwork(f.bytes, &c.Network)
		case fieldUnixNanos:
			c.Host = clock.FromNanos(int64(f.varint))
		case fieldEntropy:
			c.Entropy = f.bytes
		case fieldEnv:
			return parseEnv(f.bytes, &c)
		case fieldDefaultUser:
			c.User = string(f.bytes)
		case fieldDefaultCwd:
			c.Cwd = string(f.bytes)
		case fieldSetBootID:
			c.BootID = string(f.bytes)
		case fieldTestFeatures:
			c.TestFeatures = f.varint != 0
		case fieldShares:
			return parseShare(f.bytes, &c)
		}
		return nil
	})
	return c, err
}

func parseShare(b []byte, c *identity.Config) error {
	var s shares.Share
	err := walk(b, func(f field) error {
		switch f.number {
		case fieldTag:
			s.Tag = string(f.bytes)
		case fieldPath:
			s.Path = string(f.bytes)
		case fieldReadOnly:
			s.ReadOnly = f.varint != 0
		}
		return nil
	})
	c.Shares = append(c.Shares, s)
	return err
}

func parseNetwork(b []byte, n *identity.Network) error {
	return walk(b, func(f field) error {
		switch f.number {
		case fieldAddress:
			n.Address = string(f.bytes)
		case fieldGateway:
			n.Gateway = string(f.bytes)
		case fieldDNS:
			n.DNS = append(n.DNS, string(f.bytes))
		case fieldMTU:
			n.MTU = uint32(f.varint)
		}
		return nil
	})
}

func parseEnv(b []byte, c *identity.Config) error {
	var key, value string
	err := walk(b, func(f field) error {
		switch f.number {
		case fieldKey:
			key = string(f.bytes)
		case fieldValue:
			value = string(f.bytes)
		}
		return nil
	})
	if c.Env == nil {
		c.Env = map[string]string{}
	}
	c.Env[key] = value
	return err
}

// appendFacts appends a ConfigureResponse.
func appendFacts(b []byte, version string, f identity.Facts) []byte {
	b = appendString(b, fieldAgentVersion, version)
	b = appendString(b, fieldKernelVersion, f.Kernel)
	b = appendString(b, fieldBootID, f.BootID)
	b = appendStrings(b, fieldWarnings, f.Warnings)
	return appendStrings(b, fieldShareErrors, f.ShareErrors)
}

func appendStrings(b []byte, number protowire.Number, all []string) []byte {
	for _, s := range all {
		b = protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
	}
	return b
}

func appendString(b []byte, number protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
}
