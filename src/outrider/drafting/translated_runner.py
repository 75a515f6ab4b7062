"""A draft model with another vocabulary, token by token where both know the same piece of text.

Token-level intersection (TLI; Timor et al., arXiv 2502.05202, algorithm 4): the draft's distribution is restricted to
the tokens that the target has too, and is a distribution over the target's tokens from there on. So its trees are
drawn, verified and rejected like those of a draft with the target's own vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache
from outrider.drafting.draft_runner import DraftRunner, TreeRows, log_weights_of, sibling_rows
from outrider.drafting.drafter import DraftContext, FinishedText
from outrider.drafting.growth.tree import GrowingTree, Row
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch
from outrider.models.model import Model


@dataclass(frozen=True, eq=False)
class Translation:
    """From the target's tokens to the draft's and back.

    Attributes:
        pairs: ``[num_shared, 2]`` int64; the target's and the draft's id of each piece of text that both have.
        encode: the draft's tokens for the text of some of the target's, as a text begins.
        spell: the draft's tokens for the text of one of the target's, within a text.
    """

    pairs: np.ndarray
    encode: Callable[[Sequence[int]], Sequence[int]]
    spell: Callable[[int], Sequence[int]]


class TranslatedRunner(DraftRunner):
    """Args:
    vocab_size: of the target.
    """

    def __init__(
        self, model: Model, cache: KVCache, *, vocab_size: int, max_batch_tokens: int, translation: Translation
    ) -> None:
        super().__init__(model, cache, vocab_size=vocab_size, max_batch_tokens=max_batch_tokens)
        target_ids, draft_ids = translation.pairs.T
        self._target_ids = torch.from_numpy(target_ids.copy()).to(model.device)
        self._draft_ids = torch.from_numpy(draft_ids.copy()).to(model.device)
        self._draft_id_of = dict(zip(target_ids.tolist(), draft_ids.tolist(), strict=True))
        self._translation = translation
        self._texts: dict[str, tuple[list[int], int]] = {}  # draft tokens, and how many of the target's they are

    def has_room(self, context: DraftContext, num_rows: int, depth: int) -> bool:
        token_ids = self._translated(context)
        return bool(token_ids) and super().has_room(replace(context, token_ids=token_ids), num_rows, depth)

    def catch_up(self, contexts: Sequence[DraftContext]) -> list[Row]:
        if not contexts:
            return []
        logits = self._read_committed({c.request_id: self._texts[c.request_id][0] for c in contexts})
        return log_weights_of(torch.cat([logits[c.request_id] for c in contexts]), [(c, ()) for c in contexts])

    def rows_for(self, tree: GrowingTree, num_rows: int) -> TreeRows:
        request_id = tree.context.request_id
        return TreeRows(tree, self._cache.reserve(request_id, num_rows), len(self._texts[request_id][0]))

    def commit(self, request_id: str, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        super().commit(request_id, rows, [self._draft_id_of[token] for token in token_ids])

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._texts.pop(request_id, None)
        super().release(request_id)

    def _sibling_rows(self, rows: TreeRows, family: Sequence[int]) -> SequenceRows:
        sequence = sibling_rows(rows, family)
        return replace(sequence, token_ids=[self._draft_id_of[token] for token in sequence.token_ids])

    def _forward(self, sequences: Sequence[SequenceRows]) -> Tensor:
        """The draft's logits at the target's ids; -inf for tokens that the draft does not have."""
        own = self._model.forward(ForwardBatch(sequences, self._model.device), self._cache)
        logits = own.new_full((own.shape[0], self._vocab_size), float("-inf"))
        logits[:, self._target_ids] = own[:, self._draft_ids]
        return logits

    def _translated(self, context: DraftContext) -> list[int]:
        """The committed text in the draft's tokens: encoded as a whole at first, then token by token."""
        committed = context.token_ids
        known = self._texts.get(context.request_id)
        if known is None:
            token_ids = list(self._translation.encode(committed))
        else:
            token_ids, num_known = known
            for token in committed[num_known:]:
                draft_id = self._draft_id_of.get(token)
                token_ids.extend(self._translation.spell(token) if draft_id is None else (draft_id,))
        self._texts[context.request_id] = (token_ids, len(committed))
        return token_ids
