"""Replaying recorded outputs: what a drafter would have got accepted, without running a model.

A drafter that reads only tokens proposes the same trees for the same tokens, whoever chose them. So feeding it a
known output counts exactly what it would save a model that generates this output.

What a target would have said off the recorded path is not known. Drafters that read its logits, or learn from its
choices there, are given those of a stand-in (`SyntheticTarget`): the time that drafting takes is then measured as in
an engine, tokens per step are not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, FinishedText
from outrider.errors import ConfigError
from outrider.kernels.native import MAXIMA_BLOCK
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree
from outrider.verification.coupled import follow_choices

NUM_BINS = 10  # of confidences, from 0 to 1
NUM_ROWS = 256  # of a stand-in's logits; which one stands after a token follows from the token
LOGIT_SPREAD = 2.5  # standard deviation of a stand-in's logits
LEAD = 0.5  # of the recorded token over the next best, in logits


@dataclass(frozen=True)
class Recording:
    """A prompt and what was generated for it."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


class SyntheticTarget:
    """Stands in for the model: random logits after each token, whose best is the recorded token on its path.

    Args:
        vocab_size: at least that of the recordings.
    """

    def __init__(self, vocab_size: int) -> None:
        rows = np.random.default_rng(0).standard_normal((NUM_ROWS, vocab_size), dtype=np.float32)
        self._rows = rows * np.float32(LOGIT_SPREAD)
        self._best = self._rows.argmax(axis=-1)

    def outcome(self, context: DraftContext, tree: TokenTree, future: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Logits and choices after the nodes of a tree.

        Args:
            future: the recorded tokens behind the context; on their path they are the choices, with the context's
                temperature and noise.

        Returns:
            ``[num_nodes, vocab]`` and ``[num_nodes]``.
        """
        of_row = np.asarray(tree.tokens) % NUM_ROWS
        logits, choices = self._rows[of_row], self._best[of_row].tolist()
        for depth, node in enumerate((0, *tree.nodes_along(future[:-1]))):
            position = len(context.token_ids) + depth
            logits[node, future[depth]] = self._winning_logit(logits[node], context, position, future[depth])
            choices[node] = future[depth]
        return torch.from_numpy(logits), choices

    def _winning_logit(self, row: NDArray[np.float32], context: DraftContext, position: int, token: int) -> float:
        """The logit with which a token is chosen, by a little."""
        params = context.params
        if params.greedy:
            return float(row.max()) + LEAD
        noise = gumbel_noise(context.seed, position, Purpose.TARGET, len(row)) * np.float32(params.temperature)
        return float((row + noise).max() - noise[token]) + LEAD


@dataclass(eq=False)
class ReplayResult:
    """What a drafter came to over all recordings.

    Attributes:
        num_tokens: output tokens committed.
        num_steps: verifications that it took.
        num_drafted, num_accepted: draft tokens.
        first_steps: ``[num_recordings]`` each one's first step, in which drafters read the prompt.
        propose_s, observe_s: ``[num_steps]`` seconds of each call.
        confidence_sums, num_confident, num_right: ``[NUM_BINS]`` over the drafted nodes whose parent was on the
            accepted path, by their confidence: its sum, how many there were, and how many were the target's choice.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    first_steps: list[int] = field(default_factory=list)
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
    def step_ms(self) -> NDArray[np.float64]:
        """Milliseconds of `propose` and `observe` in each step but the first ones."""
        return np.delete(np.add(self.propose_s, self.observe_s) * 1000, self.first_steps)

    @property
    def median_draft_ms(self) -> float:
        """Median of `step_ms`, or 0."""
        return self.draft_ms(50)

    def draft_ms(self, percentile: float) -> float:
        """What this percentage of `step_ms` stays below; 0 if there are none."""
        step_ms = self.step_ms
        return float(np.percentile(step_ms, percentile)) if len(step_ms) else 0.0

    @property
    def prompt_ms(self) -> float:
        """Mean milliseconds of `propose` and `observe` in a first step."""
        seconds = np.add(self.propose_s, self.observe_s)[self.first_steps]
        return float(seconds.mean()) * 1000 if len(seconds) else 0.0

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
    target: SyntheticTarget | None = None,
    temperature: float = 0.0,
) -> ReplayResult:
    """Feed recorded outputs to a drafter, one recording after the other, and count what it gets accepted.

    Args:
        drafter: keeps what it learns from one recording to the next, if it is of that kind.
        max_nodes: the most draft tokens per step; None is the drafter's own limit.
        min_path_prob: as in `DraftContext`.
        target: what logits and choices are made up by; None gives the drafter none.
        temperature: of the requests.

    Raises:
        ConfigError: the drafter reads logits, and there is no target.
    """
    if drafter.reads_logits and target is None:
        raise ConfigError(
            "replay",
            got=f"{drafter.name}, which reads logits",
            expected="a drafter that reads tokens, or a target",
            remedy="pass target=SyntheticTarget(vocab_size)",
        )
    result = ReplayResult()
    for index, recording in enumerate(recordings):
        result.first_steps.append(result.num_steps)
        blank = DraftContext(
            request_id=f"recording-{index}",
            token_ids=(),
            num_prompt_tokens=len(recording.prompt_token_ids),
            max_nodes=drafter.max_nodes if max_nodes is None else max_nodes,
            max_depth=0,
            params=SamplingParams(temperature=temperature),
            seed=index,
            stop_token_ids=frozenset(),
            min_path_prob=min_path_prob,
        )
        _replay_one(drafter, recording, blank, target, result)
        known = [*recording.prompt_token_ids, *recording.output_token_ids]
        drafter.release(blank.request_id, FinishedText(known, blank.num_prompt_tokens))
    return result


def _replay_one(
    drafter: Drafter,
    recording: Recording,
    blank: DraftContext,
    target: SyntheticTarget | None,
    result: ReplayResult,
) -> None:
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
        logits, choices = (None, None) if target is None else target.outcome(context, tree, future)
        maxima = None if logits is None else _maxima(logits)
        outcome = DraftOutcome(blank.request_id, tree, path, logits, choices, maxima)
        start = time.perf_counter()
        drafter.observe([outcome])
        result.observe_s.append(time.perf_counter() - start)
        token_ids += outcome.new_tokens
        result.num_steps += 1
        result.num_tokens += len(outcome.new_tokens)
        result.num_drafted += tree.num_nodes - 1
        result.num_accepted += len(path.accepted_nodes)
        _count_confidences(result, tree, path.accepted_nodes)


def _maxima(logits: Tensor) -> Tensor:
    """What a forward leaves beside its logits: see `Choices`."""
    rows = logits.numpy()
    return torch.from_numpy(np.maximum.reduceat(rows, np.arange(0, rows.shape[1], MAXIMA_BLOCK), axis=1))


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
