package accesslog

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/knhk/sidecar/server/envoywire"
)

// batch is what we read of one StreamAccessLogsMessage. Its slices point into the frame.
type batch struct {
	identified bool   // the message carries an identifier: the first of a stream does
	node       []byte // node id
	tcp        bool   // entries are of TCP connections
	entries    [][]byte
}

// scan reads one StreamAccessLogsMessage. After an error b must not be used.
func (b *batch) scan(frame []byte) error {
	*b = batch{entries: b.entries[:0]}
	r := envoywire.NewReader(frame)
	for r.Next() {
		switch {
		case r.IsMessage(1):
			b.identified = true
			id := envoywire.NewReader(r.Bytes)
			for id.Next() {
				if !id.IsMessage(1) {
					continue
				}
				node := envoywire.NewReader(id.Bytes)
				for node.Next() {
					if node.Num == 1 {
						node.Text(&b.node)
					}
				}
				id.Fail(node.Err())
			}
			r.Fail(id.Err())
		case r.IsMessage(2): // oneof with 3: whichever comes last counts; pieces of the same one are joined
			r.Fail(b.logs(r.Bytes, false))
		case r.IsMessage(3):
			r.Fail(b.logs(r.Bytes, true))
		}
	}
	return r.Err()
}

// logs reads HTTPAccessLogEntries or TCPAccessLogEntries.
func (b *batch) logs(part []byte, tcp bool) error {
	if b.tcp != tcp {
		b.tcp, b.entries = tcp, b.entries[:0]
	}
	r := envoywire.NewReader(part)
	for r.Next() {
		if r.IsMessage(1) {
			b.entries = append(b.entries, r.Bytes)
		}
	}
	return r.Err()
}

// record is what we read of one HTTPAccessLogEntry or TCPAccessLogEntry. Its slices point into the frame; nil: the field was not there.
type record struct {
	tcp bool
	// common_properties
	remote       address
	cluster      []byte
	flags        envoywire.Flags
	told         [len(namespaces)]told
	route        []byte
	attempts     uint32
	intermediate bool
	logType      int32
	lastByte     duration // time_to_last_downstream_tx_byte
	duration     duration
	// request
	method       int32
	authority    []byte
	path         []byte
	requestID    []byte
	requestBytes uint64
	// response
	status        uint32
	responseBytes uint64
	cacheStatus   []byte
	details       []byte // of a connection: connection_termination_details
}

// namespaces are searched for receipt ids, in this order.
var namespaces = [...]string{NamespaceAuthz, Namespace, NamespaceAuthzConn}

// told is what stands in one of namespaces.
type told struct{ receipt, gap []byte }

// receipted reports whether there is a receipt id.
func (e *record) receipted() bool {
	for i := range e.told {
		if len(e.told[i].receipt) > 0 {
			return true
		}
	}
	return false
}

// toldBefore reports whether the id in namespace i stands in an earlier one too.
func (e *record) toldBefore(i int) bool {
	for _, t := range e.told[:i] {
		if bytes.Equal(t.receipt, e.told[i].receipt) {
			return true
		}
	}
	return false
}

// gap is why it passed without a receipt; empty if it did not.
func (e *record) gap() []byte {
	for i := range e.told {
		if g := e.told[i].gap; len(g) > 0 {
			return g
		}
	}
	return nil
}

// address is an envoy.config.core.v3.Address: a socket, a pipe or an internal listener.
type address struct {
	kind      protowire.Number // 1 socket, 2 pipe, 3 internal; 0 none
	host      []byte           // host, path or listener name
	port      uint32
	namedPort []byte
}

// duration is a google.protobuf.Duration.
type duration struct {
	seconds int64
	nanos   int32
}

// scan reads one HTTPAccessLogEntry. After an error e must not be used.
func (e *record) scan(b []byte) error {
	*e = record{}
	r := envoywire.NewReader(b)
	for r.Next() {
		switch {
		case r.IsMessage(1):
			r.Fail(e.scanCommon(r.Bytes))
		case r.IsMessage(3):
			r.Fail(e.scanRequest(r.Bytes))
		case r.IsMessage(4):
			r.Fail(e.scanResponse(r.Bytes))
		}
	}
	return r.Err()
}

// scanTCP reads one TCPAccessLogEntry. After an error e must not be used.
func (e *record) scanTCP(b []byte) error {
	*e = record{tcp: true}
	r := envoywire.NewReader(b)
	for r.Next() {
		switch {
		case r.IsMessage(1):
			r.Fail(e.scanCommon(r.Bytes))
		case r.IsMessage(2):
			c := envoywire.NewReader(r.Bytes)
			for c.Next() {
				switch c.Num {
				case 1:
					c.Uint64(&e.requestBytes)
				case 2:
					c.Uint64(&e.responseBytes)
				}
			}
			r.Fail(c.Err())
		}
	}
	return r.Err()
}

// scanCommon reads an AccessLogCommon.
func (e *record) scanCommon(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		switch r.Num {
		case 12, 13, 16, 17, 23:
			if !r.IsMessage(r.Num) {
				continue
			}
			switch r.Num {
			case 12:
				r.Fail(e.lastByte.scan(r.Bytes))
			case 13:
				r.Fail(e.remote.scan(r.Bytes))
			case 16:
				r.Fail(e.flags.Scan(r.Bytes))
			case 17:
				r.Fail(e.scanMetadata(r.Bytes))
			case 23:
				r.Fail(e.duration.scan(r.Bytes))
			}
		case 15:
			r.Text(&e.cluster)
		case 19:
			r.Text(&e.route)
		case 24:
			r.Uint32(&e.attempts)
		case 25:
			if e.tcp {
				r.Text(&e.details)
			}
		case 27:
			r.Bool(&e.intermediate)
		case 33:
			r.Int32(&e.logType)
		}
	}
	return r.Err()
}

// scanMetadata reads an envoy.config.core.v3.Metadata for our namespaces. A later entry of the map replaces an earlier one.
func (e *record) scanMetadata(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if !r.IsMessage(1) {
			continue
		}
		key, value, n, err := envoywire.MapEntry(r.Bytes)
		if err != nil {
			return err
		}
		for i := range namespaces {
			if string(key) != namespaces[i] {
				continue
			}
			t := &e.told[i]
			*t = told{}
			if n == 1 {
				r.Fail(t.scan(value))
			} else {
				r.Fail(envoywire.EachValue(r.Bytes, t.scan))
			}
		}
	}
	return r.Err()
}

// scan reads a google.protobuf.Struct, or a further piece of one.
func (t *told) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if !r.IsMessage(1) {
			continue
		}
		key, value, n, err := envoywire.MapEntry(r.Bytes)
		if err != nil {
			return err
		}
		var dst *[]byte
		switch string(key) {
		case keyReceipt:
			dst = &t.receipt
		case keyGap:
			dst = &t.gap
		default:
			continue
		}
		var v stringValue
		if n == 1 {
			err = v.scan(value)
		} else {
			err = envoywire.EachValue(r.Bytes, v.scan)
		}
		r.Fail(err)
		*dst = v.text
	}
	return r.Err()
}

// stringValue is a google.protobuf.Value if it is a string.
type stringValue struct{ text []byte }

// scan reads a Value, or a further piece of one: the member of its oneof that was set last counts.
func (v *stringValue) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		switch {
		case r.Num == 3:
			r.Text(&v.text)
		case (r.Num == 1 || r.Num == 4) && r.Type == protowire.VarintType,
			r.Num == 2 && r.Type == protowire.Fixed64Type,
			r.IsMessage(5), r.IsMessage(6):
			v.text = nil
		}
	}
	return r.Err()
}

// scanRequest reads an HTTPRequestProperties.
func (e *record) scanRequest(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		switch r.Num {
		case 1:
			r.Int32(&e.method)
		case 3:
			r.Text(&e.authority)
		case 5:
			r.Text(&e.path)
		case 9:
			r.Text(&e.requestID)
		case 12:
			r.Uint64(&e.requestBytes)
		}
	}
	return r.Err()
}

// scanResponse reads an HTTPResponseProperties.
func (e *record) scanResponse(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		switch r.Num {
		case 1:
			if r.IsMessage(1) { // UInt32Value
				v := envoywire.NewReader(r.Bytes)
				for v.Next() {
					if v.Num == 1 {
						v.Uint32(&e.status)
					}
				}
				r.Fail(v.Err())
			}
		case 3:
			r.Uint64(&e.responseBytes)
		case 4:
			if r.IsMessage(4) {
				r.Fail(e.scanResponseHeader(r.Bytes))
			}
		case 6:
			r.Text(&e.details)
		}
	}
	return r.Err()
}

// scanResponseHeader reads one entry of response_headers, a map of strings.
func (e *record) scanResponseHeader(entry []byte) error {
	var key, value []byte
	r := envoywire.NewReader(entry)
	for r.Next() {
		switch r.Num {
		case 1:
			r.Text(&key)
		case 2:
			r.Text(&value)
		}
	}
	if string(key) == "cache-status" {
		e.cacheStatus = value
	}
	return r.Err()
}

// scan reads an Address, or a further piece of one: another kind replaces what was read of the first.
func (a *address) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if r.Num > 3 || !r.IsMessage(r.Num) {
			continue
		}
		if a.kind != r.Num {
			*a = address{kind: r.Num}
		}
		v := envoywire.NewReader(r.Bytes)
		for v.Next() {
			if v.Num > 4 { // nor is 769 of kind 3 a field 1
				continue
			}
			switch a.kind<<8 | v.Num {
			case 1<<8 | 2, 2<<8 | 1, 3<<8 | 1:
				v.Text(&a.host)
			case 1<<8 | 3:
				if v.Type == protowire.VarintType {
					v.Uint32(&a.port)
					a.namedPort = nil
				}
			case 1<<8 | 4:
				if v.Type == protowire.BytesType {
					v.Text(&a.namedPort)
					a.port = 0
				}
			}
		}
		r.Fail(v.Err())
	}
	return r.Err()
}

// scan reads a Duration, or a further piece of one.
func (d *duration) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		switch r.Num {
		case 1:
			r.Int64(&d.seconds)
		case 2:
			r.Int32(&d.nanos)
		}
	}
	return r.Err()
}
