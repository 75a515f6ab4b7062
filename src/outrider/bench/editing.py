"""Editing prompts: a function that was rewritten several times, a variable renamed each time, and is once more.

What follows is mostly a copy of what stands before it. So small a model as the bundled one does not copy every text:
the functions are those of the held-out modules that it copies best (`scripts/editing_prompts.py` measures it).
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from outrider.bench.held_out import held_out_files

NUM_REWRITES = 3
NEW_NAMES = ("value", "item", "result", "data", "name", "index")
GIVEN_LINES = 0.35  # of the last version: the others are the model's to write
CHOSEN = Path(__file__).resolve().parent / "editing_functions.json"

# Where a Python comes without its library's source.
BUILT_IN_FUNCTIONS = (
    'def total(prices):\n    """Sum the prices."""\n    total = 0\n    for price in prices:\n'
    "        total = total + price\n    return total\n",
    "def largest(items):\n    best = items[0]\n    for item in items:\n        if item > best:\n"
    "            best = item\n    return best\n",
)


def edit_prompts(count: int) -> tuple[list[str], str]:
    """Prompts that end in the middle of a rewritten function, and a description of their source.

    Args:
        count: at least 1; prompts repeat where there are fewer functions.
    """
    wanted = [tuple(entry) for entry in json.loads(CHOSEN.read_text(encoding="utf-8"))["functions"]]
    files = held_out_by_name()
    found: dict[tuple[str, ...], str] = {}
    for name in dict.fromkeys(name for name, _ in wanted):
        if name in files:
            found.update({(name, function): code for function, code in functions_of(files[name])})
    codes = [found[entry] for entry in wanted if entry in found]
    prompts = [prompt for prompt, _ in filter(None, map(edit_prompt, codes))]
    source = "functions of held-out standard library modules"
    if not prompts:
        prompts = [prompt for prompt, _ in filter(None, map(edit_prompt, BUILT_IN_FUNCTIONS))]
        source = "built-in functions"
    source += f" rewritten {NUM_REWRITES} times with a variable renamed, {GIVEN_LINES:.0%} of the last one given"
    return [prompts[i % len(prompts)] for i in range(count)], source


def held_out_by_name() -> dict[str, Path]:
    """Held-out files by their path inside the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    return {path.relative_to(library).as_posix(): path for path in held_out_files()}


def edit_prompt(code: str) -> tuple[str, str] | None:
    """A prompt and how it goes on if the function is copied to its end; None without a variable to rename."""
    old = _most_used_name(code)
    names = [name for name in NEW_NAMES if not re.search(rf"\b{name}\b", code)][:NUM_REWRITES]
    if old is None or len(names) < NUM_REWRITES:
        return None
    versions = [f"# {old} renamed to {name}\n" + re.sub(rf"\b{old}\b", name, code) for name in names]
    num_lines = max(2, math.ceil(GIVEN_LINES * len(code.splitlines())))
    given = "".join(versions[-1].splitlines(keepends=True)[: 1 + num_lines]).rstrip("\n")
    return "\n\n".join([code, *versions[:-1], given]), versions[-1][len(given) :].rstrip("\n")


def functions_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and code of each function of a file, without its indentation."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            yield node.name, textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))


def _most_used_name(code: str) -> str | None:
    """The variable that occurs most, at least twice; of equals the last in the alphabet."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a string at the left margin keeps the function's indentation
        return None
    names = Counter(
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.arg)
    )
    own = [name for name, uses in names.items() if uses > 1 and name != "self" and not hasattr(builtins, name)]
    return max(own, key=lambda name: (names[name], name), default=None)
