package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The ruler. Numbers alone make no good code; what is over them is asked to
// explain itself by being split.
const (
	maxFuncLines        = 70
	maxFileLines        = 500
	maxInterfaceMethods = 10
)

// source is one parsed file of ours.
type source struct {
	path string
	test bool
	file *ast.File
	fset *token.FileSet
}

func sources(t *testing.T) []source {
	t.Helper()
	var out []source
	for _, top := range []string{"../../internal", "../../cmd", "../../test"} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == "testdata" {
				return filepath.SkipDir
			}
			if filepath.Ext(path) != ".go" {
				return nil
			}
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
			if err != nil {
				return err
			}
			if ast.IsGenerated(f) {
				return nil
			}
			rel := strings.TrimPrefix(filepath.ToSlash(path), "../../")
			out = append(out, source{rel, strings.HasSuffix(path, "_test.go"), f, fset})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func (s source) lines(n ast.Node) int {
	return s.fset.Position(n.End()).Line - s.fset.Position(n.Pos()).Line + 1
}

func (s source) at(n ast.Node) string {
	return fmt.Sprintf("%s:%d", s.path, s.fset.Position(n.Pos()).Line)
}

func TestFilesAndFunctionsAreShort(t *testing.T) {
	for _, s := range sources(t) {
		limit := maxFileLines
		if s.test {
			limit *= 2 // a test file is a list
		}
		if n := s.fset.File(s.file.Pos()).LineCount(); n > limit {
			t.Errorf("%s has %d lines, more than %d", s.path, n, limit)
		}
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && s.lines(f) > maxFuncLines && !s.test {
				t.Errorf("%s: %s has %d lines, more than %d", s.at(f), f.Name.Name, s.lines(f), maxFuncLines)
			}
		}
	}
}

func TestInterfacesAreSmall(t *testing.T) {
	for _, s := range sources(t) {
		ast.Inspect(s.file, func(n ast.Node) bool {
			if i, ok := n.(*ast.InterfaceType); ok && len(i.Methods.List) > maxInterfaceMethods {
				t.Errorf("%s: an interface of %d methods, more than %d", s.at(i), len(i.Methods.List), maxInterfaceMethods)
			}
			return true
		})
	}
}

// TestNoInitAndNoMutableGlobals allows package variables that nothing can
// change in effect: errors, compiled patterns, embedded files, and "_".
func TestNoInitAndNoMutableGlobals(t *testing.T) {
	harmless := regexp.MustCompile(`^(errors\.New|fmt\.Errorf|fault\.New|regexp\.MustCompile|netip\.Must\w+)$`)
	for _, s := range sources(t) {
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.Name == "init" && d.Recv == nil {
					t.Errorf("%s: init(): wiring is explicit", s.at(d))
				}
			case *ast.GenDecl:
				if d.Tok != token.VAR || s.test {
					continue
				}
				if d.Doc != nil && strings.Contains(d.Doc.Text(), "go:embed") || hasEmbed(d) {
					continue
				}
				for _, spec := range d.Specs {
					v := spec.(*ast.ValueSpec)
					if v.Names[0].Name != "_" && !allCalls(v.Values, harmless) {
						t.Errorf("%s: package variable %s: state has an owner", s.at(v), v.Names[0].Name)
					}
				}
			}
		}
	}
}

func hasEmbed(d *ast.GenDecl) bool {
	if d.Doc == nil {
		return false
	}
	for _, c := range d.Doc.List {
		if strings.HasPrefix(c.Text, "//go:embed") {
			return true
		}
	}
	return false
}

func allCalls(values []ast.Expr, want *regexp.Regexp) bool {
	for _, v := range values {
		call, ok := v.(*ast.CallExpr)
		if !ok {
			return false
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return false
		}
		x, ok := sel.X.(*ast.Ident)
		if !ok || !want.MatchString(x.Name+"."+sel.Sel.Name) {
			return false
		}
	}
	return len(values) > 0
}

// banned are calls with a better way, and where they are right.
func banned() map[string]struct {
	why   string
	right *regexp.Regexp
} {
	type b = struct {
		why   string
		right *regexp.Regexp
	}
	return map[string]b{
		"connect.NewError": {"errors are mapped to codes in one place, rpcx", regexp.MustCompile(`^internal/rpcx/|_test\.go$`)},
		"fmt.Print":        {"output goes to a given writer", nil},
		"fmt.Printf":       {"output goes to a given writer", nil},
		"fmt.Println":      {"output goes to a given writer", regexp.MustCompile(`^cmd/|_test\.go$`)}, // tests that run themselves as a child
		"log.Fatal":        {"only main ends the process", nil},
		"log.Printf":       {"logs are slog with fields", nil},
		"slog.Info":        {"the logger is given, not global", nil},
		"slog.Warn":        {"the logger is given, not global", nil},
		"slog.Error":       {"the logger is given, not global", nil},
	}
}

func TestNoBannedCalls(t *testing.T) {
	for _, s := range sources(t) {
		ast.Inspect(s.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			name := callName(call)
			if b, ok := banned()[name]; ok && (b.right == nil || !b.right.MatchString(s.path)) {
				t.Errorf("%s: %s: %s", s.at(call), name, b.why)
			}
			if name == "time.Sleep" && s.test {
				t.Errorf("%s: time.Sleep in a test: wait for a level, with a deadline", s.at(call))
			}
			return true
		})
	}
}

func callName(c *ast.CallExpr) string {
	if sel, ok := c.Fun.(*ast.SelectorExpr); ok {
		if x, ok := sel.X.(*ast.Ident); ok {
			return x.Name + "." + sel.Sel.Name
		}
	}
	return ""
}

func TestNamesAndWords(t *testing.T) {
	vague := regexp.MustCompile(`(Helper|Util|Utils|Common|Base)$`)
	for _, s := range sources(t) {
		ast.Inspect(s.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.TypeSpec:
				if vague.MatchString(n.Name.Name) || strings.HasSuffix(n.Name.Name, "Manager") && !strings.HasPrefix(s.path, "internal/host/lifecycle/") {
					t.Errorf("%s: type %s says nothing", s.at(n), n.Name.Name)
				}
			case *ast.BasicLit:
				if n.Kind == token.STRING && strings.Contains(n.Value, "failed"+" to ") && !s.test {
					t.Errorf("%s: say the act and the thing, not that it failed: %s", s.at(n), n.Value)
				}
			}
			return true
		})
	}
}
