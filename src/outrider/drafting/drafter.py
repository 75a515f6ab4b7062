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
        min_path_prob: draft tokens whose path is less likely than this to be accepted are not worth their rows, nor
            the time of drafting them; a drafter may ignore it.
        num_step_rows: rows of the whole step without draft tokens, other requests' and prompts' included.
    """

    request_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    max_nodes: int
    max_depth: int
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    min_path_prob: float = 0.0
    num_step_rows: int = 1


@dataclass(frozen=True, eq=False)
class DraftOutcome:
    """What verification made of one request's tree.

    Attributes:
        tree: what was verified: all or a part of what a drafter proposed, or the tree of another one. A drafter that
            keeps state about its own nodes finds them by walking along the accepted tokens.
        choices: ``[tree.num_nodes]`` the target's choice of each node's successor, with the request's own noise,
            whether its path was accepted or not; None under rejection rules at a temperature, which draw only along
            the path.
        target_logits: ``[tree.num_nodes, vocab]`` the target's raw logits at each node; None only for a drafter that
            does not read them.
        logit_maxima: ``[tree.num_nodes, num_maxima(vocab)]`` of these, as `Choices` has them; None where nobody has
            looked.
    """

    request_id: str
    tree: TokenTree
    path: VerifiedPath
    target_logits: Tensor | None
    choices: Sequence[int] | None = None
    logit_maxima: Tensor | None = None

    @property
    def new_tokens(self) -> list[int]:
        """The accepted tokens and the one after them."""
        return [*(self.tree.tokens[node] for node in self.path.accepted_nodes), self.path.next_token]


@dataclass(frozen=True, eq=False)
class FinishedText:
    """What a request came to, whoever drafted for it, or nobody: what later requests may be drafted from.

    Attributes:
        token_ids: prompt and output, up to the token that ended it. Read only.
        num_prompt_tokens: how many of them are the prompt.
    """

    token_ids: Sequence[int]
    num_prompt_tokens: int


class Drafter(Protocol):
    """A planner asks a drafter in some steps and not in others, and shows it what became of those alone.

    So what it learns of a text it takes from the tokens of the contexts and of `FinishedText`, which have no gaps;
    from an outcome only what it was asked for. It never joins one outcome's tokens to another's.

    Attributes:
        name: as users spell it, and as statistics name it.
        max_nodes: the most draft tokens that it proposes for one request.
        returns_probs: True if its trees carry the distributions they were drawn from.
        reads_logits: True if `observe` looks at the target's logits (asked in each step after `propose`).
        num_without_room: requests that the last `propose` drafted nothing for, because a draft model had no room for
            them: in its cache or in its context.
    """

    name: str
    max_nodes: int
    returns_probs: bool
    reads_logits: bool
    num_without_room: int

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        """One tree per context, in order, rooted at its last token.

        A drafter gives `TokenTree.confidences` where it can: the planner keeps the nodes that are worth their rows.
        """
        ...

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        """Learn what was accepted; called once after each verification."""
        ...

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        """Forget a request, if it is known; it has lost its place, or has finished.

        Args:
            finished: its text, if it has finished. It may be of a request that was never seen before.
        """
        ...
