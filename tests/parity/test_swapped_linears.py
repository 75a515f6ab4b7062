"""transformers' modules on our linear layers: logits, bits, whole generations, dtypes of the cache, refusals."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from outrider import LLM
from outrider.errors import ConfigError, ModelLoadError, UnsupportedModelError
from outrider.kernels import native, ops
from outrider.kernels.native import ISA_VARIABLE, REFERENCE
from outrider.kernels.packed import PackedWeight, WeightFormat, dequantize
from outrider.models import packed_linear, transformers_model
from outrider.models.loader import load_model
from outrider.models.packed_linear import PackedLinear, packed_formats, swap_linears
from outrider.models.probe import CachedRun, probe_model
from outrider.models.row_invariance import check_row_invariance
from outrider.models.transformers_model import TransformersModel
from outrider.quantization.weights import pack_linear
from tests.parity.swapping_checks import (
    LEVELS,
    TOKENS,
    assert_drafters_agree,
    eager,
    logits_of,
    packed_of,
    relative_error,
    set_kernels,
    typical_error,
)
from tests.tiny_models import FAMILIES, build_tiny, make_tiny

FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "int8", "int4")
UNIVERSAL = tuple(family for family in FAMILIES if family not in ("llama", "llama3", "qwen2", "qwen3", "mistral"))
SWAPPED = (*UNIVERSAL, "qwen2")  # with one of the lean family, which comes here without compiled kernels


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


def dequantised(module: Any, packed: Mapping[str, PackedWeight]) -> Any:
    """The module with the values that its packed layers stand for."""
    with torch.no_grad():
        for name, weight in packed.items():
            part: Any = module.get_submodule(name)
            value = dequantize(weight).to(part.weight.dtype)
            part.weight = nn.Parameter(value.T.contiguous() if isinstance(part, Conv1D) else value)
    return module


# --- a module's layers, swapped


@pytest.mark.parametrize("family", SWAPPED)
def test_swapped_module_computes_what_it_was(family: str, kernels: str) -> None:
    """fp32: as it was; the others: as the module with dequantised weights, up to the rounding of activations."""
    for format in FORMATS:
        module = build_tiny(family)
        swap_linears(module, format, "fp32", 32)
        assert not [part for part in module.modules() if type(part) in (nn.Linear, Conv1D)]
        same = build_tiny(family) if format == "fp32" else dequantised(build_tiny(family), packed_of(module))
        found, expected = eager(module), eager(same)
        if format == "fp32":
            assert relative_error(found, expected) < 1e-5
        else:
            assert typical_error(found, expected) < (0.02 if format == "bf16" else 0.06)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_formats_of_the_layers(family: str) -> None:
    module = build_tiny(family)
    plain = {name: type(part) for name, part in module.named_modules() if type(part) in (nn.Linear, Conv1D)}
    swap_linears(module, "int4", "fp32", 32)
    packed = packed_of(module)
    assert packed.keys() == plain.keys()
    assert {name: weight.format for name, weight in packed.items() if weight.format != "int4"} == {"lm_head": "int8"}


class Router(nn.Module):
    """Of a mixture: a linear layer that decides, one that computes, one that is shared, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 4)
        self.up_proj = nn.Linear(48, 48)
        self.again = self.up_proj
        self.other = nn.modules.linear.NonDynamicallyQuantizableLinear(48, 48)


def test_routers_shared_layers_and_subclasses() -> None:
    module: Any = build_tiny("gemma2")
    module.model.router = Router()
    swap_linears(module, "int4", "bf16", 32)
    router = module.model.router
    assert {name: packed_formats(part) for name, part in router.named_children()} == {
        "gate": {"bf16"},
        "up_proj": {"int4"},
        "other": set(),
    }
    assert router.again is router.up_proj
    assert type(router.other) is nn.modules.linear.NonDynamicallyQuantizableLinear


def test_each_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = build_tiny("gpt2")
    weights = {
        f"{name}.weight": weakref.ref(part.weight)
        for name, part in module.named_modules()
        if type(part) in (nn.Linear, Conv1D)
    }
    alive: list[list[str]] = []

    def watch(weight: Tensor, format: WeightFormat, group_size: int, name: str) -> PackedWeight:
        alive.append([other for other in weights if other != name and weights[other]() is not None])
        return pack_linear(weight, format, group_size, name)

    monkeypatch.setattr(packed_linear, "pack_linear", watch)
    swap_linears(module, "int8", "fp32", 32)
    names = list(weights)
    head = [] if names[-1] == "lm_head.weight" else ["lm_head.weight"]
    assert [sorted(left) for left in alive] == [sorted({*names[i + 1 :], *head}) for i in range(len(names))]
    assert all(weight() is None for name, weight in weights.items() if not name.startswith("lm_head"))


def test_a_tied_head_is_packed_and_the_embedding_stays(tmp_path: Path, compiled: None) -> None:
    options = {"model_type": "gemma2", "tie_word_embeddings": True}
    module: Any = build_tiny("gemma2", options=options)
    module.save_pretrained(tmp_path)
    loaded: Any = load_model(tmp_path, weights="int4", group_size=32)
    inner = loaded.module
    assert torch.equal(inner.model.embed_tokens.weight, module.model.embed_tokens.weight)
    assert inner.lm_head.packed.format == "int8"
    expected = pack_linear(module.model.embed_tokens.weight.detach(), "int8", 0, "w")
    assert torch.equal(inner.lm_head.packed.data, expected.data)
    assert not inner.all_tied_weights_keys


def test_layer_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any leading dimensions, the input's dtype, and the kernels that are there when it is called."""
    linear = nn.Linear(40, 24)
    weight = linear.weight.detach()
    packed = PackedLinear(pack_linear(weight, "fp32", 0, "w"), linear.bias, torch.bfloat16)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for level in (None, REFERENCE, None):
            if level is None:
                monkeypatch.delenv(ISA_VARIABLE, raising=False)
            else:
                monkeypatch.setenv(ISA_VARIABLE, level)
            torch.testing.assert_close(packed(x), linear(x))
            assert packed(x[0, 0]).shape == (24,)
            assert packed(x[:0]).shape == (0, 3, 24)
            assert packed(x.bfloat16()).dtype == torch.bfloat16
    assert packed.weight.shape == (24, 40)
    assert packed.weight.dtype == torch.bfloat16
    assert packed.weight.is_meta
    assert "40, 24, fp32" in repr(packed)
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    monkeypatch.setattr(native, "Linear", None)
    assert ops.Linear(packed.packed)(x[0]).shape == (3, 24)


# --- loading


@pytest.mark.parametrize("family", UNIVERSAL)
def test_what_is_loaded_is_swapped(family: str, folders: Any, kernels: str) -> None:
    """By itself where there are compiled kernels; without them only on demand."""
    folder = folders(family)
    model: Any = load_model(folder)
    assert packed_formats(model.module) == ({"fp32"} if kernels == "compiled" else set())
    assert relative_error(logits_of(model), eager(build_tiny(family))) < 1e-5
    asked: Any = load_model(folder, weights="bf16")
    assert packed_formats(asked.module) == {"bf16"}
    assert asked.dtype == torch.float32


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", SWAPPED)
def test_row_invariance(family: str, format: WeightFormat, kernels: str) -> None:
    dtype = torch.float32 if format in ("fp32", "int8") else torch.bfloat16
    module = build_tiny(family, dtype=dtype)
    swap_linears(module, format, "fp32", 32)
    model = TransformersModel(module, name=family, row_invariant=True)
    probe_model(model)
    check_row_invariance(model)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    ("family", "option"), [("gpt_oss", "sinks"), ("gpt_oss", "sliding_window"), ("gemma2", "sliding_window")]
)
def test_the_probe_finds_mutants_through_rounding(
    family: str, option: str, format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tolerance is that of bfloat16 where linear layers round their inputs."""
    true, dropped = transformers_model._attention_params, {option: None}
    monkeypatch.setattr(transformers_model, "_attention_params", lambda *args: replace(true(*args), **dropped))
    module = build_tiny(family)
    swap_linears(module, format, "fp32", 32)
    with pytest.raises(UnsupportedModelError, match="eager"):
        probe_model(TransformersModel(module, name=family))


def test_dtypes(folders: Any, compiled: None) -> None:
    folder = folders("gpt2")
    half: Any = load_model(folder, dtype="float16")
    assert half.dtype == torch.float16
    assert not packed_formats(half.module)
    half = load_model(folder, dtype="float16", weights="int8")
    assert half.dtype == torch.float16
    assert packed_formats(half.module) == {"int8"}
    brain: Any = load_model(folder, dtype="bfloat16")
    assert packed_formats(brain.module) == {"bf16"}
    assert typical_error(logits_of(brain), eager(build_tiny("gpt2"))) < 0.1


@pytest.mark.parametrize("weights", ["auto", "int4"])
@pytest.mark.parametrize("tensor", ["transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(weights: Any, tensor: str, value: float, tmp_path: Path) -> None:
    make_tiny("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"tensor {tensor} of .*NaN or infinite"):
        load_model(tmp_path, weights=weights)


def test_weights_that_int4_cannot_hold(tmp_path: Path) -> None:
    make_tiny("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"tensor transformer\.h\.1\.mlp\.c_fc\.weight .*use int8"):
        load_model(tmp_path, weights="int4")


def test_a_mutant_swap_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity test above would fail on a layer without its bias."""
    monkeypatch.setattr(
        packed_linear.ops, "Linear", lambda packed, bias: lambda x: ops.reference_linear.linear(x, packed)
    )
    module = build_tiny("gpt2")
    swap_linears(module, "fp32", "fp32", 32)
    assert relative_error(eager(module), eager(build_tiny("gpt2"))) > 0.1


# --- whole generations


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmoe"])
@pytest.mark.usefixtures("compiled")
def test_drafters_do_not_change_the_output(family: str, weights: Any, folders: Any) -> None:
    plain = LLM(folders(family), decoding="none", weights=weights, group_size=32)
    assert_drafters_agree(plain, folders("llama"))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_drafters_do_not_change_the_output_without_kernels(
    weights: Any, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    plain = LLM(folders("llama"), decoding="none", weights=weights, exactness="bitwise", group_size=32)
    assert isinstance(plain.model, TransformersModel)
    assert_drafters_agree(plain, folders("llama"), num_prompts=4)


# --- dtypes of the cache


@pytest.mark.parametrize(("cache_dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.06)])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("compiled")
def test_cache_dtypes(family: str, cache_dtype: str, most: float, folders: Any) -> None:
    model: Any = load_model(folders(family), cache_dtype=cache_dtype, row_invariant=True)
    assert model.cache_dtype == getattr(torch, cache_dtype)
    assert model.dtype == torch.float32
    assert 0 < typical_error(logits_of(model), eager(build_tiny(family))) < most
    check_row_invariance(model)


@pytest.mark.usefixtures("compiled")
def test_drafters_with_an_int8_cache(folders: Any) -> None:
    plain = LLM(folders("gemma2"), decoding="none", weights="int8", cache={"dtype": "int8"})
    assert plain.engine.cache.keys[0].dtype == torch.int8
    assert_drafters_agree(plain, folders("llama"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
def test_cache_dtypes_without_kernels(
    dtype: str, cache_dtype: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both modes: the step's own keys and values, and those of its trees, take the same way."""
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    for family in ("gemma2", "gpt_neox"):
        exact = eager(build_tiny(family))
        model: Any = load_model(folders(family), dtype=dtype, cache_dtype=cache_dtype, row_invariant=True)
        check_row_invariance(model)
        most = 1e-5 if dtype == cache_dtype == "float32" else 0.1
        for row_invariant in (False, True):
            run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=row_invariant)
            found = torch.cat([run.feed("a", TOKENS[:20]), run.feed("a", TOKENS[20:21]), run.feed("a", TOKENS[21:])])
            assert typical_error(found, exact) < most


# --- what is refused


def test_devices_without_packed_weights(folders: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights: got int8 on meta.*set dtype"):
        load_model(folders("gpt2"), weights="int8", device="meta")


def test_an_int8_cache_without_kernels(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cache\.dtype: got int8 on meta"):
        load_model(folders("gpt2"), cache_dtype="int8", device="meta")
    with pytest.raises(ConfigError, match=r"cache\.dtype: got 'int2'"):
        load_model(folders("gpt2"), cache_dtype="int2")
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    with pytest.raises(ConfigError, match=r"cache\.dtype: got int8 without compiled kernels.*compiler"):
        load_model(folders("gpt2"), cache_dtype="int8")
