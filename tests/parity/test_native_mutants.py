"""Kernels that are wrong on purpose: each must fail the check that is there to find it.

The layers' mutants are made from the reference, so that they need no compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.kernels import native, packed, reference_linear
from outrider.kernels.attention import AttentionParams, FlatSequences
from outrider.kernels.packed import PackedWeight
from tests.parity import attention_checks, linear_checks
from tests.parity.attention_checks import Attend, Step, decode, make_step
from tests.parity.kernel_levels import LEVELS, use_level
from tests.parity.linear_checks import KINDS, Apply, Layer, rows_of, twice_rounded_int4


@pytest.fixture
def kernels() -> Iterator[None]:
    """The fastest level, even where the environment asks for the reference."""
    if not LEVELS:
        pytest.skip("built without kernels")
    with use_level(LEVELS[0]):
        yield


def nudged(out: Tensor, rows: slice | list[int] = slice(None)) -> Tensor:
    """The next larger float in some rows: one bit of error."""
    out = out.clone()
    out[rows] = torch.nextafter(out[rows], torch.tensor(torch.inf))
    return out


# Layers. A mutant takes rows, weight and bias, as the reference does.

reference = reference_linear.linear


def perturbs_the_last_of_thirteen_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out = reference(x, weight, bias)
    return nudged(out, [12]) if len(x) == 13 else out


def perturbs_the_first_row_but_alone(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out = reference(x, weight, bias)
    return nudged(out, [0]) if len(x) > 1 else out


def has_one_scale_for_all_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    largest = x.abs().max() if len(x) else torch.tensor(0.0)
    joined = torch.cat((x, largest.expand(len(x), 1)), dim=1)
    q, scales = reference_linear.quantize_rows(joined)
    out = (q[:, :-1] * scales) @ packed.dequantize(weight).T
    return out if bias is None else out + bias


def depends_on_the_number_of_threads(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out = reference(x, weight, bias)
    return nudged(out, [len(x) - 1]) if native.num_threads() == 5 else out


def ignores_the_last_input(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    x = x.clone()
    x[:, -1] = 0
    return reference(x, weight, bias)


def ignores_the_bias(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return reference(x, weight, None)


def ignores_the_order(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return reference(x, replace(weight, input_order=None), bias)


def repeats_the_first_output(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out = reference(x, weight, bias)
    out[:, -1] = out[:, 0]
    return out


def cuts_instead_of_rounding(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    whole = torch.full_like(x.bfloat16().view(torch.int16), -1).int() << 16
    return reference((x.view(torch.int32) & whole).view(torch.float32), weight, bias)


def quantizes_to_128(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    values, scales, _ = packed.unpack(weight)
    assert scales is not None
    assert bias is None
    largest = x.abs().amax(dim=1, keepdim=True)
    q = (x * (128 / largest)).round().clamp(max=127)
    return (q.double() @ values.double().T).float() * scales * (largest / 128)


def loses_nan(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return reference(x.nan_to_num(posinf=1.0, neginf=-1.0), weight, bias)


def loses_infinity(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return reference(torch.where(x.isinf(), torch.finfo(torch.float32).max, x), weight, bias)


def spreads_nan(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return reference(x, weight, bias) + 0 * x.sum()


LINEAR_CHECKS: dict[str, Callable[[Layer], None]] = {
    "truth": lambda layer: linear_checks.check_near_truth(layer, rows_of(14, 70)),
    "reference": lambda layer: linear_checks.check_equals_reference(layer, rows_of(14, 70), fuses=True),
    "rows": lambda layer: linear_checks.check_row_invariance(layer.apply, rows_of(26, 70), range(1, 26)),
    "threads": lambda layer: linear_checks.check_threads(layer.apply, rows_of(14, 70)),
    "bad rows": lambda layer: linear_checks.check_bad_rows(layer, rows_of(14, 70)),
}

LINEAR_MUTANTS = [
    (perturbs_the_last_of_thirteen_rows, "int8", "rows"),
    (perturbs_the_first_row_but_alone, "int4 g32", "rows"),
    (has_one_scale_for_all_rows, "int8", "rows"),
    (depends_on_the_number_of_threads, "int8", "threads"),
    (ignores_the_last_input, "fp32", "truth"),
    (ignores_the_last_input, "bf16", "truth"),
    (ignores_the_last_input, "int8", "reference"),
    (ignores_the_last_input, "int4 g128 bias", "reference"),
    (ignores_the_bias, "fp32 order bias", "truth"),
    (ignores_the_bias, "int4 g64 zeros bias", "truth"),
    (ignores_the_order, "bf16 order bias", "truth"),
    (ignores_the_order, "int4 g32 zeros order", "truth"),
    (repeats_the_first_output, "int8", "truth"),
    (repeats_the_first_output, "fp32", "truth"),
    (cuts_instead_of_rounding, "bf16", "truth"),
    (quantizes_to_128, "int8", "reference"),
    (loses_nan, "fp32", "bad rows"),
    (loses_nan, "int8", "bad rows"),
    (loses_infinity, "int4 g32", "bad rows"),
    (spreads_nan, "int8", "bad rows"),
]


def layer_of(function: Callable[[Tensor, PackedWeight, Tensor | None], Tensor], kind: str) -> Layer:
    weight, bias = KINDS[kind].weight(40, 70)
    apply: Apply = lambda x: function(x, weight, bias)  # noqa: E731 - typed
    return Layer(weight, bias, apply)


@pytest.mark.parametrize(("mutant", "kind", "check"), LINEAR_MUTANTS)
def test_wrong_layers_are_found(
    mutant: Callable[[Tensor, PackedWeight, Tensor | None], Tensor], kind: str, check: str
) -> None:
    with pytest.raises(AssertionError):
        LINEAR_CHECKS[check](layer_of(mutant, kind))


@pytest.mark.parametrize("kind", ["int8", "int4 g32", "int4 g64 zeros bias", "int4 g32 zeros order"])
def test_right_layers_pass(kind: str) -> None:
    """Or the mutants might be found for being tested at all."""
    for check in LINEAR_CHECKS.values():
        check(layer_of(reference, kind))


def test_one_rounding_more_or_less_is_found() -> None:
    """The product of a group's sum and its scale has more than 24 bits only where the sum is large."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(12, 16, (40, 256), generator=generator).to(torch.uint8)
    scales = torch.rand(40, 2, generator=generator).half()
    weight = packed.pack_int4(q, scales, torch.zeros(40, 2, dtype=torch.uint8), 128)
    x = torch.rand(9, 256, generator=generator) + 0.5
    for function, fuses in ((reference, True), (twice_rounded_int4, False)):
        layer = Layer(weight, None, lambda x, function=function: function(x, weight, None))
        linear_checks.check_equals_reference(layer, x, fuses)
        with pytest.raises(AssertionError):
            linear_checks.check_equals_reference(layer, x, not fuses)


# Attention. A mutant gets what the kernel gets and calls it with something else, or changes what it gives.


@dataclass(frozen=True)
class Call:
    """The arguments of `native.attention`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    sequences: FlatSequences
    params: AttentionParams

    def run(self, **changed: Any) -> Tensor:
        call = replace(self, **changed)
        return native.attention(call.query, call.keys, call.values, call.sequences, call.params)


def sees_siblings(call: Call) -> Tensor:
    every = np.ones_like(call.sequences.is_chain)
    return call.run(sequences=replace(call.sequences, is_chain=every))


def misses_the_parent(call: Call) -> Tensor:
    grandparents = call.sequences.parents.copy()
    for start, end in zip(call.sequences.cu_rows[:-1], call.sequences.cu_rows[1:], strict=True):
        parents = call.sequences.parents[start:end]
        grandparents[start:end] = np.where(parents >= 0, parents[parents], -1)
    every = np.zeros_like(call.sequences.is_chain)
    return call.run(sequences=replace(call.sequences, parents=grandparents, is_chain=every))


def misses_the_first_key(call: Call) -> Tensor:
    s = call.sequences
    kept = np.delete(s.slots, s.cu_slots[:-1])
    moved = s.cu_slots - np.arange(len(s.cu_slots))
    return call.run(sequences=replace(s, slots=kept, cu_slots=moved, num_context=s.num_context - 1))


def sees_one_key_too_many(call: Call) -> Tensor:
    assert call.params.sliding_window is not None
    return call.run(params=replace(call.params, sliding_window=call.params.sliding_window + 1))


def without(call: Call, name: str) -> Tensor:
    return call.run(params=replace(call.params, **{name: None}))


def rounds_the_query(call: Call) -> Tensor:
    return call.run(query=call.query.bfloat16())


def reads_every_slot(call: Call) -> Tensor:
    return call.run() + 0 * decode(call.values).sum().float()


def perturbs_a_row_among_others(call: Call) -> Tensor:
    return nudged(call.run(), [0]) if len(call.query) > 1 else call.run()


def perturbs_the_rows_of_trees(call: Call) -> Tensor:
    return call.run() if call.sequences.is_chain.all() else nudged(call.run())


def perturbs_among_other_sequences(call: Call) -> Tensor:
    return nudged(call.run(), [0]) if len(call.sequences.num_context) > 1 else call.run()


def perturbs_by_the_first_slot(call: Call) -> Tensor:
    return nudged(call.run()) if call.sequences.slots[0] % 3 else call.run()


def perturbs_by_the_size_of_the_cache(call: Call) -> Tensor:
    return nudged(call.run()) if len(call.keys) > 60 else call.run()


def perturbs_by_threads(call: Call) -> Tensor:
    return nudged(call.run(), [len(call.query) - 1]) if native.num_threads() == 3 else call.run()


def loses_nan_of_attention(call: Call) -> Tensor:
    return call.run().nan_to_num()


def spreads_nan_of_queries(call: Call) -> Tensor:
    return call.run() + 0 * call.query.sum()


def small_step(**options: Any) -> Step:
    return make_step([((-1, 0, 0, 1, 2), 9), ((-1, 0), 20)], **options)


ATTENTION_CHECKS: dict[str, Callable[[Attend, Step], None]] = {
    "truth": attention_checks.check_near_truth,
    "rows": attention_checks.check_rows_alone,
    "batches": attention_checks.check_batches,
    "layouts": attention_checks.check_layouts,
    "threads": attention_checks.check_threads,
    "bad rows": attention_checks.check_bad_rows,
}


@dataclass(frozen=True)
class AttentionMutant:
    run: Callable[[Call], Tensor]
    check: str
    options: dict[str, Any] = field(default_factory=dict)


ATTENTION_MUTANTS = {
    "sees siblings": AttentionMutant(sees_siblings, "truth"),
    "sees siblings' NaN": AttentionMutant(sees_siblings, "bad rows"),
    "sees siblings beside others": AttentionMutant(sees_siblings, "rows"),
    "misses the parent": AttentionMutant(misses_the_parent, "truth"),
    "misses the first key": AttentionMutant(misses_the_first_key, "truth"),
    "window off by one": AttentionMutant(sees_one_key_too_many, "truth", {"window": 5}),
    "no window": AttentionMutant(partial(without, name="sliding_window"), "truth", {"window": 5}),
    "no softcap": AttentionMutant(partial(without, name="softcap"), "truth", {"softcap": 2.0}),
    "no sinks": AttentionMutant(partial(without, name="sinks"), "truth", {"sinks": True}),
    "rounds the query": AttentionMutant(rounds_the_query, "truth"),
    "reads every slot": AttentionMutant(reads_every_slot, "truth"),
    "a row among others": AttentionMutant(perturbs_a_row_among_others, "rows"),
    "rows of trees": AttentionMutant(perturbs_the_rows_of_trees, "rows"),
    "other sequences": AttentionMutant(perturbs_among_other_sequences, "batches"),
    "first slot": AttentionMutant(perturbs_by_the_first_slot, "layouts"),
    "size of the cache": AttentionMutant(perturbs_by_the_size_of_the_cache, "layouts"),
    "threads": AttentionMutant(perturbs_by_threads, "threads"),
    "loses NaN": AttentionMutant(loses_nan_of_attention, "bad rows"),
    "spreads NaN": AttentionMutant(spreads_nan_of_queries, "bad rows"),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ATTENTION_MUTANTS)
def test_wrong_attention_is_found(name: str, dtype: torch.dtype) -> None:
    mutant = ATTENTION_MUTANTS[name]
    step = small_step(dtype=dtype, **mutant.options)
    check = ATTENTION_CHECKS[mutant.check]
    check(native.attention, step)  # or the mutant might be found for being tested at all
    with pytest.raises(AssertionError):
        check(lambda *arguments: mutant.run(Call(*arguments)), step)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_slots_that_no_row_sees_are_poison(dtype: torch.dtype) -> None:
    """Or the checks could not tell a kernel that reads them."""
    step = small_step(dtype=dtype)
    seen = np.concatenate([sequence.slots for sequence in step.sequences])
    unseen = sorted({*range(len(step.key_cache))} - {*seen.tolist()})
    assert unseen
    for cache in (step.key_cache, step.value_cache):
        assert decode(cache)[unseen].isnan().all()
        assert decode(cache)[torch.from_numpy(seen)].isfinite().all()
