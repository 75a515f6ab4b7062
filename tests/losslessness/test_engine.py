"""Token equality: whatever the drafter, the batch, the cache and the parameters, the output is plain decoding's."""

from __future__ import annotations

import random

import pytest

from outrider.config import SchedulerConfig
from outrider.drafting.drafter import FinishedText
from outrider.drafting.plain import PlainDrafter
from outrider.errors import CacheError
from outrider.sampling.params import SamplingParams
from tests.losslessness.engine_harness import DRAFTERS, decode, make_engine, make_request, run
from tests.toy_model import ToyModel

SETTINGS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "greedy-eos": SamplingParams(temperature=0.0, max_tokens=60),
    "sampled": SamplingParams(temperature=0.9, max_tokens=40, seed=11, ignore_eos=True),
    "sampled-eos": SamplingParams(temperature=1.0, max_tokens=80, seed=12),
    "top_k": SamplingParams(temperature=1.0, top_k=4, max_tokens=30, seed=13),
    "top_p": SamplingParams(temperature=1.2, top_p=0.7, max_tokens=30, seed=14),
    "min_p": SamplingParams(temperature=1.5, min_p=0.2, max_tokens=30, seed=15),
    "penalties": SamplingParams(
        temperature=0.7,
        repetition_penalty=1.3,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        max_tokens=40,
        seed=16,
    ),
    "greedy-penalties": SamplingParams(temperature=0.0, frequency_penalty=0.9, max_tokens=40),
    "logit_bias": SamplingParams(temperature=1.0, logit_bias={3: 4.0, 5: -100.0}, max_tokens=30, seed=17),
    "min_tokens": SamplingParams(temperature=1.0, min_tokens=25, max_tokens=60, seed=18, logit_bias={0: 3.0}),
    "stop": SamplingParams(temperature=1.0, stop=["ab", "c", "hq"], max_tokens=80, seed=19, ignore_eos=True),
    "stop-late": SamplingParams(
        temperature=0.5, stop=["b", "j"], min_tokens=9, max_tokens=80, seed=20, ignore_eos=True
    ),
    "stop_token_ids": SamplingParams(temperature=1.0, stop_token_ids=[4, 9], max_tokens=80, seed=21),
    "one": SamplingParams(temperature=1.0, max_tokens=1, seed=22),
    "two": SamplingParams(temperature=0.0, max_tokens=2),
    "logprobs": SamplingParams(temperature=0.8, max_tokens=30, seed=23, logprobs=3),
}


def prompts(count: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        base = [rng.randrange(1, 24) for _ in range(rng.choice([1, 2, 7, 15, 33, 60]))]
        made.append(base * 2 if index % 3 == 0 else base)
    return made


_PLAIN: dict[tuple[str, tuple[int, ...]], dict] = {}


def plain(name: str, prompt: list[int], params: SamplingParams) -> dict:
    """What plain decoding gives, alone, without prefix caching: the reference of all comparisons."""
    key = (name, tuple(prompt))
    if key not in _PLAIN:
        request = make_request("plain", prompt, params)
        run(make_engine("none", prefix_caching=False), [request])
        _PLAIN[key] = summary(request)
    return _PLAIN[key]


def summary(request) -> dict:
    return {
        "token_ids": request.output_token_ids,
        "finish_reason": request.finish_reason,
        "stop_reason": request.stop_reason,
        "text": request.detokenizer.text if request.detokenizer else None,
        "logprobs": [{t: (round(v.logprob, 5), v.rank) for t, v in of.items()} for of in request.logprobs],
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_equal_to_plain_decoding_alone(drafter: str, setting: str) -> None:
    params = SETTINGS[setting]
    for prompt in prompts(4):
        request = make_request("r", prompt, params)
        run(make_engine(drafter), [request])
        assert summary(request) == plain(setting, prompt, params)
        assert request.metrics.num_accepted_tokens <= request.metrics.num_draft_tokens


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("num_blocks", "max_num_seqs", "max_batch_tokens", "prefix_caching"),
    [
        (400, 16, 256, True),  # all at once
        (400, 16, 256, False),
        (400, 4, 9, True),  # prompts in chunks of a few tokens, requests in turns
        (40, 16, 256, True),  # blocks run out: preemption
        (36, 3, 11, False),  # everything at once
    ],
)
def test_equal_to_plain_decoding_in_every_batch_mix(
    drafter: str, num_blocks: int, max_num_seqs: int, max_batch_tokens: int, prefix_caching: bool
) -> None:
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens)
    engine = make_engine(drafter, num_blocks=num_blocks, scheduler=scheduler, prefix_caching=prefix_caching)
    names = list(SETTINGS)
    mixed = [(names[i % len(names)], prompt) for i, prompt in enumerate(prompts(len(names) + 3))]
    requests = [make_request(f"r{i}", prompt, SETTINGS[name]) for i, (name, prompt) in enumerate(mixed)]
    run(engine, requests)
    for (name, prompt), request in zip(mixed, requests, strict=True):
        assert summary(request) == plain(name, prompt, SETTINGS[name]), name
    # The same prompts again: now they hit the prefix index, and nothing changes.
    again = [make_request(f"again{i}", prompt, SETTINGS[name]) for i, (name, prompt) in enumerate(mixed)]
    run(engine, again)
    for (name, prompt), request in zip(mixed, again, strict=True):
        assert summary(request) == plain(name, prompt, SETTINGS[name]), name
    if prefix_caching and num_blocks == 400:
        assert sum(request.metrics.num_cached_tokens for request in again) > 0, "the second round was to hit"


class ListeningDrafter(PlainDrafter):
    def __init__(self) -> None:
        self.heard: dict[str, list[FinishedText | None]] = {}

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self.heard.setdefault(request_id, []).append(finished)


def test_a_drafter_is_given_each_text_once_when_it_has_ended() -> None:
    """With requests that lose their place in between, end by a stop token and are aborted."""
    engine = make_engine(num_blocks=16)
    engine.drafter = listening = ListeningDrafter()
    requests = [make_request(f"r{i}", [1 + i, 2 + i, 3], SETTINGS["greedy"]) for i in range(8)]
    aborted = make_request("aborted", [1, 2, 3], SETTINGS["greedy"])
    engine.add(aborted)
    for _ in range(3):
        engine.step()
    engine.abort(aborted)
    run(engine, requests)
    assert sum(request.metrics.num_preemptions for request in requests) >= 2
    for request in (aborted, *requests):
        *before, finished = listening.heard[request.request_id]
        assert before == [None] * request.metrics.num_preemptions
        assert finished is not None
        assert list(finished.token_ids) == request.token_ids
        assert finished.num_prompt_tokens == 3


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_preemption_does_not_change_the_output(drafter: str) -> None:
    """Eight requests grow to 11 blocks each where there are 16: they take turns."""
    engine = make_engine(drafter, num_blocks=16)
    names = ["greedy", "sampled", "penalties", "top_p"]
    mixed = [(names[i % len(names)], [1 + i, 2 + i, 3]) for i in range(8)]
    requests = [make_request(f"r{i}", prompt, SETTINGS[name]) for i, (name, prompt) in enumerate(mixed)]
    run(engine, requests)
    assert sum(request.metrics.num_preemptions for request in requests) >= 2
    for (name, prompt), request in zip(mixed, requests, strict=True):
        assert summary(request) == plain(name, prompt, SETTINGS[name]), name


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_requests_that_come_and_go_do_not_disturb_each_other(drafter: str) -> None:
    rng = random.Random(3)
    engine = make_engine(drafter, num_blocks=60, scheduler=SchedulerConfig(max_num_seqs=5, max_batch_tokens=40))
    names = list(SETTINGS)
    arrivals = [(names[i % len(names)], prompt) for i, prompt in enumerate(prompts(24, seed=8))]
    live, finished, aborted = [], [], 0
    while arrivals or engine.has_unfinished:
        while arrivals and rng.random() < 0.4:
            name, prompt = arrivals.pop()
            request = make_request(f"q{len(arrivals)}", prompt, SETTINGS[name])
            engine.add(request)
            live.append((name, prompt, request))
        if live and rng.random() < 0.05:
            _, _, victim = live.pop(rng.randrange(len(live)))
            if not victim.finished:
                engine.abort(victim)
                aborted += 1
        if engine.has_unfinished:
            engine.step()
            engine.cache.check_integrity()
        finished += [entry for entry in live if entry[2].finished]
        live = [entry for entry in live if not entry[2].finished]
    assert engine.cache.pool.num_used == 0
    assert len(finished) >= 15
    assert aborted > 0
    for name, prompt, request in finished:
        assert summary(request) == plain(name, prompt, SETTINGS[name]), name


@pytest.mark.parametrize("drafter", [name for name in DRAFTERS if name != "none"])
def test_drafts_are_accepted(drafter: str) -> None:
    """An equality that holds because nothing is ever accepted proves nothing."""
    params = SamplingParams(temperature=0.0, max_tokens=130, ignore_eos=True)
    requests = [make_request(f"r{i}", prompt, params) for i, prompt in enumerate(prompts(6))]
    engine = make_engine(drafter, model=ToyModel(memory=0.2))
    run(engine, requests)
    assert engine.stats.num_accepted_tokens > 10
    assert engine.stats.num_output_tokens == sum(request.num_output_tokens for request in requests)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", ["rejection", "tree_rejection", "multi_candidate"])
def test_greedy_is_the_same_under_rejection_rules(rule: str, drafter: str) -> None:
    for name in ("greedy", "greedy-penalties", "two", "greedy-eos"):
        for prompt in prompts(3):
            request = make_request("r", prompt, SETTINGS[name])
            run(make_engine(drafter, rule=rule), [request])
            assert summary(request) == plain(name, prompt, SETTINGS[name])


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", ["rejection", "tree_rejection", "multi_candidate"])
def test_sampling_under_rejection_rules_is_repeatable(rule: str, drafter: str) -> None:
    outputs = []
    for _ in range(2):
        request = make_request("r", prompts(1)[0], SETTINGS["sampled"])
        run(make_engine(drafter, rule=rule), [request])
        outputs.append(request.output_token_ids)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 40


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_unsound_logits_end_the_requests_that_reach_them_and_no_other(drafter: str) -> None:
    """NaN after token 7: a request that generates 7 ends with an error, one that was only offered it does not."""
    model = ToyModel(poison=7)
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=2, ignore_eos=True)
    safe = SamplingParams(temperature=1.0, max_tokens=40, seed=2, ignore_eos=True, logit_bias={7: -100.0})
    mixed = [([7], params), ([1, 2, 3], params), ([4, 4], params), ([1, 2, 3], safe), ([5, 4, 3], safe)]
    requests = [make_request(f"r{i}", prompt, p) for i, (prompt, p) in enumerate(mixed)]
    run(make_engine(drafter, model=model), requests)
    assert requests[0].finish_reason == "error"
    assert "NaN" in str(requests[0].error)
    assert [request.finish_reason for request in requests[3:]] == ["length"] * 2
    for (prompt, p), request in zip(mixed, requests, strict=True):
        alone = make_request("alone", prompt, p)
        run(make_engine("none", model=ToyModel(poison=7)), [alone])
        assert summary(alone) == summary(request)


@pytest.mark.parametrize("rule", ["coupled", "rejection", "tree_rejection"])
def test_a_request_that_leaves_no_token_to_choose_ends_with_an_error(rule: str) -> None:
    everything = SamplingParams(temperature=1.0, min_tokens=9, max_tokens=20, stop_token_ids=list(range(24)), seed=1)
    bad = make_request("bad", [1, 2, 3], everything)
    good = make_request("good", [1, 2, 3], SETTINGS["greedy"])
    run(make_engine("ngram", rule=rule), [bad, good])
    assert bad.finish_reason == "error"
    assert summary(good) == plain("greedy", [1, 2, 3], SETTINGS["greedy"])


def test_text_of_stop_strings_never_leaks() -> None:
    params = SETTINGS["stop"]
    for drafter in DRAFTERS:
        for prompt in prompts(6, seed=21):
            request = make_request("r", prompt, params)
            run(make_engine(drafter), [request])
            full = decode(request.output_token_ids)
            assert request.detokenizer is not None
            assert full.startswith(request.detokenizer.text)
            assert not any(stop in request.detokenizer.text for stop in params.stop)
            if request.finish_reason == "stop":
                assert full == request.detokenizer.text + str(request.stop_reason)


def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(CacheError, match="at most the cache's 40 positions"):
        make_engine(num_blocks=10).add(make_request("r", [1] * 60, SETTINGS["one"]))


def test_a_step_without_requests_does_nothing() -> None:
    assert make_engine().step() == []


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_an_engine_goes_on_after_a_failed_forward(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel()
    engine = make_engine(drafter, model=model)
    requests = [make_request(f"r{i}", prompt, SETTINGS["sampled"]) for i, prompt in enumerate(prompts(4))]
    for request in requests:
        engine.add(request)
    right, count = model.forward, iter(range(1000))

    def forward(batch, cache):
        if next(count) % 3 == 1:
            raise RuntimeError("out of memory")
        return right(batch, cache)

    monkeypatch.setattr(model, "forward", forward)
    failures = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except RuntimeError:
            failures += 1
        engine.cache.check_integrity()
    assert failures > 2
    for prompt, request in zip(prompts(4), requests, strict=True):
        assert summary(request) == plain("sampled", prompt, SETTINGS["sampled"])


def test_long_prompts_take_turns_instead_of_preempting_each_other() -> None:
    model = ToyModel()
    engine = make_engine(
        model=model,
        num_blocks=40,
        scheduler=SchedulerConfig(max_num_seqs=8, max_batch_tokens=16),
        prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    requests = [make_request(f"r{i}", [1 + i] * 100, params) for i in range(3)]
    run(engine, requests)
    assert sum(request.metrics.num_preemptions for request in requests) == 0
    assert sum(model.num_rows) <= 3 * 110
