"""Replaying recorded outputs: what a drafter would have got accepted, without running a model.

A drafter that reads only tokens proposes the same trees for the same tokens, whoever chose them. So feeding it a
known output counts exactly what it would save a model that generates this output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree
from outrider.verification.coupled import follow_choices

NUM_BINS = 10  # of confidences, from 0 to 1


@dataclass(frozen=True)
class Recording:
    """A prompt and what was generated for it."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(eq=False)
class ReplayResult:
    """What a drafter came to over all recordings.

    Attributes:
        num_tokens: output tokens committed.
        num_steps: verifications that it took.
        num_drafted, num_accepted: draft tokens.
        propose_s, observe_s: ``[num_steps]`` seconds of each call.
        confidence_sums, num_confident, num_right: ``[NUM_BINS]`` over the drafted nodes whose parent was on the
            accepted path, by their confidence: its sum, how many there were, and how many were the target's choice.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    propose_s: list[float] = field(default_factory=list)
    observe_s: list[float] = field(default_factory=list)
    confidence_sums: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    num_confident: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    num_right: list[int] = field(default_factory=lambda: [0] * NUM_BINS)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification, the bonus token included."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def median_draft_ms(self) -> float:
        """Median milliseconds of `propose` and `observe` in a step."""
        return float(np.median(np.add(self.propose_s, self.observe_s))) * 1000 if self.num_steps else 0.0

    @property
    def calibration_error(self) -> float:
        """Mean distance of confidences from the observed rate, weighted by how often they were given."""
        total = sum(self.num_confident)
        gaps = (
            abs(confidence - right) for confidence, right in zip(self.confidence_sums, self.num_right, strict=True)
        )
        return sum(gaps) / total if total else 0.0


def replay(
    drafter: Drafter,
    recordings: Sequence[Recording],
    *,
    max_nodes: int | None = None,
    min_path_prob: float = 0.0,
) -> ReplayResult:
    """Feed recorded outputs to a drafter, one recording after the other, and count what it gets accepted.

    Args:
        drafter: keeps what it learns from one recording to the next, if it is of that kind.
        max_nodes: the most draft tokens per step; None is the drafter's own limit.
        min_path_prob: as in `DraftContext`.

    Raises:
        ConfigError: the drafter reads logits, which no recording has.
    """
    if drafter.reads_logits:
        raise ConfigError("replay", got=f"{drafter.name}, which reads logits", expected="a drafter that reads tokens")
    result = ReplayResult()
    for index, recording in enumerate(recordings):
        blank = DraftContext(
            request_id=f"recording-{index}",
            token_ids=(),
            num_prompt_tokens=len(recording.prompt_token_ids),
            max_nodes=drafter.max_nodes if max_nodes is None else max_nodes,
            max_depth=0,
            params=SamplingParams(temperature=0.0),
            seed=0,
            stop_token_ids=frozenset(),
            min_path_prob=min_path_prob,
        )
        _replay_one(drafter, recording, blank, result)
        drafter.release(blank.request_id)
    return result


def _replay_one(drafter: Drafter, recording: Recording, blank: DraftContext, result: ReplayResult) -> None:
    known = [*recording.prompt_token_ids, *recording.output_token_ids]
    token_ids = known[: blank.num_prompt_tokens]
    while len(token_ids) < len(known):
        context = replace(blank, token_ids=token_ids, max_depth=len(known) - len(token_ids) - 1)
        start = time.perf_counter()
        (tree,) = drafter.propose([context])
        result.propose_s.append(time.perf_counter() - start)
        future = known[len(token_ids) :]
        # Along the accepted path the recorded tokens are the choices; what would be chosen off it is not known, and
        # not asked for: a node below a rejected one is never reached.
        path = follow_choices(tree, [future[depth] if depth < len(future) else -1 for depth in tree.depths])
        outcome = DraftOutcome(blank.request_id, tree, path, None)
        start = time.perf_counter()
        drafter.observe([outcome])
        result.observe_s.append(time.perf_counter() - start)
        token_ids += outcome.new_tokens
        result.num_steps += 1
        result.num_tokens += len(outcome.new_tokens)
        result.num_drafted += tree.num_nodes - 1
        result.num_accepted += len(path.accepted_nodes)
        _count_confidences(result, tree, path.accepted_nodes)


def _count_confidences(result: ReplayResult, tree: TokenTree, accepted_nodes: Sequence[int]) -> None:
    if tree.confidences is None:
        return
    reached = {0, *accepted_nodes}
    for node in range(1, tree.num_nodes):
        if tree.parents[node] in reached:
            confidence = tree.confidences[node]
            index = min(int(confidence * NUM_BINS), NUM_BINS - 1)
            result.confidence_sums[index] += confidence
            result.num_confident[index] += 1
            result.num_right[index] += node in reached
