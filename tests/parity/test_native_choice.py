"""What kernels choose from a row of logits against the processors, the noise and the argmax in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider import LLM, SamplingParams
from outrider.cache.kv_cache import KVCache
from outrider.kernels import native
from outrider.kernels.rows import KeyedDraw, SequenceRows
from outrider.models.batch import ForwardBatch
from outrider.models.llama import LlamaModel
from outrider.sampling.noise import Purpose, _gumbel, gumbel_noise
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import check_finite
from outrider.token_tree import TokenTree
from tests.parity.kernel_hooks import noise_ceiling
from tests.parity.kernel_levels import LEVELS, use_level, use_threads
from tests.parity.test_lean_path import load, make

pytestmark = pytest.mark.skipif(not native.is_available(), reason="outrider was built without compiled kernels")

TREE = TokenTree((9, 4, 5, 6, 7), (-1, 0, 0, 1, 1))


def cache_of(model: LlamaModel) -> KVCache:
    cache = KVCache(model.layer_shapes, num_blocks=16, block_size=8, dtype=model.cache_dtype, prefix_caching=False)
    for name in "ab":
        cache.admit(name, [])
    return cache


def sequences_of(cache: KVCache, draws: Sequence[KeyedDraw | None]) -> list[SequenceRows]:
    """A prompt of which some rows are wanted, and a tree."""
    prompt, tree = draws
    return [
        SequenceRows(list(range(3, 33)), range(-1, 29), 0, cache.reserve("a", 30), (0, 3, 29), prompt),
        SequenceRows(TREE.tokens, TREE.parents, 0, cache.reserve("b", 5), range(5), tree),
    ]


def expected_tokens(logits: torch.Tensor, positions: Sequence[int], draw: KeyedDraw | None) -> list[int]:
    """As the engine does it without kernels; `positions` are those of the rows' successors."""
    if draw is None:
        return logits.numpy().argmax(-1).tolist()
    context = RowContext(
        rows=slice(0, len(logits)),
        params=SamplingParams(temperature=draw.temperature),
        token_ids=[0],
        num_prompt_tokens=1,
        tree=TokenTree.root_only(0),
        stop_ids=(),
    )
    weights = process_logits(logits, [context]).numpy()
    noise = np.stack([gumbel_noise(draw.seed, p, Purpose.TARGET, logits.shape[1]) for p in positions])
    return (weights + noise).argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [61, 128, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_choices_are_those_of_python(level: str, threads: int, vocab_size: int, tmp_path: Path) -> None:
    """Greedy and sampled sequences side by side, at temperatures from the coldest to the flattest."""
    make(tmp_path, model_type="llama", vocab_size=vocab_size)
    with use_level(level), use_threads(threads):
        model = load(tmp_path)
        cache = cache_of(model)
        for trial, temperature in enumerate((1e-3, 0.05, 0.7, 0.8, 1.0, 1.3, 30.0, 1e4) * 6):
            draw = KeyedDraw(temperature, seed=2**64 - 1 - 977 * trial)
            for draws in ((draw, None), (None, draw), (draw, replace(draw, temperature=1.1))):
                batch = ForwardBatch(sequences_of(cache, draws))
                logits = model.forward(batch, cache)
                choices = model.choose(batch, cache, with_logits=True)
                assert choices is not None
                assert choices.logits is not None
                assert torch.equal(choices.logits, logits)
                assert choices.maxima is not None
                starts = np.arange(0, vocab_size, native.MAXIMA_BLOCK)
                assert (choices.maxima.numpy() == np.maximum.reduceat(logits.numpy(), starts, axis=1)).all()
                assert choices.token_ids == [
                    *expected_tokens(logits[:3], (1, 4, 30), draws[0]),
                    *expected_tokens(logits[3:], (1, 2, 2, 3, 3), draws[1]),
                ]
                alone = model.choose(batch, cache)
                assert alone is not None
                assert alone.token_ids == choices.token_ids
                assert alone.log_weights == choices.log_weights
                assert alone.logits is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_nothing_can_be_drawn_from_show(poison: float, tmp_path: Path) -> None:
    """A model that gives such logits: what is told of a row, if anything, is not finite."""
    make(tmp_path, model_type="llama", vocab_size=96)
    model = load(tmp_path)
    bias = torch.zeros(96)
    bias[:] = poison
    model._llama.lm_head.bias = bias  # kept alive
    head = native.Linear(model._llama.lm_head.weight, bias)
    model._llama = model._assemble(model._llama.layers, model._llama.embedding, head)
    cache = cache_of(model)
    for draw in (None, KeyedDraw(0.8, 1)):
        batch = ForwardBatch(sequences_of(cache, (draw, draw)))
        assert not check_finite(model.forward(batch, cache)).any()
        choices = model.choose(batch, cache, with_logits=True)
        assert choices is None or not np.isfinite(choices.log_weights).any()
        assert choices is None or choices.maxima is None or not choices.maxima.isfinite().any()


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-3, -1e-3])
def test_what_rounding_could_decide_is_left_to_python(gap: float, tmp_path: Path) -> None:
    """Two tokens whose log-weight and noise add up to nearly the same; all others are far below."""
    make(tmp_path, model_type="llama", vocab_size=96)
    model = load(tmp_path)
    cache = cache_of(model)
    noise = gumbel_noise(5, 1, Purpose.TARGET, 96)
    bias = torch.full((96,), -1e4)
    bias[17], bias[40] = 0.0, float(noise[17] - noise[40]) + gap
    weight = model._llama.lm_head.weight
    weight.data.zero_()
    model._llama = model._assemble(model._llama.layers, model._llama.embedding, native.Linear(weight, bias))
    rows = SequenceRows([9], [-1], 0, cache.reserve("a", 1), (0,), KeyedDraw(1.0, 5))
    choices = model.choose(ForwardBatch([rows]), cache)
    if abs(gap) < 1e-6:
        assert choices is None
    else:
        assert choices is not None
        assert choices.token_ids == [40 if gap > 0 else 17]


@pytest.mark.parametrize("level", LEVELS)
def test_ceilings_hold_for_every_kind_of_number(level: str) -> None:
    """Both ends, powers of two from both sides, and many others."""
    powers = [(1 << bit) + step for bit in range(33) for step in range(-3, 4)]
    many = np.random.default_rng(0).integers(0, 2**32, 20_000).tolist()
    halves = [half for half in (*powers, *many) if 0 <= half < 2**32]
    halves += [2**32 - 1 - half for half in halves]
    with use_level(level):
        ceilings = [noise_ceiling(half) for half in halves]
    for half, noise, ceiling in zip(
        halves, _gumbel(np.array(halves, dtype=np.uint32)).tolist(), ceilings, strict=True
    ):
        assert noise < ceiling, half
        if 3.0 < noise < 15.0:
            assert ceiling - noise < 0.1, "too high to rule tokens out"


def test_the_engine_draws_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model; with and without a drafter that reads logits, batches of greedy and sampled requests."""
    params = [
        SamplingParams(temperature=(0.0, 0.3, 0.8, 1.5)[i % 4], seed=i, max_tokens=24, ignore_eos=True)
        for i in range(12)
    ]
    prompts = ["def f(", "class A:\n", "import os\n"] * 4
    found = []
    for by_kernels in (True, False):
        if not by_kernels:
            monkeypatch.setattr(LlamaModel, "choose", lambda *_, **__: None)
        for decoding in ("none", "recycling", "ngram"):
            outputs = LLM(decoding=decoding).generate(prompts, params)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert all(tokens == found[0] for tokens in found[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [96, 1]}, "token id: got 96"),
        ({"token_ids": [-1, 1]}, "token id: got -1"),
        ({"token_ids": [1]}, "parents: got 2"),
        ({"parents": [-1, 1]}, "parent of a row: got 1"),
        ({"parents": [-2, 0]}, "parent of a row: got -2"),
        ({"num_context": 1}, "slots: got 2"),
        ({"slots": np.array([0, 128])}, "slot: got 128"),
        ({"slots": np.array([-1, 0])}, "slot: got -1"),
        ({"slots": np.array([0, 1], dtype=np.int32)}, "array of int64"),
        ({"slots": np.arange(4)[::2]}, "contiguous"),
        ({"logits_rows": (2,)}, "wanted row: got 2"),
        ({"draw": KeyedDraw(0.0, 1)}, "temperature"),
        ({"draw": KeyedDraw(float("nan"), 1)}, "temperature"),
    ],
)
def test_rows_that_hang_together_wrongly_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    make(tmp_path, model_type="llama", vocab_size=96)
    model = load(tmp_path)
    cache = cache_of(model)
    rows = SequenceRows([3, 4], [-1, 0], 0, np.array([0, 1]), (0, 1))
    model.forward(ForwardBatch([rows]), cache)
    with pytest.raises((ValueError, BufferError), match=message):
        model.forward(ForwardBatch([replace(rows, **changes)]), cache)
    with pytest.raises(ValueError, match="at least one"):
        model.forward(ForwardBatch([]), cache)
