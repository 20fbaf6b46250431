package config

import (
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// locate finds where in the file a character of a scalar stands: line and column are those in n's value, from 1, column in
// characters. Quotes, escapes, indentation and folding lie between the two. Where the two cannot be matched up any
// further, it returns the last place that could be.
func (d *document) locate(n *yaml.Node, line, column int) (int, int) {
	value := []rune(n.Value)
	target := 0
	for l, text := range strings.Split(n.Value, "\n") {
		if l+1 == line {
			target += min(max(column-1, 0), len([]rune(text)))
			break
		}
		target += len([]rune(text)) + 1
	}
	c := cursor{d.lines, n.Line - 1, max(n.Column-1, 0), nil}
	c.load()
	switch {
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		c.nextLine() // what stands beside | or > is not text
	case n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0:
		c.column++
	}
	lastLine, lastColumn := n.Line, n.Column
	for i := 0; i <= target; {
		r, ok := c.rune()
		switch {
		case i >= len(value):
			if ok && c.line+1 == lastLine {
				return lastLine, c.column + 1 // just behind the end
			}
			return lastLine, lastColumn
		case ok && r == value[i] && (r != '\\' || n.Style&yaml.DoubleQuotedStyle == 0):
			lastLine, lastColumn = c.line+1, c.column+1
			if r == '\'' && n.Style&yaml.SingleQuotedStyle != 0 {
				c.column++ // it is written twice
			}
			c.column++
			i++
		case ok && r == '\\' && n.Style&yaml.DoubleQuotedStyle != 0:
			lastLine, lastColumn = c.line+1, c.column+1
			c.escape()
			i++
		case ok && unicode.IsSpace(r):
			c.column++ // indentation, or a line break that folding removed
		case unicode.IsSpace(value[i]):
			i++ // a line break made by folding
		default:
			return lastLine, lastColumn // something this does not know
		}
	}
	return lastLine, lastColumn
}

// cursor walks over the file's characters; the end of a line counts as '\n'.
type cursor struct {
	lines        []string
	line, column int // from 0
	text         []rune
}

func (c *cursor) load() {
	c.text = nil
	if c.line < len(c.lines) {
		c.text = []rune(strings.TrimSuffix(c.lines[c.line], "\r"))
	}
}

func (c *cursor) nextLine() {
	c.line, c.column = c.line+1, 0
	c.load()
}

// rune returns the character under the cursor; ok is false at the end of the file.
func (c *cursor) rune() (r rune, ok bool) {
	for c.column > len(c.text) {
		c.nextLine()
		if c.line >= len(c.lines) {
			return 0, false
		}
	}
	if c.line >= len(c.lines) {
		return 0, false
	}
	if c.column == len(c.text) {
		return '\n', true
	}
	return c.text[c.column], true
}

// escape steps over one escape of a double-quoted scalar.
func (c *cursor) escape() {
	c.column++
	width := 1
	if c.column < len(c.text) {
		switch c.text[c.column] {
		case 'x':
			width = 3
		case 'u':
			width = 5
		case 'U':
			width = 9
		}
	}
	c.column += width
}
