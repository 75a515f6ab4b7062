"""What a drafter is: it proposes token trees and observes what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from outrider.sampling.params import SamplingParams
from outrider.token_tree import DraftNoise, SiblingDraws, TokenTree, VerifiedPath


@dataclass(frozen=True)
class DraftStyle:
    """How the verification rule wants trees drawn; see `VerificationRule`."""

    noise: DraftNoise = "shared"
    sibling_draws: SiblingDraws = "without_replacement"
    chains_only: bool = False


@dataclass(frozen=True, eq=False)
class DraftContext:
    """One request that may have drafts this step.

    Attributes:
        token_ids: all committed tokens; the last one is the root. Read only.
        num_prompt_tokens: how many of them are the prompt.
        max_nodes: the most draft tokens (root not counted); 0 asks for the root alone.
        max_depth: the longest path that could still be committed.
        seed: of the request's keyed noise.
    """

    request_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_nodes: int
    max_depth: int
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True, eq=False)
class DraftOutcome:
    """What verification made of one request's tree.

    Attributes:
        target_logits: ``[tree.num_nodes, vocab]`` the target's raw logits at each node; None only for a drafter that
            does not read them.
    """

    request_id: str
    tree: TokenTree
    path: VerifiedPath
    target_logits: Tensor | None


class Drafter(Protocol):
    """Attributes:
    name: as users spell it.
    max_nodes: the most draft tokens that it proposes for one request.
    returns_probs: True if its trees carry the distributions they were drawn from.
    reads_logits: True if `observe` looks at the target's logits.
    """

    name: str
    max_nodes: int
    returns_probs: bool
    reads_logits: bool

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        """One tree per context, in order, rooted at its last token."""
        ...

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        """Learn what was accepted; called once after each verification."""
        ...

    def release(self, request_id: str) -> None:
        """Forget a request that has finished or lost its place; unknown ids are ignored."""
        ...
