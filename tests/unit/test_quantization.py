"""Rounding to nearest, GPTQ, and calibration of whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from outrider.errors import ConfigError, ModelLoadError
from outrider.kernels.packed import PackedWeight, dequantize, unpack
from outrider.quantization import calibrate
from outrider.quantization.calibrate import Calibration, calibration_ids
from outrider.quantization.gptq import InputStatistics, gptq_int4
from outrider.quantization.round_to_nearest import quantize_int4, quantize_int8, search_scales
from tests.tiny_models import build_tiny


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int4_error(weight: Tensor, packed: PackedWeight) -> float:
    return float((dequantize(packed) - weight).square().sum())


# --- rounding to nearest


@settings(max_examples=30)
@given(shape=st.tuples(st.integers(1, 70), st.integers(1, 150)), seed=st.integers(0, 2**20))
def test_int8_is_within_half_a_step(shape: tuple[int, int], seed: int) -> None:
    weight = randn(*shape, seed=seed)
    packed = quantize_int8(weight, "w")
    q, scales, _ = unpack(packed)
    assert scales is not None
    assert torch.equal(scales, weight.abs().amax(1) / 127)
    assert int(q.abs().max()) <= 127
    assert ((dequantize(packed) - weight).abs() <= scales[:, None] * 0.5001).all()


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**20),
)
def test_int4_scales_are_no_worse_than_the_plain_ones(shape: tuple[int, int], group_size: int, seed: int) -> None:
    """In every group: at most the error of max / 8 with the sign of the largest value, and of no value at all."""
    weight = randn(*shape, seed=seed)
    packed = quantize_int4(weight, group_size, "w")
    restored = dequantize(packed)
    assert not packed.has_zeros
    for start in range(0, shape[1], group_size):
        group = weight[:, start : start + group_size]
        widest = group.gather(1, group.abs().argmax(1, keepdim=True))
        scale = (widest / -8).half().float()
        plain = (group / scale).round().clamp(-8, 7) * scale
        error = (restored[:, start : start + group_size] - group).square().sum(1)
        assert (error <= (plain - group).square().sum(1) * 1.00001).all()
        assert (error <= group.square().sum(1)).all()


def test_search_comes_near_the_best_scale() -> None:
    groups = randn(200, 64)
    widest = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    best = torch.full((200,), float("inf"))
    for factor in torch.linspace(0.5, 1.2, 300):
        scale = widest * factor
        error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(1)
        best = torch.minimum(best, error)
    scale = search_scales(groups).float()[:, None]
    found = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(1)
    assert float(found.mean() / best.mean()) < 1.01


def test_importance_moves_the_scale_to_what_counts() -> None:
    groups = randn(50, 32)
    importance = torch.ones(32)
    importance[:4] = 1000
    scale = search_scales(groups, importance).float()[:, None]
    plain = search_scales(groups).float()[:, None]

    def error(scale: Tensor) -> float:
        return float(((groups / scale).round().clamp(-8, 7) * scale - groups)[:, :4].square().sum())

    assert error(scale) < 0.5 * error(plain)


@pytest.mark.parametrize("quantize", [quantize_int8, lambda w, name: quantize_int4(w, 32, name)])
def test_zeros_and_tiny_values(quantize: Any) -> None:
    weight = torch.zeros(3, 40)
    weight[1] = 1e-30
    weight[2, 5] = -1
    restored = dequantize(quantize(weight, "w"))
    assert torch.equal(restored[0], weight[0])
    assert restored.isfinite().all()
    assert abs(float(restored[2, 5]) + 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    weight = randn(40, 70).to(dtype)
    assert torch.equal(dequantize(quantize_int8(weight, "w")), dequantize(quantize_int8(weight.float(), "w")))
    assert torch.equal(dequantize(quantize_int4(weight, 32, "w")), dequantize(quantize_int4(weight.float(), 32, "w")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = randn(5, 40)
    weight[3, 3] = bad
    with pytest.raises(ModelLoadError, match=r"tensor layer\.q cannot be quantised: got NaN or infinity"):
        quantize_int8(weight, "layer.q")
    with pytest.raises(ModelLoadError, match=r"tensor layer\.q"):
        quantize_int4(weight, 32, "layer.q")
    with pytest.raises(ModelLoadError, match=r"tensor layer\.q"):
        gptq_int4(weight, torch.eye(40), 32, "layer.q")


def test_weights_beyond_float16() -> None:
    with pytest.raises(ModelLoadError, match=r"got a value of 1e\+06"):
        quantize_int4(torch.full((1, 32), 1e6), 32, "w")
    assert dequantize(quantize_int8(torch.full((1, 32), 1e6), "w")).isfinite().all()


# --- GPTQ


def correlated_inputs(num_rows: int, num_inputs: int, seed: int = 3) -> Tensor:
    mixing = randn(num_inputs, num_inputs, seed=seed) / num_inputs**0.5
    return randn(num_rows, num_inputs, seed=seed + 1) @ mixing * torch.logspace(-1, 1, num_inputs)


def statistics_of(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1])
    statistics.add(x)
    return statistics


@pytest.mark.parametrize("num_inputs", [64, 130, 300])
def test_gptq_beats_rounding_on_correlated_inputs(num_inputs: int) -> None:
    weight, x = randn(70, num_inputs), correlated_inputs(1000, num_inputs)
    packed = gptq_int4(weight, statistics_of(x).hessian, 64, "w")
    nearest = quantize_int4(weight, 64, "w")
    assert packed.input_order is None

    def output_error(packed: PackedWeight, x: Tensor) -> float:
        return float((x @ (dequantize(packed) - weight).T).square().sum())

    assert output_error(packed, x) < 0.6 * output_error(nearest, x)
    unseen = correlated_inputs(2000, num_inputs)[1000:]
    assert output_error(packed, unseen) < 0.75 * output_error(nearest, unseen)


def slow_gptq(weight: Tensor, hessian: Tensor, packed: PackedWeight) -> Tensor:
    """The original's column by column rule in float64, with the scales that the fast one chose."""
    scales = unpack(packed).scales
    assert scales is not None
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    remaining = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    q = torch.empty_like(weight)
    while remaining:
        k, *rest = remaining
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        scale = scales[:, k // packed.group_size].double()
        q[:, k] = (weight[:, k] / scale).round().clamp(-8, 7)
        error = (weight[:, k] - q[:, k] * scale) / inverse[0, 0]
        weight[:, rest] -= error[:, None] * inverse[0, 1:]
        remaining = rest
    return q


def test_gptq_is_the_papers_rule() -> None:
    """Optimal brain compression, inverting the Hessian of the remaining inputs anew for each column."""
    weight, x = randn(20, 150), correlated_inputs(400, 150)
    hessian = statistics_of(x).hessian
    packed = gptq_int4(weight, hessian, 32, "w")
    same = unpack(packed).values.double() - 8 == slow_gptq(weight, hessian, packed)
    assert float(same.double().mean()) > 0.995  # float32 against float64: a tie may fall to the other side


def test_gptq_without_inputs_rounds_to_nearest() -> None:
    weight = randn(10, 100)
    packed = gptq_int4(weight, torch.zeros(100, 100), 32, "w")
    assert int4_error(weight, packed) == pytest.approx(int4_error(weight, quantize_int4(weight, 32, "w")), rel=1e-3)


def test_gptq_with_dead_and_repeated_inputs() -> None:
    x = correlated_inputs(20, 96)  # fewer rows than inputs: the Hessian is singular
    x[:, 10:20] = 0
    x[:, 30] = x[:, 31]
    packed = gptq_int4(randn(8, 96), statistics_of(x).hessian, 32, "w")
    assert dequantize(packed).isfinite().all()


def test_gptq_names_what_it_cannot_calibrate() -> None:
    with pytest.raises(ModelLoadError, match=r"calibration of layer\.q: got NaN or infinity"):
        gptq_int4(randn(4, 32), torch.full((32, 32), float("nan")), 32, "layer.q")


# --- whole models


def linear_names(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear | calibrate.Conv1D)]


def random_ids(num_sequences: int = 6, length: int = 40) -> Tensor:
    return torch.randint(3, 128, (num_sequences, length), generator=torch.Generator().manual_seed(5))


def whole_model_error(family: str, quantised: dict[str, PackedWeight]) -> float:
    module, ids = build_tiny(family), random_ids()
    with torch.no_grad():
        exact = module(input_ids=ids).logits
        for name, packed in quantised.items():
            weight = module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(
                dequantize(packed) if isinstance(module.get_submodule(name), nn.Linear) else dequantize(packed).T
            )
        return float((module(input_ids=ids).logits - exact).square().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "mixtral"])
def test_calibration_beats_rounding(family: str) -> None:
    module = build_tiny(family)
    names = linear_names(module)
    nearest = {}
    for name in names:
        part: Any = module.get_submodule(name)
        weight = part.weight if isinstance(part, nn.Linear) else part.weight.T
        nearest[name] = quantize_int4(weight.detach(), 32, name)
    calibration = Calibration(module, names, random_ids(), 32)
    assert list(calibration.parts)[:3] == ["layer_0000", "layer_0001", "layer_0002"]
    calibrated = {name: packed for _, part in calibration.run({}) for name, packed in part.items()}
    assert sorted(calibrated) == sorted(names)
    assert whole_model_error(family, calibrated) < 0.8 * whole_model_error(family, nearest)


def test_calibration_goes_on_where_it_was() -> None:
    def calibration() -> Calibration:
        module = build_tiny("gemma2")
        return Calibration(module, linear_names(module), random_ids(), 32)

    whole = dict(calibration().run({}))
    for num_finished in (1, 2, 3):
        finished = dict(list(whole.items())[:num_finished])
        parts_done: list[int] = []
        rest = dict(calibration().run(finished, lambda done=parts_done: done.append(1)))
        assert sorted([*finished, *rest]) == sorted(whole)
        assert len(parts_done) == len(whole)
        for part, layers in rest.items():
            for name, packed in layers.items():
                assert torch.equal(packed.data, whole[part][name].data), (num_finished, name)


def test_replayed_layers_see_what_a_whole_forward_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessians of layer-by-layer calibration against plain hooks on the model quantised so far."""
    module, ids = build_tiny("gemma3"), random_ids()
    hessians: dict[str, Tensor] = {}

    def remember(weight: Tensor, hessian: Tensor, group_size: int, name: str) -> PackedWeight:
        hessians[name] = hessian.clone()
        return gptq_int4(weight, hessian, group_size, name)

    monkeypatch.setattr(calibrate, "gptq_int4", remember)
    plain = build_tiny("gemma3")
    for _, part in Calibration(module, linear_names(module), ids, 32).run({}):
        statistics = {name: InputStatistics(hessians[name].shape[0]) for name in part}
        hooks = [
            plain.get_submodule(name).register_forward_pre_hook(calibrate._input_hook(statistics[name]))
            for name in part
        ]
        with torch.no_grad():
            plain(input_ids=ids)
            for hook in hooks:
                hook.remove()
            for name, packed in part.items():
                torch.testing.assert_close(hessians[name], statistics[name].hessian, rtol=1e-4, atol=1e-3)
                calibrate._matrix(plain.get_submodule(name)).copy_(dequantize(packed))


class SharedLayer(nn.Module):
    """A model that runs one layer twice, so that its layers cannot be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32)])
        self.head = nn.Linear(32, 128)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden = self.embedding(input_ids)
        for _ in range(2):
            hidden = hidden + self.layers[0](hidden).tanh()
        return self.head(hidden)


def test_a_model_whose_layers_cannot_be_replayed() -> None:
    calibration = Calibration(SharedLayer(), ["layers.0", "head"], random_ids(), 32)
    assert list(calibration.parts.values()) == [["layers.0", "head"]]
    ((_, part),) = calibration.run({})
    assert sorted(part) == ["head", "layers.0"]


def test_memory_for_hessians_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_HESSIAN_BYTES", 5000)
    calibration = Calibration(SharedLayer(), ["layers.0", "head"], random_ids(), 32)
    assert list(calibration.parts.values()) == [["layers.0"], ["head"]]
    assert len(dict(calibration.run({}))) == 2


# --- calibration text


class WordTokenizer:
    """A token a word, after a first one if `bos` is given."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        assert not verbose
        return {"input_ids": [*([] if self.bos_token_id is None else [self.bos_token_id]), *map(int, text.split())]}


def numbers(count: int) -> str:
    return " ".join(str(i) for i in range(count))


def test_sequences_are_spread_over_the_text() -> None:
    ids = calibration_ids(WordTokenizer(), numbers(10_000), 2048, 4096)
    assert ids.shape == (4, 512)
    assert ids[:, 0].tolist() == [0, 2500, 5000, 7500]
    assert ids[1].tolist() == list(range(2500, 3012))


def test_sequences_begin_as_texts_do() -> None:
    ids = calibration_ids(WordTokenizer(bos=777), numbers(1000), 256, 64)
    assert ids.shape == (4, 64)
    assert ids[:, 0].tolist() == [777] * 4
    assert ids[0, 1:4].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("words", "num_tokens", "shape"), [(100, 10_000, (1, 100)), (10_000, 40, (1, 40))])
def test_short_texts_and_small_wishes(words: int, num_tokens: int, shape: tuple[int, int]) -> None:
    assert calibration_ids(WordTokenizer(), numbers(words), num_tokens, 1024).shape == shape


def test_a_text_that_says_nothing() -> None:
    with pytest.raises(ConfigError, match="calibration: got 20 tokens"):
        calibration_ids(WordTokenizer(), numbers(20), 1000, 1024)
