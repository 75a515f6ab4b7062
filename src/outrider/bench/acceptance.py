"""How many tokens a step each drafter brings at the same number of draft nodes, over several kinds of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.bench.predict import PAIR_RATES, SIBLING_SHARES
from outrider.bench.runner import OutriderContender, Sample
from outrider.bench.speculation import by_depth_and_rank
from outrider.config import DraftModelConfig, JacobiConfig, LookaheadConfig, NoDrafterConfig, drafter_config
from outrider.llm import LLM
from outrider.sampling.params import SamplingParams
from outrider.verification.descriptions import RULE_DESCRIPTIONS

LONGEST_PATH = 32  # of a draft model whose depth is left open


@dataclass(frozen=True)
class AcceptanceRow:
    """One drafter with one budget under one rule on one workload.

    Attributes:
        spec: of the drafter, as it ran.
        budget: the most draft tokens of a step.
        acceptance_length: tokens per verification, the bonus token included.
        draft_tokens_per_step: draft tokens verified, of the budget.
        draft_ms: in the drafter, per step and request.
        num_equal: outputs that are plain decoding's; None under a rule that gives another sample.
        levels: what each level of a hierarchy was asked, answered, drafted and had accepted; None for other drafters.
    """

    workload: str
    rule: str
    temperature: float
    drafter: str
    spec: Mapping[str, Any]
    budget: int
    acceptance_length: float
    draft_tokens_per_step: float
    draft_ms: float
    num_steps: int
    num_tokens: int
    num_equal: int | None
    num_outputs: int
    levels: Sequence[Mapping[str, Any]] | None = None

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def with_budget(spec: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """A drafter's specification with `budget` draft tokens at most.

    A draft model's depth and branching, which could keep it from using them, follow the budget where the
    specification leaves them open.

    Raises:
        ConfigError: the drafter refuses that budget.
    """
    config = drafter_config(spec)
    settings: dict[str, Any] = {"max_nodes": budget}
    given, depth = dict(spec), min(budget, LONGEST_PATH)
    match config:
        case NoDrafterConfig():
            return given
        case JacobiConfig():
            settings = {"block_size": budget}
        case LookaheadConfig():
            settings = _lookahead_settings(budget)
        case DraftModelConfig(growth="mcsd" | "rsd_c"):
            # Two chains, as in `GROWTH_SETTINGS`; of fewer than two nodes one.
            following = {"depth": depth, "branching": [min(2, budget), *[1] * (min(depth, budget // 2) - 1)]}
            given = {**following, **given}
        case DraftModelConfig():
            given = {"depth": depth, **given}
    made = {**given, **settings}
    drafter_config(made)
    return made


def _lookahead_settings(budget: int) -> dict[str, int]:
    """The longest n-grams of which window and guesses, equally many (the paper's choice), fit into the budget.

    ``guesses * (ngram - 1)`` nodes and ``window * (ngram - 1) - 1``. On held-out code longer n-grams brought more
    tokens a step than more of them did, up to 16 nodes.
    """
    columns = max(1, budget // 16)
    return {"window": columns, "guesses": columns, "ngram": 1 + (budget + 1) // (2 * columns)}


# How a draft model's trees grow, beside the budget. Two paths side by side did better than three or four, with 8
# nodes and with 16; shapes that are constant by definition do not end where the draft is not confident.
GROWTH_SETTINGS: dict[str, dict[str, Any]] = {
    "beam": {"width": 2},
    "mcsd": {"min_path_prob": 0.0},
    "mcsd_improved": {"width": 2},
    "rsd_c": {"min_path_prob": 0.0},
    "rsd_s": {"width": 2, "min_path_prob": 0.0},
    "static": {
        "min_path_prob": 0.0,
        "rank_probs": [[round(p, 3) for p in row] for row in by_depth_and_rank(PAIR_RATES, SIBLING_SHARES)],
    },
}


def growth_specs(growths: Sequence[str], spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A draft model's specification for each growth, by "draft_model" and its name; what `spec` says goes first."""
    return {f"{spec['method']} {name}": {**GROWTH_SETTINGS.get(name, {}), **spec, "growth": name} for name in growths}


@dataclass
class AcceptanceRuns:
    """Runs of drafters over workloads.

    Args:
        llm: plain decoding over the target, without prefix caching.
        specs: a specification a drafter, by name.
        budgets: of draft tokens a step.
        max_tokens: of each output.
        seed: of every prompt.
    """

    llm: LLM
    specs: Mapping[str, Mapping[str, Any]]
    budgets: Sequence[int]
    max_tokens: int
    seed: int
    batch_size: int = 1
    rows: list[AcceptanceRow] = field(default_factory=list)

    def contenders(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Name, budget and specification of all that is run."""
        return [
            (name, budget, with_budget(spec, budget)) for name, spec in self.specs.items() for budget in self.budgets
        ]

    def run(
        self,
        workload: str,
        prompts: Sequence[list[int]],
        temperature: float,
        rules: Sequence[str],
        on_start: Callable[[str], None],
    ) -> None:
        """Run one workload; `rows` grows as the runs end, so that an interruption leaves the finished ones.

        Args:
            on_start: called with the name of each run before it starts; once for plain decoding.
        """
        params = SamplingParams(temperature=temperature, max_tokens=self.max_tokens, seed=self.seed)
        on_start(f"{workload}: plain")
        plain, _ = self._decode({"method": "none"}, "coupled", params, prompts)
        for rule in rules:
            exact = params.greedy or RULE_DESCRIPTIONS[rule].exactness == "sample"
            for name, budget, spec in self.contenders():
                on_start(f"{workload}: {name} with {budget}")
                sample, levels = self._decode(spec, rule, params, prompts)
                where = {"workload": workload, "rule": rule, "temperature": temperature, "levels": levels}
                where |= {"drafter": name, "spec": spec, "budget": budget}
                self.rows.append(_row(where, sample, plain if exact else None))

    def _decode(
        self, spec: Mapping[str, Any], rule: str, params: SamplingParams, prompts: Sequence[list[int]]
    ) -> tuple[Sample, list[dict[str, Any]] | None]:
        base = self.llm if rule == self.llm.config.verification else self.llm.with_decoding("none", verification=rule)
        contender = _Contender("", base, spec, params, self.batch_size)
        contender.prepare()
        before = contender.levels()
        sample = contender.run(prompts)
        after = contender.levels()
        return sample, None if before is None or after is None else list(map(_since, before, after))


class _Contender(OutriderContender):
    """One whose drafter may count by levels."""

    def levels(self) -> list[dict[str, Any]] | None:
        """Counts of every level so far, the warm-up's too; None for a drafter without any."""
        statistics = getattr(self._llm.engine.drafter, "statistics", None)
        return None if statistics is None else [dataclasses.asdict(level) for level in statistics]


def _since(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value - before[key] if key.startswith("num_") else value for key, value in after.items()}


def _row(where: Mapping[str, Any], sample: Sample, plain: Sample | None) -> AcceptanceRow:
    stats = sample.stats
    assert stats is not None, "our own engine has statistics"
    equal = None
    if plain is not None:
        equal = sum(ours == theirs for ours, theirs in zip(sample.token_ids, plain.token_ids, strict=True))
    num_steps = max(1, stats.num_verifications)
    return AcceptanceRow(
        **where,
        acceptance_length=stats.acceptance_length,
        draft_tokens_per_step=stats.num_draft_tokens / num_steps,
        draft_ms=1e3 * stats.draft_s / num_steps,
        num_steps=stats.num_verifications,
        num_tokens=sample.num_tokens,
        num_equal=equal,
        num_outputs=len(sample.token_ids),
    )
