package rule

import (
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
)

// conjuncts gathers the guards among the operands of e's outermost &&s, and reports whether they are all of e. A guard compares a variable
// with one literal by ==, startsWith or endsWith, however long the variable is: most requests fail most rules in one. In CEL
// "false && error" and "error && false" are false, so a guard that fails makes the whole false whatever the rest does.
func conjuncts(e ast.Expr, to []native) (guards []native, whole bool) {
	if e.Kind() == ast.CallKind && e.AsCall().FunctionName() == operators.LogicalAnd {
		whole = true
		for _, arg := range e.AsCall().Args() {
			var all bool
			to, all = conjuncts(arg, to)
			whole = whole && all
		}
		return to, whole
	}
	if n, ok := asNative(e); ok && (n.op == is || n.op == begins || n.op == ends) {
		return append(to, n), true
	}
	return to, false
}

// readsHeat reports whether a names heat or heat_known anywhere.
func readsHeat(a *ast.AST) bool {
	found := false
	ast.PostOrderVisit(a.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() == ast.IdentKind && (e.AsIdent() == names[varHeat] || e.AsIdent() == names[varHeatKnown]) {
			found = true
		}
	}))
	return found
}
