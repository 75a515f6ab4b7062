"""The file of packed weights, the folder around it, and the one interface that models read weights through."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.errors import ModelLoadError
from outrider.kernels import huge_pages
from outrider.kernels.packed import PackedWeight, dequantize, pack_int4
from outrider.quantization.packed_checkpoint import PlannedLinear, plan_linear, write_packed
from outrider.quantization.round_to_nearest import quantize_int4, quantize_int8
from outrider.quantization.weights import open_weights, pack_linear
from tests.tiny_models import build_tiny
from tests.unit.test_packed import generator, random_int4

CONFIG = {"quant_method": "outrider", "format_version": 1, "weights": "int4", "group_size": 32}


def layers() -> dict[str, PackedWeight]:
    weight = torch.randn(70, 100, generator=generator())
    order = torch.randperm(100, generator=generator()).int()
    plain = {format: pack_linear(weight, format, 32, "w") for format in ("fp32", "bf16", "int8", "int4")}
    q, scales, zeros = random_int4(33, 100, 64, True)
    return {**plain, "ordered": pack_int4(q, scales, zeros, 64, order)}


def others() -> dict[str, Tensor]:
    return {
        "embedding.weight": torch.randn(5, 7, generator=generator()).bfloat16(),
        "norm": torch.randn(3, generator=generator()),
        "table": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(2.5, dtype=torch.float16),
        "nothing": torch.empty(0, 4),
    }


def write(folder: Path, config: dict[str, Any] | None = None) -> Path:
    path = folder / "model.safetensors"
    write_packed(path, [plan_linear(name, packed) for name, packed in layers().items()], others())
    (folder / "config.json").write_text(json.dumps({"quantization_config": config or CONFIG}))
    return path


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- what is written comes back


def test_everything_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_weights(tmp_path)
    assert source.held == "int4"
    assert source.linear_names == set(layers())
    assert source.names == sorted(others())
    for name, packed in layers().items():
        found = source.linear(name, "int8")
        assert (found.format, found.num_outputs, found.num_inputs) == (
            packed.format,
            packed.num_outputs,
            packed.num_inputs,
        )
        assert torch.equal(found.data, packed.data)
        assert torch.equal(dequantize(found), dequantize(packed))
        assert source.shape(f"{name}.weight") == (packed.num_outputs, packed.num_inputs)
    for name, tensor in others().items():
        assert source.tensor(name).dtype == tensor.dtype
        assert torch.equal(source.tensor(name), tensor)


def test_without_room_for_a_copy_data_is_the_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "has_room_for", lambda num_bytes: False)
    path = write(tmp_path)
    header, _ = read_header(path)
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for name in layers():
        assert (start + header[f"{name}.weight"]["data_offsets"][0]) % 64 == 0
    source = open_weights(tmp_path)
    mapped = source.linear("int8", "int8").data
    again = source.linear("int8", "int8").data
    assert mapped.data_ptr() == again.data_ptr()  # no copy of either
    with path.open("r+b") as file:
        file.seek(start + header["int8.weight"]["data_offsets"][0])
        file.write(b"\x07")
    assert int(mapped.flatten()[0]) == 7


def test_with_room_for_a_copy_data_is_aligned_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(huge_pages, "has_room_for", lambda num_bytes: asked.append(num_bytes) or True)
    path = write(tmp_path)
    source = open_weights(tmp_path)
    found = {name: source.linear(name, "int8").data for name in layers()}
    assert asked == [sum(packed.data.numel() for packed in layers().values())]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    for name, packed in layers().items():
        assert torch.equal(found[name], packed.data)
        assert found[name].data_ptr() % 64 == 0


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    tensors = load_file(path)
    assert torch.equal(tensors["int4.weight"], layers()["int4"].data)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "outrider-packed"


def test_a_copy_without_alignment_is_still_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    header, data = read_header(path)
    for shift in range(4):
        header["__metadata__"]["shift"] = "x" * shift
        write_header(path, header, data)
        source = open_weights(tmp_path)
        for name, packed in layers().items():
            assert torch.equal(source.linear(name, "int4").data, packed.data)


# --- what is refused


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match=r"model.safetensors is damaged"):
        open_weights(tmp_path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = write(tmp_path)
    save_file({"q.weight": torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"quant_method 'outrider' .* format 'pt'"):
        open_weights(tmp_path)


def test_foreign_config(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"quant_method None .* format 'outrider-packed'"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**CONFIG, "weights": "int5"}}))
    with pytest.raises(ModelLoadError, match="got weights 'int5'"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": 4}')
    with pytest.raises(ModelLoadError, match="got quantization_config 4"):
        open_weights(tmp_path)


def test_another_version(tmp_path: Path) -> None:
    path = write(tmp_path)
    header, data = read_header(path)
    header["__metadata__"]["version"] = "2"
    write_header(path, header, data)
    with pytest.raises(ModelLoadError, match=r"version '2', expected .* version '1'; quantise the model again"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("int4", {"group_size": 64}),
        ("int4", {"group_size": 33}),
        ("int4", {"has_zeros": True}),
        ("int4", {"num_inputs": 64}),
        ("int8", {"num_outputs": 97}),
        ("int8", {"num_outputs": 0}),
        ("int8", {"num_outputs": -5}),
        ("int8", {"num_inputs": True}),
        ("int8", {"format": "int4"}),
        ("int8", {"format": "int3"}),
        ("int8", {"group_size": 32}),
        ("bf16", {"more": 1}),
        ("ordered", {"input_order": "norm"}),
        ("ordered", {"input_order": "absent"}),
        ("ordered", {"input_order": 3}),
    ],
)
def test_descriptors_that_do_not_fit(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    path = write(tmp_path)
    header, data = read_header(path)
    linears = json.loads(header["__metadata__"]["linears"])
    linears[name].update(changes)
    header["__metadata__"]["linears"] = json.dumps(linears)
    write_header(path, header, data)
    with pytest.raises(ModelLoadError):
        open_weights(tmp_path)


@pytest.mark.parametrize("linears", [None, "{", "[]", '{"int4": 3}', '{"absent": {}}'])
def test_descriptors_that_are_none(tmp_path: Path, linears: str | None) -> None:
    path = write(tmp_path)
    header, data = read_header(path)
    del header["__metadata__"]["linears"]
    if linears is not None:
        header["__metadata__"]["linears"] = linears
    write_header(path, header, data)
    with pytest.raises(ModelLoadError, match="the metadata of the packed weights"):
        open_weights(tmp_path)


def test_an_order_that_is_none(tmp_path: Path) -> None:
    """Kernels index by it: nothing outside the inputs may come through."""
    path = write(tmp_path)
    header, data = read_header(path)
    start = header["ordered.input_order"]["data_offsets"][0]
    write_header(path, header, data[:start] + struct.pack("<i", 1000) + data[start + 4 :])
    with pytest.raises(ModelLoadError, match="repeated or missing inputs"):
        open_weights(tmp_path).linear("ordered", "int4")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> PackedWeight:
        raise KeyboardInterrupt

    plans = [plan_linear(name, packed) for name, packed in layers().items()]
    plans.append(PlannedLinear("more", plans[0].descriptor, fail))
    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "model.safetensors", plans, {})
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tensor odd: got torch\.complex64"):
        write_packed(tmp_path / "model.safetensors", [], {"odd": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


# --- plain checkpoints


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tensors = {"q.weight": torch.randn(40, 100, generator=generator()).half(), "q.bias": torch.ones(40)}
    save_file(
        {**tensors, "flat.weight": torch.ones(40), "ids.weight": torch.ones(4, 4).int()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_plain_checkpoints_are_packed_as_asked(plain: Path) -> None:
    source = open_weights(plain, "int8")
    weight = source.tensor("q.weight")
    assert source.held is None
    assert source.names == ["flat.weight", "ids.weight", "q.bias", "q.weight"]
    assert source.linear_names == frozenset()
    assert source.shape("q.weight") == (40, 100)
    assert torch.equal(dequantize(source.linear("q", "fp32")), weight.float())
    assert torch.equal(dequantize(source.linear("q", "bf16")), weight.bfloat16().float())
    assert torch.equal(source.linear("q", "int8").data, quantize_int8(weight, "w").data)
    assert torch.equal(source.linear("q", "int4", 32).data, quantize_int4(weight, 32, "w").data)
    assert torch.equal(dequantize(source.linear("q", "fp32", transposed=True)), weight.float().T)
    assert "q.weight" in source
    assert "p.weight" not in source


def test_plain_tensors_that_are_no_linear_layers(plain: Path) -> None:
    source = open_weights(plain)
    for name in ("flat", "ids"):
        with pytest.raises(ModelLoadError, match=f"tensor {name}.weight: got"):
            source.linear(name, "bf16")
    for call in (source.tensor, source.shape):
        with pytest.raises(ModelLoadError, match=r"no tensor p\.weight"):
            call("p.weight")


def test_shards(tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    build_tiny("llama").save_pretrained(tmp_path / "whole")
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "consolidated.safetensors")  # not in the index
    shards, whole = open_weights(tmp_path), open_weights(tmp_path / "whole")
    assert shards.names == whole.names
    for name in whole.names:
        assert torch.equal(shards.tensor(name), whole.tensor(name))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelLoadError, match=r"tensor model\.norm\.weight in two files"):
        open_weights(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(plain: Path) -> None:
    inner = plain / "inner"
    inner.mkdir()
    (inner / "config.json").write_text("{}")
    (inner / "model.safetensors.index.json").write_text('{"weight_map": {"q.weight": "../model.safetensors"}}')
    with pytest.raises(ModelLoadError, match="missing files"):
        open_weights(inner)
