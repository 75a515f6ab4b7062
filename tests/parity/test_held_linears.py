"""Checkpoints whose linear layers are quantised already, in families that run through transformers' modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from outrider import LLM
from outrider.cli.app import app
from outrider.errors import ConfigError, ModelLoadError, UnsupportedModelError
from outrider.kernels.packed import PackedWeight
from outrider.models import packed_linear
from outrider.models.loader import load_model
from outrider.models.packed_linear import packed_formats
from outrider.models.row_invariance import check_row_invariance
from outrider.models.transformers_model import TransformersModel
from outrider.quantization.weights import open_weights
from tests.parity.swapping_checks import (
    LEVELS,
    assert_drafters_agree,
    eager,
    logits_of,
    packed_of,
    set_kernels,
    typical_error,
)
from tests.tiny_models import build_tiny, make_tiny
from tests.unit.test_hub_formats import awq_columns, gptq_columns, gptq_rows


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    set_kernels(request.param, monkeypatch)
    return request.param


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    set_kernels("compiled", monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of tiny models by family, each made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="module")
def quantised(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `outrider quantize` makes of a family, each once; "plain" is what it made that of."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, weights: str) -> Path:
        if weights == "plain":
            return folders(family)
        if (family, weights) not in made:
            out = made[family, weights] = tmp_path_factory.mktemp("quantised") / family
            command = ["quantize", str(folders(family)), str(out), "--weights", weights, "--group-size", "32"]
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
        return made[family, weights]

    return folder


def pack_nothing(*args: object) -> PackedWeight:
    raise AssertionError(f"packed from full precision: {args[-1]}")


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "llama"])
def test_packed_folders(
    family: str, weights: Any, quantised: Any, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the plain checkpoint rounded at load, with no layer in full precision on the way."""
    if family == "llama" and kernels == "compiled":
        pytest.skip("takes the lean path")
    at_load = load_model(quantised(family, "plain"), weights=weights, group_size=32)
    monkeypatch.setattr(packed_linear, "pack_linear", pack_nothing)
    model: Any = load_model(quantised(family, weights))
    assert isinstance(model, TransformersModel)
    assert not hasattr(model.config, "quantization_config")
    assert packed_formats(model.module) == {weights, "int8"}
    assert torch.equal(logits_of(model), logits_of(at_load))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
@pytest.mark.usefixtures("compiled")
def test_generation_from_packed_folders(family: str, folders: Any, quantised: Any) -> None:
    plain = LLM(quantised(family, "int4"), decoding="none")
    at_load = LLM(folders(family), decoding="none", weights="int4", group_size=32)
    assert assert_drafters_agree(plain, folders("llama"), 4) == assert_drafters_agree(at_load, folders("llama"), 4)


def test_packed_folder_of_a_tied_model(tmp_path: Path) -> None:
    """Saved from the base model too: names without its prefix, and no output layer in the file."""
    module: Any = build_tiny("gemma2", options={"model_type": "gemma2", "tie_word_embeddings": True})
    plain, out = tmp_path / "plain", tmp_path / "packed"
    module.model.save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma2ForCausalLM"]}))
    result = CliRunner().invoke(app, ["quantize", str(plain), str(out), "--weights", "int8"])
    assert result.exit_code == 0, result.output
    assert "layers.0.mlp.up_proj" in open_weights(out).linear_names
    model: Any = load_model(out)
    assert packed_formats(model.module) == {"int8"}
    assert torch.equal(model.module.model.embed_tokens.weight, module.model.embed_tokens.weight)
    assert torch.equal(logits_of(model), logits_of(load_model(plain, weights="int8")))


def write_hub_int4(folder: Path, method: str, module: Any, dtype: str = "float32") -> None:
    """Write a module as GPTQ or AWQ of random integers, its output layer plain, and give it the values these mean."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, part in list(module.named_modules()):
        if type(part) not in (nn.Linear, Conv1D) or name == "lm_head":
            continue
        num_inputs, num_outputs = part.weight.shape if isinstance(part, Conv1D) else part.weight.T.shape
        groups = -(-num_inputs // 32)
        q = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator)
        zeros = torch.randint(6, 10, (groups, num_outputs), generator=generator)
        scales = ((torch.rand(groups, num_outputs, generator=generator) + 0.5) * 0.3 * num_inputs**-0.5).half()
        if method == "gptq":
            parts = {"qweight": gptq_rows(q), "qzeros": gptq_columns(zeros - 1)}
        else:
            parts = {"qweight": awq_columns(q), "qzeros": awq_columns(zeros)}
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in {**parts, "scales": scales}.items()}
        group_of = torch.arange(num_inputs) // 32
        value = scales.float()[group_of] * (q - zeros[group_of])
        part.weight = nn.Parameter(value if isinstance(part, Conv1D) else value.T.contiguous())
        tensors[f"{name}.weight"] = None
    module.save_pretrained(folder)
    path = folder / "model.safetensors"
    plain = {key: tensor.half() if dtype == "float16" else tensor for key, tensor in load_file(path).items()}
    kept = {key: tensor for key, tensor in {**plain, **tensors}.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    quantization = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True, "sym": False}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype, "quantization_config": quantization}))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_hub_formats(family: str, method: str, tmp_path: Path, kernels: str) -> None:
    module = build_tiny(family)
    write_hub_int4(tmp_path, method, module)
    model: Any = load_model(tmp_path, row_invariant=True)
    packed = packed_of(model.module)
    assert {name: weight.format for name, weight in packed.items() if weight.format != "int4"} == {"lm_head": "fp32"}
    check_row_invariance(model)
    assert typical_error(logits_of(model), eager(module)) < 0.1


@pytest.mark.usefixtures("compiled")
def test_float16_of_the_hub_is_computed_in_bfloat16(tmp_path: Path) -> None:
    """With a tied output layer, which such a checkpoint has no tensor of."""
    module: Any = build_tiny("gemma2", options={"model_type": "gemma2", "tie_word_embeddings": True})
    write_hub_int4(tmp_path, "awq", module, "float16")
    assert "lm_head.weight" not in open_weights(tmp_path)
    model: Any = load_model(tmp_path, weights="int4")
    assert model.dtype == torch.bfloat16
    assert packed_formats(model.module) == {"int4", "bf16"}
    assert model.module.lm_head.packed.format == "bf16"
    assert typical_error(logits_of(model), eager(module)) < 0.1


@pytest.mark.usefixtures("compiled")
def test_generation_from_hub_formats(tmp_path: Path, folders: Any) -> None:
    make_tiny("phi3", tmp_path)
    write_hub_int4(tmp_path, "gptq", build_tiny("phi3"))
    assert_drafters_agree(LLM(tmp_path, decoding="none"), folders("llama"), 4)


# --- what is refused


def test_other_devices_than_the_cpu(quantised: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights: got int4 in .*, on meta"):
        load_model(quantised("gpt2", "int4"), device="meta")


def test_another_format_than_the_checkpoints(quantised: Any) -> None:
    with pytest.raises(ConfigError, match=r"got int8 for .*, which holds int4"):
        load_model(quantised("gpt2", "int4"), weights="int8")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_packed_weights_that_do_not_fit(tmp_path: Path, quantised: Any) -> None:
    source = quantised("gemma2", "int8")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    edit_config(tmp_path, intermediate_size=64)
    with pytest.raises(ModelLoadError, match=r"gate_proj of shape \[96, 48\].*expected \[64, 48\]"):
        load_model(tmp_path)
    edit_config(tmp_path, intermediate_size=96, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    with pytest.raises(ModelLoadError, match=r"tensors missing, such as model\.layers\.3"):
        load_model(tmp_path)
    edit_config(tmp_path, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with pytest.raises(UnsupportedModelError, match=r"7 quantised layers, such as model\.layers\.2"):
        load_model(tmp_path)


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    module = build_tiny("mixtral")
    write_hub_int4(tmp_path, "gptq", module)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    like = "model.layers.0.self_attn.q_proj"
    del tensors[f"{expert}.weight"]
    save_file(
        {
            **tensors,
            **{f"{expert}.{kind}": tensors[f"{like}.{kind}"].clone() for kind in ("qweight", "qzeros", "scales")},
        },
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(UnsupportedModelError, match=rf"1 quantised layers, such as {expert}.*outrider quantize"):
        load_model(tmp_path)


def test_transformers_catalogue_keeps_out_of_our_files(folders: Any, quantised: Any, compiled: None) -> None:
    """Loading a packed folder leaves nothing behind that changes how transformers loads a plain one."""
    load_model(quantised("gpt2", "int8"))
    plain: Any = AutoModelForCausalLM.from_pretrained(folders("gpt2"), attn_implementation="eager")
    assert torch.equal(eager(plain), eager(build_tiny("gpt2")))
