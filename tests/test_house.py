"""The house rules, from the syntax tree: who may import whom, and what must not exist."""

import ast
import functools
from pathlib import Path

from liborth_cli.methods import METHODS
from tools.count_house import open_dictionaries

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "liborth_cli", ROOT / "kernels" / "liborth_kernels"]
OURS = set(PACKAGES[0].rglob("*.py"))
FILES = [file for package in PACKAGES for file in package.rglob("*.py")]
ORDER = [
    {"errors", "cgroup", "heap", "messages"}, {"conditions", "console", "line", "machine", "ranks"}, {"chart"},
    {"checkpoint", "manifest"},
    {"linalg"}, {"stream"}, {"curvature"}, {"methods"}, {"card", "ends"},
    {"split", "excise", "inspect", "compare", "doctor", "push"}, {"measure"},
    {"tune"}, {"recall"}, {"verify"}, {"attachment"}, {"export", "dose", "decode", "extract", "generate"}, {"clean", "demo"},
    {"cli"}, {"__main__", "main", "results"}, {"arguments"}, {"api"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


BORDERS = {
    "api.py": ["More"],  # keywords of a Python caller
    "checkpoint/config.py": ["meaning"],  # a model's config.json, whatever its family writes there
    "checkpoint/documents.py": ["load_object", "unique_keys"],  # JSON, before a record is made of it
    "checkpoint/layout.py": ["has_index"],
    "checkpoint/reader.py": ["config"],
    "stream/fields.py": ["apply"],  # a record, as its file has it
    "stream/runner.py": ["Call", "split_call"],  # keywords of a block of any model
}
"""Where a dictionary is open by nature; everything else that crosses a file is a record."""
CYCLES: set[str] = set()
"""Files that import each other, `if TYPE_CHECKING` included."""


@functools.cache
def tree_of(file):
    return ast.parse(file.read_text())


def trees():
    return {file: tree_of(file) for file in FILES}


def imports(file):
    """Every module and name that a file imports, wherever in it the import stands, `if TYPE_CHECKING` included."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(file):
    base = ROOT if "liborth_cli" in file.parts else ROOT / "kernels"
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def unit(file):
    return file.relative_to(ROOT / "liborth_cli").parts[0].removesuffix(".py")


def test_every_room_has_its_place():
    rooms = {unit(file) for file in FILES if "liborth_cli" in file.parts} - {"__init__"}
    assert rooms == set(LEVEL)


def test_imports_point_one_way():
    """Nothing imports what stands above it; so no library package imports the command line."""
    for file in FILES:
        if "liborth_cli" not in file.parts or unit(file) == "__init__":
            continue
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "liborth_cli" and len(parts) > 1 and parts[1] in LEVEL:
                assert LEVEL[parts[1]] <= LEVEL[unit(file)], f"{file.relative_to(ROOT)} imports {name}"


def test_no_two_files_import_each_other():
    modules = {module(file): file for file in FILES}
    edges = {name: {n for n in imports(file) if n in modules and n != name} for name, file in modules.items()}
    while True:  # what imports nothing that is left, or is imported by nothing that is left, is in no cycle
        ends = {name for name, found in edges.items() if not found} | (edges.keys() - set().union(*edges.values()))
        if not ends:
            break
        edges = {name: found - ends for name, found in edges.items() if name not in ends}
    assert not edges


def test_no_walls_of_positional_arguments():
    every = [node for tree in trees().values() for node in ast.walk(tree)]
    ours = {node.name for node in every if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    known = ours - {node.name for node in every if isinstance(node, ast.FunctionDef) and node.args.vararg}
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} {name}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and not file.stem.endswith("_triton")
        and len(node.args) > 6
        and (name := getattr(node.func, "id", getattr(node.func, "attr", None))) in known
    ]
    assert not found


def test_what_crosses_a_file_is_a_record():
    found = {str(file.relative_to(PACKAGES[0])): open_dictionaries(tree) for file, tree in trees().items() if file in OURS}
    assert {file: names for file, names in found.items() if names} == BORDERS


def test_only_the_command_line_knows_typer():
    for file in FILES:
        if "cli" not in file.parts:
            assert not any(n.split(".")[0] in ("typer", "click") for n in imports(file)), file


def test_kernels_know_nothing_of_the_tool():
    for file in PACKAGES[1].rglob("*.py"):
        assert not any(name.startswith("liborth_cli") for name in imports(file)), file


def test_methods_see_no_files_and_no_siblings():
    names = {type(method).__module__.rpartition(".")[2] for method in METHODS.values()}
    for name in names:
        found = set(imports(ROOT / "liborth_cli" / "methods" / f"{name}.py"))
        for other in names - {name}:
            assert f"liborth_cli.methods.{other}" not in found
        assert not any("checkpoint" in f or "console" in f for f in found), name


def test_only_the_console_knows_rich():
    assert [f.name for f in FILES if any(n.split(".")[0] == "rich" for n in imports(f))] == ["console.py"]


def test_only_the_line_between_ranks_knows_torch_distributed():
    assert [f.name for f in FILES if any(n.startswith("torch.distributed") for n in imports(f))] == ["line.py"]


def test_no_junk_drawers_and_no_package_called_kernels():
    assert not [f for f in FILES if f.stem in ("utils", "common", "helpers", "misc")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_error_has_its_own_documented_code():
    from liborth_cli import errors

    leaves = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LiborthError)]
    codes = [c.exit_code for c in leaves if c is not errors.Stopped]
    assert len(set(codes)) == len(codes)
    page = (ROOT / "docs" / "formats.md").read_text()
    assert all(f"| {code} |" in page for code in codes)


def test_the_command_line_page_is_what_the_commands_say():
    from tools.write_docs import MANUAL, PAGE, manual, render

    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"
    assert MANUAL.read_text(encoding="utf-8") == manual(), "run `make docs`"


def test_the_readme_names_only_what_exists():
    import re

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", readme):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"\]\(((?:docs|tests)/[^)#]+)\)", readme):
        assert (ROOT / path).exists(), path
