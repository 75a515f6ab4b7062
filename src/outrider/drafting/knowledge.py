"""What a planner keeps between runs: records, prices, accounts and counted acceptance, drafter by drafter.

Learning what pays costs time in every run anew (regret); so what was learnt is where the next run begins. It counts
for a bounded number of trials, and an account keeps a bounded part of what was won or lost: another text, or another
load of the machine, is soon believed instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outrider.config import from_mapping
from outrider.config.checks import check_int, check_number, require
from outrider.drafting.acceptance import CENTRES, AcceptanceEstimator
from outrider.drafting.arms import Arm, Record

VERSION = 2
KEPT_TRIALS = 16  # that a record, or a bin of confidences, counts for
# Plain steps of an account: a run of a few dozen steps must not lose in trials what another has won, and one that
# drafts a first time needs no more than to be solvent.
KEPT_CREDIT, KEPT_DEBT = 1.0, 4.0
MOST = 1e9


@dataclass(frozen=True)
class _Kept:
    """What is kept of one drafter.

    Attributes:
        hits, trials: ``[tables][bins]`` of `AcceptanceEstimator.shared_counts`.

    Raises:
        ConfigError: figures that cannot be.
    """

    seconds: float
    seconds_per_node: float
    observe_s: float
    credit: float
    num_trials: int
    accepted: float
    rows: float
    hits: Sequence[Sequence[float]]
    trials: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        for name in ("seconds", "seconds_per_node", "observe_s", "accepted", "rows"):
            check_number(name, getattr(self, name), 0.0, MOST)
        check_number("credit", self.credit, -KEPT_DEBT, KEPT_CREDIT)
        check_int("num_trials", self.num_trials, 1, KEPT_TRIALS)
        for table in (self.hits, self.trials):
            sizes = [len(row) if isinstance(row, Sequence) else None for row in table]
            require(sizes in ([], [len(CENTRES)] * 3), "tables of acceptance", sizes, f"three of {len(CENTRES)} bins")
        require(len(self.hits) == len(self.trials), "hits", len(self.hits), "as many as trials")
        for hits, trials in zip(self.hits, self.trials, strict=True):
            for hit, trial in zip(hits, trials, strict=True):
                check_number("trials", trial, 0.0, KEPT_TRIALS)
                check_number("hits", hit, 0.0, trial)


class Knowledge:
    """A planner's knowledge as values that JSON can hold."""

    def __init__(self, arms: Sequence[Arm], acceptance: AcceptanceEstimator) -> None:
        self._arms, self._acceptance = arms, acceptance
        self._num_recalled = 0

    @property
    def has_news(self) -> bool:
        """Whether anything was learnt beyond what was recalled."""
        return sum(arm.shared.num_trials for arm in self._arms) != self._num_recalled

    def as_mapping(self) -> dict[str, Any]:
        """Of every drafter that has been tried."""
        drafters: dict[str, Any] = {}
        for arm in self._arms:
            if arm.shared.num_trials and arm.seconds is not None:
                hits, trials = self._acceptance.shared_counts(arm.name, KEPT_TRIALS)
                credit = max(-KEPT_DEBT, min(KEPT_CREDIT, arm.credit))
                num_trials, shared = min(KEPT_TRIALS, arm.shared.num_trials), arm.shared
                prices = (arm.seconds, arm.seconds_per_node, arm.observe_s)
                drafters[arm.name] = asdict(
                    _Kept(*prices, credit, num_trials, shared.accepted, shared.rows, hits, trials)
                )
        return {"version": VERSION, "drafters": drafters}

    def recall(self, values: Any) -> None:
        """Begin with what an earlier planner of the same drafters knew.

        Args:
            values: what `as_mapping` gave.

        Raises:
            ConfigError: it is something else; then nothing is taken from it.
        """
        valid = isinstance(values, Mapping) and values.get("version") == VERSION
        require(valid, "a planner's knowledge", values, f"a mapping of version {VERSION}")
        drafters: Any = values.get("drafters")
        require(isinstance(drafters, Mapping), "a planner's knowledge", drafters, "a mapping of drafters")
        known = {name: from_mapping(_Kept, of, "a planner's knowledge") for name, of in drafters.items()}
        for arm in self._arms:
            kept = known.get(arm.name)
            if kept is None:
                continue
            arm.seconds, arm.seconds_per_node, arm.is_steady = kept.seconds, kept.seconds_per_node, True
            arm.observe_s, arm.credit = kept.observe_s, kept.credit
            arm.shared = Record(num_trials=kept.num_trials, accepted=kept.accepted, rows=kept.rows)
            self._acceptance.recall(arm.name, kept.hits, kept.trials)
            self._num_recalled += kept.num_trials
