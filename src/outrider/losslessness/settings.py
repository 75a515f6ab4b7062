"""The sampling settings that losslessness is verified under. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider.sampling.params import SamplingParams


@dataclass(frozen=True)
class Setting:
    """Sampling parameters under their name in the report; the seed is that of the first prompt."""

    name: str
    params: SamplingParams

    def for_prompt(self, index: int) -> SamplingParams:
        """The parameters of prompt `index`: each prompt has a seed of its own."""
        return dataclasses.replace(self.params, seed=(self.params.seed or 0) + index)


def default_settings(max_tokens: int, seed: int) -> list[Setting]:
    """Greedy, sampled, filtered and penalised decoding: each chooses its tokens in another way.

    Raises:
        SamplingParamsError: a value is out of range.
    """
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
        Setting(name, SamplingParams(max_tokens=max_tokens, seed=seed, **values)) for name, values in variants.items()
    ]


def temperature_settings(temperatures: Sequence[float], max_tokens: int, seed: int) -> list[Setting]:
    """A setting for each temperature, with nothing else.

    Raises:
        SamplingParamsError: a value is out of range.
    """
    return [
        Setting(f"temperature {value:g}", SamplingParams(temperature=value, max_tokens=max_tokens, seed=seed))
        for value in temperatures
    ]
