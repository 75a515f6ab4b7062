"""Every example of the documentation runs as it stands, and gives what plain decoding gives."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import outrider.llm
from outrider.cli.app import app
from outrider.config import DRAFTER_CONFIGS, EngineConfig, NoDrafterConfig

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples.md"
COMMANDS = re.search(r"```bash\n(.*?)```", EXAMPLES.read_text(), flags=re.DOTALL)
LINES = COMMANDS.group(1).splitlines() if COMMANDS else []
SHORT = ("--max-tokens", "12", "--seed", "3")


@pytest.fixture(scope="module", autouse=True)
def one_load() -> Iterator[None]:
    """Load the target once for all commands: it does not depend on how it is decoded."""
    load = functools.cache(outrider.llm.load_target)
    plain = EngineConfig(decoding=NoDrafterConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            outrider.llm,
            "load_target",
            lambda config: load(replace(config, decoding=plain.decoding, verification=plain.verification)),
        )
        yield


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_method_has_an_example() -> None:
    shown = {words[words.index("--decoding") + 1] for words in map(shlex.split, LINES) if "--decoding" in words}
    assert shown == set(DRAFTER_CONFIGS)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "sorting.py").write_text("def quicksort(items):\n    return sorted(items)\n" * 20)
    plain = run(["generate", "def quicksort(", "--decoding", "none", *SHORT])
    for line in LINES:
        program, *words = shlex.split(line)
        assert program == "outrider"
        if words[0] == "generate":
            text = run([*words, *SHORT])
            assert text == plain or "tree_rejection" in words, line
        else:
            files = [str(path) for path in sorted(Path().glob("library/*.py"))]
            run([word for word in words if "*" not in word] + files)
