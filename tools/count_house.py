"""Count what the house rules are about, for any checkout: `python tools/count_house.py [ROOT]`.

Prints, for `liborth_cli` under ROOT: files, lines and lines of code by package; small files with one importer; calls with
more than six positional arguments; public signatures, fields and aliases that are open dictionaries, `dict[str, Any]`; and
import cycles, `TYPE_CHECKING` included.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

SMALL = 160
POSITIONALS = 6
LOOSE = re.compile(r"(dict|Mapping)\[str, (Any|object)\]")


def code_lines(text: str) -> int:
    """Count the lines that hold a token other than a comment or a docstring."""
    tree = ast.parse(text)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - prose)


def module_name(root: Path, file: Path) -> str:
    """Name a file as it is imported."""
    parts = list(file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Return the modules among `known` that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner or ({node.module} & known)
    return found


def top_level_imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Return what is imported when the module is: outside functions, but under TYPE_CHECKING too."""
    body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
    return imported(ast.Module(body=body, type_ignores=[]), known)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def open_dictionaries(tree: ast.Module) -> list[str]:
    """Name the public functions, methods, fields and aliases of a file that pass a `dict[str, Any]` or a like mapping on."""
    found = []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    for node in (node for owner in (tree, *classes) for node in owner.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = node.name
            arguments = (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)
            hints = [hint for hint in (*(a.annotation for a in arguments), node.returns) if hint is not None]
        elif isinstance(node, (ast.AnnAssign, ast.Assign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = ast.unparse(target)
            hints = [part for part in (getattr(node, "annotation", None), node.value) if part is not None]
        else:
            continue
        if not name.startswith("_") and any(LOOSE.search(ast.unparse(hint)) for hint in hints):
            found.append(name)
    return sorted(found)


def count(root: Path) -> None:
    """Print the counts of one checkout."""
    files = sorted((root / "liborth_cli").rglob("*.py"))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    names = {file: module_name(root, file) for file in files}
    known = set(names.values())
    importers: defaultdict[str, set[str]] = defaultdict(set)
    graph: dict[str, set[str]] = {}
    for file, tree in trees.items():
        for name in imported(tree, known):
            importers[name].add(names[file])
        graph[names[file]] = top_level_imports(tree, known) - {names[file]}

    packages: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for file, text in texts.items():
        inside = file.relative_to(root / "liborth_cli").parts
        row = packages[inside[0] if len(inside) > 1 else "(top)"]
        row[0] += 1
        row[1] += len(text.splitlines())
        row[2] += code_lines(text)
    print(f"{'package':<14}{'files':>7}{'lines':>8}{'code':>8}")
    for package, row in sorted(packages.items()):
        print(f"{package:<14}{row[0]:>7}{row[1]:>8}{row[2]:>8}")
    print(f"{'all':<14}{sum(r[0] for r in packages.values()):>7}", end="")
    print(f"{sum(r[1] for r in packages.values()):>8}{sum(r[2] for r in packages.values()):>8}")

    modules = [file for file in files if file.name != "__init__.py"]
    small = [f for f in modules if len(texts[f].splitlines()) < SMALL and len(importers[names[f]]) == 1]
    calls = [n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.Call) and len(n.args) > POSITIONALS]
    loose = [name for tree in trees.values() for name in open_dictionaries(tree)]
    print(f"\nfiles under {SMALL} lines with one importer: {len(small)}")
    print(f"calls with more than {POSITIONALS} positional arguments: {len(calls)}")
    print(f"public signatures, fields and aliases with open dictionaries: {len(loose)} ({', '.join(loose)})")
    print(f"import cycles, TYPE_CHECKING included: {cycles(graph)}")


if __name__ == "__main__":
    count(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
