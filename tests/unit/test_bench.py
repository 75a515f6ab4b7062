"""Workloads, the order of measuring, and what is made of the samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO

import pytest
from rich.console import Console

from outrider.bench import held_out
from outrider.bench.held_out import BUILT_IN_PROMPTS, held_out_prompts
from outrider.bench.report import environment, speed_table, step_table, summarise
from outrider.bench.runner import Results, Sample, _until_end, run_rounds
from outrider.bench.workloads import prompts_hash
from outrider.engine.stats import EngineStats


def test_held_out_prompts_are_function_heads_and_always_the_same() -> None:
    prompts, source = held_out_prompts(24)
    assert len(set(prompts)) == 24
    assert all(prompt.startswith(("def ", "async def ")) for prompt in prompts)
    assert all(prompt.count("\n") == held_out.LINES_PER_PROMPT for prompt in prompts)
    assert held_out_prompts(24) == (prompts, source)
    assert held_out_prompts(5)[0] == prompts[:5]
    assert "held-out" in source


def test_built_in_prompts_where_there_is_no_library_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "held_out_files", list)
    prompts, source = held_out_prompts(6)
    assert prompts == [*BUILT_IN_PROMPTS, *BUILT_IN_PROMPTS[:2]]
    assert source == "built-in prompts"


def test_prompts_hash_depends_on_every_prompt() -> None:
    assert prompts_hash(["a", "b"]) == prompts_hash(["a", "b"]) != prompts_hash(["ab"])


class FakeContender:
    comparable = True

    def __init__(self, name: str, log: list[str], token_ids: list[list[int]], fails_at: int | None = None) -> None:
        self.name, self._log, self._token_ids, self._fails_at = name, log, token_ids, fails_at
        self._num_runs = 0

    def prepare(self) -> None:
        self._log.append(f"prepare {self.name}")

    def run(self, prompts: Sequence[list[int]]) -> Sample:
        if self._num_runs == self._fails_at:
            raise KeyboardInterrupt
        self._num_runs += 1
        self._log.append(f"run {self.name}")
        return Sample(1.0 / self._num_runs, self._token_ids)


def test_contenders_take_turns_and_each_repeat_begins_with_the_next() -> None:
    log: list[str] = []
    contenders = [FakeContender(name, log, [[1]]) for name in "abc"]
    run_rounds(contenders, [[0]], repeats=3, results=Results(), on_start=lambda name: None)
    runs = [entry[-1] for entry in log if entry.startswith("run")]
    assert "".join(runs) == "abc" + "bca" + "cab"
    assert log[::2] == [f"prepare {name}" for name in runs]


def test_an_interruption_leaves_the_finished_samples() -> None:
    log: list[str] = []
    contenders = [FakeContender("none", log, [[1]]), FakeContender("b", log, [[1]], fails_at=0)]
    results = Results()
    with pytest.raises(KeyboardInterrupt):
        run_rounds(contenders, [[0]], repeats=2, results=results, on_start=lambda name: None)
    assert list(results.complete()) == ["none"]


def test_summary_takes_the_median_of_what_repeats_accepted() -> None:
    """A planner decides by time, so its repeats differ."""
    stats = [EngineStats(num_steps=100, other_s=1.0) for _ in range(3)]
    for of, accepted in zip(stats, (0, 300, 100), strict=True):
        of.num_verifications, of.num_accepted_tokens = 100, accepted
    plain = [[1, 2]]
    results = Results({"none": [Sample(1.0, plain)] * 3, "auto": [Sample(1.0, plain, of) for of in stats]})
    assert summarise("auto", results, comparable=True)["acceptance_length"] == 2.0


def test_summary_pairs_the_repeats_and_counts_equal_outputs() -> None:
    stats = EngineStats(draft_s=1.0, target_s=2.0, verify_s=0.5, other_s=0.5, num_steps=100)
    stats.num_verifications, stats.num_accepted_tokens = 100, 150
    plain = [[1, 2], [3, 4]]
    results = Results(
        {
            "none": [Sample(1.0, plain), Sample(2.0, plain)],
            "ngram": [Sample(0.5, plain, stats), Sample(0.5, [[1, 2], [3, 5]], stats)],
        }
    )
    summary = summarise("ngram", results, comparable=True)
    assert summary["tokens_per_s"] == {"median": 8.0, "min": 8.0, "max": 8.0}
    assert summary["speedup"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert (summary["num_equal"], summary["num_outputs"]) == (1, 2)  # in every repeat, not in some
    assert summary["acceptance_length"] == 2.5
    assert summary["phases"]["target"] == {"ms_per_step": 20.0, "percent": 50.0}
    assert summary["phases"]["other"] == {"ms_per_step": 5.0, "percent": 12.5}
    assert summary["own_ms_per_step"]["median"] == pytest.approx(10.0)
    assert len(summary["samples"]) == 2
    json.dumps(summary)
    assert summarise("ngram", results, comparable=False)["num_equal"] is None


def test_speed_table_has_a_row_for_every_contender() -> None:
    results = Results({"none": [Sample(1.0, [[1]], EngineStats(other_s=1.0))], "other engine": [Sample(0.5, [[2]])]})
    summaries = [summarise(name, results, comparable=True) for name in results.complete()]
    out = StringIO()
    console = Console(file=out, width=160)
    console.print(speed_table(summaries, "title"))
    (line,) = [line for line in out.getvalue().splitlines() if "other engine" in line]
    assert line.split() == ["other", "engine", "2.0", "2-2", "2.00x", "-", "0/1"]
    console.print(step_table(summaries[:1]))
    assert "all but draft and target" in out.getvalue()


def test_outputs_of_transformers_end_with_their_end_of_sequence_token() -> None:
    assert _until_end([5, 6, 0, 0, 0], {0}) == [5, 6, 0]
    assert _until_end([5, 6], {0}) == [5, 6]


def test_environment_names_what_a_figure_depends_on() -> None:
    record = environment()
    assert record["versions"]["torch"]
    assert record["machine"]["torch_threads"] >= 1
    json.dumps(record)
