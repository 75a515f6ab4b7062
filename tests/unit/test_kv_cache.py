"""The cache against a dictionary of lists: whatever is reserved, kept, dropped, shared and evicted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.cache.block_pool import BlockPool
from outrider.cache.kv_cache import KVCache, LayerShape, SequenceCommit
from outrider.errors import CacheError

BLOCK = 4
LAYERS = (LayerShape(2, 3, 3), LayerShape(1, 5, 2))  # two storages of unlike widths


def make_cache(num_blocks: int = 12, *, prefix_caching: bool = True) -> KVCache:
    return KVCache(
        LAYERS, num_blocks=num_blocks, block_size=BLOCK, dtype=torch.float32, prefix_caching=prefix_caching
    )


def write(cache: KVCache, slots: np.ndarray, tokens: list[int]) -> None:
    """Keys and values that name their token, differently in every layer."""
    for layer in range(len(LAYERS)):
        for row, slot in enumerate(slots):
            cache.keys[layer][slot] = tokens[row] * 10 + layer
            cache.values[layer][slot] = -(tokens[row] * 10 + layer)


def read(cache: KVCache, slots: np.ndarray) -> list[int]:
    tokens = []
    for slot in slots:
        token = int(cache.keys[0][slot].flatten()[0]) // 10
        for layer in range(len(LAYERS)):
            assert (cache.keys[layer][slot] == token * 10 + layer).all()
            assert (cache.values[layer][slot] == -(token * 10 + layer)).all()
        tokens.append(token)
    return tokens


class CacheMachine(RuleBasedStateMachine):
    """Sequences over a small alphabet, so that prefixes are often equal and blocks often shared."""

    @initialize(prefix_caching=st.booleans())
    def start(self, prefix_caching: bool) -> None:
        self.cache = make_cache(prefix_caching=prefix_caching)
        self.tokens: dict[str, list[int]] = {}
        self.count = 0

    @precondition(lambda self: len(self.tokens) < 5)
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def admit(self, prompt: list[int]) -> None:
        name = f"s{self.count}"
        self.count += 1
        cached = self.cache.admit(name, prompt)
        assert cached % BLOCK == 0
        assert cached < len(prompt)
        self.tokens[name] = prompt[:cached]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        rows = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        if not self.cache.can_reserve(name, len(rows)):
            with pytest.raises(CacheError):
                self.cache.reserve(name, len(rows))
            self.cache.rollback(name)
            return
        known = self.tokens[name]
        slots = self.cache.reserve(name, len(rows))
        assert len(slots) == len(known) + len(rows)
        write(self.cache, slots[len(known) :], rows)
        kept = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
        tokens = [rows[row] for row in kept]
        self.tokens[name] = known + tokens
        self.cache.commit({name: SequenceCommit(kept, tokens)})

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reserve_and_roll_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        if self.cache.can_reserve(name, 7):
            slots = self.cache.reserve(name, 7)
            write(self.cache, slots[len(self.tokens[name]) :], [9] * 7)
            self.cache.rollback(name)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.release(name)
        del self.tokens[name]

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        for name, tokens in self.tokens.items():
            assert self.cache.num_computed(name) == len(tokens)
            assert read(self.cache, self.cache.reserve(name, 0)) == tokens

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for name in list(self.tokens):
                self.cache.release(name)
            self.cache.check_integrity()
            assert self.cache.pool.num_used == 0


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestCacheMachine = CacheMachine.TestCase


def test_equal_prefixes_share_blocks_and_survive_release() -> None:
    cache = make_cache()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert cache.admit("a", prompt) == 0
    write(cache, cache.reserve("a", 9), prompt)
    cache.commit({"a": SequenceCommit(range(9), prompt)})
    assert cache.admit("b", prompt) == 8
    assert cache.pool.num_used == 3
    cache.release("a")
    cache.release("b")
    assert cache.pool.num_used == 0
    assert cache.admit("c", [*prompt[:8], 0]) == 8
    assert cache.admit("d", prompt[:8]) == 4, "the last token is always computed: its logits are needed"
    assert cache.admit("e", [0, *prompt]) == 0


def test_cached_blocks_are_evicted_oldest_tail_first() -> None:
    cache = make_cache(num_blocks=3)
    cache.admit("a", list(range(13)))
    cache.reserve("a", 12)
    cache.commit({"a": SequenceCommit(range(12), range(12))})
    cache.release("a")
    cache.admit("b", [50])
    cache.reserve("b", 1)  # takes the block of tokens 8..11
    assert cache.admit("c", list(range(13))) == 8
    cache.check_integrity()


def test_a_commit_of_unreserved_rows_is_a_bug() -> None:
    cache = make_cache()
    cache.admit("a", [1, 2])
    cache.reserve("a", 2)
    with pytest.raises(AssertionError):
        cache.commit({"a": SequenceCommit([0, 2], [1, 3])})


def test_integrity_check_finds_a_leak() -> None:
    cache = make_cache()
    cache.admit("a", [1, 2])
    cache.reserve("a", 2)
    cache._sequences["a"].blocks.pop()
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_an_exhausted_pool_says_so() -> None:
    pool = BlockPool(1, evict=lambda block: None)
    pool.allocate()
    with pytest.raises(CacheError, match="no free block"):
        pool.allocate()
