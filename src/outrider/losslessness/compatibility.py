"""Runs every drafter under every rule with every parameter, and records what happened: the matrix's only source.

A combination works if its output is plain decoding's (or, under a rule that is exact in distribution, one that the
target's distribution allows) and drafts were verified; without drafts it fell back; a typed error is a refusal. The
planner may decide against drafts, by what they cost on the machine: where its output is right, it works.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from outrider.config import AutoConfig, DrafterConfig, NoDrafterConfig
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, FinishedText
from outrider.errors import OutriderError
from outrider.llm import LLM, Prompt
from outrider.losslessness import matrix as m
from outrider.losslessness.explain import Divergence, explain_divergence
from outrider.losslessness.matrix import Cell, Matrix
from outrider.models.probe import CachedRun
from outrider.outputs import CompletionOutput, RequestOutput
from outrider.sampling.params import SamplingParams
from outrider.sampling.processors import RowContext, process_logits
from outrider.token_tree import TokenTree
from outrider.verification.descriptions import RULE_DESCRIPTIONS

ALONE, TOGETHER, AGAIN = "batch 1", "batch of all", "prefix hits"
SITUATIONS = (ALONE, TOGETHER, AGAIN)
LOGPROB_TOLERANCE = 1e-3


def parameter_settings(max_tokens: int, vocab_size: int, stop: str) -> dict[str, SamplingParams]:
    """One setting for each sampling parameter.

    Args:
        stop: a string that outputs are likely to have.
    """
    every_fifth = tuple(range(0, vocab_size, 5))
    variants: dict[str, dict[str, Any]] = {
        "temperature 0": {"temperature": 0.0},
        "temperature 0, penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        "temperature": {"temperature": 0.7},
        "top_k": {"top_k": 4},
        "top_p": {"top_p": 0.6},
        "min_p": {"min_p": 0.2},
        "repetition_penalty": {"repetition_penalty": 1.5},
        "presence_penalty": {"presence_penalty": 1.5},
        "frequency_penalty": {"frequency_penalty": 1.5},
        "logit_bias": {"logit_bias": {7: 4.0, 9: -100.0}},
        "min_tokens": {"min_tokens": max_tokens // 2, "stop_token_ids": every_fifth},
        # Some steps first: a request that ends with its first token has had no use for drafts.
        "stop": {"stop": (stop,), "min_tokens": max_tokens // 4},
        "stop_token_ids": {"stop_token_ids": every_fifth, "min_tokens": max_tokens // 4},
        "logprobs": {"logprobs": 3},
        "n": {"n": 3},
        "seed": {"seed": 2**64 - 5},
    }
    common = {"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True}
    return {
        name: SamplingParams(**{**common, "seed": 100 + index, **values})
        for index, (name, values) in enumerate(variants.items())
    }


class WatchedDrafter:
    """A drafter that notes whether any of its trees had branches; otherwise the drafter that it is given."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.name = drafter.name
        self.max_nodes = drafter.max_nodes
        self.returns_probs = drafter.returns_probs
        self.reads_logits = drafter.reads_logits
        self.num_without_room = 0
        self.branched = False

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        trees = self._drafter.propose(contexts)
        self.reads_logits = self._drafter.reads_logits
        self.num_without_room = self._drafter.num_without_room
        self.branched |= any(len(set(tree.parents)) < tree.num_nodes for tree in trees)
        return trees

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        self._drafter.observe(outcomes)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._drafter.release(request_id, finished)


class PathRuns:
    """Runs of all drafters over one loaded target.

    Args:
        path: its name in the matrix.
        llm: with a cache whose blocks are shorter than the prompts, or none of them would hit the prefix index.
        prompts: at least two, some of whose tokens repeat, so that every drafter has something to propose.
    """

    def __init__(
        self, path: str, llm: LLM, prompts: Sequence[Sequence[int]], settings: Mapping[str, SamplingParams]
    ) -> None:
        self.path = path
        self.llm = llm
        self.prompts: list[Prompt] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        self._settings = settings
        self._plain = {name: self._plain_outputs(params) for name, params in settings.items()}
        self._branched: dict[str, bool] = {}

    @property
    def places(self) -> list[str]:
        return [f"{self.path}, {situation}" for situation in SITUATIONS]

    def plain_outputs(self, parameter: str) -> list[RequestOutput]:
        """What plain decoding gives for each prompt alone: what all runs are held against."""
        return self._plain[parameter]

    def run(self, name: str, config: DrafterConfig, rule: str) -> Iterator[Cell]:
        """Every parameter in every situation. Under the coupled rule first: others are held against its trees.

        Args:
            name: of the drafter in the matrix.
        """
        for situation, place in zip(SITUATIONS, self.places, strict=True):
            found: dict[str, list[RequestOutput] | OutriderError]
            try:
                llm = self._build(config, rule, prefix_caching=situation == AGAIN)
            except OutriderError as error:
                found = dict.fromkeys(self._settings, error)
                branched = False
            else:
                watched = llm.engine.drafter = WatchedDrafter(llm.engine.drafter)
                found = self._alone(llm) if situation == ALONE else self._together(llm, again=situation == AGAIN)
                branched = watched.branched
            if rule == "coupled":
                self._branched[f"{name} {situation}"] = branched
            lost_branches = self._branched.get(f"{name} {situation}", False) and not branched
            for parameter, result in found.items():
                outcome = self._outcome(parameter, result, config, rule, lost_branches=lost_branches)
                yield Cell(name, rule, place, parameter, outcome)

    def by_name(self, method: str) -> str:
        """What comes of asking for a method by its name alone."""
        try:
            self.llm.with_decoding(method).generate(self.prompts[0], SamplingParams(temperature=0.0, max_tokens=4))
        except OutriderError as error:
            return _refusal(error)
        return m.WORKS

    def _build(self, config: DrafterConfig, rule: str, *, prefix_caching: bool) -> LLM:
        llm = copy(self.llm)
        llm.config = dataclasses.replace(
            llm.config, cache=dataclasses.replace(llm.config.cache, prefix_caching=prefix_caching)
        )
        return llm.with_decoding(config, verification=rule)

    def _plain_outputs(self, params: SamplingParams) -> list[RequestOutput]:
        llm = self._build(NoDrafterConfig(), "coupled", prefix_caching=False)
        return [output for prompt in self.prompts for output in llm.generate(prompt, params)]

    def _alone(self, llm: LLM) -> dict[str, list[RequestOutput] | OutriderError]:
        """One prompt at a time."""
        found: dict[str, list[RequestOutput] | OutriderError] = {}
        for name, params in self._settings.items():
            try:
                found[name] = [output for prompt in self.prompts for output in llm.generate(prompt, params)]
            except OutriderError as error:
                found[name] = error
        return found

    def _together(self, llm: LLM, *, again: bool) -> dict[str, list[RequestOutput] | OutriderError]:
        """All prompts under all settings in one batch; `again` runs it twice and reports the second time."""
        found = self._refusals(llm)
        names = [name for name in self._settings if name not in found]
        if not names:
            return found
        prompts = [prompt for _ in names for prompt in self.prompts]
        params = [self._settings[name] for name in names for _ in self.prompts]
        outputs = llm.generate(prompts, params)
        if again:
            outputs = llm.generate(prompts, params)
            if not any(sample.metrics.num_cached_tokens for output in outputs for sample in output.outputs):
                raise RuntimeError("no prompt hit the prefix index: the matrix would claim what was not run")
        size = len(self.prompts)
        ran = {name: outputs[i * size : (i + 1) * size] for i, name in enumerate(names)}
        return {name: ran[name] if name in ran else found[name] for name in self._settings}

    def _refusals(self, llm: LLM) -> dict[str, list[RequestOutput] | OutriderError]:
        """Settings that a request alone is refused with: in a batch they would end the others too."""
        found: dict[str, list[RequestOutput] | OutriderError] = {}
        for name, params in self._settings.items():
            try:
                llm.generate(self.prompts[0], dataclasses.replace(params, max_tokens=max(1, params.min_tokens)))
            except OutriderError as error:
                found[name] = error
        return found

    def _outcome(
        self,
        parameter: str,
        result: list[RequestOutput] | OutriderError,
        config: DrafterConfig,
        rule: str,
        *,
        lost_branches: bool,
    ) -> str:
        if isinstance(result, OutriderError):
            return _refusal(result)
        params = self._settings[parameter]
        exact = params.greedy or RULE_DESCRIPTIONS[rule].exactness == "sample"
        samples = [
            (plain.prompt_token_ids, expected, got)
            for plain, output in zip(self._plain[parameter], result, strict=True)
            for expected, got in zip(plain.outputs, output.outputs, strict=True)
        ]
        for prompt, expected, got in samples:
            if not (self._agrees(prompt, expected, got, params) if exact else self._allows(prompt, got, params)):
                return m.WRONG
        if not isinstance(config, NoDrafterConfig | AutoConfig):
            if not any(got.metrics.num_draft_tokens for _, _, got in samples):
                return m.TO_PLAIN
            if lost_branches:
                return m.TO_CHAINS if exact else m.TO_CHAINS_IN_DISTRIBUTION
        return m.WORKS if exact else m.WORKS_IN_DISTRIBUTION

    def _agrees(
        self, prompt: Sequence[int], expected: CompletionOutput, got: CompletionOutput, params: SamplingParams
    ) -> bool:
        """Whether an output is plain decoding's, in numerical mode up to ties."""
        fields = ("token_ids", "text", "finish_reason", "stop_reason", "seed")
        if all(getattr(expected, name) == getattr(got, name) for name in fields):
            return _same_logprobs(expected, got)
        if self.llm.config.exactness == "bitwise" or expected.seed != got.seed:
            return False
        divergence = Divergence(
            tuple(prompt),
            tuple(expected.token_ids),
            tuple(got.token_ids),
            params,
            got.seed,
            stop_ids=frozenset(params.stop_token_ids),
        )
        return explain_divergence(self.llm.model, divergence).verdict == "tie"

    def _allows(self, prompt: Sequence[int], got: CompletionOutput, params: SamplingParams) -> bool:
        """Whether every token has a positive probability after those before it, and the end is where it must be."""
        if not got.token_ids or len(got.token_ids) > (params.max_tokens or 0):
            return False
        if got.finish_reason == "length" and len(got.token_ids) != params.max_tokens:
            return False
        known = [*prompt, *got.token_ids]
        run = CachedRun(self.llm.model, block_size=16, num_positions=len(known), num_sequences=1, row_invariant=False)
        with torch.inference_mode():
            logits = run.feed("0", known[:-1])[len(prompt) - 1 :]
        contexts = [
            RowContext(
                slice(i, i + 1),
                params,
                known[: len(prompt) + i],
                len(prompt),
                TokenTree.root_only(known[len(prompt) + i - 1]),
                frozenset(params.stop_token_ids),
            )
            for i in range(len(got.token_ids))
        ]
        rows = process_logits(logits, contexts)
        return bool(rows[torch.arange(len(got.token_ids)), got.token_ids].isfinite().all())


def _refusal(error: OutriderError) -> str:
    got = f", got {error.got}" if error.got is not None else ""
    return f"{m.REFUSED}{type(error).__name__}: {error.what}{got}"


def _same_logprobs(expected: CompletionOutput, got: CompletionOutput) -> bool:
    """Equal up to rounding; the alternatives' order may change where two are tied."""
    return len(expected.logprobs or ()) == len(got.logprobs or ()) and all(
        abs(ours[token].logprob - theirs[token].logprob) <= LOGPROB_TOLERANCE
        for ours, theirs in zip(expected.logprobs or (), got.logprobs or (), strict=True)
        for token in ours.keys() & theirs.keys()
    )


def run_matrix(
    paths: Sequence[PathRuns],
    drafters: Mapping[str, DrafterConfig],
    on_path: Callable[[DrafterConfig, str], DrafterConfig],
    *,
    rules: Sequence[str],
    parameters: Sequence[str],
    advance: Callable[[str], None] = lambda name: None,
) -> Matrix:
    """Run everything.

    Args:
        drafters: by their names in the matrix.
        on_path: a drafter as one path runs it: the folder of a second model may depend on it.
        rules: the coupled one first.
        advance: called before each drafter and rule on each path.
    """
    cells: list[Cell] = []
    for name, config in drafters.items():
        for rule in rules:
            for path in paths:
                advance(f"{name}, {rule}, {path.path}")
                cells += path.run(name, on_path(config, path.path), rule)
    settings = {name: settings_of(config) for name, config in drafters.items()}
    by_name = {config.method: paths[0].by_name(config.method) for config in drafters.values()}
    places = tuple(place for path in paths for place in path.places)
    return Matrix(settings, places, tuple(parameters), tuple(cells), by_name)


def settings_of(config: DrafterConfig) -> dict[str, Any]:
    """A drafter's method and its settings that are not the default, as JSON has them; paths of files are left out."""
    values: dict[str, Any] = {"method": config.method}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and "/" not in str(value):
            values[field.name] = value
    return json.loads(json.dumps(values, default=settings_of))
