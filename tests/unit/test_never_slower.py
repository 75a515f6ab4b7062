"""`benchmarks/never_slower.py`: which cases it runs, and that its record says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import never_slower

from outrider import LLM, SamplingParams


def test_cases_are_chosen_by_name_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(never_slower.CASES) == 8, "no two of one name"
    assert never_slower.arguments([]).cases == list(never_slower.CASES)
    chosen = never_slower.arguments(["--cases", "random-1.5-b1", "code-1.0-b16-of-48", "--pairs", "9"])
    assert [never_slower.CASES[name].num_prompts for name in chosen.cases] == [1, 48]
    with pytest.raises(SystemExit) as ended:
        never_slower.arguments(["--help"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out.split()
    assert all(f"{name}," in listed or name in listed for name in never_slower.CASES)


@pytest.mark.parametrize(
    "argv",
    [
        ["--cases", "random"],
        ["--pairs", "0"],
        ["--model", "m", "--contenders", "draft-model"],
        ["--contenders", "plain"],
    ],
)
def test_what_cannot_be_run_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        never_slower.arguments(argv)
    assert ended.value.code == 2
    assert argv[-2] in capsys.readouterr().err


def test_a_draft_model_contends_where_there_is_one() -> None:
    assert never_slower.arguments([]).contenders == never_slower.CONTENDERS
    assert never_slower.arguments(["--model", "m"]).contenders == ("training-free",)
    assert never_slower.arguments(["--model", "m", "--draft-model", "d"]).contenders == never_slower.CONTENDERS


def test_what_was_chosen_is_run_and_the_record_carries_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(
        plain: object, name: str, spec: dict, cases: list[never_slower.Case], *, by_steps: bool, control: bool
    ) -> Iterator[dict]:
        for case in cases:
            measured.append((name, case.name, case.num_pairs, by_steps, control))
            yield {"case": case.name}

    monkeypatch.setattr(never_slower, "LLM", lambda *args, **settings: settings["device"])
    monkeypatch.setattr(never_slower, "measure", measure)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    output = str(tmp_path / "a record.json")
    chosen = [
        "--contenders",
        "draft-model",
        "--cases",
        "code-1.0-b16",
        "random-1.5-b1",
        "--pairs",
        "9",
        "--by-steps",
        "--control",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/never_slower.py", *chosen, "--output", output])
    never_slower.main()
    assert measured == [
        ("draft-model", "code-1.0-b16", 9, True, True),
        ("draft-model", "random-1.5-b1", 9, True, True),
    ]
    record = json.loads(Path(output).read_text())
    assert record["rows"] == [{"case": "code-1.0-b16"}, {"case": "random-1.5-b1"}]
    assert (
        record["command"]
        == f"OMP_NUM_THREADS=2 python benchmarks/never_slower.py {' '.join(chosen)} --output '{output}'"
    )


def test_engines_take_turns_step_by_step_and_give_what_generating_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LLM(decoding="none", cache={"prefix_caching": False})
    llms = {"plain": plain, "auto": plain.with_decoding("ngram")}
    prompts = ["    x = 1\n    x = 1\n    x =", "class A:\n    x = 1\n    x = 1\n    x ="]
    params = [SamplingParams(temperature=0.0, max_tokens=32, seed=0, ignore_eos=True)] * 2
    expected = [output.outputs[0].token_ids for output in plain.generate(prompts, params)]
    turns = []
    for label, llm in llms.items():

        def step(label: str = label, step: Callable[[], list] = llm.step) -> list:
            turns.append(label)
            return step()

        monkeypatch.setattr(llm, "step", step)
    decoded = never_slower.decode(llms, prompts, params)
    assert all(seconds > 0 and tokens == expected for seconds, tokens in decoded.values())
    assert turns[:2] == ["plain", "auto"]
    assert turns.count("auto") < turns.count("plain"), "drafts save steps here"
    last = len(turns) - 1 - turns[::-1].index("auto")
    assert "plain" in turns[2:last], "they alternate"


@pytest.mark.parametrize(
    ("by_steps", "control", "groups"),
    [
        (False, False, [["plain"], ["auto"], ["auto"], ["plain"]]),
        (True, False, [["plain", "auto"], ["auto", "plain"]]),
        (True, True, [["plain", "auto", "control"], ["control", "auto", "plain"]]),
    ],
)
def test_a_pair_is_decoded_in_both_orders(
    by_steps: bool, control: bool, groups: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def decode(llms: dict[str, LLM], batch: list, params: list) -> dict[str, tuple[float, list[list[int]]]]:
        decoded.append(list(llms))
        return {label: ({"plain": 3.0, "auto": 2.0, "control": 4.0}[label], [[1]]) for label in llms}

    monkeypatch.setattr(never_slower, "decode", decode)
    case = never_slower.Case("random", 1.0, 1, 1, 1, 4)
    plain = LLM(decoding="none", cache={"prefix_caching": False})
    (row,) = never_slower.measure(plain, "training-free", "ngram", [case], by_steps=by_steps, control=control)
    assert decoded == groups
    assert row["speedup_median"] == 1.5
    assert row.get("control_median") == (0.75 if control else None)
    assert row["outputs_equal"]


@pytest.mark.parametrize("wrong", ["auto", "control"])
def test_outputs_that_differ_are_said(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(llms: dict[str, LLM], batch: list, params: list) -> dict[str, tuple[float, list[list[int]]]]:
        return {label: (1.0, [[2 if label == wrong else 1]]) for label in llms}

    monkeypatch.setattr(never_slower, "decode", decode)
    case = never_slower.Case("random", 1.0, 1, 1, 1, 4)
    plain = LLM(decoding="none", cache={"prefix_caching": False})
    (row,) = never_slower.measure(plain, "training-free", "ngram", [case], by_steps=True, control=True)
    assert not row["outputs_equal"]
