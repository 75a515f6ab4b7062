"""`outrider advise`: measured on the bundled model in a moment, and predicted for machines that are not here."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.models import OptionInfo
from typer.testing import CliRunner, Result
from typer.utils import get_params_from_function

import outrider.llm
from outrider.bench import advise as bench_advise
from outrider.cli.advise import advise
from outrider.cli.app import app
from outrider.config import AutoConfig, EngineConfig, drafter_config
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine import calibration
from outrider.engine.build import _drafters_for_any_text
from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET
from outrider.kernels import native

TINY = ("--seconds", "0.1", "--prompts", "2", "--max-tokens", "8")


@pytest.fixture(scope="module", autouse=True)
def one_load() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.llm, "load_target", functools.cache(outrider.llm.load_target))
        yield


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["advise", *arguments])


def test_measured_on_the_bundled_model(tmp_path: Path) -> None:
    output = tmp_path / "advice.json"
    result = run(*TINY, "-o", str(output))
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    assert record["advice"] == "measurement"
    names = {of["name"] for of in record["candidates"]}
    assert names == {"ngram", "suffix", "recycling", "bundled draft, chain", "bundled draft, tree", "auto"}
    for of in record["candidates"]:
        assert of["num_equal"] == of["num_outputs"] >= 1
        assert of["tokens_per_s"]["low"] <= of["tokens_per_s"]["median"] <= of["tokens_per_s"]["high"]
        assert [plan["batch_size"] for plan in of["batches"]] == [1, 2, 4, 8, 16, 32, 64]
        drafter_config(of["drafter"])
    check = record["batch_check"]
    assert check["num_equal"] == check["num_outputs"] == 16
    drafter_config(record["drafter"])
    assert ("Decode plainly" if record["recommended"] == "none" else "Use ") in result.stdout
    assert "To paste:" in result.stdout
    assert "llm = LLM(decoding=" in result.stdout


def test_prompts_of_the_user_a_draft_and_json_alone(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def main():\nclass Stack:\n")
    options = ("--prompts", str(prompts), "--seconds", "0.1", "--max-tokens", "6", "--draft", str(BUNDLED_DRAFT))
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["prompts"]["workload"] == "file"
    chain = next(of for of in record["candidates"] if of["name"] == "draft, chain")
    assert chain["drafter"] == {"method": "draft_model", "model": str(BUNDLED_DRAFT)}


@pytest.mark.parametrize(
    ("drafts", "spec"),
    [([], {"method": "auto"}), (["a"], {"method": "auto", "draft_model": "a"}), (["a", "b"], None)],
)
def test_the_planner_that_is_tried_is_the_engine_s_default(
    drafts: list[str], spec: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"method": "draft_model", "model": draft} for draft in drafts]
    monkeypatch.setattr(bench_advise, "_usable_draft", lambda _, path: models[drafts.index(path)])
    llm = SimpleNamespace(config=EngineConfig())
    found = bench_advise.candidates(llm, drafts)["auto"]  # type: ignore[arg-type]
    if spec is not None:
        assert found == spec
        return
    config = drafter_config(found)
    assert isinstance(config, AutoConfig)
    drafters = tuple(drafter_config(of) for of in config.drafters or ())
    assert drafters[:-1] == _drafters_for_any_text(EngineConfig(), "a", "shared")
    assert drafters[-1] == replace(drafters[-2], model="b")  # type: ignore[type-var]


def test_an_interruption_advises_on_what_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench_advise.measure

    def interrupted(*arguments: object) -> None:
        measure(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_advise, "measure", interrupted)
    result = run(*TINY, "--json")
    assert result.exit_code == 130
    record = json.loads(result.stdout)
    assert record["interrupted"]
    assert record["batch_check"] is None
    assert len(record["candidates"]) == 6


def test_predicted_from_the_configuration_alone(tmp_path: Path) -> None:
    shutil.copy(Path(BUNDLED_TARGET) / "config.json", tmp_path)
    options = (
        "--model",
        str(tmp_path),
        "--draft",
        "1M",
        "--draft",
        "60M",
        "--acceptance",
        "0.8",
        "--hardware",
        "a100",
    )
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["advice"] == "prediction"
    assert [of["name"] for of in record["predictions"]] == [
        "prompt lookup",
        "a 1M draft, chain",
        "a 1M draft, tree",
        "a 60M draft, chain",
        "a 60M draft, tree",
    ]
    for of in record["predictions"]:
        assert of["tokens_per_s"] == pytest.approx(of["batches"][0]["speedup"] * record["plain_tokens_per_s"])
    drafter_config(record["drafter"])
    text = run(*options).stdout
    assert "PREDICTION, no decoding was measured" in text
    assert "NVIDIA A100" in text


MEASURED_ONLY = {
    "--dtype": "float32",
    "--device": "cpu",
    "--exactness": "auto",
    "--threads": "1",
    "--workload": "code",
    "--prompts": "2",
    "--data": "questions.jsonl",
    "--seconds": "60",
    "--recalibrate": None,
    "--max-tokens": "128",
    "--temperature": "0",
    "--seed": "0",
}
PREDICTED = {
    "--model": str(BUNDLED_TARGET),
    "--revision": "main",
    "--weights": "int4",
    "--group-size": "64",
    "--draft": "1M",
    "--context": "100",
    "--acceptance": "0.5",
    "--json": None,
    "--output": os.devnull,
}


def words(option: str, value: str | None) -> tuple[str, ...]:
    return (option,) if value is None else (option, value)


def test_options_without_effect_on_a_prediction_are_refused() -> None:
    for option, value in MEASURED_ONLY.items():
        result = run("--hardware", "h100", *words(option, value))
        assert result.exit_code == 2, option
        assert result.stderr.startswith(f"error: {option}: got hardware 'h100'"), option


def test_a_prediction_takes_every_other_option() -> None:
    command = next(of for of in app.registered_commands if of.callback is advise)
    parameters = get_params_from_function(command.callback)  # type: ignore[arg-type]
    options = {
        (of.default.param_decls or ("",))[0] for of in parameters.values() if isinstance(of.default, OptionInfo)
    }
    assert options == {*MEASURED_ONLY, *PREDICTED, "--hardware"}
    for option, value in PREDICTED.items():
        result = run("--hardware", "h100", *words(option, value))
        refused = option == "--revision"  # used, but the bundled model is a folder and has none
        assert result.exit_code == (2 if refused else 0), (option, result.output)
        assert "no decoding is measured" not in result.stderr


def test_costs_are_measured_once_and_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[ForwardCost] = []

    def measured(*_: object, **__: object) -> ForwardCost:
        made.append(ForwardCost((1, 64), (32,), [[0.001 * (1 + len(made)), 0.02]]))
        return made[-1]

    monkeypatch.setattr(calibration, "measure", measured)

    def seconds_of_a_row(*options: str) -> float:
        result = run(*TINY, "--json", *options)
        assert result.exit_code == 0, result.output
        (kept,) = (tmp_path / "outrider" / "calibration").iterdir()
        cost = json.loads(result.stdout)["forward_cost"]
        assert json.loads(kept.read_text()) == made[-1].as_mapping()
        return cost["seconds"][0][0]

    first = seconds_of_a_row()
    assert (seconds_of_a_row(), len(made)) == (first, 1)
    again = seconds_of_a_row("--recalibrate")
    assert (len(made), again > first) == (2, True)
    assert (seconds_of_a_row(), len(made)) == (again, 2)


def test_predicted_for_this_machine_as_a_probe_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--hardware", "probe", "--acceptance", "0.8", "--threads", str(torch.get_num_threads()), "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    machine = record["hardware"]
    assert record["advice"] == "prediction"
    assert machine["name"] == "this machine"
    assert 1e8 < machine["bandwidth"] < 1e13
    assert all(1e8 < flops < 1e15 for flops in machine["flops"].values())
    bytes_read = record["model"]["num_shared"] * record["model"]["weight_bytes"]
    assert record["plain_tokens_per_s"] < machine["bandwidth"] / bytes_read
    assert "measured just now" in record["assumptions"][0]
    monkeypatch.setattr(native, "is_available", lambda: False)
    refused = run("--hardware", "probe")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "compiled kernels" in refused.stderr


def test_where_nothing_pays_plain_decoding_is_the_advice() -> None:
    result = run("--hardware", "h100", "--acceptance", "0")
    assert result.exit_code == 0, result.output
    assert "Decode plainly" in result.stdout
    assert "--decoding none" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "h10"), "did you mean 'h100'"),
        (("--hardware", "l40s", "--model", "/nowhere/at/all"), "nothing there"),
        (("--model", "/nowhere/at/all"), "nothing there"),
        (("--hardware", "l40s", "--acceptance", "1.2"), "--acceptance"),
        (("--hardware", "l40s", "--weights", "int3"), "weights"),
        (("--hardware", "l40s", "--draft", "0.5X"), "0.5X"),
        (("--hardware", "l40s", "--context", "-1"), "--context"),
        (("--acceptance", "0.5"), "here acceptance is measured"),
        (("--hardware", "h100", "--seconds", "60"), "error: --seconds: got hardware 'h100'"),
        (("--hardware", "h100", "-t", "0", "-p", "4", "--seed", "1"), "error: --prompts, --temperature, --seed: got"),
        (("--hardware", "H100", "--recalibrate"), "expected hardware 'this'; leave it out for a prediction"),
        (("--seconds", "0"), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--workload", "poems"), "--workload"),
        (("--draft", "/nowhere/at/all"), "nothing there"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
