"""Predicting what speculation brings on a machine that is not at hand: roofline figures and assumed acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from outrider.bench.hardware import Hardware
from outrider.bench.roofline import ModelFigures, forward_seconds
from outrider.bench.speculation import (
    BATCHES,
    LARGEST_BATCH,
    WORTH_IT,
    Draftings,
    Plan,
    break_even,
    by_depth_and_rank,
    width_of,
)
from outrider.errors import ConfigError

# The bundled pair on 24 pieces of held-out code, greedy, up to 96 tokens each. Pairs: how often the draft token of
# each depth was the target's choice once its parent was, of chains of 12 without a threshold. Siblings: which part of
# the first token's misses the second, third and fourth candidates were (teacher-forced, 2,304 positions). Lookup:
# chains of 12 of prompt lookup with one candidate.
PAIR_RATES = (0.825, 0.822, 0.85, 0.853, 0.937, 0.926, 0.927, 0.907)
SIBLING_SHARES = (0.63, 0.144, 0.045)
LOOKUP_RATES = (0.466, 0.796, 0.865, 0.883, 0.911, 0.91, 0.939, 0.951)
LOOKUP_S = 0.3e-3  # the most that a training-free drafter of ours may take a step and request
MAX_DEPTH, MAX_NODES = 16, 64


@dataclass(frozen=True)
class Drafting:
    """One way to draft, with what it is assumed to be worth.

    Attributes:
        model: of the draft; None for lookup in the text.
        rates: acceptance by depth; no draft is longer.
        tree: whether the draft's other candidates may stand beside the likeliest.
        path: of the draft model; None where only its size is known.
    """

    name: str
    method: str
    model: ModelFigures | None
    rates: Sequence[float]
    tree: bool = False
    path: str | None = None

    @property
    def acceptance(self) -> list[tuple[float, ...]]:
        """By depth and rank."""
        return by_depth_and_rank(self.rates, SIBLING_SHARES if self.tree else ())


@dataclass(frozen=True)
class Prediction:
    """What one way to draft is expected to come to.

    Attributes:
        plans: of each batch size of BATCHES.
        width: the most draft tokens of one depth, at batch size 1.
        break_even_batch: from which on plain decoding is as good; None if speculation pays in all that was examined.
    """

    drafting: Drafting
    plans: list[Plan]
    width: int
    break_even_batch: int | None

    @property
    def speedup(self) -> float:
        return self.plans[0].speedup

    @property
    def pays(self) -> bool:
        return self.speedup >= WORTH_IT

    def spec(self) -> dict[str, Any]:
        """The drafter's settings for one sequence."""
        plan, draft = self.plans[0], self.drafting.model
        spec: dict[str, Any] = {"method": self.drafting.method, "depth": plan.depth, "max_nodes": plan.num_nodes}
        if draft is None:
            return {**spec, "num_candidates": self.width}
        spec = {**spec, "model": self.drafting.path or "PATH_OR_HUB_ID", "min_path_prob": 0.0}
        if self.width <= 1:
            return spec
        rows = [[min(0.999, round(p, 3)) for p in sorted(row, reverse=True)] for row in self.drafting.acceptance]
        return {**spec, "growth": "static", "rank_probs": rows}

    def record(self) -> dict[str, Any]:
        return {
            "name": self.drafting.name,
            "method": self.drafting.method,
            "draft": None if self.drafting.model is None else asdict(self.drafting.model),
            "acceptance_by_depth": list(self.drafting.rates),
            "nodes": self.plans[0].num_nodes,
            "depth": self.plans[0].depth,
            "width": self.width,
            "acceptance_length": self.plans[0].tokens_per_step,
            "tokens_per_s": self.plans[0].tokens_per_s,
            "pays": self.pays,
            "break_even_batch": self.break_even_batch,
            "examined_to_batch": LARGEST_BATCH,
            "batches": [{**asdict(plan), "tokens_per_s": plan.tokens_per_s} for plan in self.plans],
        }


def draftings(drafts: Sequence[tuple[ModelFigures, str | None]], rates: Sequence[float] | None) -> list[Drafting]:
    """Lookup, and every draft model as a chain and as a tree.

    Args:
        drafts: with their paths, None for one of which only the size is known.
        rates: acceptance by depth; None is what the bundled pair measured.
    """
    found = [Drafting("prompt lookup", "ngram", None, rates or LOOKUP_RATES)]
    for draft, path in drafts:
        for tree in (False, True):
            name = f"{draft.name}, {'tree' if tree else 'chain'}"
            found.append(Drafting(name, "draft_model", draft, rates or PAIR_RATES, tree, path))
    return found


def step_seconds(
    target: ModelFigures,
    machine: Hardware,
    drafting: Drafting | None,
    size: tuple[int, int, int],
    context: int,
) -> float:
    """Time of one step: the drafts, the target's forward over all roots and drafts, and what is neither.

    A draft model runs once for each depth, over the nodes of that depth, which are taken to be equally many.

    Args:
        size: sequences, draft tokens of each, and the depth of the draft.
    """
    batch, nodes, depth = size
    seconds = machine.step_s + forward_seconds(target, machine, batch * (1 + nodes), sequences=batch, context=context)
    if drafting is None or nodes == 0:
        return seconds
    if drafting.model is None:
        return seconds + batch * LOOKUP_S
    rows = batch * ceil(nodes / depth)
    return seconds + depth * forward_seconds(drafting.model, machine, rows, sequences=batch, context=context)


def predict(target: ModelFigures, machine: Hardware, drafting: Drafting, *, context: int) -> Prediction:
    """The best chain or tree for every batch size, and the batch from which on none pays."""
    options = Draftings(drafting.acceptance, max_nodes=MAX_NODES if drafting.tree else MAX_DEPTH, max_depth=MAX_DEPTH)

    def seconds(batch: int, nodes: int, depth: int) -> float:
        return step_seconds(target, machine, drafting, (batch, nodes, depth), context)

    plans = [options.best(batch, seconds) for batch in BATCHES]
    shape = options.shape(plans[0])
    return Prediction(
        drafting, plans, width_of(shape), break_even(lambda batch: options.best(batch, seconds).speedup)
    )


def plain_tokens_per_s(target: ModelFigures, machine: Hardware, batch: int, context: int) -> float:
    return batch / step_seconds(target, machine, None, (batch, 0, 0), context)


def assumptions(target: ModelFigures, machine: Hardware, *, context: int, rates_given: bool) -> list[str]:
    """Everything that a prediction stands on, a sentence each."""
    said = [
        f"{machine.name}: {machine.bandwidth / 1e9:.0f} GB/s, "
        + ", ".join(f"{kind} {flops / 1e12:g}" for kind, flops in machine.flops.items())
        + f" TFLOP/s dense ({machine.source}); {machine.bandwidth_efficiency:.0%} of the bandwidth and "
        f"{machine.compute_efficiency:.0%} of the arithmetic are reached",
        f"{1e3 * machine.forward_s:g} ms beside every forward's work (on a GPU: one captured graph), "
        f"{1e3 * machine.step_s:g} ms a step outside the models",
        f"{target.name}: {target.num_read / 1e9:.3g}B weights read, {target.weights} "
        f"({target.weight_bytes:g} bytes each); {target.kv_bytes / 1024:.3g} KiB of keys and values a position; "
        f"context {context} in every sequence, all of it attended to",
        "acceptance as given, the same for every drafter"
        if rates_given
        else "acceptance as the bundled pair of small models measured on code, where a lot repeats: "
        "yours will differ, so give --acceptance if you know it",
        f"siblings in trees get {SIBLING_SHARES} of what the likeliest token misses (bundled pair)",
        f"every step drafts; prompt lookup takes {1e3 * LOOKUP_S:g} ms a sequence, a draft model one forward a depth",
    ]
    if target.num_experts:
        said.append(f"rows choose among {target.num_experts} experts evenly and each on its own")
    if target.weights in ("int8", "int4"):
        said.append("integer multiplications for int4, too; outrider itself runs rounded weights on CPUs only")
    return said


def parse_acceptance(text: str | None) -> list[float] | None:
    """``0.7`` is a chain's acceptance at every depth, ``0.8,0.7,0.6`` by depth, and no draft is longer than the list.

    Raises:
        ConfigError: no probabilities.
    """
    if text is None:
        return None
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "--acceptance", got=repr(text)[:60], expected="numbers such as 0.7 or 0.8,0.7,0.6"
        ) from error
    if not all(0.0 <= rate <= 1.0 for rate in rates) or len(rates) > MAX_DEPTH:
        raise ConfigError(
            "--acceptance", got=repr(text)[:60], expected=f"probabilities in [0, 1], at most {MAX_DEPTH} of them"
        )
    return rates * MAX_DEPTH if len(rates) == 1 else rates
