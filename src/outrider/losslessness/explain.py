"""Why two runs differ: a numerical tie, or a bug.

Forwards of different shapes round differently, so two tokens that are equal but for rounding may be chosen
either way. The explainer recomputes the logits of the first differing token in several shapes, takes their
largest difference as the size of the rounding, and asks whether logits within a few times that much give the
other token by the request's whole pipeline (penalties, filters, keyed choice). If not, rounding is no excuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from outrider.models.model import Model
from outrider.models.probe import CachedRun
from outrider.sampling.noise import Purpose
from outrider.sampling.params import SamplingParams
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import KeyedDecisions
from outrider.token_tree import TokenTree, TokenTreeBatch

Verdict = Literal["tie", "bug"]

ROUNDING_FACTOR = 2.0
"""How much more than between the replayed shapes the rounding of the two runs may have differed. All of 42
divergences of the bundled model in bfloat16 were less than 0.75 times that far from a tie."""

FLOOR_ULPS = 2.0
"""Rounding to expect anyway, in units in the last place of the model's dtype at the logits in question."""

NEAREST, FARTHEST = 1e-6, 100.0
"""The range in which the distance to the other token is looked for."""

NUM_TREE_ROWS = 8
NUM_SEQUENCES = 4
BLOCK_SIZE = 16
CHUNK_SIZE = 256  # of a prefill, whose rows' logits are all computed


@dataclass(frozen=True)
class Divergence:
    """Two outputs of one request that differ.

    Attributes:
        plain_token_ids, other_token_ids: outputs of plain decoding and of the run in question.
        stop_ids: token ids that `min_tokens` holds back.
        row_invariant: the runs claimed the bitwise mode, in which no difference is rounding.
    """

    prompt_token_ids: Sequence[int]
    plain_token_ids: Sequence[int]
    other_token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: Collection[int] = ()
    row_invariant: bool = False

    @property
    def position(self) -> int:
        """Index into the outputs of the first difference; the shorter one's length if it is a prefix."""
        pairs = zip(self.plain_token_ids, self.other_token_ids, strict=False)
        shorter = min(len(self.plain_token_ids), len(self.other_token_ids))
        return next((i for i, (plain, other) in enumerate(pairs) if plain != other), shorter)


@dataclass(frozen=True)
class Explanation:
    """What the replay of a divergence showed; logits are raw unless said otherwise.

    Attributes:
        verdict: "tie" or "bug".
        reason: the verdict in words.
        position: index into the outputs of the first differing token.
        plain_token, other_token: the two tokens; None where an output had ended.
        replayed_token: what plain decoding at one row per forward chooses there.
        top_two: the two largest raw logits and their tokens, ``((token, logit), (token, logit))``.
        delta: largest difference of a logit between the replayed shapes.
        tolerance: the rounding that was allowed for.
        distance: the least change of the logits that makes the replayed choice the other one of the two tokens
            (the farther one, if it is neither).
        differences: per shape, its largest difference of a logit from one row per forward.
        choices: per shape, the token chosen.
    """

    verdict: Verdict
    reason: str
    position: int
    plain_token: int | None
    other_token: int | None
    replayed_token: int | None = None
    top_two: tuple[tuple[int, float], ...] = ()
    delta: float = 0.0
    tolerance: float = 0.0
    distance: float = math.inf
    differences: dict[str, float] | None = None
    choices: dict[str, int] | None = None

    @property
    def top_two_gap(self) -> float:
        return self.top_two[0][1] - self.top_two[1][1] if len(self.top_two) == 2 else math.inf

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        record = {**asdict(self), "top_two_gap": self.top_two_gap}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }


@torch.inference_mode()
def explain_divergence(model: Model, divergence: Divergence) -> Explanation:
    """Replay the first differing position of two outputs and tell rounding from error.

    Args:
        model: the target, in the state in which it gave the outputs.
        divergence: the outputs must differ, or one be a prefix of the other.
    """
    at = divergence.position
    if at >= min(len(divergence.plain_token_ids), len(divergence.other_token_ids)):
        plain, other = (
            next(iter(ids[at:]), None) for ids in (divergence.plain_token_ids, divergence.other_token_ids)
        )
        reason = "the tokens agree as far as they go, but one output ended earlier: no logit explains that"
        return Explanation("bug", reason, at, plain, other)
    plain, other = divergence.plain_token_ids[at], divergence.other_token_ids[at]
    logits = dict(_replay(model, divergence))
    choose = _chooser(divergence)
    reference = logits["one row"]
    differences = {shape: _largest_difference(reference, of) for shape, of in logits.items()}
    delta = max(differences.values())
    tolerance = 0.0
    if not divergence.row_invariant and math.isfinite(delta):
        compared = torch.stack([reference.max(), reference[plain], reference[other]])
        tolerance = ROUNDING_FACTOR * delta + FLOOR_ULPS * _ulp(compared, model.dtype)
    chosen = choose(reference)
    distance = max(_distance(choose, reference, chosen, token) for token in (plain, other))
    top = reference.topk(min(2, reference.shape[-1]))
    return Explanation(
        verdict="tie" if distance <= tolerance else "bug",
        reason=_reason(distance, tolerance, divergence.row_invariant),
        position=at,
        plain_token=plain,
        other_token=other,
        replayed_token=chosen,
        top_two=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        delta=delta,
        tolerance=tolerance,
        distance=distance,
        differences=differences,
        choices={shape: choose(of) for shape, of in logits.items()},
    )


def _reason(distance: float, tolerance: float, row_invariant: bool) -> str:
    if row_invariant:
        return "the bitwise mode promises equal bits, and none of its runs may differ"
    within = "within" if distance <= tolerance else "beyond"
    return f"logits {distance:.3g} away give the other token, {within} the {tolerance:.3g} that rounding explains"


def _largest_difference(left: Tensor, right: Tensor) -> float:
    """Of two rows of logits; infinite where only one of them is a number."""
    differences = torch.where(left == right, 0.0, (left - right).abs())
    return float(differences.nan_to_num(nan=math.inf).max())


def _ulp(logits: Tensor, dtype: torch.dtype) -> float:
    """The unit in the last place of `dtype` at the largest magnitude of `logits`."""
    _, exponent = math.frexp(float(logits[logits.isfinite()].abs().max()))
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 1)


def _chooser(divergence: Divergence) -> Callable[[Tensor], int]:
    """The request's whole pipeline at the differing position, from raw logits ``[vocab]`` to its token."""
    prefix = [*divergence.prompt_token_ids, *divergence.plain_token_ids[: divergence.position]]
    tree = TokenTree.root_only(prefix[-1])
    context = RowContext(
        slice(0, 1), divergence.params, prefix, len(divergence.prompt_token_ids), tree, divergence.stop_ids
    )
    decisions = KeyedDecisions(
        TokenTreeBatch.from_trees([tree]), [divergence.seed], [len(prefix)], [divergence.params.greedy]
    )

    def choose(logits: Tensor) -> int:
        return decisions.sample(process_logits(logits[None], [context]), [0], Purpose.TARGET)[0]

    return choose


def _distance(choose: Callable[[Tensor], int], logits: Tensor, chosen: int, token: int) -> float:
    """The least move of ``[vocab]`` `logits` (largest change of one) that makes `token` the choice, to 5 percent.

    Infinite where no move up to FARTHEST does, as for tokens that the request's parameters exclude.
    """
    if token == chosen:
        return 0.0

    def reaches(size: float) -> bool:
        return any(choose(moved) == token for moved in _perturbations(logits, chosen, token, size))

    low, high = NEAREST, FARTHEST
    if not reaches(high):
        return math.inf
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _perturbations(logits: Tensor, chosen: int, token: int, size: float) -> Iterator[Tensor]:
    """The corners of the box around `logits` that favour `token` most.

    Each raises it and lowers the chosen one. What lies above either of them moves too in the later ones, because
    borders of top_p and min_p depend on it: up to push the chosen one out, down to let `token` in.
    """
    nothing = torch.zeros_like(logits)
    above_chosen, above_token = logits > logits[chosen], logits > logits[token]
    for sign_above, sign_below, above in (
        (0.0, 0.0, above_chosen),
        (1.0, -1.0, above_chosen),
        (-1.0, 1.0, above_token),
        (-1.0, -1.0, above_token),
    ):
        moves = torch.where(above, nothing + sign_above, nothing + sign_below)
        moves[token], moves[chosen] = 1.0, -1.0
        yield logits + size * moves


def _replay(model: Model, divergence: Divergence) -> Iterator[tuple[str, Tensor]]:
    """Raw logits ``[vocab]`` of the differing position by forwards of several shapes; the first is plain."""
    num_prompt = len(divergence.prompt_token_ids)
    prefix = [*divergence.prompt_token_ids, *divergence.plain_token_ids[: divergence.position]]
    last = len(prefix) - 1
    num_drafts = min(NUM_TREE_ROWS - 1, model.context_length - len(prefix))
    drafts = list(divergence.other_token_ids[divergence.position :][:num_drafts])
    drafts += drafts[-1:] * (num_drafts - len(drafts))

    def start(end: int, num_sequences: int = 1) -> CachedRun:
        """A run whose sequences, named 0, 1, ..., hold ``prefix[:end]``."""
        run = CachedRun(
            model,
            block_size=BLOCK_SIZE,
            num_positions=len(prefix) + num_drafts,
            num_sequences=num_sequences,
            row_invariant=divergence.row_invariant,
        )
        for sequence in range(num_sequences):
            for at in range(0, end, CHUNK_SIZE):
                run.feed(str(sequence), prefix[at : min(at + CHUNK_SIZE, end)])
        return run

    run = start(num_prompt - 1)
    for token in prefix[num_prompt - 1 : last]:
        run.feed("0", [token])
    yield "one row", run.feed("0", prefix[last:])[-1]
    split = last - last % CHUNK_SIZE
    yield "prefill", start(split).feed("0", prefix[split:])[-1]
    rows = ([prefix[last], *drafts], range(-1, num_drafts))
    yield f"{1 + num_drafts} rows", start(last).step({"0": rows})["0"][0]
    row = (prefix[last:], (-1,))
    batch = {str(sequence): row for sequence in range(NUM_SEQUENCES)}
    yield f"{NUM_SEQUENCES} sequences", start(last, NUM_SEQUENCES).step(batch)["0"][0]
