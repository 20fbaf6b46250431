package receipt

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Describe tells a verified receipt as a story for people, one sentence or two to a line: when and where it was issued,
// who asked, what was decided and why, what became of it, where it stands in the log, which keys signed, and what remains
// unproved. Text that came from outside is quoted when it holds anything but plain printable characters.
func Describe(v *Verified) []string {
	d := &v.Decision
	_, instance, _ := ParseID(d.ID)
	lines := []string{
		fmt.Sprintf("Receipt %s was issued at %s by instance %s of log %s.", d.ID, stamp(d.Time), instance, shown(d.Origin)),
		describeClient(d),
		describeDecision(d),
	}
	if v.Pending() {
		lines = append(lines, "What became of it is pending: this bundle holds no outcome.")
	}
	for i := range v.Outcomes {
		lines = append(lines, describeOutcome(&v.Outcomes[i]))
	}
	for i, p := range v.Places {
		what := "The decision"
		if i > 0 {
			what = "The outcome"
		}
		h := &v.Headers[p.Header]
		recovered := ""
		if h.Recovered {
			recovered = ", sealed by recovery after a crash"
		}
		lines = append(lines, fmt.Sprintf("%s is record %d of %d in block %d, closed at %s%s; the block's header is entry %d of the log.",
			what, p.Index+1, h.Count, h.Seq, stamp(h.Time), recovered, h.Index))
	}
	lines = append(lines, fmt.Sprintf("All of it stands below the checkpoint of %d entries with root %s.", v.Size, v.Root))
	k := &v.Keys[0]
	follows := "it states no predecessor"
	if k.Predecessor != "" {
		follows = "it follows " + shortKey(k.Predecessor)
		if words, ok := ends[k.Ended]; ok {
			follows += ", " + words
		}
	}
	lines = append(lines,
		fmt.Sprintf("The checkpoint is signed by the log's identity key %s and by the daily key %s, in force from %s to %s; %s (entry %d).",
			shortKey(v.Identity), shortKey(k.Key), stamp(k.NotBefore), stamp(k.NotAfter), follows, k.Index))
	if s := v.Seal; s != nil {
		line := fmt.Sprintf("The log was sealed at %s, as its last entry says", stamp(s.Time))
		if s.Reason != "" {
			line += ": " + shown(s.Reason)
		}
		lines = append(lines, line+".")
	}
	for _, pin := range v.Pins {
		lines = append(lines, fmt.Sprintf("It is consistent with the log of %d entries that a revocation pins.", pin.Size))
	}
	for _, c := range v.Cosignatures {
		lines = append(lines, fmt.Sprintf("Witness %s cosigned it at %s.", shown(c.Name), stamp(c.Time)))
	}
	if len(v.Cosignatures) == 0 {
		lines = append(lines, "No witness cosigned it: times are the recorder's own, and others may have been shown another log.")
	}
	if e := v.Evidence; e != nil {
		var parts []string
		for _, f := range e.Fields {
			if f.Value != "" {
				parts = append(parts, shown(f.Name)+" "+shown(f.Value))
			}
		}
		lines = append(lines, "The evidence opens the decision's commitment: "+strings.Join(parts, ", ")+".")
	}
	return lines
}

func describeClient(d *Decision) string {
	var b strings.Builder
	b.WriteString("The request came ")
	if d.SPIFFEID != "" {
		b.WriteString("from " + shown(d.SPIFFEID))
	} else {
		b.WriteString("from a client without a SPIFFE identity")
	}
	say(&b, " of tenant ", d.Tenant)
	say(&b, " on route ", d.Route)
	say(&b, " for cluster ", d.Cluster)
	if d.TraceID != [16]byte{} {
		fmt.Fprintf(&b, ", trace %x", d.TraceID)
	}
	say(&b, ", caused by ", d.Parent)
	return b.String() + "."
}

func describeDecision(d *Decision) string {
	var b strings.Builder
	if d.Class == "unknown" {
		b.WriteString("No class was found for it, and it was")
	} else {
		b.WriteString("It was of class " + d.Class)
		say(&b, " by rule ", d.Rule)
		b.WriteString(" and was")
	}
	switch d.Verdict {
	case "admit":
		b.WriteString(" admitted")
	case "park":
		b.WriteString(" parked, then admitted")
	default:
		b.WriteString(" refused")
		if d.Status != 0 {
			b.WriteString(" with " + status(d.Status))
		}
	}
	if d.WaitedNS != 0 {
		b.WriteString(" after waiting " + nanoseconds(d.WaitedNS))
	}
	if words, ok := reasons[d.Reason]; ok {
		b.WriteString(": " + words)
	} else {
		b.WriteString(": " + d.Reason)
	}
	if d.Tick != 0 {
		fmt.Fprintf(&b, " (tick %d)", d.Tick)
	}
	b.WriteByte('.')
	if d.Authz != "" {
		words, ok := authorised[d.Reason]
		if !ok {
			words = " permits it"
		}
		b.WriteString(" Authorisation rule " + shown(d.Authz) + words + ".")
	}
	if d.DryRun {
		b.WriteString(" This was a dry run: it passed in any case.")
	}
	return b.String()
}

func describeOutcome(o *Outcome) string {
	var b strings.Builder
	if words, ok := results[o.Result]; ok {
		b.WriteString(words)
	} else {
		b.WriteString("It ended as " + o.Result)
	}
	if o.Status != 0 {
		b.WriteString(", the client got " + status(o.Status))
	}
	if o.UpstreamStatus != 0 {
		b.WriteString(", the upstream said " + status(o.UpstreamStatus))
	}
	say(&b, ", from ", o.UpstreamHost)
	say(&b, " in cluster ", o.Cluster)
	if o.Attempts > 1 {
		fmt.Fprintf(&b, " after %d attempts", o.Attempts)
	}
	if o.DurationNS != 0 {
		b.WriteString(", in " + nanoseconds(o.DurationNS))
	}
	if o.BytesIn != 0 || o.BytesOut != 0 {
		fmt.Fprintf(&b, ", %d bytes in, %d bytes out", o.BytesIn, o.BytesOut)
	}
	say(&b, ", flags ", o.Flags)
	say(&b, ", details ", o.Details)
	say(&b, ", cache ", o.CacheStatus)
	source, ok := sources[o.Source]
	if !ok {
		source = o.Source
	}
	fmt.Fprintf(&b, ". This was recorded at %s, as told by %s", stamp(o.Time), source)
	if o.Late {
		b.WriteString(", after the outcome had been recorded as unknown")
	}
	return b.String() + "."
}

// ends says of a key why it ended.
var ends = map[string]string{
	EndedRotated:   "which signed its statement",
	EndedExpired:   "which was past its age",
	EndedUntrusted: "which was given up as its time could not be trusted",
	EndedLost:      "which was lost",
	EndedRevoked:   "which was revoked",
}

// authorised says what the authorisation rule did that a decision names; with any other reason it permitted the request.
var authorised = map[string]string{"authz_forbidden": " forbids it", "authz_rule_error": " is the one that failed"}

// reasons, results and sources put the words of package policy into sentences. A word that is not here is shown as it is.
var (
	reasons = map[string]string{
		"ok":                 "a credit of the current tick was free",
		"waited":             "a credit of a later tick became free",
		"no_credit":          "no tick it could wait for had a credit left",
		"authz_forbidden":    "an authorisation rule forbids it",
		"authz_no_rule":      "no authorisation rule permits it",
		"authz_rule_error":   "an authorisation rule failed or cost too much",
		"unknown_class":      "no rule or route gave it a class",
		"class_rule_error":   "a class rule failed or cost too much",
		"body_mode_mismatch": "its class depends on the body, and Envoy did not send the body",
		"client_gone":        "the client left before there was a verdict",
		"log_unavailable":    "the receipt log could not take the decision",
		"log_full":           "the receipt log had no room for the decision and its outcome",
		"unsigned_too_long":  "the log had gone without a signature for too long",
		"log_sealed":         "the receipt log had ended",
		"stopping":           "the service was stopping",
		"internal":           "the service had a fault of its own",
	}
	results = map[string]string{
		"complete":     "The response reached its end",
		"local_reply":  "Envoy or the sidecar answered in place of the upstream",
		"upstream":     "The upstream could not be reached or broke off",
		"client_abort": "The client left before the end",
		"timeout":      "A timeout ended it",
		"aborted":      "It ended before its end, and which side did that is not known",
		"unknown":      "What became of it is unknown",
	}
	sources = map[string]string{
		"als":       "Envoy's access log",
		"ext_proc":  "Envoy's processing stream",
		"ext_authz": "Envoy's authorisation call",
		"recovery":  "recovery after a crash",
	}
)

func say(b *strings.Builder, words, value string) {
	if value != "" {
		b.WriteString(words)
		b.WriteString(shown(value))
	}
}

// shown quotes s unless it is plain: what clients chose must not move the cursor of whoever reads it.
func shown(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsGraphic(r) || unicode.IsSpace(r) || r == '"' || r == unicode.ReplacementChar
	}) {
		return strconv.QuoteToGraphic(s)
	}
	return s
}

func status(code uint32) string {
	if text := http.StatusText(int(code)); text != "" {
		return fmt.Sprintf("%d %s", code, text)
	}
	return strconv.FormatUint(uint64(code), 10)
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.000 UTC") }

// nanoseconds shows n as a duration; what exceeds 292 years is shown as a number.
func nanoseconds(n uint64) string {
	if n > 1<<63-1 {
		return fmt.Sprintf("%d ns", n)
	}
	return time.Duration(n).String()
}

// shortKey leaves the key itself out of a verifier key.
func shortKey(vkey string) string {
	name, rest, _ := strings.Cut(vkey, "+")
	hash, _, _ := strings.Cut(rest, "+")
	return shown(name) + "+" + hash
}
