"""Code that the bundled model has not seen: functions of the modules kept out of its training."""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path

HELD_OUT = Path(__file__).resolve().parent.parent / "bundled" / "held_out.json"
LINES_PER_PROMPT = 8
MIN_RENAMED = 3  # uses of a name that an edit renames
MIN_FUNCTION_LINES = 16  # so that a prompt is the beginning of something

# Where a Python comes without its library's source.
BUILT_IN_PROMPTS = (
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n',
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n    def setUp(self):\n",
    'def read_lines(path):\n    """Yield the lines of a file."""\n    with open(path) as file:\n',
)


def held_out_prompts(count: int) -> tuple[list[str], str]:
    """The first lines of `count` functions, spread over the modules kept out of the bundled model's training.

    Args:
        count: at least 1; the built-in prompts repeat where they must.

    Returns:
        The prompts, the same for the same Python, and a description of their source.
    """
    files = held_out_files()
    tests = [path for path in files if "test" in path.parts]
    modules = [path for path in files if path not in tests]
    # Tests come last, and are read only where the modules are too few: they are long.
    turns = chain.from_iterable(chain(_take_turns(modules), _take_turns(tests)))
    prompts = list(islice((head for head in turns if head is not None), count))
    if len(prompts) == count:
        return prompts, f"first {LINES_PER_PROMPT} lines of functions of held-out standard library modules"
    return [BUILT_IN_PROMPTS[i % len(BUILT_IN_PROMPTS)] for i in range(count)], "built-in prompts"


def rename_edits(count: int) -> list[tuple[str, str]]:
    """Edits of held-out functions: prompts that hold one and ask for it with a name changed, and the answers.

    Args:
        count: the most edits; fewer where the held-out files have fewer functions of `MIN_FUNCTION_LINES` or more.
    """
    return list(islice(chain.from_iterable(map(_rename_edits, held_out_files())), count))


def _rename_edits(path: Path) -> Iterator[tuple[str, str]]:
    """An edit of the first long function of a file that uses a name of its own several times."""
    for source in _long_functions(path):
        names = re.findall(r"\b[a-z][a-z_]{3,}(?= = )", source)  # assigned
        name = max(names, key=names.count, default=None)
        if name is not None and len(re.findall(rf"\b{name}\b", source)) >= MIN_RENAMED:
            prompt = f"# Rename {name} to renamed_{name}.\n{source}\n# The same after the change:\n"
            yield prompt, re.sub(rf"\b{name}\b", f"renamed_{name}", source)
            return


def _take_turns(files: Sequence[Path]) -> Iterator[tuple[str | None, ...]]:
    """The first function's head of each file, then the second one's, and so on; None where a file has no more."""
    yield from zip_longest(*map(_function_heads, files))


def held_out_files() -> list[Path]:
    """Held-out files of the running Python's library."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = json.loads(HELD_OUT.read_text())["modules"] if HELD_OUT.is_file() else []
    found = (
        [path] if (path := library / f"{module}.py").is_file() else sorted((library / module).rglob("*.py"))
        for module in sorted(modules)
    )
    return [path for paths in found for path in paths]


def _function_heads(path: Path) -> Iterator[str]:
    """The first lines of each long function of a file, without their common indentation."""
    for source in _long_functions(path):
        yield textwrap.dedent("".join(source.splitlines(keepends=True)[:LINES_PER_PROMPT]))


def _long_functions(path: Path) -> Iterator[str]:
    """The source of each long function of a file, as it is indented."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            start = node.lineno - 1
            if node.end_lineno - start >= MIN_FUNCTION_LINES:
                yield "".join(lines[start : node.end_lineno])
