"""What the engine counts: where a step's time goes, and how drafts fare."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Sums since the last `reset`; seconds of wall time.

    Attributes:
        draft_s: in the drafter's propose and observe.
        target_s: in the target's forward.
        kernel_s: of that in compiled kernels; 0 for a model that is not one call of them.
        verify_s: in processors and the verification rule.
        other_s: in the rest of a step, the engine's own time.
        num_steps: steps run.
        num_verifications: trees verified (a request's decode steps).
        num_drafts: trees with at least one draft token.
        num_draft_tokens, num_accepted_tokens: draft tokens verified, and accepted.
        num_output_tokens: tokens that reached an output.
        num_cut_rows: rows for draft tokens that requests did not get because the cache had no block for them.
        num_without_room: times that a draft model drafted nothing for a request, its own cache being full or its
            context too short.
        accepted_at_depth: how often a draft token at depth d + 1 was accepted.
    """

    draft_s: float = 0.0
    target_s: float = 0.0
    kernel_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    num_steps: int = 0
    num_verifications: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_output_tokens: int = 0
    num_cut_rows: int = 0
    num_without_room: int = 0
    accepted_at_depth: list[int] = field(default_factory=list)
    _last = 0.0  # when the last lap ended; no field

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification, the bonus token included."""
        return 1.0 + self.num_accepted_tokens / max(1, self.num_verifications)

    @property
    def step_s(self) -> float:
        """Whole steps."""
        return self.draft_s + self.target_s + self.verify_s + self.other_s

    @property
    def own_ms_per_step(self) -> float:
        """The engine's time per step outside draft and target forwards, verification included."""
        return 1e3 * (self.step_s - self.draft_s - self.target_s) / max(1, self.num_steps)

    @property
    def outside_kernels_ms_per_step(self) -> float | None:
        """A step's time outside the draft and the target's compiled kernels; None for a model without them."""
        if not self.kernel_s:
            return None
        return 1e3 * (self.step_s - self.draft_s - self.kernel_s) / max(1, self.num_steps)

    def count_path(self, num_draft_tokens: int, num_accepted: int, num_output: int) -> None:
        self.num_verifications += 1
        self.num_output_tokens += num_output
        self.num_drafts += num_draft_tokens > 0
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        if len(self.accepted_at_depth) < num_accepted:
            self.accepted_at_depth.extend([0] * (num_accepted - len(self.accepted_at_depth)))
        for depth in range(num_accepted):
            self.accepted_at_depth[depth] += 1

    def begin_step(self) -> None:
        self.num_steps += 1
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the wall time since the last lap, or since the step began, to ``<phase>_s``."""
        now = time.perf_counter()
        name = f"{phase}_s"
        setattr(self, name, getattr(self, name) + now - self._last)
        self._last = now
