"""`outrider quantize` as its users meet it: what it writes, what it says, and what an interruption leaves."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from outrider.cli.app import app
from outrider.engine.bundled import BUNDLED_TARGET
from outrider.kernels.packed import dequantize
from outrider.quantization import calibrate, output_folder
from outrider.quantization.weights import open_weights
from tests.tiny_models import make_tiny

IDS = [random.Random(i).randrange(3, 128) for i in range(1000)]
TEXT = " ".join(f"t{token}" for token in IDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def quantized(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def logits_error(folder: Path, model: Path) -> float:
    """Of the packed weights in transformers' module, against the model's own, relative."""
    source, exact, rounded = open_weights(folder), load(model), load(model)
    with torch.no_grad():
        for name in source.linear_names:
            part: Any = rounded.get_submodule(name)
            part.weight = torch.nn.Parameter(dequantize(source.linear(name, "fp32")))
        ids = torch.tensor(IDS).view(5, 200)
        expected = exact(input_ids=ids).logits
        return float((rounded(input_ids=ids).logits - expected).norm() / expected.norm())


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.05), ("int4", 0.6)])
def test_weights(model: Path, tmp_path: Path, weights: str, most: float) -> None:
    out = tmp_path / "out"
    record = quantized(model, out, "--weights", weights, "--group-size", 32)
    assert record["weights"] == weights
    assert record["method"] == "rtn"
    assert record["num_linears"] == 22
    assert record["bytes_after"] < 0.6 * record["bytes_before"]
    assert logits_error(out, model) < most
    assert {path.name for path in out.iterdir()} == {path.name for path in model.iterdir()}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "outrider"
    assert config["weights"] == weights
    assert open_weights(out).linear("lm_head", "fp32").format == "int8"


@pytest.mark.parametrize("lm_head", ["int4", "bf16"])
def test_output_layer(model: Path, tmp_path: Path, lm_head: str) -> None:
    quantized(model, tmp_path / "out", "--lm-head", lm_head)
    assert open_weights(tmp_path / "out").linear("lm_head", "fp32").format == lm_head


def test_calibration_helps(model: Path, text: Path, tmp_path: Path) -> None:
    quantized(model, tmp_path / "plain", "--group-size", 32, "--lm-head", "int4")
    record = quantized(model, tmp_path / "out", "--group-size", 32, "--lm-head", "int4", "--calibrate", text)
    assert record["method"] == "gptq"
    assert logits_error(tmp_path / "out", model) < logits_error(tmp_path / "plain", model)


def test_bundled_model_and_its_tied_output_layer(tmp_path: Path) -> None:
    record = quantized(BUNDLED_TARGET, tmp_path / "out")
    packed = open_weights(tmp_path / "out")
    assert "lm_head" in packed.linear_names
    assert "model.embed_tokens.weight" in packed.names
    assert record["bytes_after"] < 0.5 * record["bytes_before"]


def test_summary_for_people(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out")
    assert result.exit_code == 0
    for pattern in (
        "int4 in groups of 64, rtn, lm_head int8",
        r"linear layers +│ 22",
        r"MiB -> .* MiB",
        "weight error",
    ):
        assert re.search(pattern, result.stdout), result.stdout


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = 0
    original = calibrate.gptq_int4

    def interrupted(*arguments: Any) -> Any:
        nonlocal rounded
        rounded += 1
        if rounded > count:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(calibrate, "gptq_int4", interrupted)


def test_interrupted_calibration_goes_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (model, tmp_path / "out", "--calibrate", text, "--calibration-tokens", 500)
    quantized(model, tmp_path / "whole", *arguments[2:])
    with monkeypatch.context() as patch:
        interrupt_after(10, patch)  # in the second of three layers of seven
        result = run(*arguments)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    assert_refused(run(*arguments, "--group-size", 32), "other settings (group_size)", ".partial")
    done: list[str] = []
    original = output_folder.OutputFolder.save_part

    def save_part(folder: Any, part: str, layers: Any) -> None:
        done.append(part)
        original(folder, part, layers)

    monkeypatch.setattr(output_folder.OutputFolder, "save_part", save_part)
    quantized(*arguments)
    assert done == ["layer_0001", "layer_0002"]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "out" / ".partial").exists()


def test_interrupted_writing_looks_unfinished(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("outrider.quantization.convert._squares", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(model, out).exit_code == 130
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.safetensors*"))
    quantized(model, out, "--weights", "int8")  # nothing is lost by other settings
    assert open_weights(out).held == "int8"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "int5"], ["weights", "int5"]),
        (["--weights", "bf16"], ["weights", "bf16"]),
        (["--group-size", "48"], ["group size", "48"]),
        (["--lm-head", "fp32"], ["lm_head", "fp32"]),
        (["--method", "awq"], ["method", "awq"]),
        (["--method", "gptq"], ["gptq with no --calibrate"]),
        (["--calibrate", "TEXT", "--method", "rtn"], ["rtn with --calibrate"]),
        (["--calibrate", "TEXT", "--weights", "int8"], ["gptq for int8"]),
        (["--calibrate", "TEXT", "--calibration-tokens", "0"], ["--calibration-tokens"]),
        (["--calibrate", "TEXT", "--calibration-tokens", "20"], ["calibration", "20 tokens"]),
        (["--calibrate", "absent.txt"], ["absent.txt"]),
        (["--calibrate", "BINARY"], ["UTF-8"]),
        (["--threads", "0"], ["--threads"]),
        (["--revision", "main"], ["revision"]),
    ],
)
def test_options_that_cannot_be(
    model: Path, text: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    places = {"TEXT": str(text), "BINARY": str(tmp_path / "binary")}
    out = tmp_path / "out"
    assert_refused(run(model, out, *(places.get(option, option) for option in options)), *words)
    assert not (out / "config.json").exists()


def test_models_that_cannot_be(model: Path, tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "absent", tmp_path / "out"), "absent")
    quantized(model, tmp_path / "once", "--weights", "int8")
    assert_refused(run(tmp_path / "once", tmp_path / "twice"), "int8 weights", "quantise the original")
    assert not (tmp_path / "twice").exists()


def test_folders_that_are_not_empty(model: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in model.iterdir())
    assert_refused(run(model, model), "not empty")
    assert sorted(path.name for path in model.iterdir()) == before
    (tmp_path / "file").write_text("")
    assert_refused(run(model, tmp_path / "file"), "the file")
