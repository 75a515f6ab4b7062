from __future__ import annotations

import math
from typing import Any

import pytest

from outrider.errors import SamplingParamsError
from outrider.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, math.nan) for name in ("temperature", "top_p", "min_p", "repetition_penalty")],
        *[(name, math.nan) for name in ("presence_penalty", "frequency_penalty")],
        *[(name, math.inf) for name in ("temperature", "top_p", "repetition_penalty")],
        *[(name, True) for name in ("n", "temperature", "top_k", "top_p", "max_tokens", "seed", "logprobs")],
        *[(name, "1") for name in ("n", "temperature", "top_k", "max_tokens", "seed")],
        *[(name, 1.0) for name in ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs")],
        *[(name, -1) for name in ("n", "temperature", "top_p", "min_p", "max_tokens", "seed", "logprobs")],
        ("n", 0),
        ("n", 129),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("max_tokens", 0),
        ("min_tokens", 129),  # above max_tokens
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop", ["x"] * 17),
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("stop", [7]),
        ("stop_token_ids", range(129)),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_value_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.what.split()[0].split("[")[0] in name
    assert caught.value.expected is not None


def test_what_a_user_gave_is_copied() -> None:
    bias, stops = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stops)
    bias[2] = 3.0
    stops.append("b")
    assert params.logit_bias == {1: 2.0}
    assert params.stop == ("a",)


def test_one_stop_string_is_not_split_into_letters() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_limits_are_allowed() -> None:
    SamplingParams(
        n=128,
        temperature=0,
        top_k=-1,
        top_p=1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        max_tokens=5,
        min_tokens=5,
        stop=["x" * 256] * 16,
        seed=2**64 - 1,
        logprobs=20,
        logit_bias={0: -100, 1: 100},
    )


def test_greedy_and_penalties() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams().has_penalties
    assert SamplingParams(repetition_penalty=1.1).has_penalties
    assert SamplingParams(presence_penalty=0.1).has_penalties
    assert SamplingParams(frequency_penalty=-0.1).has_penalties
