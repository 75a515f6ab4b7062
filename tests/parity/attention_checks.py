"""What tree attention over a slotted cache has to do, as checks of any function that stands for `native.attention`.

Legend: N rows of the step, H query heads, K key/value heads, D key width, E value width, S cache slots, L keys of
a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from outrider.kernels import native, reference_linear
from outrider.kernels.attention import AttentionParams, FlatSequences
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch
from tests.parity.kernel_levels import ROUNDING, assert_same_bits, assert_within, use_threads

Attend = Callable[[Tensor, Tensor, Tensor, FlatSequences, AttentionParams], Tensor]
"""Query ``[N, H, D]``, key cache, value cache, sequences, params: ``[N, H, E]`` float32."""

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Truth:
    """Attention in float64, and how far from it float32 may end."""

    out: Tensor  # [N, H, E]
    bound: Tensor  # [N, H, E]


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of one step, their keys and values in the cache already.

    Attributes:
        query: ``[N, H, D]``.
        key_cache: ``[S, K, D]`` float32 or bfloat16, ``[S, K, D + 4]`` int8 with the scale of each head at its end;
            value_cache likewise with E.
    """

    sequences: tuple[SequenceRows, ...]
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    params: AttentionParams

    def run(self, attend: Attend) -> Tensor:
        return attend(self.query, self.key_cache, self.value_cache, flat_of(self.sequences), self.params)

    def truth(self) -> Truth:
        return dense_attention(
            self.query, decode(self.key_cache), decode(self.value_cache), self.sequences, self.params
        )

    def of_rows(self, sequences: Sequence[SequenceRows], rows: Sequence[int]) -> Step:
        """Some of the rows, as rows of other sequences."""
        return replace(self, sequences=tuple(sequences), query=self.query[list(rows)])


def flat_of(sequences: Sequence[SequenceRows]) -> FlatSequences:
    return ForwardBatch(sequences).attention.flat


def sequence_of(parents: Sequence[int], num_context: int, slots: np.ndarray) -> SequenceRows:
    return SequenceRows([0] * len(parents), tuple(parents), num_context, np.ascontiguousarray(slots), ())


def keys_of_rows(sequence: SequenceRows) -> list[np.ndarray]:
    """Slots of each row's keys in position order, from the definition: the context, then the way down to the row."""
    paths = []
    for row in range(len(sequence.parents)):
        path, at = [], row
        while at >= 0:
            path.append(at)
            at = sequence.parents[at]
        paths.append(
            sequence.slots[[*range(sequence.num_context), *(sequence.num_context + at for at in path[::-1])]]
        )
    return paths


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, sequences: Sequence[SequenceRows], params: AttentionParams
) -> Truth:
    """One row at a time from the definition.

    The bound counts roundings: a score is a sum of D products, scaled, capped and taken from the maximum; a weight is
    its exponential (2 units in the last place) and is rescaled once for each split of 64 keys; the mean sums L of
    them. An error d of all scores changes each weight by a factor of at most exp(2 d).

    Args:
        keys: ``[S, K, D]`` float64; values: ``[S, K, E]`` float64.
    """
    num_heads, kv_heads, width = query.shape[1], keys.shape[1], query.shape[2]
    group = num_heads // kv_heads
    outs, bounds = [], []
    for row, slots in enumerate(slots for sequence in sequences for slots in keys_of_rows(sequence)):
        seen = torch.from_numpy(slots)
        if params.sliding_window is not None:
            seen = seen[-params.sliding_window :]
        q = query[row].double().view(kv_heads, group, width)
        k, v = keys[seen], values[seen]
        scores = torch.einsum("kgd,lkd->kgl", q, k) * params.scaling
        error = torch.einsum("kgd,lkd->kgl", q.abs(), k.abs()).amax(dim=-1) * abs(params.scaling)
        error = error * ROUNDING * (width + 6)
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
            error = error + params.softcap * 20 * ROUNDING
        spread = scores.amax(dim=-1) - scores.amin(dim=-1)
        if params.sinks is not None:
            sinks = params.sinks.double().view(kv_heads, group, 1)
            scores = torch.cat((scores, sinks), dim=-1)
            spread = scores.amax(dim=-1) - scores.amin(dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : len(seen)]
        outs.append(torch.einsum("kgl,lke->kge", weights, v).flatten(0, 1))
        num_splits = len(slots) // 64 + 2
        relative = torch.expm1(2 * error) + ROUNDING * (2 * spread + 2 * len(seen) + 16 * num_splits)
        magnitude = torch.einsum("kgl,lke->kge", weights, v.abs())
        tail = 2.0**-125 * v.abs().sum(dim=0)[:, None, :]  # what weighs less than exp(-87) counts as much
        bounds.append((relative[..., None] * magnitude + tail).flatten(0, 1))
    return Truth(torch.stack(outs), torch.stack(bounds))


def encode(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads ``[..., width]`` as a cache of this dtype holds them."""
    if dtype != torch.int8:
        return heads.to(dtype)
    q, scales = reference_linear.quantize_rows(heads.reshape(-1, heads.shape[-1]))
    scales = scales.view(*heads.shape[:-1], 1)
    return torch.cat((q.view(heads.shape).to(torch.int8), scales.contiguous().view(torch.int8)), dim=-1)


def decode(cache: Tensor) -> Tensor:
    """Float64 ``[S, K, width]`` of what a cache holds."""
    if cache.dtype != torch.int8:
        return cache.double()
    scales = cache[..., -native.SCALE_BYTES :].contiguous().view(torch.float32)
    return cache[..., : -native.SCALE_BYTES].double() * scales.double()


def make_step(
    layouts: Sequence[tuple[Sequence[int], int]],
    *,
    heads: tuple[int, int, int, int] = (4, 2, 16, 16),
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    scattered: bool = True,
    seed: int = 0,
) -> Step:
    """A random step whose own keys and values `native.write_kv` has written; all slots that no row sees are NaN.

    Args:
        layouts: parents and length of the context of each sequence.
        heads: H, K, D, E.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads, width, value_width = heads
    num_slots = sum(len(parents) + context for parents, context in layouts) + 5
    order = np.random.default_rng(seed).permutation(num_slots) if scattered else np.arange(num_slots)
    ends = np.cumsum([len(parents) + context for parents, context in layouts])
    sequences = tuple(
        sequence_of(parents, context, slots)
        for (parents, context), slots in zip(layouts, np.split(order, ends), strict=False)
    )

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def cache_of(cache_width: int) -> Tensor:
        rows = torch.full((num_slots, kv_heads, cache_width), NAN)
        for sequence in sequences:
            rows[sequence.slots[: sequence.num_context]] = random(sequence.num_context, kv_heads, cache_width)
        return encode(rows, dtype)

    key_cache, value_cache = cache_of(width), cache_of(value_width)
    num_rows = sum(len(parents) for parents, _ in layouts)
    slots = torch.from_numpy(np.concatenate([sequence.slots[sequence.num_context :] for sequence in sequences]))
    native.write_kv(random(num_rows, kv_heads, width), key_cache, slots)
    native.write_kv(random(num_rows, kv_heads, value_width), value_cache, slots)
    params = AttentionParams(
        scaling=2 / width**0.5,
        sliding_window=window,
        softcap=softcap,
        sinks=random(num_heads) * 2 if sinks else None,
    )
    return Step(sequences, random(num_rows, num_heads, width), key_cache, value_cache, params)


def check_near_truth(attend: Attend, step: Step) -> None:
    """Raises AssertionError where an output is farther from the truth than its roundings allow."""
    truth = step.truth()
    assert_within(step.run(attend), truth.out, truth.bound)


def check_rows_alone(attend: Attend, step: Step) -> None:
    """Each row has the bits that it has as the one row of a sequence whose context are its ancestors.

    Raises:
        AssertionError: one bit differs.
    """
    together = step.run(attend)
    paths = [slots for sequence in step.sequences for slots in keys_of_rows(sequence)]
    decoding = [sequence_of((-1,), len(slots) - 1, slots) for slots in paths]
    rows = range(len(decoding))
    assert_same_bits(step.of_rows(decoding, rows).run(attend), together)
    for row in {0, len(rows) // 3, len(rows) // 2, len(rows) - 1}:
        assert_same_bits(step.of_rows([decoding[row]], [row]).run(attend), together[row : row + 1])


def check_batches(attend: Attend, step: Step) -> None:
    """Sequences have the same bits alone and in another order.

    Raises:
        AssertionError: one bit differs.
    """
    together = step.run(attend)
    ends = np.cumsum([len(sequence.parents) for sequence in step.sequences])
    rows_of = [[*range(end - len(s.parents), end)] for s, end in zip(step.sequences, ends, strict=True)]
    for sequence, rows in zip(step.sequences, rows_of, strict=True):
        assert_same_bits(step.of_rows([sequence], rows).run(attend), together[rows])
    backwards = [row for rows in rows_of[::-1] for row in rows]
    assert_same_bits(step.of_rows(step.sequences[::-1], backwards).run(attend), together[backwards])


def check_layouts(attend: Attend, step: Step) -> None:
    """The same keys and values in other slots of a larger cache give the same bits.

    Raises:
        AssertionError: one bit differs.
    """
    num_slots = len(step.key_cache)
    place = np.random.default_rng(1).permutation(2 * num_slots)[:num_slots]

    def moved(cache: Tensor) -> Tensor:
        larger = poisoned(cache.repeat(2, 1, 1), range(2 * num_slots))
        larger[place] = cache
        return larger

    sequences = tuple(sequence_of(s.parents, s.num_context, place[s.slots]) for s in step.sequences)
    other = replace(step, sequences=sequences, key_cache=moved(step.key_cache), value_cache=moved(step.value_cache))
    assert_same_bits(other.run(attend), step.run(attend))


def check_threads(attend: Attend, step: Step, numbers: Sequence[int] = (2, 3, 5)) -> None:
    """Raises AssertionError where the number of threads changes one bit."""
    with use_threads(1):
        alone = step.run(attend)
    for number in numbers:
        with use_threads(number):
            assert_same_bits(step.run(attend), alone)


def check_bad_rows(attend: Attend, step: Step) -> None:
    """NaN in a row's query reaches that row, NaN in its keys or values its descendants too; nothing else.

    Raises:
        AssertionError: it spread, or it was lost.
    """
    clean = step.run(attend)
    paths = [keys for sequence in step.sequences for keys in keys_of_rows(sequence)]
    for bad, path in enumerate(paths):
        slot = int(path[-1])
        query = step.query.clone()
        query[bad] = NAN
        below = [row for row, keys in enumerate(paths) if slot in keys]
        for broken, reached in (
            (replace(step, query=query), [bad]),
            (replace(step, key_cache=poisoned(step.key_cache, [slot])), below),
            (replace(step, value_cache=poisoned(step.value_cache, [slot])), below),
        ):
            out = broken.run(attend)
            assert out[reached].isnan().all(), f"NaN in row {bad} was lost"
            others = [row for row in range(len(paths)) if row not in reached]
            assert_same_bits(out[others], clean[others])


def poisoned(cache: Tensor, slots: Sequence[int]) -> Tensor:
    """A copy with NaN in some slots (int8: as their scales)."""
    out = cache.clone()
    for slot in slots:
        if cache.dtype == torch.int8:
            out[slot, :, -native.SCALE_BYTES :] = torch.tensor([NAN]).view(torch.int8)
        else:
            out[slot] = NAN
    return out
