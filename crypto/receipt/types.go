package receipt

import "time"

// Prefixes of the leaves. A leaf is its prefix followed by one JSON object, nothing after it; a key statement and a seal are
// C2SP signed notes whose text is the prefix, one JSON object and a newline.
const (
	DecisionPrefix = "knhk/decision/v1\n"
	OutcomePrefix  = "knhk/outcome/v1\n"
	HeaderPrefix   = "knhk/header/v1\n"
	KeyPrefix      = "knhk/key/v1\n"
	SealPrefix     = "knhk/seal/v1\n"
)

// Hash is a SHA-256 value: a leaf hash or tree hash of RFC 6962.
type Hash [32]byte

// Decision is the first record of a transaction: what was decided, before the request went on.
type Decision struct {
	ID           string // receipt id: UUIDv7 "." instance
	Nonce        [16]byte
	Ordinal      uint64 // position in the recorder's write-ahead log; dense over decisions and outcomes
	Origin       string
	Time         time.Time // when it was decided; wall clock, nanoseconds
	Tenant       string
	Class        string // "R1", "W1"; "unknown" when no class was found
	Verdict      string // "admit", "park", "refuse"
	Reason       string
	Rule         string   // class rule or route that gave the class
	Authz        string   // authorisation rule that decided or failed; empty when none did
	Status       uint32   // of a refusal; 0 otherwise
	Tick         uint64   // tick number whose credit was taken; 0 when none was
	WaitedNS     uint64   // time spent parked
	DryRun       bool     // true: passed whatever Verdict says
	PolicyDigest [16]byte // first half of SHA-256 over the configuration in force
	Capture      string   // "lean" or "full"
	SPIFFEID     string   // client's identity from the connection
	Route        string
	Cluster      string   // cluster known at request time; may be empty
	TraceID      [16]byte // zero: no trace
	SpanID       [8]byte
	Parent       string // receipt id of the transaction that caused this one; only when authenticated
	Request      Hash   // commitment to method, scheme, authority, path, request id and source; see Evidence
}

// Outcome is the second record: what became of the transaction.
type Outcome struct {
	ID             string // receipt id of the decision
	Nonce          [16]byte
	Ordinal        uint64
	Origin         string
	Time           time.Time // when it was recorded
	Source         string    // "als", "ext_proc", "ext_authz", "recovery"
	Result         string    // policy.Result
	Status         uint32    // status sent downstream; 0 when none
	UpstreamStatus uint32    // 0 when not known apart from Status
	Flags          string    // Envoy response flags, short names, commas
	Details        string    // Envoy response_code_details or the reason of "unknown"
	Cluster        string
	UpstreamHost   string
	Attempts       uint32
	BytesIn        uint64
	BytesOut       uint64
	DurationNS     uint64
	CacheStatus    string
	Late           bool // a decision's outcome had been recorded as unknown before this one came
}

// Evidence is the preimage of a decision's commitment. It is kept apart from the records and can be erased without
// touching the log.
type Evidence struct {
	ID     string
	Salt   [32]byte
	Fields []Field // in the order they are committed to
}

// Field is one named value, exactly the bytes Envoy sent.
type Field struct {
	Name  string
	Value string
}

// Header kinds.
const (
	HeaderOpen      = "open"      // first of an incarnation
	HeaderBlock     = "block"     // commits to a block of records
	HeaderHeartbeat = "heartbeat" // nothing to seal
	HeaderFinal     = "final"     // last of an incarnation: clean stop, or written by the recovery after a crash
)

// Header is the log leaf that commits to a block of records.
type Header struct {
	Origin      string
	LogID       [16]byte // made with the log's directory
	Instance    string
	Incarnation [16]byte // random, one for each start of the process
	Seq         uint64   // dense within the incarnation, from 0
	Kind        string
	// Key is the log index of the key statement in force where the header stands: the last one before it.
	Key         uint64
	Prev        Hash      // RFC 6962 leaf hash of the previous header of this log id; zero for the very first
	Time        time.Time // when the block was closed
	Count       uint64    // records in the block
	Root        Hash      // RFC 6962 tree head over the records' leaf hashes; SHA-256 of nothing for Count 0
	First, Last uint64    // ordinals of the first and last record; both 0 for Count 0
	Recovered   bool      // written after a crash, from what the WAL held
	// Ordinals LostFrom up to, not including, LostTo may have been given to R1 decisions that did not survive a machine
	// crash; equal when none were.
	LostFrom, LostTo uint64
}

// Why a daily key ended, as its successor's statement says it. Only EndedRotated carries, and must carry, the signature of the
// key that ended.
const (
	EndedRotated   = "rotated"   // it signed its successor's statement
	EndedExpired   = "expired"   // it was past its age, and so could not sign
	EndedUntrusted = "untrusted" // time went back, or the log's directory was restored from an older copy
	EndedLost      = "lost"      // its private key is gone or disabled
	EndedRevoked   = "revoked"   // somebody else may hold it; a Revocation says so to those who verify
)

// KeyStatement is the leaf that ends one daily key and begins the next. It stands in the log at the index it names, so that
// the key before it signs checkpoints of at most FirstSize leaves and the key it brings in those of more: never two keys for
// one size. The leaf is a signed note by the identity key and, when Ended is EndedRotated, by the key that ended. The first leaf of
// a log is its first key statement.
type KeyStatement struct {
	Origin      string
	Key         string // verifier key ("name+hash+base64") of the daily key
	Predecessor string // verifier key of the key it follows; empty for the first
	Ended       string // why the predecessor ended, one of the Ended constants; empty for the first
	NotBefore   time.Time
	NotAfter    time.Time // at most 24 h after NotBefore
	FirstSize   uint64    // leaves before the statement, which is its own index; 0 for the first
	FirstRoot   Hash      // of the tree of FirstSize leaves
	Succeeds    *Quote    // the sealed log that this one takes over from; only in the first statement
}

// Quote is the end of a sealed log, as the first statement of its successor quotes it.
type Quote struct {
	Origin   string
	Identity string // verifier key of the sealed log's identity key; the successor has another
	Size     uint64 // of the sealed log, its seal not counted
	Root     Hash   // of the tree of Size leaves
}

// Seal is the last leaf of a log whose identity key must not be believed any more. The leaf is a signed note by the identity
// key and, when it can sign, the daily key in force. One checkpoint covers it; nothing may be signed after that. It is a
// revocation too: see Policy.Revoke.
type Seal struct {
	Origin string
	Key    uint64 // log index of the key statement in force
	Size   uint64 // leaves before the seal, which is its own index
	Root   Hash   // of the tree of Size leaves
	Time   time.Time
	Reason string // at most MaxReason bytes; may be empty
}

// Revocation tells those who verify that a daily key may be in the wrong hands, and what it signed by right. It stands in no
// log: it is a signed note by the identity key that is handed to verifiers, see Policy.Revoke.
type Revocation struct {
	Origin string
	Key    string // verifier key of the daily key
	// Size and Root are the last tree of that key the log stands by: FirstSize and FirstRoot of its successor's statement.
	Size   uint64
	Root   Hash
	Time   time.Time
	Reason string // at most MaxReason bytes; may be empty
}

// MaxReason bounds the reason of a seal or revocation.
const MaxReason = 1024
