"""`outrider methods`, and the descriptions that it and the documentation give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from outrider.cli import methods as command
from outrider.cli.app import app
from outrider.config import DRAFTER_CONFIGS
from outrider.config.descriptions import DRAFTER_DESCRIPTIONS
from outrider.losslessness.matrix import REFUSED, TO_PLAIN, WORKS, Cell, Matrix, read_matrix
from outrider.verification.build import RULE_NAMES, build_rule
from outrider.verification.descriptions import RULE_DESCRIPTIONS

METHODS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
ARXIV = re.compile(r"\d{4}\.\d{5}")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["methods", *arguments])


def table_of(heading: str) -> dict[str, str]:
    """Rows of the page's table below a heading, by what stands in their second column."""
    section = METHODS_PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return {row.split("|")[2].strip().strip("`"): row for row in rows}


def test_every_drafter_and_rule_has_a_description() -> None:
    assert list(DRAFTER_DESCRIPTIONS) == list(DRAFTER_CONFIGS), "describe it in config/descriptions.py"
    assert list(RULE_DESCRIPTIONS) == list(RULE_NAMES), "describe it in verification/descriptions.py"
    for name, rule in RULE_DESCRIPTIONS.items():
        assert (rule.trees == "chains") == build_rule(name).chains_only
        assert (rule.exactness == "sample") == (build_rule(name).draft_noise == "shared")


def test_what_a_drafter_needs_is_what_it_is_refused_without() -> None:
    """What users must bring (a model, a file) is described by "a ..."; the others run by their name alone."""
    refused = {name for name, outcome in read_matrix().by_name.items() if outcome.startswith(REFUSED)}
    assert refused == {name for name, of in DRAFTER_DESCRIPTIONS.items() if of.needs.startswith("a ")}


def test_the_page_of_methods_has_a_row_for_each_with_its_papers() -> None:
    for heading, described in (("Drafters", DRAFTER_DESCRIPTIONS), ("Verification rules", RULE_DESCRIPTIONS)):
        rows = table_of(heading)
        assert rows.keys() == described.keys(), f"docs/methods.md, {heading}"
        for name, of in described.items():
            missing = set(ARXIV.findall(of.source)) - set(ARXIV.findall(rows[name]))
            assert not missing, f"docs/methods.md does not name {missing} for {name}"


def test_tables_have_everything() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for name in (*DRAFTER_CONFIGS, *RULE_NAMES):
        assert re.search(rf"^ *{name} ", result.stdout, re.MULTILINE), name
    for description in DRAFTER_DESCRIPTIONS.values():
        assert description.proposes.split()[0] in result.stdout
    assert "draft_model without a second model" in " ".join(result.stdout.split())
    assert "ConfigError" in result.stdout


def test_one_drafter_under_one_rule_in_full() -> None:
    result = run("--decoding", "ngram", "--rule", "rejection")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for parameter in read_matrix().parameters:
        assert any(line.strip().startswith(f"{parameter} ") and "falls back to chains" in line for line in lines)
    assert "recycling" not in result.stdout
    assert "coupled" not in result.stdout


def test_json_is_one_object_with_the_whole_matrix() -> None:
    record = json.loads(run("--json").stdout)
    assert list(record["drafters"]) == list(DRAFTER_CONFIGS)
    assert list(record["rules"]) == list(RULE_NAMES)
    matrix = record["compatibility"]["matrix"]
    assert matrix["ngram"]["coupled"]["top_k"] == WORKS
    assert matrix["ngram"]["rejection"]["temperature 0"] == "falls back to chains"
    assert record["drafters"]["ngram"]["exactness"] == {
        "coupled": "sample",
        **dict.fromkeys(RULE_NAMES[1:], "distribution"),
    }
    part = json.loads(run("--json", "--decoding", "recycling", "--rule", "coupled").stdout)
    assert list(part["drafters"]) == ["recycling"]
    assert {variant.split("-")[0] for variant in part["compatibility"]["matrix"]} == {"recycling"}
    assert list(part["rules"]) == ["coupled"]


def test_all_variants_of_a_method_are_shown() -> None:
    record = json.loads(run("--json", "--decoding", "draft_model").stdout)
    variants = record["compatibility"]["drafters"]
    assert len(variants) >= 2
    assert {of["method"] for of in variants.values()} == {"draft_model"}


def test_outcomes_that_differ_by_place_name_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (
        Cell("ngram", "coupled", "lean, batch 1", "top_k", WORKS),
        Cell("ngram", "coupled", "universal, batch 1", "top_k", TO_PLAIN),
        Cell("ngram", "coupled", "lean, batch 1", "n", WORKS),
        Cell("ngram", "coupled", "universal, batch 1", "n", f"{REFUSED}ConfigError: n > 1 [with ngram]"),
    )
    places = ("lean, batch 1", "universal, batch 1")
    matrix = Matrix({"ngram": {"method": "ngram"}}, places, ("top_k", "n"), cells, {"ngram": WORKS})
    monkeypatch.setattr(command, "read_matrix", lambda: matrix)
    words = " ".join(run("--decoding", "ngram").stdout.split())
    assert "top_k works (lean, batch 1); falls back to plain decoding (universal, batch 1)" in words
    assert "ngram with coupled: refused: ConfigError: n > 1 [with ngram]" in words
    overview = " ".join(run().stdout.split())
    assert "works 2/4, falls back to plain decoding 1/4, refused 1/4" in overview


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--decoding", "telepathy"), ("telepathy", "ngram")), (("--rule", "hope"), ("hope", "coupled"))],
)
def test_unknown_names_are_one_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert all(word in line for word in words)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['outrider', 'methods', '--json']\nfrom outrider.cli.app import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"
