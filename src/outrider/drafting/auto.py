"""The planner: each step the drafter and the tree that pay, and plain decoding where none does.

Drafters are asked in two rounds. Those that cost next to nothing always propose, and their proposals are weighed by
what their confidences have been worth. The others (a draft model) are asked where their record promises more than
that, or on trial. Of each request's proposals the best is taken, and over all of them the nodes that are worth their
rows. What a row and a draft cost is measured as the steps run.

Never slower is a matter of accounts, one a drafter, in plain steps. A share of all steps is paid in, and what its
draft tokens win; paid out is all that it costs: the first reading of a prompt, observing, forgetting and planning
included. Who has nothing left is not asked, whatever it promises (conservative bandits, Wu et al., arXiv 1602.04282).
While no one is to be asked for a request, it sleeps, and its steps cost what plain ones do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from outrider.config import AutoConfig
from outrider.drafting.acceptance import AcceptanceEstimator
from outrider.drafting.arms import Arm, OwnRecord
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, FinishedText
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.knowledge import Knowledge
from outrider.drafting.planner import choose_nodes
from outrider.token_tree import TokenTree

NEARLY_FREE = 0.008  # of a token: what all drafters of the first round together may cost a request's step
MARGIN = 1.3  # times its price a row or a draft must promise: what looks best is what is overrated
ROW_STEP = 4  # rows over which the price of one more is taken
PAUSE = 4  # steps of a request, at least, between proposals of a drafter that does not pay
# Of the time: what proposals of drafters that do not pay may take while their accounts are full, those for requests
# that never had one, whose texts are yet to be read, and all others each.
TRIAL_SHARE = 0.01
LONGEST_SLEEP = 256
FIRST_CREDIT = 1.0  # plain steps that all drafters together may cost before any has passed


@dataclass(eq=False)
class _Proposal:
    """A tree on offer for a request.

    Attributes:
        probs: ``[num_nodes]`` of reaching each node; None for a tree that must stay whole.
        nodes: draft tokens that are worth their rows.
        worth: expected accepted tokens, less what these rows cost.
        seconds: that drafting took.
    """

    arm: Arm
    tree: TokenTree
    probs: list[float] | None
    nodes: range | list[int]
    worth: float
    seconds: float = 0.0
    on_trial: bool = False


@dataclass(eq=False)
class _Planned:
    """What a request got in the step under way."""

    chosen: _Proposal | None = None
    num_nodes: int = 0
    proposals: list[_Proposal] = field(default_factory=list)

    def has(self, arm: Arm) -> bool:
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
            Arm(name if names.count(name) == 1 else f"{name}-{names[:index].count(name) + 1}", drafter)
            for index, (name, drafter) in enumerate(zip(names, drafters, strict=True))
        ]
        self.max_nodes = max((min(config.max_nodes, drafter.max_nodes) for drafter in drafters), default=0)
        self.returns_probs = any(drafter.returns_probs for drafter in drafters)
        self.reads_logits = False
        self.num_without_room = 0
        self._acceptance = AcceptanceEstimator()
        self._records: dict[str, dict[Arm, OwnRecord]] = {}
        self._step, self._settled_step = 0, 0
        self._solvent_from = 0  # the step before which no drafter can pay
        self._wake: dict[str, int] = {}  # the step before which no drafter need be asked for a request
        self._tokens, self._seconds = 0.0, 0.0  # of recent steps, the older ones worth less
        self._planned: dict[str, _Planned] = {}
        self._first_round: list[Arm] = []
        self._market: _Market | None = None
        self._draft_s, self._forward_start, self._num_step_rows = 0.0, 0.0, 0
        self._drafters_s = 0.0  # of the step under way, in drafters
        self.num_chosen = {arm.name: 0 for arm in self._arms}
        for arm in self._arms:
            arm.credit = FIRST_CREDIT / len(self._arms)
        self.knowledge = Knowledge(self._arms, self._acceptance)

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        self._step += 1
        self.reads_logits, self.num_without_room = False, 0
        self._market = None  # a step that failed left its own
        trees = [TokenTree.root_only(context.token_ids[-1]) for context in contexts]
        if self._step < self._solvent_from:
            return trees
        start = self.clock()
        awake = [
            index for index, context in enumerate(contexts) if self._wake.get(context.request_id, 0) <= self._step
        ]
        if not awake:  # nothing pays for any of them, and nothing is due for a trial
            return trees
        self._drafters_s = 0.0
        market = self._market = self._prices(contexts)
        watched = [contexts[index] for index in awake]
        self._planned = {context.request_id: _Planned() for context in watched}
        self._collect([c for c in contexts if c.max_nodes > 0 and c.max_depth > 0], market)
        for index, tree in zip(awake, self._allot(watched, market), strict=True):
            trees[index] = tree
        self._num_step_rows = market.num_rows + sum(tree.num_nodes - 1 for tree in trees)
        self.reads_logits = any(arm.drafter.reads_logits for arm in self._asked())
        self._forward_start = self.clock()
        self._draft_s = self._forward_start - start
        return trees

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        market = self._market
        if market is None:
            return  # all sleep
        self._market, now = None, self.clock()
        self._learn_prices(market, now - self._forward_start, sum(len(outcome.new_tokens) for outcome in outcomes))
        for outcome in outcomes:
            self._learn(outcome, market)
        asked = self._asked()
        for arm in asked:
            self._show(arm, outcomes)
        self._settle(asked, market, self._draft_s + self.clock() - now)
        for outcome in outcomes:
            plan = self._planned.get(outcome.request_id)
            if plan is not None and plan.chosen is None:
                own = self._own(outcome.request_id)
                calls = (self._next_call(arm, own) for arm in self._arms)
                self._wake[outcome.request_id] = min(self._step + LONGEST_SLEEP, *calls)

    def _asked(self) -> list[Arm]:
        """The drafters that have proposed in the step under way."""
        asked = {id(proposal.arm) for plan in self._planned.values() for proposal in plan.proposals}
        return [arm for arm in self._arms if id(arm) in asked]

    def _show(self, arm: Arm, outcomes: Sequence[DraftOutcome]) -> None:
        """Have a drafter observe what became of its own proposals."""
        outcomes = [o for o in outcomes if (plan := self._planned.get(o.request_id)) and plan.has(arm)]
        if not outcomes:
            return
        start = self.clock()
        arm.drafter.observe(outcomes)
        seconds = self._charge(arm, self.clock() - start)
        arm.observe_s += 0.1 * (seconds / len(outcomes) - arm.observe_s)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        asked = self._records.pop(request_id, {})
        for arm in self._arms:
            start = self.clock()
            # Reading a text is work too: for who has proposed for it, or can pay.
            arm.drafter.release(request_id, finished if arm in asked or arm.credit > 0.0 else None)
            arm.spent_s += self.clock() - start
        self._acceptance.release(request_id)
        self._wake.pop(request_id, None)

    def check_integrity(self) -> None:
        for arm in self._arms:
            check = getattr(arm.drafter, "check_integrity", None)
            if check is not None:
                check()

    def _charge(self, arm: Arm, seconds: float) -> float:
        arm.spent_s += seconds
        self._drafters_s += seconds
        return seconds

    def _settle(self, asked: Sequence[Arm], market: _Market, own_s: float) -> None:
        """Pay into all accounts, and out of them what the step has cost beyond a plain one.

        Args:
            asked: who was; they share the time of planning and what rows took.
            own_s: seconds of drafting, observing and planning.
        """
        plain_s = self._cost.seconds(market.num_sequences, market.context, market.num_sequences)
        num_drafted = self._num_step_rows - market.num_rows
        rows_s = self._forward_s(market, self._num_step_rows) - self._forward_s(market, market.num_rows)
        for plan in self._planned.values():
            if plan.num_nodes and plan.chosen is not None:
                plan.chosen.arm.spent_s += rows_s * plan.num_nodes / num_drafted
        planning_s = max(0.0, own_s - self._drafters_s)
        paid_in = self._config.exploration * (self._step - self._settled_step) / len(self._arms)
        self._settled_step = self._step
        for arm in self._arms:
            if arm in asked:
                arm.spent_s += planning_s / len(asked)
            arm.settle(paid_in, plain_s, market.num_sequences)
        self._solvent_from = min(map(self._can_pay_from, self._arms))

    def _collect(self, contexts: Sequence[DraftContext], market: _Market) -> None:
        """Have drafters propose: first those that cost next to nothing, then those that promise more, or are due."""
        solvent = [arm for arm in self._arms if arm.credit > 0.0]
        self._first_round = self._nearly_free(solvent, market)
        second_round = [arm for arm in solvent if arm not in self._first_round]
        awake = [context for context in contexts if context.request_id in self._planned]
        for arm in self._first_round:
            self._ask(arm, [context for context in awake if self._is_due(arm, context.request_id)], market)
        asked: dict[Arm, list[DraftContext]] = {}
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
        tokens_per_s = max(
            num / self._cost.seconds(num, context, num), self._tokens / self._seconds if self._seconds else 0.0
        )
        marginal = self._cost.seconds(num_rows + ROW_STEP, context, num) - self._cost.seconds(num_rows, context, num)
        price = MARGIN * tokens_per_s * max(0.0, marginal) / ROW_STEP
        return _Market(num_rows, num, context, tokens_per_s, price)

    def _forward_s(self, market: _Market, num_rows: float) -> float:
        return self._cost.seconds(num_rows, market.context, market.num_sequences)

    def _nearly_free(self, arms: Sequence[Arm], market: _Market) -> list[Arm]:
        """Drafters that may propose whatever their record says, the cheapest first."""
        found, spent = [], 0.0
        for arm in sorted((arm for arm in arms if arm.step_s is not None), key=lambda arm: arm.step_s or 0.0):
            spent += market.tokens_per_s * (arm.step_s or 0.0)
            if spent > NEARLY_FREE:
                break
            found.append(arm)
        return found

    def _ask(self, arm: Arm, contexts: Sequence[DraftContext], market: _Market, *, on_trial: bool = False) -> None:
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
        seconds = self._charge(arm, self.clock() - start) / len(contexts)
        self.num_without_room += arm.drafter.num_without_room
        steady = all(arm in self._own(context.request_id) for context in contexts)
        arm.measured(seconds, sum(tree.num_nodes - 1 for tree in trees) // len(trees), steady=steady)
        for context, tree in zip(contexts, trees, strict=True):
            proposal = self._weigh(arm, context.request_id, tree, market)
            proposal.seconds, proposal.on_trial = seconds, on_trial
            self._planned[context.request_id].proposals.append(proposal)

    def _weigh(self, arm: Arm, request_id: str, tree: TokenTree, market: _Market) -> _Proposal:
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

    def _most_promising(self, request_id: str, arms: Sequence[Arm], market: _Market) -> Arm | None:
        """The drafter whose record promises a request most, and more than what is on the table."""
        best, best_worth = None, self._best_worth(request_id)
        own = self._own(request_id)
        for arm in arms:
            if arm.shared.num_trials and arm.step_s is not None:
                worth = self._promise(arm, own.get(arm), market)
                if worth > best_worth:
                    best, best_worth = arm, worth
        return best

    def _try_out(self, arms: Sequence[Arm], contexts: Sequence[DraftContext], market: _Market) -> None:
        """Let every drafter propose once more, to the request that may gain most by it.

        That is one which knows little of the drafter and has little without it. If it sleeps, it is woken for the
        next step, or those that are awake, because something else pays for them, would use the account up.
        """
        tried = set[str]()
        for arm in arms:
            due = [c for c in contexts if c.request_id not in tried and self._is_due(arm, c.request_id)]
            if not due:
                continue
            context = min(due, key=lambda context: self._knowledge(arm, context.request_id))
            tried.add(context.request_id)
            if context.request_id in self._planned:
                self._ask(arm, [context], market, on_trial=True)
            else:
                self._wake[context.request_id] = 0

    def _is_due(self, arm: Arm, request_id: str) -> bool:
        if self._step < self._next_trial(arm, self._own(request_id)):
            return False
        plan = self._planned.get(request_id)
        return plan is None or not plan.has(arm)

    def _knowledge(self, arm: Arm, request_id: str) -> float:
        """What a request knows of a drafter, in trials, times the tokens that it gets without it."""
        record = self._own(request_id).get(arm)
        return (1 + (record.num_trials if record is not None else 0)) * (1.0 + self._best_worth(request_id))

    def _best_worth(self, request_id: str) -> float:
        plan = self._planned.get(request_id)
        return max((p.worth for p in plan.proposals), default=0.0) if plan is not None else 0.0

    def _next_call(self, arm: Arm, own: Mapping[Arm, OwnRecord]) -> int:
        """The step in which an arm is to be asked again for a request, as far as is known now."""
        return max(self._can_pay_from(arm), self._next_trial(arm, own))

    @staticmethod
    def _next_trial(arm: Arm, own: Mapping[Arm, OwnRecord]) -> int:
        record = own.get(arm)
        return arm.next_newcomer if record is None else record.next_trial

    def _can_pay_from(self, arm: Arm) -> int:
        """The step from which on an arm has something in its account, as far as is known now."""
        if arm.credit > 0.0:
            return self._step
        paid_in = self._config.exploration / len(self._arms)
        return self._step + (min(LONGEST_SLEEP, int(-arm.credit / paid_in) + 1) if paid_in else LONGEST_SLEEP)

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
        self._tokens, self._seconds = 0.95 * self._tokens + num_tokens, 0.95 * self._seconds + seconds

    def _learn(self, outcome: DraftOutcome, market: _Market) -> None:
        request_id = outcome.request_id
        plan = self._planned.get(request_id)
        if plan is None:
            return
        own = self._own(request_id)
        for proposal in plan.proposals:
            arm, taken = proposal.arm, proposal is plan.chosen
            self._acceptance.observe(arm.name, request_id, proposal.tree, outcome.new_tokens)
            record = own.setdefault(arm, OwnRecord())
            if taken:
                accepted, rows = len(outcome.path.accepted_nodes), plan.num_nodes
                arm.won += accepted
            else:  # it counts with what it would have come to, as far as is known
                accepted = len(set(proposal.nodes).intersection(proposal.tree.nodes_along(outcome.new_tokens)))
                rows = len(proposal.nodes)
            record.add(accepted, rows)
            arm.shared.add(accepted, rows)
            record.pays = self._promise(arm, record, market) > 0.0
            waits = arm.is_steady and not record.pays
            record.next_trial = self._step + (max(PAUSE, self._pause(arm.step_s or 0.0, market)) if waits else 0)
            if arm.is_steady and record.num_trials == 1 and self._promise(arm, None, market) <= 0.0:
                pause = self._pause(proposal.seconds, market) // market.num_sequences
                arm.next_newcomer = max(arm.next_newcomer, self._step) + pause

    def _promise(self, arm: Arm, own: OwnRecord | None, market: _Market) -> float:
        """What a drafter's record says that a proposal wins, in tokens, less what drafting and rows cost."""
        accepted, rows = arm.expected(own)
        return accepted - market.row_price * rows - MARGIN * market.tokens_per_s * (arm.step_s or 0.0)

    def _pause(self, seconds: float, market: _Market) -> int:
        """Steps of a request in which a proposal that does not pay takes no more than its share of the time."""
        return int(seconds * market.tokens_per_s * len(self._arms) / TRIAL_SHARE)

    def _own(self, request_id: str) -> dict[Arm, OwnRecord]:
        return self._records.setdefault(request_id, {})
