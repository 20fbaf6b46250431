package config

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Problem is one thing that is wrong with a file.
type Problem struct {
	File    string `json:"file"`
	Line    int    `json:"line,omitempty"`    // from 1; 0 if the file as a whole is meant
	Column  int    `json:"column,omitempty"`  // in characters, from 1; 0 if Line is 0
	Path    string `json:"path,omitempty"`    // of the setting, such as routes[3].policy.class; empty for the file as a whole
	Message string `json:"message"`           // what is wrong, and the way out where there is one
	Snippet string `json:"snippet,omitempty"` // the line, or the part of it around Column, and below it a marker
}

// Error returns the problem in one line, followed by the marked line if there is one.
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": ")
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Message)
	if p.Snippet != "" {
		source, marker, _ := strings.Cut(p.Snippet, "\n")
		fmt.Fprintf(&b, "\n%5d | %s\n      | %s", p.Line, source, marker)
	}
	return b.String()
}

// Errors is everything that is wrong with a file, in the order of its lines. It is the type of the errors of Load and
// Parse, and encodes as a JSON array.
type Errors []Problem

// maxPrinted bounds the text of Errors; a generated file can have thousands of problems that are one.
const maxPrinted = 50

// Error returns the problems one after another.
func (e Errors) Error() string {
	var b strings.Builder
	for i, p := range e {
		if i > 0 {
			b.WriteByte('\n')
		}
		if i == maxPrinted {
			fmt.Fprintf(&b, "%s: and %d more problems", p.File, len(e)-i)
			break
		}
		b.WriteString(p.Error())
	}
	return b.String()
}

// snippetWidth is how much of a long line is shown.
const snippetWidth = 120

// snippet returns line with a marker below column. Both are cut when the line is long; tabs stay tabs in both.
func snippet(line string, column int) string {
	line = strings.TrimRight(line, "\r")
	runes := []rune(line)
	at := min(max(column-1, 0), len(runes))
	from, cut, end := 0, "", ""
	if len(runes) > snippetWidth {
		from = max(0, min(at-snippetWidth/2, len(runes)-snippetWidth))
		if from > 0 {
			cut = "..."
		}
		if from+snippetWidth < len(runes) {
			end = "..."
		}
		runes = runes[from : from+snippetWidth]
	}
	marker := []rune(strings.Repeat(" ", utf8.RuneCountInString(cut)))
	for _, r := range runes[:min(at-from, len(runes))] {
		if r != '\t' {
			r = ' '
		}
		marker = append(marker, r)
	}
	return cut + string(runes) + end + "\n" + string(marker) + "^"
}
