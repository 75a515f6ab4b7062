"""What the planner knows of each drafter: what its proposals came to, what it costs, and what it may yet cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.drafting.drafter import Drafter

# Weight of a new figure in a long record, one request's or all requests'; in a short one all count alike.
OWN_RECENT, SHARED_RECENT = 0.08, 0.02
OTHERS_WEIGHT = 8  # of a request's own trials that count as much as what other requests have found
MOST_CREDIT = 32.0  # plain steps that a drafter may have in its account: good times do not pay for long bad ones


@dataclass
class Record:
    """What a drafter's proposals came to: running means.

    Attributes:
        recent: the least weight of a new figure.
    """

    recent: float = SHARED_RECENT
    num_trials: int = 0
    accepted: float = 0.0
    rows: float = 0.0

    def add(self, accepted: int, rows: int) -> None:
        self.num_trials += 1
        weight = max(self.recent, 1.0 / self.num_trials)
        self.accepted += weight * (accepted - self.accepted)
        self.rows += weight * (rows - self.rows)


@dataclass
class OwnRecord(Record):
    """One request's record of a drafter, and when it is tried again.

    Attributes:
        pays: whether the record promises more than drafting and the rows cost.
        next_trial: the step from which on it may be tried although it does not pay.
    """

    recent: float = OWN_RECENT
    pays: bool = False
    next_trial: int = 0


@dataclass(eq=False)
class Arm:
    """A drafter, its price and its account.

    Attributes:
        name: of the drafter, made unique among the arms.
        seconds: of drafting, a request and step; None until measured.
        seconds_per_node: likewise a drafted node.
        is_steady: whether these come from requests that were asked before. The first time reads a whole prompt; it
            counts only while there is nothing better.
        observe_s: of observing what became of a proposal.
        credit: plain steps that it may still cost.
        spent_s: seconds that it has cost since its account was settled.
        won: draft tokens accepted since.
        next_newcomer: the step from which on a request that never had a proposal of it may get one on trial.
    """

    name: str
    drafter: Drafter
    shared: Record = field(default_factory=Record)
    seconds: float | None = None
    seconds_per_node: float = 0.0
    is_steady: bool = False
    observe_s: float = 0.0
    credit: float = 0.0
    spent_s: float = 0.0
    won: int = 0
    next_newcomer: int = 0

    @property
    def step_s(self) -> float | None:
        """Seconds that it takes of a request's step, if that is known."""
        return None if self.seconds is None else self.seconds + self.observe_s

    def expected(self, own: Record | None) -> tuple[float, float]:
        """Accepted tokens and rows that a proposal may be expected to come to, for a request with its own record."""
        weight = own.num_trials / (own.num_trials + OTHERS_WEIGHT) if own is not None else 0.0
        accepted, rows = self.shared.accepted, self.shared.rows
        if own is None:
            return accepted, rows
        return accepted + weight * (own.accepted - accepted), rows + weight * (own.rows - rows)

    def settle(self, paid_in: float, plain_s: float, num_sequences: int) -> None:
        """Bring the account up to date.

        Args:
            paid_in: plain steps.
            plain_s: of one of them, which gives each sequence a token.
        """
        balance = self.credit + paid_in + self.won / num_sequences - self.spent_s / plain_s
        self.credit, self.won, self.spent_s = min(balance, MOST_CREDIT), 0, 0.0

    def measured(self, seconds: float, num_nodes: int, *, steady: bool) -> None:
        """Learn from a proposal; `steady` if its requests had been asked before."""
        if self.is_steady and not steady:
            return
        if self.seconds is None or self.is_steady != steady:
            self.seconds, self.seconds_per_node, self.is_steady = seconds, seconds / max(1, num_nodes), steady
            return
        seconds = min(seconds, 4 * self.seconds)
        self.seconds += 0.1 * (seconds - self.seconds)
        if num_nodes:
            self.seconds_per_node += 0.1 * (seconds / num_nodes - self.seconds_per_node)
