"""Engines that are wrong on purpose: each must make the token-equality check fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.cache.prefix_index import ROOT, PrefixIndex
from outrider.config import SchedulerConfig
from outrider.engine import engine as engine_module
from outrider.engine import scheduler as scheduler_module
from outrider.kernels.native import ISA_VARIABLE, REFERENCE
from outrider.models import batch as batch_module
from outrider.sampling.sampler import KeyedDecisions
from outrider.token_tree import TokenTree, VerifiedPath
from outrider.verification import coupled
from tests.losslessness.engine_harness import make_engine, make_request, run
from tests.losslessness.test_engine import SETTINGS, plain, prompts, summary

Patch = pytest.MonkeyPatch
NAMES = ["greedy", "sampled", "penalties", "stop", "min_tokens", "two", "sampled-eos", "top_p"]


# Blocks of equal tokens after unequal ones, and prompts that begin alike.
ALIKE = [[*start, 5, 6, 7, 8, 9, 10, 11, 12, end] for start in ([1, 2, 3, 4], [4, 3, 2, 1], []) for end in (13, 14)]
MIX = [
    (NAMES[i % len(NAMES)], prompt) for i, prompt in enumerate([p for p in prompts(30) if len(p) <= 40][:12] + ALIKE)
]


def check_equality(drafter: str) -> None:
    """Two rounds of a mixed batch, with preemption and prefix hits, against plain decoding.

    Raises:
        AssertionError: an output differs.
    """
    engine = make_engine(drafter, num_blocks=32, scheduler=SchedulerConfig(max_num_seqs=8, max_batch_tokens=60))
    for round_ in range(2):
        requests = [
            (name, prompt, make_request(f"r{round_}-{i}", prompt, SETTINGS[name]))
            for i, (name, prompt) in enumerate(MIX)
        ]
        run(engine, [request for _, _, request in requests])
        for name, prompt, request in requests:
            assert summary(request) == plain(name, prompt, SETTINGS[name]), name


def no_move(patch: Patch) -> None:
    """Accepted rows stay where the tree put them."""
    right = KVCache.commit

    def commit(self, commits) -> None:
        right(self, {name: SequenceCommit(range(len(c.kept_rows)), c.token_ids) for name, c in commits.items()})

    patch.setattr(KVCache, "commit", commit)


def one_row_too_many(patch: Patch) -> None:
    """The last rejected draft is committed with the accepted ones."""
    right = engine_module.Engine._commit

    def commit(self, plan, verified) -> None:
        longer = [
            replace(v, path=VerifiedPath((*v.path.accepted_nodes, v.tree.num_nodes - 1), v.path.next_token))
            if v.tree.num_nodes - 1 > max(v.path.accepted_nodes, default=0)
            else v
            for v in verified
        ]
        right(self, plan, longer)

    patch.setattr(engine_module.Engine, "_commit", commit)


def noise_of_the_root(patch: Patch) -> None:
    """All nodes of a tree share the root's noise: positions do not count."""
    patch.setattr(
        KeyedDecisions,
        "_node_positions",
        property(lambda self: [p for t, p in zip(self._trees.trees, self._positions, strict=True) for _ in t.tokens]),
    )


def penalties_of_the_root(patch: Patch) -> None:
    """Every node is processed as if nothing stood between it and the root."""
    right = engine_module.process_logits

    def process(logits, contexts):
        flat = []
        for context in contexts:
            size = context.tree.num_nodes
            flat.append(replace(context, tree=TokenTree((context.tree.tokens[0],) * size, (-1, *[0] * (size - 1)))))
        return right(logits, flat)

    patch.setattr(engine_module, "process_logits", process)


def stop_after_the_block(patch: Patch) -> None:
    """All accepted tokens are appended before the end is looked for."""
    from outrider.engine import stopping

    def append_tokens(request, token_ids) -> int:
        tokens = list(token_ids)
        request.token_ids.extend(tokens[:-1])
        return len(tokens) - 1 + stopping.append_tokens(request, tokens[-1:])

    patch.setattr(engine_module, "append_tokens", append_tokens)


def accept_first_child(patch: Patch) -> None:
    """The first draft is taken whatever the target chose."""

    def follow(tree, choices) -> VerifiedPath:
        children = tree.children()
        node, accepted = 0, []
        while children[node]:
            node = children[node][0]
            accepted.append(node)
        return VerifiedPath(tuple(accepted), choices[node])

    patch.setattr(coupled, "follow_choices", follow)


def siblings_see_each_other(patch: Patch) -> None:
    """The reference kernels' tree mask is a plain causal mask."""
    patch.setenv(ISA_VARIABLE, REFERENCE)
    patch.setattr(batch_module, "ancestor_mask", lambda parents: torch.ones(len(parents), len(parents)).tril().bool())
    patch.setattr(batch_module, "_remembered_tree_mask", batch_module._tree_mask)


def prefixes_by_last_block_only(patch: Patch) -> None:
    """Blocks are found by their own tokens, whatever stood before them."""
    right = PrefixIndex.insert
    patch.setattr(
        PrefixIndex, "insert", lambda self, parent, tokens, block: right(self, ROOT, tokens, block) and ROOT
    )


def resumed_as_if_computed(patch: Patch) -> None:
    """A preempted request comes back believing that its tokens are in the cache, all but the last."""
    right = scheduler_module.Scheduler._admit

    def admit(self, plan, budget) -> int:
        before = {id(s) for s in plan}
        left = right(self, plan, budget)
        for i, scheduled in enumerate(plan):
            if id(scheduled) not in before and scheduled.request.metrics.num_preemptions and scheduled.chunk_size > 1:
                sequence = self._cache._sequences[scheduled.request.request_id]
                sequence.num_computed += scheduled.chunk_size - 1
                plan[i] = replace(scheduled, num_computed=sequence.num_computed, chunk_size=1)
        return left

    patch.setattr(scheduler_module.Scheduler, "_admit", admit)


MUTANTS: dict[str, tuple[Callable[[Patch], None], str, type[Exception]]] = {
    "no move": (no_move, "recycling", AssertionError),
    "one row too many": (one_row_too_many, "ngram", AssertionError),
    "noise of the root": (noise_of_the_root, "ngram", AssertionError),
    "penalties of the root": (penalties_of_the_root, "draft_model-tree", AssertionError),
    "stop after the block": (stop_after_the_block, "ngram", AssertionError),
    "accept first child": (accept_first_child, "draft_model-chain", AssertionError),
    "siblings see each other": (siblings_see_each_other, "recycling", AssertionError),
    "prefixes by last block only": (prefixes_by_last_block_only, "none", AssertionError),
    "resumed as if computed": (resumed_as_if_computed, "none", AssertionError),
}


@pytest.mark.parametrize("drafter", sorted({drafter for _, drafter, _ in MUTANTS.values()}))
def test_the_right_engine_passes(drafter: str) -> None:
    check_equality(drafter)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant: str, monkeypatch: Patch) -> None:
    mutate, drafter, expected = MUTANTS[mutant]
    for name, prompt in MIX:
        plain(name, prompt, SETTINGS[name])  # the reference is computed by the right engine
    mutate(monkeypatch)
    with pytest.raises(expected):
        check_equality(drafter)
