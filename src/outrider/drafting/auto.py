"""The planner: each step the drafter and the tree that pay, and plain decoding where none does.

Drafters are asked in two rounds. Those that cost next to nothing always propose, and their proposals are weighed by
what their confidences have been worth. The others (a draft model) are asked where their record promises more than
that, or on trial: a bandit with a bounded cost. Of each request's proposals the best is taken, and over all of them
the nodes that are worth their rows. What a row and a draft cost is measured as the steps run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from outrider.config import AutoConfig
from outrider.drafting.acceptance import AcceptanceEstimator
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.planner import choose_nodes
from outrider.token_tree import TokenTree

NEARLY_FREE = 0.008  # of a token: what all drafters of the first round together may cost a request's step
MARGIN = 1.3  # times its price a row or a draft must promise: what looks best is what is overrated
ROW_STEP = 4  # rows over which the price of one more is taken
PAUSE = 4  # steps of a request, at least, between proposals of a drafter that does not pay
# Weight of a new figure in a long record, one request's or all requests'; in a short one all count alike.
OWN_RECENT, SHARED_RECENT = 0.08, 0.02
LONGEST_SLEEP = 256
OTHERS_WEIGHT = 8  # of a request's own trials that count as much as what other requests have found
TRIAL_STEPS = 0.25  # plain steps that all drafters' trials may cost before any time has passed


@dataclass
class _Record:
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
class _OwnRecord(_Record):
    """One request's record of a drafter, and when it is tried again.

    Attributes:
        pays: whether the record promises more than drafting and the rows cost.
        next_trial: the request's step from which on it may be tried although it does not pay.
    """

    recent: float = OWN_RECENT
    pays: bool = False
    next_trial: int = 0


@dataclass(eq=False)
class _Arm:
    """A drafter and its price.

    Attributes:
        name: of the drafter, made unique among the arms.
        seconds: of drafting, a request and step; None until measured.
        seconds_per_node: likewise a drafted node.
        is_steady: whether these come from requests that were asked before. The first time reads a whole prompt; it
            counts only while there is nothing better.
        observe_s: of observing what became of a proposal.
        trials_s: what its trials have cost beyond what they won.
    """

    name: str
    drafter: Drafter
    shared: _Record = field(default_factory=_Record)
    seconds: float | None = None
    seconds_per_node: float = 0.0
    is_steady: bool = False
    observe_s: float = 0.0
    trials_s: float = 0.0

    @property
    def step_s(self) -> float | None:
        """Seconds that it takes of a request's step, if that is known."""
        return None if self.seconds is None else self.seconds + self.observe_s

    def expected(self, own: _Record | None) -> tuple[float, float]:
        """Accepted tokens and rows that a proposal may be expected to come to, for a request with its own record."""
        weight = own.num_trials / (own.num_trials + OTHERS_WEIGHT) if own is not None else 0.0
        accepted, rows = self.shared.accepted, self.shared.rows
        if own is None:
            return accepted, rows
        return accepted + weight * (own.accepted - accepted), rows + weight * (own.rows - rows)

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


@dataclass(eq=False)
class _Proposal:
    """A tree on offer for a request.

    Attributes:
        probs: ``[num_nodes]`` of reaching each node; None for a tree that must stay whole.
        nodes: draft tokens that are worth their rows.
        worth: expected accepted tokens, less what these rows cost.
    """

    arm: _Arm
    tree: TokenTree
    probs: list[float] | None
    nodes: range | list[int]
    worth: float
    on_trial: bool = False


@dataclass(eq=False)
class _Planned:
    """What a request got in the step under way."""

    chosen: _Proposal | None = None
    num_nodes: int = 0
    proposals: list[_Proposal] = field(default_factory=list)

    def has(self, arm: _Arm) -> bool:
        return any(proposal.arm is arm for proposal in self.proposals)


@dataclass(frozen=True)
class _Market:
    """Prices of a step.

    Attributes:
        num_rows: without drafts.
        context: mean length of the sequences.
        tokens_per_s: what a second is worth.
        row_price: what one more row costs, in tokens, with the margin.
    """

    num_rows: int
    num_sequences: int
    context: float
    tokens_per_s: float
    row_price: float


class AutoDrafter:
    """Args:
    drafters: to choose from; the earlier one of equals is taken.
    cost: of the target's forwards; it is kept up to date.
    clock: seconds.
    """

    name = "auto"

    def __init__(
        self,
        config: AutoConfig,
        drafters: Sequence[Drafter],
        cost: ForwardCost,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._cost, self.clock = config, cost, clock
        names = [drafter.name for drafter in drafters]
        self._arms = [
            _Arm(name if names.count(name) == 1 else f"{name}-{names[:index].count(name) + 1}", drafter)
            for index, (name, drafter) in enumerate(zip(names, drafters, strict=True))
        ]
        self.max_nodes = max((min(config.max_nodes, drafter.max_nodes) for drafter in drafters), default=0)
        self.returns_probs = any(drafter.returns_probs for drafter in drafters)
        self.reads_logits = False
        self._acceptance = AcceptanceEstimator()
        self._records: dict[str, dict[_Arm, _OwnRecord]] = {}
        self._steps: dict[str, int] = {}
        self._wake: dict[str, int] = {}  # the step of a request up to which no drafter need be asked for it
        self._tokens, self._seconds = 0.0, 0.0  # of recent steps, the older ones worth less
        self._total_s, self._plain_s = 0.0, 0.0
        self._planned: dict[str, _Planned] = {}
        self._first_round: list[_Arm] = []
        self._market: _Market | None = None
        self._draft_s, self._forward_start, self._num_step_rows = 0.0, 0.0, 0
        self.num_chosen = {arm.name: 0 for arm in self._arms}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        start = self.clock()
        trees = [TokenTree.root_only(context.token_ids[-1]) for context in contexts]
        awake = [index for index, context in enumerate(contexts) if not self._sleeps(context.request_id)]
        self.reads_logits = False
        self._market = None  # a step that failed left its own
        if not awake:
            self._total_s += self._plain_s
            return trees
        market = self._market = self._prices(contexts)
        watched = [contexts[index] for index in awake]
        self._planned = {context.request_id: _Planned() for context in watched}
        self._collect([c for c in contexts if c.max_nodes > 0 and c.max_depth > 0], market)
        for index, tree in zip(awake, self._allot(watched, market), strict=True):
            trees[index] = tree
        self._num_step_rows = market.num_rows + sum(tree.num_nodes - 1 for tree in trees)
        proposals = (proposal for plan in self._planned.values() for proposal in plan.proposals)
        self.reads_logits = any(proposal.arm.drafter.reads_logits for proposal in proposals)
        self._forward_start = self.clock()
        self._draft_s = self._forward_start - start
        return trees

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        market, now = self._market, self.clock()
        if market is None:
            return  # all sleep
        self._market = None
        self._learn_prices(market, now - self._forward_start, sum(len(outcome.new_tokens) for outcome in outcomes))
        for outcome in outcomes:
            self._learn(outcome, market)
        for arm in self._arms:
            self._show(arm, outcomes)

    def _show(self, arm: _Arm, outcomes: Sequence[DraftOutcome]) -> None:
        """Have a drafter observe; one that reads logits, which takes time, only what became of its own proposals."""
        if arm.drafter.reads_logits:
            outcomes = [o for o in outcomes if (plan := self._planned.get(o.request_id)) and plan.has(arm)]
            if not outcomes:
                return
        start = self.clock()
        arm.drafter.observe(outcomes)
        arm.observe_s += 0.1 * ((self.clock() - start) / len(outcomes) - arm.observe_s)

    def release(self, request_id: str) -> None:
        for arm in self._arms:
            arm.drafter.release(request_id)
        self._acceptance.release(request_id)
        self._records.pop(request_id, None)
        self._steps.pop(request_id, None)
        self._wake.pop(request_id, None)

    def check_integrity(self) -> None:
        for arm in self._arms:
            check = getattr(arm.drafter, "check_integrity", None)
            if check is not None:
                check()

    def _sleeps(self, request_id: str) -> bool:
        """Whether nothing pays for a request, and nothing is due for a trial: then its step costs nothing."""
        step = self._steps.get(request_id, 0)
        if step >= self._wake.get(request_id, 0):
            return False
        self._steps[request_id] = step + 1
        return True

    def _collect(self, contexts: Sequence[DraftContext], market: _Market) -> None:
        """Have drafters propose: first those that cost next to nothing, then those that promise more, or are due."""
        self._first_round = self._nearly_free(market)
        second_round = [arm for arm in self._arms if arm not in self._first_round]
        awake = [context for context in contexts if context.request_id in self._planned]
        for arm in self._first_round:
            self._ask(arm, [context for context in awake if self._is_due(arm, context.request_id)], market)
        asked: dict[_Arm, list[DraftContext]] = {}
        for context in awake:
            best = self._most_promising(context.request_id, second_round, market)
            if best is not None:
                asked.setdefault(best, []).append(context)
        for arm, some in asked.items():
            self._ask(arm, some, market)
        self._try_out(second_round, contexts, market)

    def _prices(self, contexts: Sequence[DraftContext]) -> _Market:
        num_rows = max(len(contexts), contexts[0].num_step_rows)
        context, num = sum(len(c.token_ids) for c in contexts) / len(contexts), len(contexts)
        self._plain_s = self._cost.seconds(num, context, num)
        tokens_per_s = max(num / self._plain_s, self._tokens / self._seconds if self._seconds else 0.0)
        marginal = self._cost.seconds(num_rows + ROW_STEP, context, num) - self._cost.seconds(num_rows, context, num)
        price = MARGIN * tokens_per_s * max(0.0, marginal) / ROW_STEP
        return _Market(num_rows, num, context, tokens_per_s, price)

    def _forward_s(self, market: _Market, num_rows: float) -> float:
        return self._cost.seconds(num_rows, market.context, market.num_sequences)

    def _nearly_free(self, market: _Market) -> list[_Arm]:
        """Drafters that may propose without an account, the cheapest first."""
        found, spent = [], 0.0
        for arm in sorted((arm for arm in self._arms if arm.step_s is not None), key=lambda arm: arm.step_s or 0.0):
            spent += market.tokens_per_s * (arm.step_s or 0.0)
            if spent > NEARLY_FREE:
                break
            found.append(arm)
        return found

    def _ask(self, arm: _Arm, contexts: Sequence[DraftContext], market: _Market, *, on_trial: bool = False) -> None:
        """Add a drafter's proposals to the plans."""
        if not contexts:
            return
        # Confidences may be modest, so what is left out unseen is far below what would pay.
        threshold = min(0.5, 0.25 * (market.row_price + market.tokens_per_s * arm.seconds_per_node))
        limited = [
            replace(
                context,
                max_nodes=min(context.max_nodes, self._config.max_nodes),
                min_path_prob=max(context.min_path_prob, threshold),
            )
            for context in contexts
        ]
        start = self.clock()
        trees = arm.drafter.propose(limited)
        seconds = (self.clock() - start) / len(contexts)
        steady = all(arm in self._own(context.request_id) for context in contexts)
        arm.measured(seconds, sum(tree.num_nodes - 1 for tree in trees) // len(trees), steady=steady)
        for context, tree in zip(contexts, trees, strict=True):
            proposal = self._weigh(arm, context.request_id, tree, market)
            proposal.on_trial = on_trial
            self._planned[context.request_id].proposals.append(proposal)

    def _weigh(self, arm: _Arm, request_id: str, tree: TokenTree, market: _Market) -> _Proposal:
        num_nodes = tree.num_nodes - 1
        if num_nodes == 0:
            return _Proposal(arm, tree, None, range(0), 0.0)
        if tree.draft is not None or tree.confidences is None:
            # Rejection rules forbid to leave a drawn token out because of what it is, and what was drawn decides how
            # far a tree goes; without confidences nothing tells the nodes apart. Then the record of such trees must
            # do, for what they bring and for what they cost.
            accepted, rows = arm.expected(self._own(request_id).get(arm))
            seconds = self._forward_s(market, market.num_rows + rows) - self._forward_s(market, market.num_rows)
            price = MARGIN * market.tokens_per_s * seconds
            return _Proposal(arm, tree, None, range(1, tree.num_nodes), accepted - price)
        probs = self._acceptance.path_probs(arm.name, request_id, tree)
        nodes = [node for node in range(1, tree.num_nodes) if probs[node] > market.row_price]
        return _Proposal(arm, tree, probs, nodes, sum(probs[node] - market.row_price for node in nodes))

    def _most_promising(self, request_id: str, arms: Sequence[_Arm], market: _Market) -> _Arm | None:
        """The drafter whose record promises a request most, and more than what is on the table."""
        best, best_worth = None, self._best_worth(request_id)
        own = self._own(request_id)
        for arm in arms:
            if arm.shared.num_trials and arm.step_s is not None:
                accepted, rows = arm.expected(own.get(arm))
                worth = accepted - market.row_price * rows - MARGIN * market.tokens_per_s * arm.step_s
                if worth > best_worth:
                    best, best_worth = arm, worth
        return best

    def _try_out(self, arms: Sequence[_Arm], contexts: Sequence[DraftContext], market: _Market) -> None:
        """Let every drafter whose account allows it propose once more, to the request that may gain most by it.

        That is one which knows little of the drafter and has little without it. If it sleeps, it is woken for the
        next step, or those that are awake, because something else pays for them, would use the account up.
        """
        tried = set[str]()
        for arm in arms:
            if self._debt(arm) > 0.0:
                continue
            due = [c for c in contexts if c.request_id not in tried and self._is_due(arm, c.request_id)]
            if not due:
                continue
            context = min(due, key=lambda context: self._knowledge(arm, context.request_id))
            tried.add(context.request_id)
            if context.request_id in self._planned:
                self._ask(arm, [context], market, on_trial=True)
            else:
                self._wake[context.request_id] = 0

    def _is_due(self, arm: _Arm, request_id: str) -> bool:
        record = self._own(request_id).get(arm)
        if record is not None and self._steps.get(request_id, 0) < record.next_trial:
            return False
        plan = self._planned.get(request_id)
        return plan is None or not plan.has(arm)

    def _knowledge(self, arm: _Arm, request_id: str) -> float:
        """What a request knows of a drafter, in trials, times the tokens that it gets without it."""
        record = self._own(request_id).get(arm)
        return (1 + (record.num_trials if record is not None else 0)) * (1.0 + self._best_worth(request_id))

    def _best_worth(self, request_id: str) -> float:
        plan = self._planned.get(request_id)
        return max((p.worth for p in plan.proposals), default=0.0) if plan is not None else 0.0

    def _debt(self, arm: _Arm) -> float:
        """Seconds that trials of a drafter have cost beyond what they may."""
        allowed = self._config.exploration * self._total_s + TRIAL_STEPS * self._plain_s
        return arm.trials_s - allowed / len(self._arms)

    def _next_call(self, arm: _Arm, own: Mapping[_Arm, _OwnRecord], step: int) -> int:
        """The step of a request in which an arm is to be asked again, as far as is known now."""
        record = own.get(arm)
        if arm in self._first_round or (record is not None and record.pays):
            return record.next_trial if record is not None else step
        debt, per_step = self._debt(arm), self._config.exploration / len(self._arms) * self._plain_s
        wait = min(LONGEST_SLEEP, int(debt / per_step) + 1 if per_step else LONGEST_SLEEP) if debt > 0.0 else 0
        return max(step + wait, record.next_trial if record is not None else 0)

    def _allot(self, contexts: Sequence[DraftContext], market: _Market) -> list[TokenTree]:
        """Give every request its best proposal, and the batch's rows to the nodes that are worth them."""
        for plan in self._planned.values():
            best = max(plan.proposals, key=lambda p: p.worth, default=None)
            tried = next((p for p in plan.proposals if p.on_trial and p.tree.num_nodes > 1), None)
            if tried is not None and tried.probs is None:
                best = tried  # nothing but verifying it tells what it is worth
            if best is not None and (best.worth > 0.0 or best is tried):
                plan.chosen = best
        choices = [self._planned[context.request_id] for context in contexts]
        whole = sum(p.chosen.tree.num_nodes - 1 for p in choices if p.chosen and p.chosen.probs is None)
        divisible = [p for p in choices if p.chosen is not None and p.chosen.probs is not None]
        kept = choose_nodes(
            [p.chosen.probs for p in divisible if p.chosen and p.chosen.probs],
            lambda most: self._cost.with_more_rows(
                market.num_rows + whole, most, market.context, market.num_sequences
            ),
            MARGIN * market.tokens_per_s,
        )
        nodes = {id(plan): of for plan, of in zip(divisible, kept, strict=True)}
        trees = []
        for context, plan in zip(contexts, choices, strict=True):
            tree = plan.chosen.tree if plan.chosen else TokenTree.root_only(context.token_ids[-1])
            if id(plan) in nodes:
                tree = tree.restricted_to(nodes[id(plan)])
            plan.num_nodes = tree.num_nodes - 1
            if plan.chosen and plan.num_nodes:
                self.num_chosen[plan.chosen.arm.name] += 1
            trees.append(tree)
        return trees

    def _learn_prices(self, market: _Market, forward_s: float, num_tokens: int) -> None:
        self._cost.observe(self._num_step_rows, market.context, market.num_sequences, forward_s)
        seconds = forward_s + self._draft_s
        self._total_s += seconds
        self._tokens, self._seconds = 0.95 * self._tokens + num_tokens, 0.95 * self._seconds + seconds

    def _learn(self, outcome: DraftOutcome, market: _Market) -> None:
        request_id = outcome.request_id
        plan = self._planned.get(request_id)
        if plan is None:
            return
        step = self._steps[request_id] = self._steps.get(request_id, 0) + 1
        own = self._own(request_id)
        for proposal in plan.proposals:
            arm, taken = proposal.arm, proposal is plan.chosen
            self._acceptance.observe(arm.name, request_id, proposal.tree, outcome.new_tokens)
            record = own.setdefault(arm, _OwnRecord())
            if taken:
                accepted, rows = len(outcome.path.accepted_nodes), plan.num_nodes
            else:  # it counts with what it would have come to, as far as is known
                accepted = len(set(proposal.nodes).intersection(proposal.tree.nodes_along(outcome.new_tokens)))
                rows = len(proposal.nodes)
            record.add(accepted, rows)
            arm.shared.add(accepted, rows)
            if proposal.on_trial:
                spent = self._draft_s + market.row_price * (plan.num_nodes if taken else 0) / market.tokens_per_s
                won = accepted / market.tokens_per_s if taken else 0.0
                arm.trials_s = max(0.0, arm.trials_s + spent - won)
            expected, expected_rows = arm.expected(record)
            price = market.row_price * expected_rows + MARGIN * market.tokens_per_s * (arm.step_s or 0.0)
            record.pays = expected > price
            record.next_trial = step if record.pays or not arm.is_steady else step + PAUSE
        if plan.chosen is None:
            self._wake[request_id] = min(
                step + LONGEST_SLEEP, *(self._next_call(arm, own, step) for arm in self._arms)
            )

    def _own(self, request_id: str) -> dict[_Arm, _OwnRecord]:
        return self._records.setdefault(request_id, {})
