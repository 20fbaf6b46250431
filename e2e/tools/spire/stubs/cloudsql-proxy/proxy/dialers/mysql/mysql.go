// Package mysql is empty. SPIRE's server imports the package of this name for its effect alone, a driver for MySQL in Google's cloud,
// which nobody here uses.
package mysql
