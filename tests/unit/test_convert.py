"""Which tensors of a model are packed, the file that comes of it, and the folder around that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from outrider.errors import ConfigError, UnsupportedModelError
from outrider.kernels.packed import dequantize
from outrider.quantization.convert import QuantizationSettings, write_quantized
from outrider.quantization.linears import LinearLayer, find_linears
from outrider.quantization.output_folder import OutputFolder
from outrider.quantization.packed_checkpoint import plan_linear, write_packed
from outrider.quantization.weights import WeightSource, open_weights, pack_linear
from tests.tiny_models import build_tiny, make_tiny
from tests.unit.test_packed_checkpoint import CONFIG, layers, write

# --- which tensors are linear layers, and the whole of a model


def found(family: str, folder: Path) -> tuple[WeightSource, list[LinearLayer]]:
    model = build_tiny(family)
    model.save_pretrained(folder)
    source = open_weights(folder)
    return source, find_linears(model.config, source)


def test_linears_of_llama(tmp_path: Path) -> None:
    source, linears = found("llama", tmp_path)
    assert len(linears) == 3 * 7 + 1
    assert [layer.name for layer in linears if layer.is_head] == ["lm_head"]
    assert not any(layer.transposed or layer.is_tied for layer in linears)
    assert all(layer.tensor_name in source.names for layer in linears)


def test_linears_of_gpt2_are_transposed(tmp_path: Path) -> None:
    _, (*inner, head) = found("gpt2", tmp_path)
    assert all(layer.transposed for layer in inner)
    assert len(inner) == 3 * 4
    assert head.is_head
    assert not head.transposed


@pytest.mark.parametrize("prefix", ["", "model."])
def test_tied_head_and_names_without_the_prefix(tmp_path: Path, prefix: str) -> None:
    model = build_tiny("llama")
    model.config.tie_word_embeddings = True
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "q").mkdir()
    linears = find_linears(model.config, open_weights(tmp_path))
    head = linears[-1]
    assert (head.name, head.tensor_name) == ("lm_head", f"{prefix}embed_tokens.weight")
    assert head.is_tied
    assert linears[0].name == f"{prefix}layers.0.self_attn.q_proj"
    write_quantized(
        open_weights(tmp_path), linears, QuantizationSettings("int8"), tmp_path / "q" / "model.safetensors"
    )
    (tmp_path / "q" / "config.json").write_text(json.dumps({"quantization_config": {**CONFIG, "weights": "int8"}}))
    packed = open_weights(tmp_path / "q")
    embedding = tensors[f"{prefix}embed_tokens.weight"]
    assert torch.equal(packed.tensor(f"{prefix}embed_tokens.weight"), embedding)
    assert torch.equal(packed.linear("lm_head", "fp32").data, pack_linear(embedding, "int8", 0, "w").data)


def test_routers_and_fused_experts_are_left_alone(tmp_path: Path) -> None:
    source, linears = found("qwen3_moe", tmp_path)
    assert all("self_attn" in layer.name or layer.is_head for layer in linears)
    assert any(name.endswith("gate.weight") for name in source.names)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("lm_head", [None, "int4", "bf16"])
def test_a_whole_model(tmp_path: Path, family: str, lm_head: Any) -> None:
    source, linears = found(family, tmp_path / "plain")
    quantization = QuantizationSettings("int4", 32, lm_head=lm_head)
    written: list[int] = []
    report = write_quantized(
        source, linears, quantization, tmp_path / "model.safetensors", on_layer=lambda: written.append(1)
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization.to_config()}))
    packed = open_weights(tmp_path)
    assert len(written) == report.num_linears == len(linears) == len(packed.linear_names)
    assert report.bytes_after < report.bytes_before
    assert 0.02 < report.weight_error < 0.12
    for layer in linears:
        weight = source.tensor(layer.tensor_name)
        format = (lm_head or "int8") if layer.is_head else "int4"
        expected = pack_linear(weight.T if layer.transposed else weight, format, 32, "w")
        assert torch.equal(packed.linear(layer.name, "fp32").data, expected.data)
    for name in packed.names:
        assert torch.equal(packed.tensor(name), source.tensor(name))
    assert {*packed.names, *(f"{name}.weight" for name in packed.linear_names)} == set(source.names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "bf16"}, "weights: got 'bf16'"),
        ({"group_size": 48}, "group size: got 48"),
        ({"method": "awq"}, "method: got 'awq'"),
        ({"lm_head": "fp32"}, "lm_head: got 'fp32'"),
        ({"weights": "int8", "method": "gptq"}, "gptq for int8"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationSettings(**arguments)


def test_a_model_that_is_quantised_already(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_weights(tmp_path)
    with pytest.raises(UnsupportedModelError, match="got int4 weights"):
        write_quantized(source, [], QuantizationSettings(), tmp_path / "again.safetensors")


# --- the output folder


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="which is not empty"):
        OutputFolder(tmp_path, {})
    with pytest.raises(ConfigError, match="the file"):
        OutputFolder(tmp_path / "notes.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_parts_are_taken_up_by_the_same_settings_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = OutputFolder(out, {"group": 32})
    OutputFolder(out, {"group": 64})  # nothing is lost by that
    first = OutputFolder(out, {"group": 32})
    first.save_part("layer_0001", {"ordered": layers()["ordered"]})
    assert not (out / "config.json").exists()
    with pytest.raises(ConfigError, match=r"other settings \(group\)"):
        OutputFolder(out, {"group": 64})
    parts = OutputFolder(out, {"group": 32}).finished_parts()
    assert list(parts) == ["layer_0001"]
    assert torch.equal(dequantize(parts["layer_0001"]["ordered"]), dequantize(layers()["ordered"]))


def test_finishing(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "plain")
    (source / "quantize_config.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    folder = OutputFolder(tmp_path / "out", {})
    write_packed(folder.weights_file, [plan_linear(name, packed) for name, packed in layers().items()], {})
    folder.finish(source, CONFIG)
    names = sorted(path.name for path in folder.path.iterdir())
    copied = {path.name for path in source.iterdir()} - {"quantize_config.json"}
    assert names == sorted(copied)
    config = json.loads((folder.path / "config.json").read_text())
    assert config.pop("quantization_config") == CONFIG
    assert config == json.loads((source / "config.json").read_text())
    assert open_weights(folder.path).held == "int4"
    with pytest.raises(ConfigError, match="not empty"):
        OutputFolder(folder.path, {})
