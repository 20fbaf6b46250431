package main

// mutation is one change of the product that must not go unnoticed. old stands exactly once in file.
type mutation struct {
	name     string // area/what is taken out
	file     string
	old, new string
	pkg      string // folder of the test
	test     string // the test, or TEST/SUBTEST, that must fail
}

// Folders that appear more than once.
const (
	wal        = "region/wal"
	receiptlog = "region/receiptlog"
	receipt    = "crypto/receipt"
	soft       = "crypto/soft"
	kms        = "crypto/kms"
	rotation   = "crypto/rotation"
	bootstrap  = "envoy/bootstrap"
	spiffe     = "crypto/spiffe"
)

var mutations = []mutation{
	// Each call that makes something durable.
	{"fsync/wal-commit", wal + "/run.go", "if err = s.f.Sync(); err != nil {", "if err != nil {", wal, "TestCrashAndReplay"},
	{
		"fsync/wal-opening-group", wal + "/segment.go",
		"if err := seg.f.Sync(); err != nil {", "if err := error(nil); err != nil {",
		wal, "TestCrashAndReplay",
	},
	{
		"fsync/wal-new-segment", wal + "/segment.go",
		"err = f.Sync() // for speed", "err = nil // for speed",
		wal, "TestSegmentIsSyncedFirst",
	},
	{"fsync/wal-segment-name", wal + "/segment.go", "err := w.cfg.FS.SyncDir(w.cfg.Dir)", "err := error(nil)", wal, "TestCrashAndReplay"},
	{"fsync/wal-version", wal + "/open.go", "		err = f.Sync()\n", "", wal, "TestCrashAndReplay"},
	{"fsync/wal-version-name", wal + "/open.go", "return w.cfg.FS.SyncDir(w.cfg.Dir)", "return nil", wal, "TestCrashAndReplay"},
	{"fsync/wal-recovered", wal + "/open.go", "return r.f.Sync()", "return nil", wal, "TestFailedSyncIsNotRetried"},
	{
		"fsync/wal-fdatasync", wal + "/fs_linux.go",
		"err := unix.Fdatasync(int(f.Fd()))", "err := error(nil)",
		wal, "TestSyncReachesTheKernel",
	},
	{"fsync/wal-directory", wal + "/fs_unix.go", "errors.Join(d.Sync(), d.Close())", "d.Close()", wal, "TestSyncReachesTheKernel"},
	{
		"fsync/state-file", receiptlog + "/state.go",
		"errors.Join(err, f.Sync(), f.Close())", "errors.Join(err, f.Close())",
		receiptlog, "TestFileIsSynced",
	},
	{"fsync/state-name", receiptlog + "/state.go", "err = syncDir(filepath.Dir(path))", "err = nil", receiptlog, "TestFileIsSynced"},
	{"fsync/state-directory", receiptlog + "/state.go", "errors.Join(d.Sync(), d.Close())", "d.Close()", receiptlog, "TestFileIsSynced"},
	{
		"fsync/wal-before-seal", receiptlog + "/seal.go",
		"err := l.wal.Sync(context.WithoutCancel(ctx))", "err := error(nil)",
		receiptlog, "TestNothingIsSealedAheadOfTheWAL",
	},
	{
		"fsync/block", receiptlog + "/seal.go",
		"batch.Commit(pebble.Sync)", "batch.Commit(pebble.NoSync)",
		receiptlog, "TestBlockSurvivesPowerLoss",
	},
	{
		"fsync/daily-keys", receiptlog + "/keys.go",
		"err = b.Commit(pebble.Sync)", "err = b.Commit(pebble.NoSync)",
		receiptlog, "TestKeysSurvivePowerLoss",
	},
	{"fsync/soft-key", soft + "/file.go", "err = f.Sync()", "err = nil", soft, "TestFileIsSynced"},
	{"fsync/soft-key-name", soft + "/file.go", "return syncDir(dir)", "return nil", soft, "TestDirectoryIsSynced"},
	{"fsync/soft-new-directory", soft + "/file.go", "return syncDir(parent)", "return nil", soft, "TestNewDirectoryIsSynced"},
	{"fsync/soft-directory", soft + "/file.go", "return d.Sync()", "return nil", soft, "TestDirectoryIsSynced"},
	{"fsync/archive-key", kms + "/archive.go", "err = f.Sync()", "err = nil", kms, "TestFileIsSynced"},
	{"fsync/archive-key-name", kms + "/archive.go", "return syncDir(a.dir)", "return nil", kms, "TestDirectoryIsSynced"},
	{"fsync/archive-new-directory", kms + "/archive.go", "return syncDir(parent)", "return nil", kms, "TestNewDirectoryIsSynced"},
	{"fsync/archive-directory", kms + "/archive.go", "return d.Sync()", "return nil", kms, "TestDirectoryIsSynced"},
	{
		"fsync/export", "server/knhk/receipts.go",
		"errors.Join(export(cmd, f), f.Sync(), f.Close())", "errors.Join(export(cmd, f), f.Close())",
		"server/knhk", "TestExportIsSynced",
	},
	{
		"fsync/note", "server/knhk/keys.go",
		"errors.Join(err, n.f.Sync(), n.f.Close())", "errors.Join(err, n.f.Close())",
		"server/knhk", "TestNoteIsSynced",
	},

	// One owner.
	{
		"lock/wal", wal + "/fs_unix.go",
		"err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)", "err := unix.Access(f.Name(), unix.F_OK)",
		wal, "TestTwoOpens",
	},
	{
		"lock/state", receiptlog + "/state.go",
		"err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)", "err := unix.Access(f.Name(), unix.F_OK)",
		receiptlog, "TestOpenRefuses",
	},

	// What a log finds when it is opened.
	{
		"tail/below-durable", wal + "/recover.go",
		"case f.Next < f.durable:", "case false && f.Next < f.durable:",
		wal, "TestTailCutBehindAcknowledged",
	},
	{"tail/same-boot", wal + "/recover.go", "case f.SameBoot && behind:", "case false && f.SameBoot && behind:", wal, "TestAssemble"},
	{"tail/released-beyond-end", wal + "/recover.go", "case f.First > f.Next:", "case false && f.First > f.Next:", wal, "TestAssemble"},
	{"tail/oldest-segment", wal + "/recover.go", "from > f.First {", "false && from > f.First {", wal, "TestDamage"},
	{"tail/chained-segments", wal + "/recover.go", "s.opening.prev != end.number || ", "", wal, "TestAssemble"},
	{"fsync/state-new-directory", receiptlog + "/state.go", "return syncDir(parent)", "return nil", receiptlog, "TestNewDirectoryIsSynced"},
	{
		"fsync/state-dir-name", receiptlog + "/state.go",
		"if err := syncDir(filepath.Dir(dir)); err != nil {", "if err := error(nil); err != nil {",
		receiptlog, "TestNewDirectoryIsSynced",
	},
	{
		"fsync/wal-dir-name", wal + "/open.go",
		"if err := w.cfg.FS.SyncDir(filepath.Dir(w.cfg.Dir)); err != nil {", "if err := error(nil); err != nil {",
		wal, "TestNewLogIsSynced",
	},
	{"tail/wal-replaced", receiptlog + "/recover.go", "if err := meets(found, l.chain.Released); err != nil {", "if false {\n\t\tvar err error", receiptlog, "TestWALReplaced"},
	{
		"group/crc", wal + "/group.go",
		"if crc32.Checksum(b[8:], castagnoli) != ", "if false && crc32.Checksum(b[8:], castagnoli) != ",
		wal, "TestBitFlips",
	},
	{"group/segment-number", wal + "/group.go", " && h.segment == segment", "", wal, "TestGroupIsOfOnePlace"},
	{"group/log-id", wal + "/group.go", " && h.log == log", "", wal, "TestGroupIsOfOnePlace"},
	{"group/offset", wal + "/group.go", " && int64(h.offset) == off", "", wal, "TestGroupIsOfOnePlace"},
	{"group/dense-numbers", wal + "/recover.go", " || (s.opened && g.first != s.end)", "", wal, "TestScan"},
	{"lost/declared", wal + "/recover.go", "if ceiling > f.Next &&", "if false && ceiling > f.Next &&", wal, "TestCrashAndReplay"},
	{"lost/ceiling", wal + "/append.go", "left == 0 || ", "", wal, "TestCeiling"},
	{
		"lost/header", receiptlog + "/recover.go",
		"headerExtra{lostFrom: r.From, lostTo: r.To}", "headerExtra{lostFrom: 0 * r.From}",
		receiptlog, "TestMachineCrash",
	},
	{"wal/unknown-level", wal + "/append.go", "if level < Queued || level > Durable {", "if false {", wal, "TestRefusedAppends"},
	{
		"wal/latched-error", wal + "/append.go",
		"usable() error {\n	if w.err != nil {", "usable() error {\n	if false {",
		wal, "TestEveryCallFails",
	},
	{"wal/reserve", wal + "/append.go", "if w.headroom() < w.cfg.ReserveBytes+need {", "if false {", wal, "TestReserve"},
	{
		"wal/release-synced", wal + "/append.go",
		"released, end := w.durable, min(w.released, w.durable), w.next", "released, end := w.durable, w.released, w.next",
		wal, "TestReleaseAheadOfDurable",
	},

	// What the receipt log does before it says yes.
	{
		"log/waits-for-level", receiptlog + "/record.go",
		"if err := t.Wait(ctx); err != nil {", "if err := t.Wait(ctx); err != nil && false {",
		receiptlog, "TestFailedSync",
	},
	{"log/identity-key-changed", receiptlog + "/state.go", "if got != id.Identity {", "if false {", receiptlog, "TestOpenRefuses"},
	{
		"log/origin-changed", receiptlog + "/state.go",
		"id.Origin != want {", "false && id.Origin != want {",
		receiptlog, "TestOpenRefuses",
	},
	{"log/instance-changed", receiptlog + "/state.go", "if id.Instance != instance {", "if false {", receiptlog, "TestOpenRefuses"},
	{"log/version", receiptlog + "/state.go", "case string(b) != stateVersion:", "case false:", receiptlog, "TestOpenRefuses"},
	{
		"log/signs-after-fault", receiptlog + "/log.go",
		"l.identity = guardedSigner{identity, l.faulted}", "l.identity = identity",
		receiptlog, "TestFaultedLogSignsNothing",
	},
	{
		"log/unsigned-too-long", receiptlog + "/watch.go",
		"age > l.cfg.MaxUnsigned {", "false && age > l.cfg.MaxUnsigned {",
		receiptlog, "TestUnsigned",
	},
	{
		"log/continues-behind", receiptlog + "/recover.go",
		"if h.LogID == l.logID {", "if h.LogID == l.logID && false {",
		receiptlog, "TestStateBehindLog",
	},
	{"log/free-disk", receiptlog + "/watch.go", "if free < minFree {", "if false {", receiptlog, "TestFreeDisk"},
	{
		"log/free-disk-for-blocks", receiptlog + "/seal.go",
		"err == nil && free < sealFree+2*size {", "err == nil && false && free < sealFree+2*size {",
		receiptlog, "TestFreeDisk",
	},
	{"fsck/previous-header", receiptlog + "/fsck.go", "if h.Prev != a.prev {", "if false {", receiptlog, "TestFsckChain"},
	{"fsck/dense-seq", receiptlog + "/fsck.go", "case h.Seq != last.Seq+1:", "case false:", receiptlog, "TestFsckChain"},
	{"fsck/root", receiptlog + "/fsck.go", "Root() != h.Root {", "Root() != h.Root && false {", receiptlog, "TestFsckNames"},
	{
		"fsck/checkpoint-identity", receiptlog + "/fsck.go",
		"a.problem(\"checkpoint\", \"is not signed by the identity key", "a.problem(\"\", \"\", \"",
		receiptlog, "TestFsckNames",
	},

	// What an auditor checks.
	{
		"verify/origin-of-decision", receipt + "/verify.go",
		"if d.Origin != out.Origin {", "if false {",
		receipt, "TestAttacks/the_decision_of_another_log",
	},
	{
		"verify/origin-of-outcome", receipt + "/verify.go",
		"case o.Origin != d.Origin:", "case false:",
		receipt, "TestAttacks/the_outcome_of_another_log",
	},
	{
		"verify/origin-of-header", receipt + "/verify.go",
		"return fmt.Errorf(\"header %d: %w\", i, err)\n		}\n		if h.Origin != c.origin {", "return fmt.Errorf(\"header %d: %w\", i, err)\n		}\n		if false {",
		receipt, "TestAttacks/the_header_of_another_log",
	},
	{
		"verify/origin-of-key", receipt + "/keystatement.go",
		"if identity.Name() != ks.Origin {\n		return nil, k, ", "if false {\n		return nil, k, ",
		receipt, "TestAttacks/a_key_for_another_log",
	},
	{
		"verify/identity-key", receipt + "/policy.go",
		"torchwood.ThresholdPolicy(3,\n			torchwood.OriginPolicy(origin), torchwood.SingleVerifierPolicy(k.verifier), witnesses)",
		"torchwood.ThresholdPolicy(2,\n			torchwood.OriginPolicy(origin), witnesses)",
		receipt, "TestAttacks/no_identity_signature,_but_the_witness's",
	},
	{
		"verify/identity-key-of-statement", receipt + "/keystatement.go",
		"if len(n.Sigs) != len(known) || len(n.UnverifiedSigs) != 0 {", "if n == nil {",
		receipt, "TestAttacks",
	},
	{"verify/daily-key", receipt + "/verify.go", "case i == 0 && !s.signed:", "case false:", receipt, "TestAttacks/no_daily_signature"},
	{
		"verify/daily-key-signature", receipt + "/policy.go",
		"return k.verifier.Verify(c.text, l.sig)", "return true",
		receipt, "TestMutations",
	},
	{
		"verify/daily-key-end", receipt + "/verify.go",
		"if c.Time.After(out.Keys[0].NotAfter.Add(MaxSkew)) {", "if false {",
		receipt, "TestAttacks/a_daily_key_that_ended_before_a_witness_saw_its_checkpoint",
	},
	{
		"verify/identity-as-daily-key", receipt + "/keystatement.go",
		"if v != nil && v.verifier.KeyHash() == identity.KeyHash() {\n			return nil, k, ",
		"if v != nil && false {\n			return nil, k, ",
		receipt, "TestAttacks",
	},
	{
		"verify/predecessor", receipt + "/verify.go",
		"later.Predecessor == \"\" || later.Predecessor != s.Key", "false",
		receipt, "TestAttacks/a_key_that_is_not_the_predecessor",
	},
	{
		"verify/log-proof", receipt + "/verifier.go",
		"err := p.check(c, proof.Leaf)", "err := error(nil)",
		receipt, "TestAttacks/proofs_swapped_between_headers",
	},
	{
		"verify/block-path", receipt + "/verify.go",
		"err := VerifyPath(h.Root, h.Count, r.Index, LeafHash(r.Leaf), r.Path)", "err := error(nil)",
		receipt, "TestForged/decision_only,_evidence,_block_of_257",
	},
	{"verify/block-size", receipt + "/verify.go", "if r.Size != h.Count {", "if false {", receipt, "TestAttacks/another_size"},
	{"verify/ordinals", receipt + "/verify.go", "ordinal < h.First || ", "", receipt, "TestAttacks/an_ordinal_outside_the_header's"},
	{
		"verify/declared-lost", receipt + "/verify.go",
		"lost.LostFrom <= ordinal && ordinal < lost.LostTo {", "false && lost.LostFrom <= ordinal {",
		receipt, "TestAttacks/an_ordinal_declared_lost",
	},
	{
		"verify/same-receipt", receipt + "/verify.go",
		"case o.ID != d.ID:", "case false:",
		receipt, "TestAttacks/the_outcome_of_another_receipt",
	},
	{"verify/evidence", receipt + "/evidence.go", "if Commit(&e.Salt, e.Fields) != d.Request {", "if false {", receipt, "TestMutations"},

	// Which daily key counts.
	{
		"keys/statement-size", receipt + "/verifier.go",
		"case ks.FirstSize != p.index:", "case false:",
		receipt, "TestAttacks/a_key_stated_before_its_first_size",
	},
	{
		"keys/tail-is-last", receipt + "/verify.go",
		"case index != c.size-1:", "case false:",
		receipt, "TestStolenDailyKeys",
	},
	{
		"keys/tail-names-the-key", receipt + "/verify.go",
		"case names != k.Index:", "case false:",
		receipt, "TestStolenDailyKeys",
	},
	{
		"keys/header-names-the-key", receipt + "/verify.go",
		"if h.Key != k.Index {\n			return fmt.Errorf(\"it names", "if false {\n			return fmt.Errorf(\"it names",
		receipt, "TestStolenDailyKeys",
	},
	{
		"keys/revoked-beyond-pin", receipt + "/verify.go",
		"k.Key == out.Keys[0].Key && c.size > k.Size {", "k.Key == out.Keys[0].Key && false {",
		receipt, "TestRevoked",
	},
	{
		"keys/pin-without-proof", receipt + "/verify.go",
		"case !found && pin.Size != c.size:", "case false:",
		receipt, "TestRevoked",
	},
	{
		"keys/beyond-the-seal", receipt + "/verify.go",
		"if s := r.seal; s != nil && (", "if s := r.seal; s != nil && false && (",
		receipt, "TestSealed",
	},
	{"keys/audit-size", receipt + "/keyaudit.go", "case ks.FirstSize != index:", "case false:", receipt, "TestKeyAudit"},
	{"keys/audit-header", receipt + "/keyaudit.go", "case h.Key != k.Index:", "case false:", receipt, "TestKeyAudit"},
	{"keys/audit-end", receipt + "/keyaudit.go", "case h.Time.After(ks.NotAfter):", "case false:", receipt, "TestKeyAudit"},
	{"keys/age", rotation + "/signer.go", "end: end, limit:", "end: end.AddDate(1, 0, 0), limit:", rotation, "TestSignerRefuses"},
	{
		"keys/range", rotation + "/signer.go",
		", head.Size > k.limit:", ":",
		rotation, "TestSignerRefuses",
	},
	{
		"keys/two-roots", rotation + "/signer.go",
		"head.Root != k.signed.Root:", "false:",
		rotation, "TestSignerRefuses",
	},
	{"keys/line-of-one-key", rotation + "/signer.go", "k := s.pinned\n", "k := s.m.inForce()\n", rotation, "TestSignerPins"},
	{
		"keys/untrusted-clock", rotation + "/open.go",
		"if cfg.Clock.Behind() > wallSlack && ", "if false && cfg.Clock.Behind() > wallSlack && ",
		rotation, "TestClockAtBoot",
	},
	{
		"keys/clock-floor", rotation + "/clock.go",
		"return &Clock{now: now, floor: floor.Round(0).UTC(), at: at}", "return &Clock{now: now, floor: floor.Round(0).UTC().AddDate(-1, 0, 0), at: at}",
		rotation, "TestClock",
	},
	{
		"keys/state-before-statement", rotation + "/machine.go",
		"return m.save(ctx, func(s *State) { s.Next, s.Prepared = next, nil })", "m.st.Next, m.st.Prepared = next, nil\n	return nil",
		rotation, "TestEveryCall",
	},

	// What decides.
	{"beat/no-more-than-capacity", "policy/beat/beat.go", " && w&creditMask >= zero {", " {", "policy/beat", "TestNeverMoreThanCapacity"},
	{"beat/credit-of-this-tick", "policy/beat/beat.go", "if w>>creditBits == tick&tickMask && ", "if ", "policy/beat", "TestStale"},
	{"beat/no-second-helping", "policy/beat/beat.go", "for t := max(b.prepared, tick);", "for t := tick;", "policy/beat", "TestTake"},
	{
		"class/blank-nodes", "policy/class/delta.go",
		"len(text) > 1 && text[0] == '_'", "false && text[0] == '_'",
		"policy/class", "TestDelta",
	},
	{
		"admit/warm-is-durable", "server/admit/admit.go",
		"if d.Class == policy.R1 {\n		level = wal.Written", "if true {\n		level = wal.Written",
		"server/admit", "TestVerdicts",
	},
	{
		"extproc/zero-reply-refuses", "server/extproc/reply.go",
		"return internalRefusal", "return continues[phaseRequestHeaders].wire",
		"server/extproc", "TestZeroReplyRefuses",
	},
	{"extproc/refused-passes", "server/extproc/stream.go", "case !d.Passes():", "case false:", "server/extproc", "TestStreams"},
	{"extproc/no-id-passes", "server/extproc/stream.go", "case d.ID == \"\":", "case false:", "server/extproc", "TestStreams"},
	{
		"extproc/malformed-passes", "server/extproc/stream.go",
		"refused\", \"error\", err)\n		return st.fault()", "refused\", \"error\", err)\n		return proceed(phaseRequestHeaders)",
		"server/extproc", "TestMalformedFrame",
	},

	// What Envoy is told, with the real one.
	{
		"envoy/early-header-strip", bootstrap + "/listener.go",
		"[]*corev3.TypedExtensionConfig{strip}", "[]*corev3.TypedExtensionConfig{strip}[:0]",
		"e2e", "TestRequestsArriveClean",
	},
	{
		"envoy/response-header-strip", bootstrap + "/headers.go",
		"			[]*mutationv3.HeaderMutation{removeOurs()},\n", "",
		"e2e", "TestResponseHeadersAreOurs",
	},
	{
		"envoy/metadata-copy", bootstrap + "/headers.go",
		"			fromMetadata(cfg, HeaderReceipt, MetadataReceipt),\n", "",
		"e2e", "TestResponseHeadersAreOurs",
	},
	{
		"envoy/metadata-namespace", bootstrap + "/extproc.go",
		"Untyped: []string{MetadataNamespace}}},", "Untyped: []string{\"other\"}}},",
		"e2e", "TestResponseHeadersAreOurs",
	},
	{
		"envoy/fails-closed", bootstrap + "/extproc.go",
		"FailureModeAllow: allows(cfg.GetDefaultRoute()),", "FailureModeAllow: true,",
		"e2e", "TestResponseHeadersAreOurs",
	},

	// Who somebody is, and what he may do.
	{"identity/allow", spiffe + "/tls.go", "	if err := allow(id); err != nil {\n", "	if err := allow(id); false {\n", spiffe, "TestPeerRefused"},
	{
		"identity/expired-peer", spiffe + "/tls.go",
		"case !now.Before(leaf.NotAfter):", "case false:",
		spiffe, "TestClock",
	},
	{"identity/closed-at-expiry", spiffe + "/tls.go", "		h.closeAt(end, peer)\n", "		_ = end\n", spiffe, "TestClosedAtExpiry"},
	{"identity/no-resumption", spiffe + "/tls.go", "SessionTicketsDisabled: true,", "SessionTicketsDisabled: false,", spiffe, "TestNoResumption"},
	{"access/role", "server/access/access.go", "	if a.grants.Load().Of(w)&need != 0 {", "	if true {", "server/access", "TestNewMethod"},
	{
		"access/grpc", "server/server.go",
		"if err := s.access.CallGRPC(ss.Context(), access.OnEnvoy, info.FullMethod); err != nil {", "if err := error(nil); err != nil {",
		"server", "TestNoRule",
	},
	{"access/uid", "server/access/roles.go", "case uid == 0 || uid == os.Geteuid():", "case uid >= 0 || uid == os.Geteuid():", "server/access", "TestGrants"},
	{
		"admit/parents", "server/admit/chain.go",
		"err != nil || !r.cfg.Parents.Match(req.SPIFFEID) {", "err != nil {",
		"server/admit", "TestParent",
	},
	{"admit/decided-once", "server/admit/chain.go", "			delete(m, id)\n", "", "server/admit", "TestChain"},
}
