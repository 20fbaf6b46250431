package accesslog

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/knhk/sidecar/server/envoywire"
)

// batch is what we read of one StreamAccessLogsMessage. Its slices point into the frame.
type batch struct {
	identified bool   // the message carries an identifier: the first of a stream does
	node       []byte // node id
	tcp        bool   // entries of TCP connections, which are none of ours
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
			b.tcp = false
			logs := envoywire.NewReader(r.Bytes)
			for logs.Next() {
				if logs.IsMessage(1) {
					b.entries = append(b.entries, logs.Bytes)
				}
			}
			r.Fail(logs.Err())
		case r.IsMessage(3):
			b.tcp = true
			b.entries = b.entries[:0]
		}
	}
	return r.Err()
}

// record is what we read of one HTTPAccessLogEntry. Its slices point into the frame; nil: the field was not there.
type record struct {
	// common_properties
	remote       address
	cluster      []byte
	flags        envoywire.Flags
	receipt, gap []byte
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
	details       []byte
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
		case 27:
			r.Bool(&e.intermediate)
		case 33:
			r.Int32(&e.logType)
		}
	}
	return r.Err()
}

// scanMetadata reads an envoy.config.core.v3.Metadata for our namespace. A later entry of the map replaces an earlier one.
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
		if string(key) != Namespace {
			continue
		}
		e.receipt, e.gap = nil, nil
		if n == 1 {
			r.Fail(e.scanStruct(value))
		} else {
			r.Fail(envoywire.EachValue(r.Bytes, e.scanStruct))
		}
	}
	return r.Err()
}

// scanStruct reads a google.protobuf.Struct, or a further piece of one.
func (e *record) scanStruct(b []byte) error {
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
			dst = &e.receipt
		case keyGap:
			dst = &e.gap
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
