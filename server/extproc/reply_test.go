package extproc

import (
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/policy"
)

const testID = "01932c5e-8a4b-7c3d-9e2f-112233445566.a"

// wantMetadata is the dynamic metadata of a reply by the generated types.
func wantMetadata(fields map[string]string) *structpb.Struct {
	inner := map[string]*structpb.Value{}
	for k, v := range fields {
		inner[k] = structpb.NewStringValue(v)
	}
	return &structpb.Struct{Fields: map[string]*structpb.Value{Namespace: structpb.NewStructValue(&structpb.Struct{Fields: inner})}}
}

func decodeReply(t *testing.T, r *reply) *extprocv3.ProcessingResponse {
	t.Helper()
	var p extprocv3.ProcessingResponse
	if err := proto.Unmarshal(r.EncodeFrame(), &p); err != nil {
		t.Fatalf("decode reply: %v", err)
	}
	if len(p.ProtoReflect().GetUnknown()) > 0 {
		t.Errorf("reply has fields that ProcessingResponse does not: %x", p.ProtoReflect().GetUnknown())
	}
	return &p
}

// wantRefusal builds the refusal of d from the generated types.
func wantRefusal(d policy.Decision, status int32, after, body string) *extprocv3.ProcessingResponse {
	set := func(k, v string) *corev3.HeaderValueOption {
		return &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: k, RawValue: []byte(v)},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}
	}
	im := &extprocv3.ImmediateResponse{
		Status:  &typev3.HttpStatus{Code: typev3.StatusCode(status)},
		Headers: &extprocv3.HeaderMutation{SetHeaders: []*corev3.HeaderValueOption{set("content-type", "text/plain")}},
		Body:    []byte(body),
		Details: DetailsPrefix + string(d.Reason),
	}
	if after != "" {
		im.Headers.SetHeaders = append(im.Headers.SetHeaders, set("retry-after", after))
	}
	p := &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ImmediateResponse{ImmediateResponse: im}}
	if d.ID != "" {
		p.DynamicMetadata = wantMetadata(map[string]string{KeyReceipt: d.ID, KeyClass: d.Class.String()})
	}
	return p
}

// TestZeroReplyRefuses is what everything else in this package leans on.
func TestZeroReplyRefuses(t *testing.T) {
	want := wantRefusal(policy.Decision{Reason: policy.ReasonInternal}, 503, "", "refused: internal\n")
	if got := decodeReply(t, &reply{}); !proto.Equal(got, want) {
		t.Errorf("zero reply:\n got %v\nwant %v", got, want)
	}
	if got := decodeReply(t, &reply{wire: []byte{}}); !proto.Equal(got, want) {
		t.Errorf("reply without bytes:\n got %v\nwant %v", got, want)
	}
	for _, p := range []phase{phaseNone, 1, 8, 255} { // no such phase: nothing to let go on
		if r := proceed(p); len(r.wire) != 0 {
			t.Errorf("proceed(%d) lets something go on: %x", p, r.wire)
		}
		if r := proceedWith(p, policy.Decision{ID: testID}); len(r.wire) != 0 {
			t.Errorf("proceedWith(%d) lets something go on: %x", p, r.wire)
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		d      policy.Decision
		status int32
		after  string
		body   string
	}{
		{"no credit, its own status, seconds rounded up",
			policy.Decision{ID: testID, Class: policy.W1, Reason: policy.ReasonNoCredit, Status: 429, RetryAfter: 1001 * time.Millisecond},
			429, "2", "refused: no_credit, receipt " + testID + "\n"},
		{"a nanosecond is a second",
			policy.Decision{ID: testID, Class: policy.R1, Reason: policy.ReasonNoCredit, Status: 429, RetryAfter: 1},
			429, "1", "refused: no_credit, receipt " + testID + "\n"},
		{"whole seconds stay",
			policy.Decision{ID: testID, Reason: policy.ReasonStopping, Status: 503, RetryAfter: 3 * time.Second},
			503, "3", "refused: stopping, receipt " + testID + "\n"},
		{"nothing recorded, no id", policy.Decision{Reason: policy.ReasonLogUnavailable, Status: 503},
			503, "", "refused: log_unavailable\n"},
		{"a status that refuses nothing is not used", policy.Decision{Reason: policy.ReasonInternal, Status: 200},
			503, "", "refused: internal\n"},
		{"status by reason", policy.Decision{Reason: policy.ReasonNoCredit}, 429, "", "refused: no_credit\n"},
		{"a negative Retry-After is none", policy.Decision{Reason: policy.ReasonNoCredit, RetryAfter: -time.Second},
			429, "", "refused: no_credit\n"},
		{"an id over one length byte", policy.Decision{ID: strings.Repeat("x", 300), Reason: policy.ReasonStopping, Status: 503},
			503, "", "refused: stopping, receipt " + strings.Repeat("x", 300) + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := refuse(c.d)
			if got, want := decodeReply(t, &r), wantRefusal(c.d, c.status, c.after, c.body); !proto.Equal(got, want) {
				t.Errorf("got %v\nwant %v", got, want)
			}
		})
	}
}

// FuzzReplies compares the hand-written encoder with the generated decoder for ids and reasons of any length.
func FuzzReplies(f *testing.F) {
	f.Add(testID, "ok", uint8(2), int64(0), false)
	f.Add("", "no_credit", uint8(1), int64(time.Second), true)
	f.Add(strings.Repeat("i", 127), strings.Repeat("r", 128), uint8(0), int64(1), true)
	f.Add(strings.Repeat("i", 20000), "\xff", uint8(9), int64(-1), false)
	f.Fuzz(func(t *testing.T, id, reason string, class uint8, after int64, gap bool) {
		d := policy.Decision{
			ID: id, Class: policy.Class(class), Reason: policy.Reason(reason), RetryAfter: time.Duration(after), Gap: gap,
		}
		var meta *structpb.Struct
		switch {
		case id != "":
			fields := map[string]string{KeyReceipt: Text(id), KeyClass: d.Class.String()}
			if d.Passes() && d.Class == policy.ClassUnknown { // decided by another replica, which has told Envoy
				delete(fields, KeyClass)
			}
			meta = wantMetadata(fields)
		case gap:
			meta = wantMetadata(map[string]string{KeyGap: Text(reason)})
		}
		for p := phaseRequestHeaders; p <= phaseResponseTrailers; p++ {
			r := proceedWith(p, d)
			if got := decodeReply(t, &r); !proto.Equal(got.GetDynamicMetadata(), meta) || got.GetImmediateResponse() != nil {
				t.Errorf("phase %d: got %v", p, got)
			}
		}
		r := refuse(d)
		got := decodeReply(t, &r)
		im := got.GetImmediateResponse()
		if im == nil || im.GetStatus().GetCode() < 400 || !strings.HasPrefix(im.GetDetails(), DetailsPrefix) {
			t.Errorf("refusal: got %v", got)
		}
	})
}

// TestContinues checks that each phase is answered in its own field: Envoy takes another as a fault of the server.
func TestContinues(t *testing.T) {
	kind := func(p *extprocv3.ProcessingResponse) phase {
		switch p.GetResponse().(type) {
		case *extprocv3.ProcessingResponse_RequestHeaders:
			return phaseRequestHeaders
		case *extprocv3.ProcessingResponse_ResponseHeaders:
			return phaseResponseHeaders
		case *extprocv3.ProcessingResponse_RequestBody:
			return phaseRequestBody
		case *extprocv3.ProcessingResponse_ResponseBody:
			return phaseResponseBody
		case *extprocv3.ProcessingResponse_RequestTrailers:
			return phaseRequestTrailers
		case *extprocv3.ProcessingResponse_ResponseTrailers:
			return phaseResponseTrailers
		}
		return phaseNone
	}
	for p := phaseRequestHeaders; p <= phaseResponseTrailers; p++ {
		r := proceed(p)
		if got := kind(decodeReply(t, &r)); got != p {
			t.Errorf("phase %d is answered as %d", p, got)
		}
	}
}

func BenchmarkReply(b *testing.B) {
	d := policy.Decision{ID: testID, Class: policy.W1, Verdict: policy.Admit}
	b.Run("admit", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r := proceedWith(phaseRequestHeaders, d)
			_ = r.EncodeFrame()
		}
	})
	b.Run("refuse", func(b *testing.B) {
		d := policy.Decision{ID: testID, Class: policy.W1, Reason: policy.ReasonNoCredit, Status: 429, RetryAfter: time.Second}
		b.ReportAllocs()
		for b.Loop() {
			r := refuse(d)
			_ = r.EncodeFrame()
		}
	})
}
