"""What the help of shared options says is what the code does."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from typer.testing import CliRunner

from outrider.cli import options as opt
from outrider.cli.app import app
from outrider.cli.options import EngineOptions, drafter_names
from outrider.config import DRAFTER_CONFIGS
from outrider.errors import ConfigError
from outrider.verification.descriptions import RULE_DESCRIPTIONS


def help_of(annotated: object) -> str:
    _, info = get_args(annotated)
    return info.help


def test_the_default_drafter_is_the_one_that_runs() -> None:
    assert f"Default: {EngineOptions().drafter_spec()['method']}." in help_of(opt.Drafter)
    assert "all (the default)" in help_of(opt.Drafters)
    assert drafter_names(None, EngineOptions()) == drafter_names(["all"], EngineOptions())


def test_every_rule_is_named_with_its_exactness() -> None:
    said = dict(re.findall(r"(\w+(?:, \w+)*) \(([^)]*)\)", help_of(opt.Verification)))
    assert set(", ".join(said).split(", ")) == set(RULE_DESCRIPTIONS)
    for names, words in said.items():
        expected = "distribution" if "distribution" in words else "sample"
        assert {RULE_DESCRIPTIONS[name].exactness for name in names.split(", ")} == {expected}


@pytest.mark.parametrize("name", sorted(set(DRAFTER_CONFIGS) - {"self_draft", "none"}))
def test_a_draft_model_chooses_no_drafter(name: str) -> None:
    """It goes to those that run one, and to the planner."""
    options = EngineOptions(drafter=name, draft_model="a draft")
    runs_one = name in ("draft_model", "universal_draft", "staged", "sorted_draft")
    if runs_one or name == "auto":
        assert options.drafter_spec() == {"method": name, "model" if runs_one else "draft_model": "a draft"}
    else:
        with pytest.raises(ConfigError, match="--draft-model"):
            options.drafter_spec()
    assert EngineOptions(draft_model="a draft").drafter_spec() == {"method": "auto", "draft_model": "a draft"}


@pytest.mark.parametrize("command", [["generate"], ["verify"], ["bench", "decode"], ["bench", "acceptance"]])
def test_help_pages_name_every_rule(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    for name in RULE_DESCRIPTIONS:
        assert name in shown.stdout
