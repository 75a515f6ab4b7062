"""Imports point down only; the table is the architecture."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import outrider

SOURCE = Path(outrider.__file__).parent

# Each part may import itself and the parts named here.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "token_tree": {"errors"},
    "request": set(),
    "kernels": set(),
    "quantization": {"errors", "kernels"},
    "sampling": {"errors", "token_tree", "kernels"},
    "cache": {"errors", "kernels"},
    "inputs": {"errors"},
    "models": {"errors", "token_tree", "cache", "kernels", "quantization"},
    "verification": {"errors", "token_tree", "sampling"},
    "drafting": {"errors", "config", "token_tree", "kernels", "sampling", "cache", "models"},
    "engine": {
        "errors", "config", "token_tree", "request", "sampling", "cache", "inputs", "kernels", "models",
        "verification", "drafting",
    },
    "outputs": {"request", "sampling"},
    "llm": {"errors", "config", "request", "sampling", "inputs", "engine", "outputs", "models"},
    "server": {"errors", "config", "request", "sampling", "inputs", "outputs", "llm"},
}  # fmt: skip
TOP = {
    "cli",
    "bench",
    "losslessness",
    "__init__",
}  # may import everything; nothing imports them, but for each other


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of ours that a file imports at run time (annotations under TYPE_CHECKING do not count)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "outrider":
                names = [f"outrider.{alias.name}" for alias in node.names]
        found.update(name.split(".")[1] for name in names if name.startswith("outrider."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part in TOP:
        return
    assert part in ALLOWED, f"say what {part} may import"
    assert imports(path) <= ALLOWED[part] | {part}, f"{path} imports upwards"


def test_the_command_line_does_without_the_server() -> None:
    """Its packages are an extra: only `outrider serve` loads them, when it runs."""
    for path in sorted((SOURCE / "cli").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not inside of functions
            assert "outrider.server" not in ast.unparse(node) or not isinstance(node, ast.Import | ast.ImportFrom), (
                path
            )
        assert "server" not in imports(path) or path.name == "serve.py", path


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if below <= done} - done
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


def test_no_file_is_a_drawer() -> None:
    """No utils.py, helpers.py, _v2, _new or _legacy: a file is named for what it does."""
    names = {path.stem for path in SOURCE.rglob("*.py")}
    assert not {name for name in names if name in {"utils", "helpers", "misc", "common"}}
    assert not {name for name in names if name.endswith(("_v2", "_new", "_old", "_legacy"))}
