// Package telemetry holds the names of everything knhk measures: metrics, their attributes and the values those can take.
//
// It promises that dashboards and alerts built on a name keep working: a name is never reused for something else. Attribute
// values are closed sets, never something a client chooses. Names follow OpenTelemetry's rules; Prometheus sees them with
// underscores and unit suffixes (knhk.decisions becomes knhk_decisions_total).
package telemetry

// Metrics.
const (
	Decisions        = "knhk.decisions"          // {decision}: verdicts given, by class, verdict and reason
	DecisionDuration = "knhk.decision.duration"  // s: from the request phase to the answer, waiting included, by class
	Outcomes         = "knhk.outcomes"           // {outcome}: outcomes reported, by source and result
	Unreceipted      = "knhk.unreceipted"        // {transaction}: seen in the access log without a decision, by kind
	Gaps             = "knhk.gaps"               // {transaction}: passed without a receipt, by who saw it
	Streams          = "knhk.extproc.events"     // {event}: what happened on ext_proc streams, by event
	AccessLogStreams = "knhk.accesslog.streams"  // {stream}: access log streams open now
	AccessLogEnded   = "knhk.accesslog.ended"    // {stream}: access log streams that ended: an Envoy epoch may have ended with unsent entries
	AccessLogUnheard = "knhk.accesslog.unheard"  // {interval}: ends of a time in which an Envoy worker's access log was not heard here
	Pending          = "knhk.receipts.pending"   // {receipt}: decisions that wait for their outcome
	Unsigned         = "knhk.log.unsigned"       // s: age of the oldest record under no signed checkpoint
	Blocks           = "knhk.log.blocks"         // {block}: blocks committed
	CheckpointSize   = "knhk.log.checkpoint"     // {leaf}: size of the latest signed checkpoint
	Refusing         = "knhk.log.refusing"       // 1 while the log refuses new decisions
	OutcomesLate     = "knhk.outcomes.late"      // {outcome}: came after "unknown" had been recorded
	OutcomesRepeated = "knhk.outcomes.repeated"  // {outcome}: second outcomes of a decision, dropped
	OutcomesForeign  = "knhk.outcomes.foreign"   // {outcome}: of decisions this replica does not know
	OutcomesUnknown  = "knhk.outcomes.unknown"   // {outcome}: recorded as unknown
	WALBytes         = "knhk.wal.size"           // By: bytes of write-ahead log in use
	WALSyncs         = "knhk.wal.syncs"          // {sync}: syncs of the write-ahead log
	DailyKeyLeft     = "knhk.key.daily.left"     // s: until the daily key refuses to sign
	DailyKeyAge      = "knhk.key.daily.age"      // s: since the daily key in force came in
	KeyChanges       = "knhk.key.changes"        // {change}: daily keys that came in, by why the one before ended
	KeyFailures      = "knhk.key.failures"       // {failure}: calls of the key stores that failed, by role, operation and kind
	SignDuration     = "knhk.key.sign.duration"  // s: signatures, waiting for the key store included, by role
	IdentityNotAfter = "knhk.identity.not_after" // s: Unix time at which the certificate in use expires
	IdentityUpdates  = "knhk.identity.updates"   // {update}: certificates taken into use
	IdentityErrors   = "knhk.identity.errors"    // {error}: renewals of the certificate that failed
	RefusedCalls     = "knhk.refused.calls"      // {call}: connections and calls of those who may not, by listener and cause
	Reloads          = "knhk.config.reloads"     // {reload}: configuration reloads, by result
)

// Attributes.
const (
	AttrClass    = "knhk.class"
	AttrVerdict  = "knhk.verdict"
	AttrReason   = "knhk.reason"
	AttrResult   = "knhk.result"
	AttrSource   = "knhk.source"
	AttrKind     = "knhk.kind"
	AttrEvent    = "knhk.event"
	AttrRole     = "knhk.role"
	AttrOp       = "knhk.operation"
	AttrListener = "knhk.listener"
	AttrCause    = "knhk.cause"
)
