"""`outrider bench acceptance` and the workloads of `bench decode`, on the bundled model."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import outrider.llm
from outrider.bench.acceptance import AcceptanceRuns, growth_specs, with_budget
from outrider.bench.runner import OutriderContender
from outrider.cli.app import app
from outrider.cli.bench_acceptance import GROWTHS
from outrider.config import DRAFTER_CONFIGS, DraftModelConfig, LookaheadConfig, drafter_config
from outrider.drafting.drafter import DraftStyle
from outrider.drafting.growth.build import build_growth
from outrider.drafting.lookahead import LookaheadDrafter
from outrider.errors import ConfigError

SMALL = ("--prompts", "2", "--max-tokens", "12")


@pytest.fixture(scope="module", autouse=True)
def one_load() -> Iterator[None]:
    """Load each model once for all commands that run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.llm, "load_target", functools.cache(outrider.llm.load_target))
        yield


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_a_row_for_every_rule_drafter_budget_and_workload(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = ("--workload", "code,random", "--decoding", "ngram,recycling", "--budget", "2,6")
    result = run(
        "acceptance", *options, "--verification", "coupled,rejection", "-t", "0,0.8", *SMALL, "-o", str(output)
    )
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    rows = record["results"]
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    for row in rows:
        assert 1.0 <= row["acceptance_length"] <= 1 + row["budget"]
        assert row["draft_tokens_per_step"] <= row["budget"]
        assert row["draft_ms"] > 0
        assert row["num_outputs"] == 2
        sampled_otherwise = row["rule"] == "rejection" and row["temperature"] > 0
        assert row["num_equal"] == (None if sampled_otherwise else 2)
    assert [of["workload"] for of in record["workloads"]] == ["code", "random"]
    assert all(of["sha256"] for of in record["workloads"])
    assert {"versions", "machine", "commit", "command", "config"} <= record.keys()
    assert "code t=0.8" in result.stdout
    assert result.stdout.count("recycling") == 4


def test_json_alone_and_the_temperature_of_the_workload() -> None:
    record = json.loads(
        run(
            "acceptance", "--workload", "edit,random", "--decoding", "ngram", "--budget", "8", *SMALL, "--json"
        ).stdout
    )
    assert [(row["workload"], row["temperature"]) for row in record["results"]] == [("edit", 0.0), ("random", 1.5)]


def test_an_interruption_prints_the_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right, runs = OutriderContender.run, iter(range(100))

    def interrupted(self, prompts):
        if next(runs) == 2:
            raise KeyboardInterrupt
        return right(self, prompts)

    monkeypatch.setattr(OutriderContender, "run", interrupted)
    options = ("--workload", "code", "--decoding", "ngram", "--budget", "2,4,6", *SMALL, "--json")
    result = run("acceptance", *options)
    assert result.exit_code == 130
    assert [row["budget"] for row in json.loads(result.stdout)["results"]] == [2]
    assert result.stderr == "interrupted\n"


BUDGETS = (1, 2, 3, 7, 8, 16, 17, 32, 100)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_becomes_settings_that_keep_to_it_and_use_it(budget: int) -> None:
    assert with_budget({"method": "none"}, budget) == {"method": "none"}
    assert with_budget({"method": "ngram", "depth": 3}, budget) == {
        "method": "ngram",
        "depth": 3,
        "max_nodes": budget,
    }
    assert with_budget({"method": "jacobi"}, budget) == {"method": "jacobi", "block_size": budget}
    style = DraftStyle()
    lookahead = drafter_config(with_budget({"method": "lookahead"}, budget))
    assert isinstance(lookahead, LookaheadConfig)
    assert budget - 2 * lookahead.window < LookaheadDrafter(lookahead, style, vocab_size=10).max_nodes <= budget
    for spec in growth_specs(GROWTHS, {"method": "draft_model"}).values():
        config = drafter_config(with_budget(spec, budget))
        assert isinstance(config, DraftModelConfig)
        assert (config.max_nodes, config.depth) == (budget, min(budget, 32))
        assert build_growth(config, style).limits.num_nodes == budget
    mcsd = with_budget({"method": "draft_model", "growth": "mcsd"}, budget)
    chains = [prod(mcsd["branching"][:depth]) for depth in range(1, 1 + len(mcsd["branching"]))]
    assert min(budget - 1, 64) <= sum(chains) <= budget


def test_what_a_specification_says_is_kept_but_for_the_budget() -> None:
    given = {"method": "draft_model", "growth": "mcsd", "depth": 3, "branching": [3, 1], "max_nodes": 99}
    assert with_budget(given, 8) == {**given, "max_nodes": 8}
    assert growth_specs(["rsd_s"], {"method": "draft_model", "width": 5})["draft_model rsd_s"]["width"] == 5
    with pytest.raises(ConfigError, match="max_nodes"):
        with_budget({"method": "ngram"}, 0)
    specs = {"none": {"method": "none"}, "ngram": {"method": "ngram"}}
    runs = AcceptanceRuns(None, specs, [4, 8], max_tokens=1, seed=0)  # type: ignore[arg-type]
    found = [(name, budget) for name, budget, _ in runs.contenders()]
    assert found == [("none", 4), ("none", 8), ("ngram", 4), ("ngram", 8)]


def test_every_method_has_a_figure_at_the_same_budget(tmp_path: Path) -> None:
    """Of every drafter in the catalogue, and of every growth of a draft model."""
    corpus, store = tmp_path / "corpus.py", tmp_path / "store"
    corpus.write_text(Path(json.__file__).read_text())
    assert CliRunner().invoke(app, ["datastore", "build", str(corpus), "-o", str(store)]).exit_code == 0
    names = sorted(set(DRAFTER_CONFIGS) - {"none"})
    settings = json.dumps({"datastore": {"path": str(store)}, "auto": {"calibrate": False}})
    options = ("--workload", "code", "--decoding", ",".join(names), "--growth", "all", "--decoding-config", settings)
    result = run("acceptance", *options, "--budget", "5", "-p", "1", "--max-tokens", "12", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["drafter"]: row for row in json.loads(result.stdout)["results"]}
    assert list(rows) == [*names, *(f"draft_model {growth}" for growth in GROWTHS)]
    for row in rows.values():
        assert row["draft_tokens_per_step"] <= 5
        assert row["num_equal"] == 1
        drafter_config(row["spec"])
    levels = rows["hierarchy"]["levels"]
    assert [level["name"] for level in levels] == ["ngram", "history", "aded"]
    assert levels[0]["num_asked"] <= rows["hierarchy"]["num_steps"]
    assert sum(level["num_accepted"] for level in levels) <= sum(level["num_drafted"] for level in levels)
    drafted = rows["hierarchy"]["draft_tokens_per_step"] * rows["hierarchy"]["num_steps"]
    assert sum(level["num_drafted"] for level in levels) == pytest.approx(drafted)
    assert {name for name, row in rows.items() if row["levels"] is not None} == {"hierarchy"}


def test_growths_need_a_draft_model() -> None:
    result = run("acceptance", "--model", "somewhere", "--growth", "beam")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--draft-model" in result.stderr


@pytest.mark.parametrize("workload", ["edit", "random"])
def test_bench_decode_records_its_workload(workload: str) -> None:
    options = ("--workload", workload, *SMALL, "--repeats", "1", "--decoding", "ngram", "--no-transformers", "--json")
    result = run("decode", *options)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["prompts"]["workload"] == workload
    assert len(record["prompts"]["sha256"]) == 64
    assert record["sampling"]["temperature"] == (1.5 if workload == "random" else 0.0)
    assert all(summary["num_equal"] == 2 for summary in record["results"])


def test_bench_decode_measures_growths() -> None:
    options = ("--decoding", "ngram", "--growth", "dyspec,static", *SMALL, "--repeats", "1", "--no-transformers")
    result = run("decode", *options, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    names = ["none", "ngram", "draft_model dyspec", "draft_model static"]
    assert [summary["name"] for summary in record["results"]] == names
    assert all(summary["num_equal"] == 2 for summary in record["results"])
    assert record["drafters"]["draft_model dyspec"]["growth"] == "dyspec"


def test_bench_decode_on_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"category": "qa", "turns": ["def f("]}) + "\n")
    options = ("--workload", "spec_bench", "--data", str(path), "--prompts", "1", "--max-tokens", "4")
    result = run("decode", *options, "--repeats", "1", "--decoding", "none", "--no-transformers")
    assert result.exit_code == 0, result.output
    assert "workload spec_bench" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("decode --workload poetry", ("--workload", "poetry")),
        ("decode --workload spec_bench", ("spec_bench", "--data")),
        ("decode --workload humaneval --data /no/such/file", ("/no/such/file",)),
        ("decode --data x", ("--data",)),
        ("decode --growth ivy", ("--growth", "ivy", "opt_tree")),
        ("acceptance --workload poetry", ("--workload", "poetry")),
        ("acceptance --data x", ("--data", "humaneval")),
        ("acceptance --budget 0", ("--budget",)),
        ("acceptance --budget many", ("--budget", "integers")),
        ("acceptance --verification hope", ("--verification", "hope")),
        ("acceptance --temperature hot", ("--temperature",)),
        ("acceptance --temperature -1", ("temperature",)),
        ("acceptance --decoding none", ("--decoding",)),
        ("acceptance --growth ivy", ("--growth", "ivy", "opt_tree")),
        ("acceptance --decoding telepathy", ("telepathy",)),
        ("acceptance --prompts 0", ("--prompts",)),
        ("acceptance --batch-size 0", ("--batch-size",)),
        ("acceptance --output /no/such/folder/file", ("/no/such/folder/file",)),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: str, words: tuple[str, ...]) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert all(word in line for word in words)
