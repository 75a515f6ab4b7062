"""Prompts to measure and verify with, by kind of work: what drafts well in one kind may not in another."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from outrider.bench.data_sets import DATA_SETS, data_set_prompts
from outrider.bench.editing import edit_prompts
from outrider.bench.held_out import held_out_prompts
from outrider.errors import ConfigError, PromptError

NUM_RANDOM_TOKENS = 64
RANDOM_TEMPERATURE = 1.5
WORKLOADS = ("code", "edit", "random", *DATA_SETS)


@dataclass(frozen=True)
class Workload:
    """Prompts of one kind.

    Attributes:
        name: one of WORKLOADS, or "file".
        source: where they are from, in words.
        count: how many are wanted.
        prompts: texts or token ids, perhaps more than wanted, because a model may not have room for some; empty where
            they are random tokens of the model's vocabulary.
        temperature: what the workload is meant for.
    """

    name: str
    source: str
    count: int
    prompts: Sequence[str | Sequence[int]] = ()
    temperature: float = 0.0

    def encode(
        self, encode: Callable[[str], list[int]], *, vocab_size: int, room: int, special: Sequence[int] = ()
    ) -> list[list[int]]:
        """Token ids of the prompts for one model.

        Args:
            room: positions that a prompt may take; longer ones of a data set are passed over, a user's own are not.
            special: token ids that random prompts do without.

        Raises:
            PromptError: fewer prompts than wanted have room.
        """
        if self.name == "random":
            return random_prompts(self.count, NUM_RANDOM_TOKENS, vocab_size, special)
        encoded = (encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in self.prompts)
        if self.name not in DATA_SETS:
            return list(islice(encoded, self.count))
        fitting = list(islice((ids for ids in encoded if len(ids) <= room), self.count))
        if len(fitting) < self.count:
            raise PromptError(
                f"prompts of {self.name} with at most {room} tokens",
                got=len(fitting),
                expected=f"{self.count}",
                remedy="ask for fewer by --prompts, or for fewer tokens by --max-tokens",
            )
        return fitting

    def record(self, prompt_ids: Sequence[Sequence[int]]) -> dict[str, object]:
        """As a JSON object; the hash is of the token ids."""
        return {
            "workload": self.name,
            "source": self.source,
            "count": len(prompt_ids),
            "num_tokens": [len(ids) for ids in prompt_ids],
            "sha256": prompts_hash(prompt_ids),
        }


def open_workload(name: str, count: int, data: str | None = None) -> Workload:
    """The workload that users call `name`.

    Args:
        count: of prompts, at least 1.
        data: the file of a data set; only those need one.

    Raises:
        ConfigError: unknown name, or a data set without its file.
        PromptError: a file that is not that data set.
    """
    if name not in WORKLOADS:
        raise ConfigError("--workload", got=repr(name), expected=f"one of {', '.join(WORKLOADS)}")
    if name in DATA_SETS:
        texts, source = data_set_prompts(name, data)
        return Workload(name, source, count, texts)
    if data is not None:
        raise ConfigError("--data", got=f"workload {name!r}", expected=f"one of {', '.join(DATA_SETS)}")
    if name == "random":
        source = f"{NUM_RANDOM_TOKENS} random tokens of the vocabulary each"
        return Workload(name, source, count, temperature=RANDOM_TEMPERATURE)
    texts, source = edit_prompts(count) if name == "edit" else held_out_prompts(count)
    return Workload(name, source, count, texts)


def random_prompts(count: int, num_tokens: int, vocab_size: int, special: Sequence[int] = ()) -> list[list[int]]:
    """Prompts that nothing can be learnt from: uniform tokens, the same for the same vocabulary."""
    allowed = sorted(set(range(vocab_size)) - set(special))
    return [random.Random(index).choices(allowed, k=num_tokens) for index in range(count)]


def prompts_hash(prompts: Sequence[object]) -> str:
    """SHA-256 of the prompts as JSON, so that two results can be told to be of the same ones."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
