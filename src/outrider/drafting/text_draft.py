"""A draft model with another tokenizer, over the text: it continues the text, and the target's tokenizer reads that.

Universal assisted generation (Hugging Face and Intel Labs 2024); string-level exact match (Timor et al.,
arXiv 2502.05202, algorithm 2). The draft has its own tokens for the committed text and drafts a greedy chain; its
text becomes a chain of the target's tokens, point masses to rejection rules. What is wrong with it costs its rows
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.realignment import (
    BROKEN,
    MAX_CONTEXT,
    TextCodec,
    TextReader,
    TokenFollower,
    common_prefix,
    continuation,
    whole_tail,
)
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath

_GREEDY = SamplingParams(temperature=0.0)  # the draft's best guess is a point mass on the likeliest text


@dataclass(frozen=True, eq=False)
class TextSide:
    """One of the two tokenizers.

    Attributes:
        codec: text of tokens and back; special tokens that the other side does not know are no text.
        special_ids: of tokens that are no text.
        eos_id: ends a text.
        prefix: special tokens that a text begins with.
    """

    codec: TextCodec
    special_ids: frozenset[int]
    eos_id: int | None
    prefix: tuple[int, ...] = ()


@dataclass(eq=False)
class _Text:
    """One request's text in the draft's tokens.

    Attributes:
        drafted: the draft model's last chain, and the tokens that it followed.
    """

    reader: TextReader
    tokens: TokenFollower
    drafted: tuple[list[int], TokenTree] | None = None


class TextDrafter:
    """Args:
    draft: over its own tokens, a chain at a time.
    depth: of the draft's chain, in its own tokens.
    max_nodes: the most of the target's tokens.
    """

    name = "universal_draft"
    returns_probs = False
    reads_logits = False

    def __init__(
        self,
        draft: DraftModelDrafter,
        target_side: TextSide,
        draft_side: TextSide,
        *,
        depth: int,
        max_nodes: int,
    ) -> None:
        self._draft = draft
        self._target_side, self._draft_side = target_side, draft_side
        self._depth = depth
        self.max_nodes = max_nodes
        self._texts: dict[str, _Text] = {}
        self.num_without_room = 0

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        active = [c for c in contexts if min(c.max_nodes, c.max_depth) > 0]
        inner = [context for context in map(self._follow, active) if context is not None]
        chains = (
            {c.request_id: tree for c, tree in zip(inner, self._draft.propose(inner), strict=True)} if inner else {}
        )
        self.num_without_room = self._draft.num_without_room if inner else 0
        return [
            self._in_target_tokens(context, chains[context.request_id])
            if context.request_id in chains
            else TokenTree.root_only(context.token_ids[-1])
            for context in contexts
        ]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the next context says what the text has become

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._texts.pop(request_id, None)
        self._draft.release(request_id)

    def check_integrity(self) -> None:
        self._draft.check_integrity()

    def _follow(self, context: DraftContext) -> DraftContext | None:
        """The request as the draft model sees it; None where there is no text yet."""
        request_id = context.request_id
        text = self._texts.get(request_id)
        if text is None:
            side = self._draft_side
            text = _Text(TextReader(self._target_side.codec), TokenFollower(side.codec, side.prefix))
            self._texts[request_id] = text
        text.tokens.append(text.reader.read(context.token_ids))
        token_ids = list(text.tokens.token_ids)
        if not token_ids:
            return None
        self._tell_outcome(request_id, text, token_ids)
        return DraftContext(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_nodes=self._depth,
            max_depth=self._depth,
            params=_GREEDY,
            seed=0,
            stop_token_ids=frozenset(),
            min_path_prob=context.min_path_prob,
        )

    def _tell_outcome(self, request_id: str, text: _Text, token_ids: list[int]) -> None:
        """How much of its last chain the draft finds in the text, or that its tokens before it have changed."""
        if text.drafted is None:
            return
        before, chain = text.drafted
        text.drafted = None
        length = len(before)
        agreed = common_prefix([*before, *chain.tokens[1:]], token_ids)
        agreed = min(agreed, len(token_ids) - 1)  # the last one is the next root
        if agreed < length:
            self._draft.release(request_id)
        else:
            path = VerifiedPath(tuple(range(1, agreed - length + 1)), token_ids[agreed])
            self._draft.observe([DraftOutcome(request_id, chain, path, None)])

    def _in_target_tokens(self, context: DraftContext, chain: TokenTree) -> TokenTree:
        text = self._texts[context.request_id]
        before = list(text.tokens.token_ids)
        text.drafted = (before, chain)
        drafted = list(chain.tokens[1:])
        end = next((i for i, token in enumerate(drafted) if token in self._draft_side.special_ids), len(drafted))
        ends_text = end < len(drafted) and drafted[end] == self._draft_side.eos_id
        decode = self._draft_side.codec.decode
        tail = whole_tail(self._draft_side.codec, before)
        new_text = decode([*tail, *drafted[:end]])[len(decode(tail)) :].rstrip(BROKEN)
        tokens = continuation(self._target_side.codec, self._last_text_tokens(context), new_text)
        if ends_text and self._target_side.eos_id is not None:
            tokens.append(self._target_side.eos_id)
        tokens = tokens[: min(context.max_nodes, context.max_depth, self.max_nodes)]
        tree = TokenTree.chain(context.token_ids[-1], tokens)
        path_confidences = chain.path_confidences
        if path_confidences is None or not tokens:
            return tree
        each = path_confidences[-1] ** (1 / len(tokens))  # tokens of one side have no counterpart on the other
        return TokenTree(tree.tokens, tree.parents, confidences=(1.0, *[each] * len(tokens)))

    def _last_text_tokens(self, context: DraftContext) -> list[int]:
        last = list(context.token_ids[-MAX_CONTEXT:])
        specials = [i for i, token in enumerate(last) if token in self._target_side.special_ids]
        return last[specials[-1] + 1 :] if specials else last
