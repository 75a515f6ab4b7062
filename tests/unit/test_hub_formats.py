"""GPTQ and AWQ checkpoints: written here bit by bit from known integers, read by outrider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from outrider.errors import ConfigError, ModelLoadError, UnsupportedModelError
from outrider.kernels.packed import dequantize, unpack
from outrider.quantization.weights import WeightSource, open_weights

NUM_OUTPUTS, NUM_INPUTS = 40, 96
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_words(rows: list[list[int]]) -> Tensor:
    """int32 words from lists of eight nibbles each, the first lowest."""
    return torch.tensor(
        [signed(sum(nibble << (4 * i) for i, nibble in enumerate(row))) for row in rows], dtype=torch.int32
    )


def gptq_columns(values: Tensor) -> Tensor:
    """Zero points [G, N] eight outputs to a word: [G, N / 8]."""
    return torch.stack([pack_words(row.view(-1, 8).tolist()) for row in values])


def gptq_rows(values: Tensor) -> Tensor:
    """Weights [K, N] eight inputs to a word: [K / 8, N]."""
    return gptq_columns(values.T.contiguous()).T.contiguous()


def awq_columns(values: Tensor) -> Tensor:
    """[R, N] eight outputs to a word in AWQ's order: [R, N / 8]."""
    words = [pack_words([[block[i] for i in AWQ_ORDER] for block in row.view(-1, 8).tolist()]) for row in values]
    return torch.stack(words)


class Known:
    """Random integers of a layer, and the weight that they mean."""

    def __init__(self, num_groups: int, symmetric: bool = False, group_of: list[int] | None = None) -> None:
        g = torch.Generator().manual_seed(4)
        self.q = torch.randint(0, 16, (NUM_INPUTS, NUM_OUTPUTS), generator=g)
        self.zeros = torch.randint(1, 16, (num_groups, NUM_OUTPUTS), generator=g)
        if symmetric:
            self.zeros.fill_(8)
        self.scales = (torch.rand(num_groups, NUM_OUTPUTS, generator=g) + 0.1).half()
        size = -(-NUM_INPUTS // num_groups)
        self.group_of = group_of or [k // size for k in range(NUM_INPUTS)]
        self.weight = torch.empty(NUM_OUTPUTS, NUM_INPUTS)
        for k, group in enumerate(self.group_of):
            self.weight[:, k] = self.scales[group].float() * (self.q[k] - self.zeros[group])

    def gptq(self, stored_less: int = 1, with_g_idx: bool = True) -> dict[str, Tensor]:
        tensors = {
            "qweight": gptq_rows(self.q),
            "qzeros": gptq_columns(self.zeros - stored_less),
            "scales": self.scales,
        }
        if with_g_idx:
            tensors["g_idx"] = torch.tensor(self.group_of, dtype=torch.int32)
        return tensors

    def awq(self) -> dict[str, Tensor]:
        return {"qweight": awq_columns(self.q), "qzeros": awq_columns(self.zeros), "scales": self.scales}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> WeightSource:
    named = {f"model.q_proj.{name}": tensor for name, tensor in tensors.items()}
    others = {"model.q_proj.bias": torch.arange(40.0).half(), "model.norm.weight": torch.ones(96)}
    save_file({**named, **others}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return open_weights(folder)


def check(source: WeightSource, known: Known) -> None:
    assert source.held == "int4"
    assert source.linear_names == {"model.q_proj"}
    assert source.names == ["model.norm.weight", "model.q_proj.bias"]
    assert source.shape("model.q_proj.weight") == (NUM_OUTPUTS, NUM_INPUTS)
    assert torch.equal(source.tensor("model.q_proj.bias"), torch.arange(40.0).half())
    packed = source.linear("model.q_proj", "bf16")  # whatever format is asked for
    assert torch.equal(dequantize(packed), known.weight)
    with pytest.raises(ModelLoadError, match="quantised layer"):
        source.tensor("model.q_proj.weight")


@pytest.mark.parametrize("with_g_idx", [True, False])
@pytest.mark.parametrize("variant", ["gptq", "gptq_v2", None])
def test_gptq(tmp_path: Path, variant: str | None, with_g_idx: bool) -> None:
    known = Known(3)
    config = GPTQ if variant is None else {**GPTQ, "checkpoint_format": variant}
    source = write(tmp_path, known.gptq(0 if variant == "gptq_v2" else 1, with_g_idx), config)
    check(source, known)
    packed = source.linear("model.q_proj", "int4")
    assert packed.has_zeros
    assert packed.input_order is None


@pytest.mark.parametrize("stored_less", [0, 1])
def test_symmetric_gptq_whatever_was_stored(tmp_path: Path, stored_less: int) -> None:
    """Some writers store 8 under the format's first version; symmetric means 8 in either case."""
    known = Known(3, symmetric=True)
    source = write(tmp_path, known.gptq(stored_less), {**GPTQ, "sym": True, "checkpoint_format": "gptq"})
    check(source, known)
    assert not source.linear("model.q_proj", "int4").has_zeros


def test_gptq_zero_point_of_zero(tmp_path: Path) -> None:
    """Less one, it is stored as 15."""
    known = Known(3)
    tensors = known.gptq()
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    packed = write(tmp_path, tensors, GPTQ).linear("model.q_proj", "int4")
    zeros = unpack(packed).zeros
    assert zeros is not None
    assert int(zeros.abs().max()) == 0


def test_gptq_in_the_order_of_activations(tmp_path: Path) -> None:
    group_of = [0, 1, 2] * 32
    known = Known(3, group_of=group_of)
    source = write(tmp_path, known.gptq(), {**GPTQ, "desc_act": True})
    check(source, known)
    order = source.linear("model.q_proj", "int4").input_order
    assert order is not None
    assert order.tolist() == [*range(0, 96, 3), *range(1, 96, 3), *range(2, 96, 3)]


def test_gptq_of_the_first_versions_has_its_settings_elsewhere(tmp_path: Path) -> None:
    known = Known(3)
    write(tmp_path, known.gptq(), GPTQ)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    check(open_weights(tmp_path), known)


def test_awq(tmp_path: Path) -> None:
    known = Known(3)
    source = write(tmp_path, known.awq(), AWQ)
    check(source, known)
    assert source.linear("model.q_proj", "int4").has_zeros


@pytest.mark.parametrize("group_size", [-1, 128, 256])
def test_one_group(tmp_path: Path, group_size: int) -> None:
    """Groups larger than the kernels' are cut up; inputs may end before a group does."""
    known = Known(1)
    check(write(tmp_path, known.gptq(), {**GPTQ, "group_size": group_size}), known)


def test_large_groups_are_cut_up(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (512, 8), generator=g)
    zeros = torch.randint(1, 16, (2, 8), generator=g)
    scales = torch.rand(2, 8, generator=g).half()
    tensors = {"qweight": gptq_rows(q), "qzeros": gptq_columns(zeros - 1), "scales": scales}
    packed = write(tmp_path, tensors, {**GPTQ, "group_size": 256}).linear("model.q_proj", "int4")
    expected = (scales.float().repeat_interleave(256, 0) * (q - zeros.repeat_interleave(256, 0))).T
    assert packed.group_size == 128
    assert torch.equal(dequantize(packed), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPTQ, "bits": 3}, "gptq of 3 bits"),
        ({**GPTQ, "bits": 8}, "gptq of 8 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "variant 'marlin'"),
        ({**GPTQ, "group_size": 16}, "group_size 16"),
        ({**GPTQ, "dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic"),
        ({**AWQ, "version": "gemv"}, "variant 'gemv'"),
        ({**AWQ, "bits": 8}, "awq of 8 bits"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_what_is_not_read(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*outrider quantize"):
        write(tmp_path, Known(3).gptq(), config)


def test_ragged_groups(tmp_path: Path) -> None:
    known = Known(3, group_of=[0] * 40 + [1] * 24 + [2] * 32)
    with pytest.raises(UnsupportedModelError, match="groups of several sizes"):
        write(tmp_path, known.gptq(), GPTQ).linear("model.q_proj", "int4")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors = Known(3).gptq()
    with pytest.raises(ModelLoadError, match=r"qweight, qzeros and scales of model\.q_proj"):
        write(tmp_path, tensors, {**GPTQ, "group_size": 64}).linear("model.q_proj", "int4")
    with pytest.raises(ModelLoadError, match="no qweight"):
        write(tmp_path, {"weight": torch.zeros(3, 3)}, GPTQ)
    del tensors["scales"]
    with pytest.raises(ModelLoadError, match=r"no tensor model\.q_proj\.scales"):
        write(tmp_path, tensors, GPTQ).linear("model.q_proj", "int4")


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    tensors = Known(3).gptq()
    with pytest.raises(UnsupportedModelError, match="values that float16 does not hold"):
        write(tmp_path, {**tensors, "scales": tensors["scales"].float() * 1e-9}, GPTQ).linear("model.q_proj", "int4")


def test_another_format_was_asked_for(tmp_path: Path) -> None:
    write(tmp_path, Known(3).gptq(), GPTQ)
    assert open_weights(tmp_path, "int4").held == "int4"
    with pytest.raises(ConfigError, match=r"got int8 for .*, which holds int4"):
        open_weights(tmp_path, "int8")
