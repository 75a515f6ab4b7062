"""transformers' modules on our linear layers: logits, whole generations, quantised checkpoints, refusals."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.cli.app import app
from outrider.errors import ConfigError, ModelLoadError, UnsupportedModelError
from outrider.kernels import native, ops
from outrider.kernels.native import ISA_VARIABLE, REFERENCE
from outrider.kernels.packed import PackedWeight, WeightFormat, dequantize
from outrider.models import packed_linear
from outrider.models.loader import load_model
from outrider.models.model import Model
from outrider.models.packed_linear import PackedLinear, packed_formats, swap_linears
from outrider.models.probe import CachedRun, probe_model
from outrider.models.row_invariance import check_row_invariance
from outrider.models.transformers_model import TransformersModel
from outrider.quantization.weights import open_weights, pack_linear
from tests.tiny_models import FAMILIES, build_tiny, make_tiny
from tests.unit.test_hub_formats import awq_columns, gptq_columns, gptq_rows

FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "int8", "int4")
UNIVERSAL = tuple(family for family in FAMILIES if family not in ("llama", "llama3", "qwen2", "qwen3", "mistral"))
SWAPPED = (*UNIVERSAL, "qwen2")  # with one of the lean family, which comes here without compiled kernels
TOKENS = [int(token) for token in torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))]
LEVELS = ["compiled", REFERENCE]


def set_kernels(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == REFERENCE:
        monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    elif not native.is_available():
        pytest.skip("outrider was built without compiled kernels")


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


@torch.no_grad()
def eager(module: Any) -> Tensor:
    return module(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float()


def logits_of(model: Model) -> Tensor:
    run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True)
    return run.feed("a", TOKENS)


def row_errors(found: Tensor, exact: Tensor) -> Tensor:
    """Of each row's logits, as a part of their spread."""
    return (found - exact).square().mean(dim=-1).sqrt() / exact.std(dim=-1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float(row_errors(found, exact).max())


def typical_error(found: Tensor, exact: Tensor) -> float:
    """Of half the rows: where activations are rounded, a mixture may send a few rows to other experts."""
    return float(row_errors(found, exact).median())


def dequantised(module: Any, packed: Mapping[str, PackedWeight]) -> Any:
    """The module with the values that its packed layers stand for."""
    with torch.no_grad():
        for name, weight in packed.items():
            part: Any = module.get_submodule(name)
            value = dequantize(weight).to(part.weight.dtype)
            part.weight = nn.Parameter(value.T.contiguous() if isinstance(part, Conv1D) else value)
    return module


def packed_of(module: nn.Module) -> dict[str, PackedWeight]:
    return {name: part.packed for name, part in module.named_modules() if isinstance(part, PackedLinear)}


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
    assert router.gate.packed.format == "bf16"
    assert router.up_proj.packed.format == "int4"
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


def assert_drafters_agree(plain: LLM, draft: Path, num_prompts: int = 10) -> list[list[int]]:
    """One by one without a drafter, and all at once with each; the tokens."""
    assert plain.config.exactness == "bitwise"
    prompts = [{"prompt_token_ids": [3 + i, 9, 4, 9 + i][: 1 + i % 4]} for i in range(num_prompts)]
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=7 + i, max_tokens=12, ignore_eos=True)
        for i in range(num_prompts)
    ]
    alone = [
        plain.generate(prompt, some)[0].outputs[0].token_ids for prompt, some in zip(prompts, params, strict=True)
    ]
    for drafter in ("none", "ngram", "recycling", {"method": "draft_model", "model": str(draft), "width": 2}):
        outputs = plain.with_drafter(drafter).generate(prompts, params)
        assert [output.outputs[0].token_ids for output in outputs] == alone, drafter
    return alone


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmoe"])
@pytest.mark.usefixtures("compiled")
def test_drafters_do_not_change_the_output(family: str, weights: Any, folders: Any) -> None:
    plain = LLM(folders(family), drafter="none", weights=weights, group_size=32)
    assert_drafters_agree(plain, folders("llama"))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_drafters_do_not_change_the_output_without_kernels(
    weights: Any, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    plain = LLM(folders("llama"), drafter="none", weights=weights, exactness="bitwise", group_size=32)
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
    plain = LLM(folders("gemma2"), drafter="none", weights="int8", cache={"dtype": "int8"})
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


# --- quantised checkpoints


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
    plain = LLM(quantised(family, "int4"), drafter="none")
    at_load = LLM(folders(family), drafter="none", weights="int4", group_size=32)
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
def test_float16_of_the_hub_is_computed_in_bfloat16(tmp_path: Path, folders: Any) -> None:
    module = build_tiny("gemma2")
    write_hub_int4(tmp_path, "awq", module, "float16")
    model: Any = load_model(tmp_path, weights="int4")
    assert model.dtype == torch.bfloat16
    assert packed_formats(model.module) == {"int4", "bf16"}
    assert typical_error(logits_of(model), eager(module)) < 0.1


@pytest.mark.usefixtures("compiled")
def test_generation_from_hub_formats(tmp_path: Path, folders: Any) -> None:
    make_tiny("phi3", tmp_path)
    write_hub_int4(tmp_path, "gptq", build_tiny("phi3"))
    assert_drafters_agree(LLM(tmp_path, drafter="none"), folders("llama"), 4)


# --- what is refused


def test_devices_without_packed_weights(folders: Any, quantised: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights: got int8 on meta.*set dtype"):
        load_model(folders("gpt2"), weights="int8", device="meta")
    with pytest.raises(ConfigError, match=r"weights: got int4 in .*, on meta"):
        load_model(quantised("gpt2", "int4"), device="meta")


def test_an_int8_cache_without_kernels(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cache\.dtype: got int8 on meta"):
        load_model(folders("gpt2"), cache_dtype="int8", device="meta")
    with pytest.raises(ConfigError, match=r"cache\.dtype: got 'int2'"):
        load_model(folders("gpt2"), cache_dtype="int2")
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    with pytest.raises(ConfigError, match=r"cache\.dtype: got int8 without compiled kernels.*compiler"):
        load_model(folders("gpt2"), cache_dtype="int8")


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
