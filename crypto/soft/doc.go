// Package soft keeps signing keys in files, for development, tests and demos only: whoever can read the directory has the
// keys, and whoever had it once may have them still.
//
// It promises what every keys.Store does, that a version is on disk (file and directory synced) before Create returns,
// that a crash leaves either the old or the new state of a version, and that it opens nothing which others than the owner
// could read. It does not promise that Destroy erases: the file system may keep old blocks. Two processes may share a
// directory; what one does, the other sees at its next call. Only when both change one version in the same moment the
// last one wins.
//
// A store is a directory of mode 0700 with one file of mode 0600 for each version, LABEL@ID.json, the label
// percent-encoded. Files that begin with ".tmp-" are unfinished writes; Open removes those older than an hour.
package soft
