"""The losslessness report: every drafter's output held against plain decoding's, token for token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.config import NoDrafterConfig
from outrider.llm import LLM, Prompt
from outrider.losslessness.explain import Divergence, Explanation, explain_divergence
from outrider.losslessness.settings import Setting
from outrider.outputs import CompletionOutput, RequestOutput


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
        drafters: over the same target, by name; plain decoding itself may be among them, to hold its batches
            against its single prompts.
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
        self._explanations: dict[tuple[str, int, Sequence[int]], Explanation] = {}  # batch sizes repeat them
        self.report = Report()

    def num_generations(self, num_settings: int) -> int:
        """How many outputs `run` generates in all."""
        num_runs = sum(len(self._batch_sizes_of(llm)) for llm in self._drafters.values())
        return num_settings * len(self._prompts) * (1 + num_runs)

    def _batch_sizes_of(self, llm: LLM) -> list[int]:
        """Single prompts decoded plainly are the reference itself."""
        plain = isinstance(llm.config.decoding, NoDrafterConfig)
        return [size for size in self._batch_sizes if size > 1 or not plain]

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
                for batch_size in self._batch_sizes_of(llm):
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

    def _compare(self, cell: Cell, setting: Setting, index: int, plain: RequestOutput, output: RequestOutput) -> None:
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
            tuple(prompt_token_ids),
            tuple(plain.token_ids),
            tuple(other.token_ids),
            params,
            plain.seed,
            stop_ids=frozenset(eos) | frozenset(params.stop_token_ids),
            row_invariant=self._plain.config.exactness == "bitwise",
        )
        key = (setting.name, index, divergence.other_token_ids)
        if key not in self._explanations:
            self._explanations[key] = explain_divergence(self._plain.model, divergence)
        return self._explanations[key]


def _same(left: CompletionOutput, right: CompletionOutput) -> bool:
    fields = ("token_ids", "text", "finish_reason", "stop_reason")
    return all(getattr(left, name) == getattr(right, name) for name in fields)
