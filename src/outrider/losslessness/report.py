"""The losslessness report: every drafter's output held against plain decoding's, token for token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.llm import LLM, Prompt
from outrider.losslessness.explain import Divergence, Explanation, explain_divergence
from outrider.outputs import CompletionOutput, RequestOutput
from outrider.sampling.params import SamplingParams


@dataclass(frozen=True)
class Setting:
    """Sampling parameters under the name that the report gives them; their seed is that of the first prompt."""

    name: str
    params: SamplingParams

    def for_prompt(self, index: int) -> SamplingParams:
        return dataclasses.replace(self.params, seed=(self.params.seed or 0) + index)


@dataclass(frozen=True)
class Mismatch:
    """One output that is not plain decoding's, and why."""

    drafter: str
    setting: str
    batch_size: int
    prompt_index: int
    explanation: Explanation
    plain_text: str | None
    other_text: str | None

    def record(self) -> dict[str, Any]:
        """As a JSON object; texts are of the first differing tokens."""
        texts = {"plain_token_text": self.plain_text, "other_token_text": self.other_text}
        where = {name: getattr(self, name) for name in ("drafter", "setting", "batch_size", "prompt_index")}
        return {**where, **texts, **self.explanation.record()}


@dataclass
class Cell:
    """Outputs of one drafter under one setting at one batch size.

    Attributes:
        num_ties, num_bugs: outputs that differ, by the explainer's verdict.
        num_tokens: output tokens compared.
        acceptance_length: tokens per step and sequence.
    """

    drafter: str
    setting: str
    batch_size: int
    num_outputs: int = 0
    num_equal: int = 0
    num_ties: int = 0
    num_bugs: int = 0
    num_tokens: int = 0
    num_steps: int = 0

    @property
    def acceptance_length(self) -> float:
        return self.num_tokens / max(1, self.num_steps)

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**dataclasses.asdict(self), "acceptance_length": self.acceptance_length}


@dataclass
class Report:
    """What was compared so far."""

    cells: list[Cell] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def num_outputs(self) -> int:
        return sum(cell.num_outputs for cell in self.cells)

    @property
    def num_equal(self) -> int:
        return sum(cell.num_equal for cell in self.cells)

    @property
    def num_ties(self) -> int:
        return sum(cell.num_ties for cell in self.cells)

    @property
    def num_bugs(self) -> int:
        return sum(cell.num_bugs for cell in self.cells)

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "num_outputs": self.num_outputs,
            "num_equal": self.num_equal,
            "num_ties": self.num_ties,
            "num_bugs": self.num_bugs,
            "cells": [cell.record() for cell in self.cells],
            "mismatches": [mismatch.record() for mismatch in self.mismatches],
        }


class Verifier:
    """Compares drafters with plain decoding, setting by setting.

    Args:
        plain: decodes without drafts; the reference is its output for one prompt at a time.
        drafters: over the same target; plain decoding itself may be among them, to hold batches against single
            prompts.
        prompts: at least one.
        batch_sizes: how many prompts run together.
    """

    def __init__(
        self, plain: LLM, drafters: Mapping[str, LLM], prompts: Sequence[Prompt], batch_sizes: Sequence[int]
    ) -> None:
        self._plain = plain
        self._drafters = drafters
        self._prompts = prompts
        self._batch_sizes = batch_sizes
        self.report = Report()

    def num_generations(self, num_settings: int) -> int:
        """How often `run` advances in all."""
        return num_settings * len(self._prompts) * (1 + len(self._drafters) * len(self._batch_sizes))

    def run(self, settings: Sequence[Setting], advance: Callable[[int], None]) -> Report:
        """Compare everything; `report` grows as it goes, and holds what is done if it is interrupted.

        Args:
            advance: called with the number of outputs generated since the last call.

        Raises:
            NumericsError: the model gave NaN or infinite logits, which no run can be compared on.
        """
        for setting in settings:
            reference = list(self._generate(self._plain, setting, 1, advance))
            for name, llm in self._drafters.items():
                for batch_size in self._batch_sizes:
                    cell = Cell(name, setting.name, batch_size)
                    self.report.cells.append(cell)
                    outputs = self._generate(llm, setting, batch_size, advance)
                    for index, (plain, output) in enumerate(zip(reference, outputs, strict=True)):
                        self._compare(cell, setting, index, plain, output)
        return self.report

    def _generate(
        self, llm: LLM, setting: Setting, batch_size: int, advance: Callable[[int], None]
    ) -> Iterator[RequestOutput]:
        for start in range(0, len(self._prompts), batch_size):
            prompts = self._prompts[start : start + batch_size]
            params = [setting.for_prompt(start + i) for i in range(len(prompts))]
            yield from llm.generate(prompts, params)
            advance(len(prompts))

    def _compare(
        self, cell: Cell, setting: Setting, index: int, plain: RequestOutput, output: RequestOutput
    ) -> None:
        for expected, got in zip(plain.outputs, output.outputs, strict=True):
            cell.num_outputs += 1
            cell.num_tokens += len(got.token_ids)
            cell.num_steps += got.metrics.num_steps
            if _same(expected, got):
                cell.num_equal += 1
                continue
            explanation = self._explain(setting, index, plain.prompt_token_ids, expected, got)
            cell.num_ties += explanation.verdict == "tie"
            cell.num_bugs += explanation.verdict == "bug"
            texts = [
                None if token is None else self._plain.tokenizer.token(token)
                for token in (explanation.plain_token, explanation.other_token)
            ]
            self.report.mismatches.append(
                Mismatch(cell.drafter, setting.name, cell.batch_size, index, explanation, *texts)
            )

    def _explain(
        self,
        setting: Setting,
        index: int,
        prompt_token_ids: Sequence[int],
        plain: CompletionOutput,
        other: CompletionOutput,
    ) -> Explanation:
        params = setting.for_prompt(index)
        eos = () if params.ignore_eos else self._plain.model.eos_token_ids
        divergence = Divergence(
            prompt_token_ids,
            plain.token_ids,
            other.token_ids,
            params,
            plain.seed,
            stop_ids=frozenset(eos) | frozenset(params.stop_token_ids),
            row_invariant=self._plain.config.exactness == "bitwise",
        )
        return explain_divergence(self._plain.model, divergence)


def _same(left: CompletionOutput, right: CompletionOutput) -> bool:
    fields = ("token_ids", "text", "finish_reason", "stop_reason")
    return all(getattr(left, name) == getattr(right, name) for name in fields)


def default_settings(max_tokens: int, seed: int) -> list[Setting]:
    """Greedy, sampled, filtered and penalised decoding: each changes how a token is chosen."""
    variants: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "temperature 0.8": {"temperature": 0.8},
        "top_p 0.9, top_k 50": {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
        "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
        "penalties": {
            "temperature": 0.8,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.3,
        },
        "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    }
    return [
        Setting(name, SamplingParams(max_tokens=max_tokens, seed=seed, **values))
        for name, values in variants.items()
    ]
