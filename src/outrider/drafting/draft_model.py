"""A second, smaller model drafts a chain or a tree (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).

The tree grows breadth-first: each forward of the draft reads the whole tree so far, then the most probable paths
draw their children by Gumbel-top-k (Kool et al., arXiv 1903.06059). Under the coupled rule the noise is the
target's own, so that draft and target tend to the same choice; under rejection rules it is independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.config import DraftModelConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.models.batch import SequenceRows, build_forward_batch
from outrider.models.model import Model
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import draw_children
from outrider.token_tree import DraftDistribution, TokenTree


@dataclass(eq=False)
class _Growing:
    """A tree under construction; nodes stand in breadth-first order.

    Attributes:
        scores: ``[num_nodes]`` log-probability, as the draft sees it, that a node's path is accepted.
        logits: ``[num_nodes, vocab]`` the draft's raw logits of the nodes forwarded so far.
        child_log_probs: ``[vocab]`` log q that each expanded node's children were drawn from, kept as it was then:
            a later forward over more rows may round differently, and rejection rules need the very q of the draw.
        num_forwarded: draft nodes (root not counted) whose keys and values are in the cache.
    """

    context: DraftContext
    logits: Tensor
    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    scores: list[float] = field(default_factory=lambda: [0.0])
    child_log_probs: dict[int, Tensor] = field(default_factory=dict)
    num_forwarded: int = 0

    @property
    def tree(self) -> TokenTree:
        return TokenTree(tuple(self.tokens), tuple(self.parents))

    @property
    def num_drafted(self) -> int:
        return len(self.tokens) - 1


class DraftModelDrafter:
    name = "draft_model"
    reads_logits = False

    def __init__(
        self,
        config: DraftModelConfig,
        style: DraftStyle,
        *,
        model: Model,
        cache: KVCache,
        vocab_size: int,
        max_batch_tokens: int,
    ) -> None:
        self._config = config
        self._style = style
        self._model = model
        self._cache = cache
        self._vocab_size = vocab_size
        self._max_batch_tokens = max_batch_tokens
        self._min_score = math.log(config.min_path_prob) if config.min_path_prob > 0 else -math.inf
        self._width = 1 if style.chains_only else config.width
        self.returns_probs = style.noise == "independent"
        self.max_nodes = min(config.max_nodes, config.depth) if self._width == 1 else config.max_nodes
        self._num_forwarded: dict[str, int] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        active = [context for context in contexts if self._has_room(context)]
        growing = self._catch_up(active)
        for depth in range(1, self._config.depth + 1):
            growers = [g for g in growing.values() if depth <= g.context.max_depth and self._extend(g, depth)]
            if not growers or depth == self._config.depth:
                break
            self._forward_trees([g for g in growers if self._may_grow(g, depth)])
        for request_id, tree in growing.items():
            self._num_forwarded[request_id] = tree.num_forwarded
        return [
            self._finish(growing[context.request_id])
            if context.request_id in growing
            else TokenTree.root_only(context.token_ids[-1])
            for context in contexts
        ]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        commits = {}
        for outcome in outcomes:
            forwarded = self._num_forwarded.pop(outcome.request_id, None)
            if forwarded is not None:
                kept = [node - 1 for node in outcome.path.accepted_nodes if node <= forwarded]
                commits[outcome.request_id] = SequenceCommit(kept, [outcome.tree.tokens[row + 1] for row in kept])
        self._cache.commit(commits)

    def release(self, request_id: str) -> None:
        self._num_forwarded.pop(request_id, None)
        if request_id in self._cache:
            self._cache.release(request_id)

    def check_integrity(self) -> None:
        self._cache.check_integrity()

    def _has_room(self, context: DraftContext) -> bool:
        """Whether the draft may run for a request: within its context, and with cache blocks to be had."""
        length = len(context.token_ids)
        depth = min(self._config.depth, context.max_depth)
        if context.max_nodes < 1 or depth < 1 or length + depth > self._model.context_length:
            return False
        request_id = context.request_id
        if request_id in self._cache and self._cache.num_computed(request_id) >= length:
            self._cache.release(request_id)  # a step failed after the draft had run: start again
        if request_id not in self._cache:
            self._cache.admit(request_id, context.token_ids)
        rows = length - self._cache.num_computed(request_id) + self.max_nodes
        if not self._cache.can_reserve(request_id, rows):
            self.release(request_id)
            return False
        self._cache.reserve(request_id, rows)  # held, so that requests of one step do not count the same blocks
        return True

    def _catch_up(self, contexts: Sequence[DraftContext]) -> dict[str, _Growing]:
        """Run the draft over the committed tokens it has not seen; its last logits are the roots'."""
        growing: dict[str, _Growing] = {}
        pending = list(contexts)
        while pending:
            budget = self._max_batch_tokens
            chunks: list[tuple[DraftContext, int, int]] = []
            for context in pending:
                start = self._cache.num_computed(context.request_id)
                end = min(len(context.token_ids), start + budget)
                if end > start:
                    chunks.append((context, start, end))
                    budget -= end - start
            complete = [context for context, _, end in chunks if end == len(context.token_ids)]
            logits = self._forward(
                [
                    SequenceRows(
                        token_ids=context.token_ids[start:end],
                        parents=range(-1, end - start - 1),
                        num_context=start,
                        slots=self._cache.reserve(context.request_id, end - start),
                        logits_rows=[end - start - 1] if end == len(context.token_ids) else [],
                    )
                    for context, start, end in chunks
                ]
            )
            self._cache.commit(
                {c.request_id: SequenceCommit(range(end - start), c.token_ids[start:end]) for c, start, end in chunks}
            )
            for row, context in enumerate(complete):
                growing[context.request_id] = _Growing(context, logits[row : row + 1], [context.token_ids[-1]])
            pending = [context for context in pending if context.request_id not in growing]
        return growing

    def _extend(self, tree: _Growing, depth: int) -> bool:
        """Draw the children of the most probable nodes of depth - 1; False if the tree stays as it is."""
        frontier = [node for node, d in enumerate(tree.depths) if d == depth - 1 and node <= tree.num_forwarded]
        if depth > 1:
            frontier = [node for node in frontier if tree.scores[node] >= self._min_score]
        frontier = sorted(frontier, key=lambda node: -tree.scores[node])[: self._config.max_expanded]
        room = tree.context.max_nodes - tree.num_drafted
        if not frontier or room < 1 or tree.num_drafted >= self.max_nodes:
            return False
        room = min(room, self.max_nodes - tree.num_drafted)
        context = tree.context
        log_weights = process_logits(tree.logits, [self._row_context(tree)])
        for node in sorted(frontier):
            num_children = min(self._width, room)
            if num_children < 1:
                break
            log_probs = log_weights[node].log_softmax(-1)
            tree.child_log_probs[node] = log_probs
            tokens, scores = draw_children(
                log_probs,
                seed=context.seed,
                position=len(context.token_ids) + depth - 1,
                num_children=num_children,
                noise=self._style.noise,
                draws=self._style.sibling_draws,
                greedy=context.params.greedy,
            )
            for token, score in zip(tokens, scores, strict=True):
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.depths.append(depth)
                tree.scores.append(tree.scores[node] + score)
            room -= len(tokens)
        return True

    def _row_context(self, tree: _Growing) -> RowContext:
        context = tree.context
        return RowContext(
            rows=slice(0, tree.logits.shape[0]),
            params=context.params,
            token_ids=context.token_ids,
            num_prompt_tokens=context.num_prompt_tokens,
            tree=tree.tree,
            stop_ids=context.stop_token_ids,
        )

    def _may_grow(self, tree: _Growing, depth: int) -> bool:
        limit = min(tree.context.max_nodes, self.max_nodes)
        is_likely = max(tree.scores[node] for node, d in enumerate(tree.depths) if d == depth) >= self._min_score
        return is_likely and tree.num_drafted < limit and depth < tree.context.max_depth

    def _forward_trees(self, growing: Sequence[_Growing]) -> None:
        """Read all trees so far in one forward, root excluded: its keys, values and logits are there already."""
        if not growing:
            return
        logits = self._forward(
            [
                SequenceRows(
                    token_ids=tree.tokens[1:],
                    parents=[parent - 1 for parent in tree.parents[1:]],
                    num_context=len(tree.context.token_ids),
                    slots=self._cache.reserve(tree.context.request_id, tree.num_drafted),
                    logits_rows=range(tree.num_drafted),
                )
                for tree in growing
            ]
        )
        start = 0
        for tree in growing:
            tree.num_forwarded = tree.num_drafted
            tree.logits = torch.cat([tree.logits[:1], logits[start : start + tree.num_drafted]])
            start += tree.num_drafted

    def _forward(self, sequences: Sequence[SequenceRows]) -> Tensor:
        """The draft's logits, as wide as the target's: embeddings may be padded differently."""
        logits = self._model.forward(build_forward_batch(sequences, self._model.device), self._cache)
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self._vocab_size]

    def _finish(self, tree: _Growing) -> TokenTree:
        if not self.returns_probs or tree.context.params.greedy or tree.num_drafted == 0:
            return tree.tree  # greedy drafts are point masses
        rows = tree.logits.new_zeros(len(tree.tokens), tree.logits.shape[1])  # those of leaves are never read
        for node, log_probs in tree.child_log_probs.items():
            rows[node] = log_probs
        return TokenTree(tuple(tree.tokens), tuple(tree.parents), DraftDistribution(rows, self._style.sibling_draws))
