"""Outputs as JSON objects, one per prompt and line, and the file that a long run appends them to."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from outrider.errors import PromptError

if TYPE_CHECKING:
    from outrider.cli.prompts import Prompt
    from outrider.outputs import CompletionOutput, RequestOutput

Record = dict[str, Any]


def output_record(index: int, output: RequestOutput) -> Record:
    """One prompt's JSON object.

    The fields of the first sample stand at the top; where there are several, all of them are in `outputs`. A
    prompt that the model gave no usable logits for has `error` instead.
    """
    record: Record = {"index": index, "prompt": output.prompt}
    if output.prompt is None:
        record["prompt_token_ids"] = output.prompt_token_ids
    if any(sample.finish_reason == "error" for sample in output.outputs):
        return {**record, "error": "the model gave NaN or infinite logits"}
    samples = [_sample_record(sample, len(output.prompt_token_ids)) for sample in output.outputs]
    record.update(samples[0])
    if len(samples) > 1:
        record["outputs"] = samples
    return record


def _sample_record(sample: CompletionOutput, num_prompt_tokens: int) -> Record:
    record: Record = {
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "seed": sample.seed,
        "lossless": sample.lossless,
        "metrics": _metrics_record(sample, num_prompt_tokens),
    }
    if sample.logprobs is not None:
        record["logprobs"] = [
            [
                {
                    "token_id": token,
                    "token": of.decoded_token,
                    "logprob": _finite(of.logprob),
                    "rank": of.rank,
                }
                for token, of in alternatives.items()
            ]
            for alternatives in sample.logprobs
        ]
    return record


def _metrics_record(sample: CompletionOutput, num_prompt_tokens: int) -> Record:
    """Counts, and times in seconds since the request arrived."""
    metrics = sample.metrics
    first, last = metrics.first_token_time, metrics.finish_time
    return {
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": len(sample.token_ids),
        "num_cached_tokens": metrics.num_cached_tokens,
        "num_steps": metrics.num_steps,
        "num_draft_tokens": metrics.num_draft_tokens,
        "num_accepted_tokens": metrics.num_accepted_tokens,
        "acceptance_length": len(sample.token_ids) / max(1, metrics.num_steps),
        "num_preemptions": metrics.num_preemptions,
        "time_to_first_token_s": None if first is None else first - metrics.arrival_time,
        "latency_s": None if last is None else last - metrics.arrival_time,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A short hash of what determines the outputs, so that a file is not continued with other settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class ResultFile:
    """A JSONL file that results are appended to as they come, each flushed.

    Args:
        settings: digest of what determines the outputs; stands in every object.
        resume: `finished` is to be asked before the first result is written.

    Raises:
        OSError: the file cannot be opened for appending.
    """

    def __init__(self, path: str, settings: str, *, resume: bool) -> None:
        self._path = path
        self._settings = settings
        self._file = Path(path).open("ab")  # noqa: SIM115 - closed by __exit__
        if not resume and self._file.tell() and not Path(path).read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def finished(self, prompts: Sequence[Prompt]) -> set[int]:
        """Indices of the prompts that are done; an unfinished last line (of a killed run) is cut off.

        Raises:
            PromptError: the file is of other prompts or other settings, or no file of results.
        """
        data = Path(self._path).read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self._path, complete)
        done: set[int] = set()
        for number, line in enumerate(data[:complete].splitlines(), 1):
            if not line.strip():
                continue
            record = self._parse(line, number)
            index = record["index"]
            same = 0 <= index < len(prompts) and _is_of(record, prompts[index])
            if not same or record.get("settings") != self._settings:
                raise PromptError(
                    f"{self._path} line {number}",
                    got=f"prompt {index} of other prompts" if not same else "a result of other settings",
                    expected="results of this very command",
                    remedy="give another --output, or the prompts, model and parameters of that run",
                )
            if "error" not in record:
                done.add(index)
        return done

    def write(self, record: Record) -> None:
        line = json.dumps({**record, "settings": self._settings}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("index"), int):
            raise PromptError(
                f"{self._path} line {number}",
                got=repr(line[:40]),
                expected="a result of `outrider generate`",
                remedy="give another --output",
            )
        return record

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class InOrder:
    """Hands records on in the order of their prompts; on leaving, also those that wait for earlier ones.

    Args:
        indices: of the prompts that will come, increasing.
        emit: takes each record.
    """

    def __init__(self, indices: Sequence[int], emit: Callable[[Record], None]) -> None:
        self._expected = list(reversed(indices))
        self._emit = emit
        self._waiting: dict[int, Record] = {}

    def put(self, record: Record) -> None:
        self._waiting[record["index"]] = record
        while self._expected and self._expected[-1] in self._waiting:
            self._emit(self._waiting.pop(self._expected.pop()))

    def __enter__(self) -> InOrder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, BrokenPipeError):
            for index in sorted(self._waiting):
                self._emit(self._waiting[index])


def _is_of(record: Record, prompt: Prompt) -> bool:
    if isinstance(prompt, str):
        return record.get("prompt") == prompt
    return record.get("prompt_token_ids") == prompt["prompt_token_ids"]
