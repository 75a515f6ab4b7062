"""Advice from measurements: which drafter decodes a workload fastest here, how sure that is, up to which batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from outrider.bench.report import summarise
from outrider.bench.runner import PLAIN, Contender, Results, Sample, run_rounds
from outrider.bench.speculation import BATCHES, WORTH_IT, Plan, break_even
from outrider.config import DRAFTER_CONFIGS, DraftModelConfig, drafter_config
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.stats import EngineStats
from outrider.errors import VocabularyMismatchError
from outrider.llm import LLM

WANTED_ROUNDS, MAX_ROUNDS = 5, 20
LEAST_PROMPTS, LEAST_TOKENS = 4, 16  # however little time there is
LEVEL = 0.95
BATCH, BATCH_SHARE = 8, 0.2  # sequences that run together as a check, and its share of the time
BATCH_PROMPTS = 2 * BATCH  # the next one begins where one ends, so that the batch is mostly full
PREFILL_ROWS = 64
TREE = {"growth": "opt_tree", "max_nodes": 24, "depth": 8}
# What the planner chooses from by default, and draft models beside it; it cuts trees itself.
PLANNED_LOOKUPS = ({"method": "suffix", "max_nodes": 24}, {"method": "recycling", "max_nodes": 24})
PLANNED_DRAFT = {"depth": 16, "max_nodes": 24, "min_path_prob": 0.0, "growth": "specexec", "max_expanded": 3}


def candidates(llm: LLM, drafts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Drafter specifications to try, by name: lookup, recycling, each draft model as a chain and a tree, the planner.

    The planner is the engine's default, with the draft model if there is one, and with all if there are several. A
    draft with another vocabulary is tried as a universal draft.

    Args:
        drafts: paths of draft models; for the bundled model without any its own draft.

    Raises:
        OutriderError: a draft that cannot be loaded.
    """
    found: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("ngram", "suffix", "recycling")}
    models: list[dict[str, Any]] = [_usable_draft(llm, path) for path in drafts]
    names = [Path(path).name for path in drafts]
    if not drafts and llm.config.model is None:
        models, names = [{"method": "draft_model"}], ["bundled draft"]
    for index, (name, spec) in enumerate(zip(names, models, strict=True)):
        label = name if names.count(name) == 1 else f"{name} {index + 1}"
        found[f"{label}, chain"] = spec
        found[f"{label}, tree"] = {**spec, **TREE}
    return {**found, "auto": _planner(models)}


def _planner(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As a user asks for it: without drafters as long as its default has those models."""
    auto: dict[str, Any] = {"method": "auto"}
    if not models or models == [{"method": "draft_model"}]:  # the bundled model's own draft belongs to the default
        return auto
    if len(models) == 1 and models[0]["method"] == "draft_model":
        return {**auto, "draft_model": models[0]["model"]}
    return {**auto, "drafters": [*PLANNED_LOOKUPS, *({**spec, **PLANNED_DRAFT} for spec in models)]}


def _usable_draft(llm: LLM, path: str) -> dict[str, Any]:
    """Loaded once before anything runs, so that what is wrong with it is said now."""
    spec = {"method": "draft_model", "model": path}
    try:
        llm.with_decoding(spec)
    except VocabularyMismatchError:
        spec["method"] = "universal_draft"
        llm.with_decoding(spec)
    return spec


def fit_to_time(
    prompts: Sequence[list[int]], max_tokens: int, cost: ForwardCost, *, num_contenders: int, seconds: float
) -> tuple[list[list[int]], int]:
    """The first prompts that every contender can run WANTED_ROUNDS times.

    Drafts fare differently on every prompt, so outputs become shorter, and rounds fewer, before LEAST_PROMPTS do.

    Returns:
        Prompts, and the most tokens to generate for each.
    """
    a_run = (1.0 - BATCH_SHARE) * seconds / (WANTED_ROUNDS * num_contenders)
    least = min(LEAST_PROMPTS, len(prompts))
    times = [cost.seconds(PREFILL_ROWS, 0) * len(prompt) / PREFILL_ROWS for prompt in prompts]
    token = cost.seconds(1, len(prompts[0]) + max_tokens)
    affordable = int((a_run - sum(times[:least])) / (least * token))
    max_tokens = min(max_tokens, max(LEAST_TOKENS, affordable))
    totals = accumulate(prefill + max_tokens * token for prefill in times)
    return list(prompts[: max(least, sum(total <= a_run for total in totals))]), max_tokens


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[list[int]],
    seconds: float,
    results: Results,
    on_start: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Rounds in which every contender runs once, as long as one more fits into the time; at least one."""
    starts: list[float] = []

    def one_more_fits() -> bool:
        starts.append(clock())
        longest = max((b - a for a, b in pairwise(starts)), default=0.0)
        return len(starts) == 1 or starts[-1] - starts[0] + longest <= seconds

    run_rounds(contenders, prompts, MAX_ROUNDS, results, on_start, keep_going=one_more_fits)


@dataclass(frozen=True)
class Interval:
    """A median and where the true one is.

    Attributes:
        low, high: between which it is with probability `coverage`; of a single value they say nothing: 0.
    """

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The narrowest pair of order statistics that covers the true median with probability `level`, or else the range.

    Whatever the distribution, the k-th smallest and the k-th largest of n values miss the median with probability
    ``2 * P(Binomial(n, 1/2) < k)``.
    """
    ordered, n = sorted(values), len(values)
    k, coverage = 1, 1.0 - 2.0 ** (1 - n)
    while k < (n + 1) // 2:
        narrower = 1.0 - 2.0 * sum(comb(n, i) for i in range(k + 1)) / 2.0**n
        if narrower < level:
            break
        k, coverage = k + 1, narrower
    return Interval(median(ordered), ordered[k - 1], ordered[n - k], coverage)


@dataclass(frozen=True)
class Profile:
    """What a drafter does in a step of one request, as measured.

    Attributes:
        drafted: share of steps with draft tokens.
        nodes: draft tokens in such a step.
        accepted: ``[depth]`` how often a draft token of each depth is accepted, of all steps.
        draft_s: seconds of drafting in a step.
        rest_s: seconds of a step beside drafting and a forward of the measured cost: the engine, and a share of
            reading the prompt.
        runs_model: whether drafting is forwards of a model, which many requests share.
    """

    drafted: float
    nodes: float
    accepted: tuple[float, ...]
    draft_s: float
    rest_s: float
    runs_model: bool = False

    @staticmethod
    def of(runs: Sequence[EngineStats], here: Conditions, *, runs_model: bool) -> Profile:
        num_verifications = max(1, sum(stats.num_verifications for stats in runs))
        num_drafts = sum(stats.num_drafts for stats in runs)
        depth = max((len(stats.accepted_at_depth) for stats in runs), default=0)
        forward_s = here.forward_s(1 + sum(stats.num_draft_tokens for stats in runs) / num_verifications, 1)
        return Profile(
            num_drafts / num_verifications,
            sum(stats.num_draft_tokens for stats in runs) / max(1, num_drafts),
            tuple(
                sum(stats.accepted_at_depth[d] for stats in runs if d < len(stats.accepted_at_depth))
                / num_verifications
                for d in range(depth)
            ),
            median(stats.draft_s / max(1, stats.num_verifications) for stats in runs),
            median((stats.step_s - stats.draft_s) / max(1, stats.num_steps) for stats in runs) - forward_s,
            runs_model,
        )

    def plan(self, batch_size: int, here: Conditions) -> Plan:
        """Its expected speed in a batch, with drafts cut to the depth that is best there.

        Cutting is taken to remove as many nodes at every depth. Sequences are taken to share a model's draft forwards
        as they share the target's; lookups, and what else a step with drafts takes longer, to add up.
        """
        return max(
            (self.cut_to(depth, batch_size, here) for depth in range(1, self.depth + 1)),
            key=lambda plan: plan.speedup,
        )

    @property
    def depth(self) -> int:
        return max(1, len(self.accepted))

    def cut_to(self, depth: int, batch_size: int, here: Conditions) -> Plan:
        """Likewise with drafts of one depth, of which `self.depth` is as it ran."""
        plain_s = here.plain_s(batch_size)
        one, all_ = here.forward_s(1, 1), here.forward_s(batch_size, batch_size)
        rest_s = here.rest_s(batch_size) + batch_size * max(0.0, self.rest_s - here.rest_s(1))
        nodes = self.drafted * min(self.nodes, depth * max(1.0, self.nodes / self.depth))
        drafting = self.draft_s * (all_ / one * depth / self.depth if self.runs_model else batch_size)
        step_s = here.forward_s(batch_size * (1 + nodes), batch_size) + drafting + rest_s
        tokens = 1.0 + sum(self.accepted[:depth])
        return Plan(batch_size, nodes, depth, tokens, step_s, tokens * plain_s / step_s)


@dataclass(frozen=True)
class Conditions:
    """What decoding costs here beside drafts.

    Attributes:
        cost: of forwards.
        context: positions of a sequence.
        rest: seconds of a plain step of one sequence beside its forward.
        rest_each: likewise of each further sequence; that its row joins others' in a forward is in it.
    """

    cost: ForwardCost
    context: float
    rest: float = 0.0
    rest_each: float = 0.0

    def forward_s(self, num_rows: float, batch_size: int) -> float:
        return self.cost.seconds(num_rows, self.context, batch_size)

    def plain_s(self, batch_size: int) -> float:
        """Of a step without drafts."""
        return self.forward_s(batch_size, batch_size) + self.rest_s(batch_size)

    def rest_s(self, batch_size: int) -> float:
        return self.rest + (batch_size - 1) * self.rest_each

    @staticmethod
    def of(results: Results, batched: Results, cost: ForwardCost, context: float) -> Conditions:
        """From plain decoding, one sequence at a time and BATCH together (which may not have run)."""
        bare = Conditions(cost, context)
        rest, of_batch = (
            [_step_s(s.stats) - bare.forward_s(size, size) for s in runs.samples.get(PLAIN, []) if s.stats]
            for runs, size in ((results, 1), (batched, BATCH))
        )
        each = max(0.0, median(of_batch) - median(rest)) / (BATCH - 1) if of_batch else 0.0
        return Conditions(cost, context, median(rest), each)


def _step_s(stats: EngineStats) -> float:
    return stats.step_s / max(1, stats.num_steps)


def fastest(results: Results) -> str | None:
    """The drafter with the greatest speedup so far."""
    of_plain = results.samples.get(PLAIN, [])
    found = {name: _ratios(samples, of_plain) for name, samples in results.complete().items() if name != PLAIN}
    return max((name for name, ratios in found.items() if ratios), key=lambda name: median(found[name]), default=None)


def _ratios(samples: Sequence[Sample], plain: Sequence[Sample]) -> list[float]:
    return [a.tokens_per_s / b.tokens_per_s for a, b in zip(samples, plain, strict=False)]


def advice(
    results: Results,
    batched: Results,
    specs: Mapping[str, dict[str, Any]],
    cost: ForwardCost,
    *,
    context: float,
    exact: bool,
) -> dict[str, Any]:
    """What the samples say, as a JSON object; only of what has run at least once beside plain decoding.

    Args:
        batched: of plain decoding and perhaps one drafter, BATCH sequences at a time.
        exact: outputs must be plain decoding's to the last token, so a drafter of which one differs is not advised;
            otherwise ties may differ.
    """
    here = Conditions.of(results, batched, cost, context)
    found = [_found(name, specs, results, here) for name in results.complete() if name != PLAIN]
    eligible = [of for of in found if not exact or of["num_equal"] == of["num_outputs"]]
    best = max(eligible, key=lambda of: of["speedup"]["median"], default=None)
    pays = best is not None and best["speedup"]["low"] > 1.0 and best["speedup"]["median"] >= WORTH_IT
    return {
        "recommended": best["name"] if best and pays else PLAIN,
        "drafter": best["drafter"] if best and pays else {"method": "none"},
        "best": best["name"] if best else None,
        "as_good": [
            of["name"]
            for of in eligible
            if best and of is not best and of["speedup"]["high"] >= best["speedup"]["low"]
        ],
        "plain": asdict(median_interval([sample.tokens_per_s for sample in results.samples[PLAIN]])),
        "candidates": found,
        "batch_check": _batch_check(batched, results, specs, here),
    }


def _found(name: str, specs: Mapping[str, dict[str, Any]], results: Results, here: Conditions) -> dict[str, Any]:
    summary = summarise(name, results, comparable=True)
    samples, spec = results.samples[name], specs[name]
    profile = _profile(name, specs, samples, here)
    config = drafter_config(spec)
    plans = [profile.plan(size, here) for size in BATCHES]
    return {
        "name": name,
        "drafter": spec,
        "depth": getattr(config, "depth", None),
        "nodes": getattr(config, "max_nodes", None),
        "width": getattr(config, "num_candidates", getattr(config, "width", None)),
        "repeats": len(samples),
        "tokens_per_s": asdict(median_interval([sample.tokens_per_s for sample in samples])),
        "speedup": asdict(median_interval(_ratios(samples, results.samples[PLAIN]))),
        "acceptance_length": summary["acceptance_length"],
        "num_equal": summary["num_equal"],
        "num_outputs": summary["num_outputs"],
        "profile": asdict(profile),
        "batches": [{**asdict(plan), "tokens_per_s": plan.tokens_per_s} for plan in plans],
        "break_even_batch": break_even(lambda size: profile.plan(size, here).speedup, BATCHES[-1]),
        "examined_to_batch": BATCHES[-1],
    }


def _batch_check(
    batched: Results, results: Results, specs: Mapping[str, dict[str, Any]], here: Conditions
) -> dict[str, Any] | None:
    """What was expected of a batch of BATCH, beside what it did.

    Sequences with drafts end at different times, so towards the end of so short a run fewer are left than without:
    expected is what as many as ran in the mean come to, with drafts that are not cut.
    """
    name = fastest(batched)
    if name is None:
        return None
    samples, plain = batched.samples[name], batched.samples[PLAIN]
    profile = _profile(name, specs, results.samples[name], here)
    num_drafting, num_plain = _num_sequences(samples), _num_sequences(plain)
    expected = profile.cut_to(profile.depth, num_drafting, here).tokens_per_s * here.plain_s(num_plain) / num_plain
    return {
        "name": name,
        "batch_size": BATCH,
        "mean_sequences": {"plain": num_plain, "drafting": num_drafting},
        "expected_speedup": expected,
        "speedup": asdict(median_interval(_ratios(samples, plain))),
        "num_equal": batched.num_equal(name),
        "num_outputs": len(samples[0].token_ids),
    }


def _num_sequences(samples: Sequence[Sample]) -> int:
    """That a step verified, in the mean over the steps."""
    found = [sample.stats.num_verifications / max(1, sample.stats.num_steps) for sample in samples if sample.stats]
    return max(1, round(median(found)))


def _profile(
    name: str, specs: Mapping[str, Mapping[str, Any]], samples: Sequence[Sample], here: Conditions
) -> Profile:
    """The planner has all draft models of the other candidates."""
    of_planner = specs[name]["method"] == "auto"
    runs_model = any(map(_runs_model, specs.values() if of_planner else (specs[name],)))
    return Profile.of([sample.stats for sample in samples if sample.stats], here, runs_model=runs_model)


def _runs_model(spec: Mapping[str, Any]) -> bool:
    return issubclass(DRAFTER_CONFIGS[spec["method"]], DraftModelConfig)
