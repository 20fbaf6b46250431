// Package hsm keeps signing keys in a PKCS#11 token. It implements keys.Store on github.com/miekg/pkcs11 and needs cgo;
// a program built without cgo links a stub whose Open says so. Package crypto/keys/... and crypto/receipt never import it.
//
// It promises: a private key it uses was made in its token, is sensitive and was never extractable, unless
// Config.AllowExportable; exactly one private and one public object stand for a label and id; a signature that does not verify under the version's public key is
// never returned; a refused PIN is not tried again by this process; sessions that were lost, logged out or reset under
// it are opened anew without the caller noticing; a token that is away is not knocked at by every caller, and is found within
// about a second when it is back (a circuit breaker: breaker.go); no version is called missing, destroyed or disabled because
// its token was away (sight.go); and a caller whose context ends gets its answer though the C call
// behind it still blocks. It does not promise that the token is hardware (Custody says which model it is), nor a time of
// creation to trust.
//
// Open starts goroutines, Config.Sessions of them, and Close ends them: the one exception in this module to "constructors
// start nothing". A C call cannot be interrupted, so each call runs on a worker that owns one session; a token that hangs
// costs at most that many threads, and its callers wait in a queue of bounded length.
//
// C_Initialize is called once for each module in the process, however many stores use it; the last Close calls
// C_Finalize. Calls never overlap with C_Initialize or C_Finalize, and never with each other on one session: modules are
// known to crash the process where they do. Nothing else in the process may use the same module behind this package's
// back. A module that was loaded stays loaded.
//
// What each return value of PKCS#11 means here, which sentinel of package keys callers see and what is tried, stands in one
// table, in codes.go. Only a PIN that the token refused is latched until the process restarts; nothing else is.
//
// Objects. A version is a key pair with CKA_LABEL = label and CKA_ID = the version's id (keys.VersionID). Disable clears
// CKA_SIGN; Destroy destroys the private object and keeps the public one, which is how a destroyed version stays listed.
// Key pairs made by other tools are listed too, with their CKA_ID in hexadecimal after an "x", and are used when they
// pass the same checks.
package hsm
