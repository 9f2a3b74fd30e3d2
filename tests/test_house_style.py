"""House style, as far as it can be measured: cells, prose, docstrings. CONTRIBUTING.md has the rules."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = sorted(p for p in (ROOT / "pagedlit").rglob("*.py") if p.name != "_modidx.py")

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path: Path) -> list[tuple[str, str]]:
    """(type, source) of each cell."""
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def directives(source: str) -> set[str]:
    """The directives of a cell, without their arguments: {"exports"}."""
    return set(re.findall(r"^#\|\s*([\w-]+)", source, re.MULTILINE))


def hidden(source: str) -> bool:
    """Is the cell absent from the page?"""
    return bool(directives(source) & {"hide", "default_exp"})


def code_lines(source: str) -> list[str]:
    """The lines of a cell that are neither blank nor directives."""
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def syntax(source: str) -> ast.Module:
    """The parsed cell, without magics."""
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines()))


@each_chapter
def test_code_cells_are_short(path):
    chapter = cells(path)
    limit = 60 if any(re.search(r"default_exp\s+kernels\.", source) for _, source in chapter) else 40
    sizes = {i: len(source.splitlines()) for i, (kind, source) in enumerate(chapter) if kind == "code"}
    assert {i: size for i, size in sizes.items() if size > limit} == {}


@each_chapter
def test_no_patch_and_no_star_import(path):
    for kind, source in cells(path):
        if kind != "code":
            continue
        for node in ast.walk(syntax(source)):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), source
            for decorator in getattr(node, "decorator_list", []):
                assert "patch" not in ast.unparse(decorator).split("(")[0].split("."), source


@each_chapter
def test_imports_stand_in_cells_of_their_own(path):
    """The site build executes every cell that imports something, with all that stands beside the import."""
    for kind, source in cells(path):
        if kind == "code" and not directives(source) & {"export", "exports"}:
            nodes = syntax(source).body
            if any(isinstance(n, (ast.Import, ast.ImportFrom)) for node in nodes for n in ast.walk(node)):
                assert all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes), source


@each_chapter
def test_a_class_is_written_in_one_cell(path):
    exported = [source for kind, source in cells(path) if kind == "code" and directives(source) & {"export", "exports"}]
    names = [node.name for source in exported for node in syntax(source).body if isinstance(node, ast.ClassDef)]
    assert len(names) == len(set(names))


@each_chapter
def test_definitions_are_shown_on_the_site(path):
    """nbdev leaves the source of `#| export` cells out of the page; `#| exports` keeps it."""
    for kind, source in cells(path):
        if kind == "code" and "export" in directives(source):
            definitions = [node.name for node in syntax(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            assert not definitions, f"use `#| exports` for {definitions}"


@each_chapter
def test_never_more_than_three_code_cells_in_a_row(path):
    row = longest = 0
    for kind, source in cells(path):
        if kind == "code" and hidden(source):
            continue
        row = row + 1 if kind == "code" else 0
        longest = max(longest, row)
    assert longest <= 3


@each_chapter
def test_prose_carries_the_code(path):
    chapter = cells(path)
    words = sum(len(source.split()) for kind, source in chapter if kind == "markdown")
    lines = sum(len(code_lines(source)) for kind, source in chapter if kind == "code" and not hidden(source))
    assert words >= 2.5 * lines, f"{words} words, {lines} lines of code: {words / lines:.1f} words a line"


@each_chapter
def test_title_cell_holds_title_and_description_alone(path):
    """Anything else in it would be lost on the site."""
    kind, source = cells(path)[0]
    assert kind == "markdown"
    assert re.fullmatch(r"(<!--.*-->\n)?# \S.*\n\n>\s+\S.*(\n\n- \w+: .*)?\n*", source), source
    makes_a_docstring = source.startswith("# ") and re.search(r"^> ", source, re.MULTILINE)
    assert not makes_a_docstring, "nbdev would put the description above the module docstring: begin with an HTML comment"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_docstring_comes_first(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module docstring is not the first statement"
    assert not any(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str) for n in tree.body[1:])
