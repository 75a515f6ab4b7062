"""How many tokens a step each drafter brings at the same number of draft nodes, over several kinds of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.bench.runner import OutriderContender, Sample
from outrider.config import DRAFTER_CONFIGS, drafter_config
from outrider.llm import LLM
from outrider.sampling.params import SamplingParams
from outrider.verification.descriptions import RULE_DESCRIPTIONS


@dataclass(frozen=True)
class AcceptanceRow:
    """One drafter with one budget under one rule on one workload.

    Attributes:
        budget: the most draft tokens of a step; None for a drafter that has no such setting, which takes its own.
        acceptance_length: tokens per verification, the bonus token included.
        draft_tokens_per_step: draft tokens verified, of the budget.
        draft_ms: in the drafter, per step and request.
        num_equal: outputs that are plain decoding's; None under a rule that gives another sample.
    """

    workload: str
    rule: str
    temperature: float
    drafter: str
    budget: int | None
    acceptance_length: float
    draft_tokens_per_step: float
    draft_ms: float
    num_steps: int
    num_tokens: int
    num_equal: int | None
    num_outputs: int

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def with_budget(spec: Mapping[str, Any], budget: int) -> dict[str, Any] | None:
    """A drafter's specification with `budget` draft tokens at most; None if it has no setting for that.

    Raises:
        ConfigError: the drafter refuses that budget.
    """
    fields = {field.name for field in dataclasses.fields(DRAFTER_CONFIGS[spec["method"]])}
    if "max_nodes" not in fields:
        return None
    budgeted = {**spec, "max_nodes": budget}
    drafter_config(budgeted)
    return budgeted


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

    def contenders(self) -> list[tuple[str, int | None, dict[str, Any]]]:
        """Name, budget and specification of all that is run."""
        found: list[tuple[str, int | None, dict[str, Any]]] = []
        for name, spec in self.specs.items():
            budgeted = [(budget, with_budget(spec, budget)) for budget in self.budgets]
            if budgeted[0][1] is None:
                found.append((name, None, dict(spec)))
            else:
                found += [(name, budget, made) for budget, made in budgeted if made is not None]
        return found

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
        plain = self._decode({"method": "none"}, "coupled", params, prompts)
        for rule in rules:
            exact = params.greedy or RULE_DESCRIPTIONS[rule].exactness == "sample"
            for name, budget, spec in self.contenders():
                on_start(f"{workload}: {name}" + ("" if budget is None else f" with {budget}"))
                sample = self._decode(spec, rule, params, prompts)
                where = {"workload": workload, "rule": rule, "temperature": temperature}
                self.rows.append(_row({**where, "drafter": name, "budget": budget}, sample, plain if exact else None))

    def _decode(
        self, spec: Mapping[str, Any], rule: str, params: SamplingParams, prompts: Sequence[list[int]]
    ) -> Sample:
        base = self.llm if rule == self.llm.config.verification else self.llm.with_decoding("none", verification=rule)
        contender = OutriderContender("", base, spec, params, self.batch_size)
        contender.prepare()
        return contender.run(prompts)


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
