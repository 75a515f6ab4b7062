"""The arithmetic of advice: rooflines by hand, lengths against brute force, where drafting stops paying."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig

from outrider.bench.advise import Conditions, Interval, Profile, advice, fit_to_time, measure, median_interval
from outrider.bench.hardware import KNOWN, Hardware, hardware_of
from outrider.bench.predict import Drafting, parse_acceptance, predict, step_seconds
from outrider.bench.roofline import ModelFigures, bytes_per_weight, forward_seconds, model_figures
from outrider.bench.roofline_check import roofline_check
from outrider.bench.runner import Results, Sample
from outrider.bench.speculation import Draftings, break_even, by_depth_and_rank
from outrider.cli.advise_report import cli_line, python_line
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.stats import EngineStats
from outrider.errors import ConfigError

MACHINE = Hardware(
    "toy",
    bandwidth=1e9,
    flops={"fp32": 1e9, "bf16": 1e12, "int8": 2e12},
    forward_s=0.001,
    step_s=0.002,
    bandwidth_efficiency=0.5,
    compute_efficiency=0.25,
)
LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
# A layer: q and o 16x16, k and v 16x8, three of 16x40, two norms; one norm and the output layer beside them.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40 + 2 * 16


def test_weights_are_counted_without_the_input_embeddings() -> None:
    figures = model_figures(LLAMA, name="toy")
    assert figures.num_shared == 2 * LAYER + 16 + 100 * 16
    assert (figures.num_routed, figures.weights, figures.weight_bytes) == (0, "bf16", 2.0)
    assert figures.kv_bytes == 2 * 2 * (2 * 4) * 2  # keys and values, layers, heads x width, bytes
    assert figures.attention_flops == 4 * 2 * 16


def test_a_tied_output_layer_is_read_all_the_same() -> None:
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    assert model_figures(tied, name="toy").num_shared == model_figures(LLAMA, name="toy").num_shared


def test_the_configuration_is_left_as_it_was() -> None:
    before = LLAMA.to_dict()
    model_figures(LLAMA, name="toy", weights="int4")
    assert LLAMA.to_dict() == before


def test_formats() -> None:
    assert bytes_per_weight("int4", 64) == 0.5 + 2 / 64
    assert model_figures(LLAMA, name="toy", weights="int8").weight_bytes == 1.0
    packed = LlamaConfig(**{**LLAMA.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert model_figures(packed, name="toy").weights == "int4"
    odd = LlamaConfig(**{**LLAMA.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 3}})
    with pytest.raises(ConfigError, match="3 bits"):
        model_figures(odd, name="toy")


def test_experts_are_read_as_rows_choose_them() -> None:
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        dtype="bfloat16",
    )
    figures = model_figures(config, name="moe")
    assert (figures.num_experts, figures.active_share) == (4, 0.25)
    assert figures.num_routed == 4 * 3 * 8 * 12
    assert figures.bytes_read(1) == pytest.approx(2 * (figures.num_shared + 0.25 * figures.num_routed))
    assert figures.bytes_read(2) == pytest.approx(2 * (figures.num_shared + 0.4375 * figures.num_routed))
    assert figures.flops(3, 0) == pytest.approx(3 * 2 * (figures.num_shared + 0.25 * figures.num_routed))


def test_a_forward_takes_the_longer_of_reading_and_computing() -> None:
    model = ModelFigures("toy", 10_000_000, weights="bf16", weight_bytes=2.0, kv_bytes=1000.0, attention_flops=500.0)
    # 20 MB of weights and 2 x 100 x 1000 bytes of cache at half of 1 GB/s; 4 rows are far from computing as long.
    few = forward_seconds(model, MACHINE, 4, sequences=2, context=100)
    assert few == pytest.approx((20e6 + 2e5) / 0.5e9 + 0.001)
    # 2,000 rows x (2 x 10M + 500 x 100) operations at a quarter of 1 TFLOP/s.
    many = forward_seconds(model, MACHINE, 2000, sequences=2, context=100)
    assert many == pytest.approx(2000 * (2e7 + 5e4) / 0.25e12 + 0.001)


def test_a_step_is_its_drafts_its_forward_and_the_rest() -> None:
    target = ModelFigures("toy", 10_000_000)
    draft = ModelFigures("draft", 1_000_000)
    drafting = Drafting("draft, tree", "draft_model", draft, (0.5,), tree=True)
    seconds = step_seconds(target, MACHINE, drafting, (1, 6, 3), 0)
    assert seconds == pytest.approx(0.002 + (20e6 / 0.5e9 + 0.001) + 3 * (2e6 / 0.5e9 + 0.001))


def chain_tokens(rates: list[float], length: int) -> float:
    tokens, reached = 1.0, 1.0
    for rate in rates[:length]:
        reached *= rate
        tokens += reached
    return tokens


@pytest.mark.parametrize(
    ("rates", "draft_s", "row_s"),
    list(product(([0.9] * 12, [0.5] * 12, [0.9, 0.3, 0.9, 0.1], [0.05] * 12), (0.0, 0.1, 0.5), (0.0, 0.05, 0.4))),
)
def test_the_length_of_a_chain_is_the_best_of_all(rates: list[float], draft_s: float, row_s: float) -> None:
    def seconds(batch: int, nodes: int, depth: int) -> float:
        return 1.0 + row_s * batch * nodes + draft_s * depth

    speeds = {k: chain_tokens(rates, k) / seconds(2, k, k) for k in range(1, len(rates) + 1)}
    plan = Draftings([(rate,) for rate in rates], max_nodes=12, max_depth=12).best(2, seconds)
    assert plan.num_nodes == plan.depth
    assert plan.speedup == pytest.approx(max(speeds.values()))
    assert speeds[plan.depth] == pytest.approx(max(speeds.values()))
    assert plan.tokens_per_s == pytest.approx(2 * plan.tokens_per_step / plan.step_s)


def test_a_tree_is_no_worse_than_any_chain_or_star_that_fits_into_it() -> None:
    acceptance = by_depth_and_rank([0.5, 0.5], [0.4, 0.2])
    assert acceptance[0] == pytest.approx((0.5, 0.2, 0.1))
    options = Draftings(acceptance, max_nodes=4, max_depth=2)

    def seconds(batch: int, nodes: int, depth: int) -> float:
        return 1.0 + 0.03 * nodes

    # By hand, of 1 to 4 nodes: 0.5; + 0.25 or 0.2; + the other; + 0.1 (at depth 1, or below the second child).
    by_hand = max(1.5 / 1.03, 1.75 / 1.06, 1.95 / 1.09, 2.05 / 1.12)
    assert options.best(1, seconds).speedup == pytest.approx(by_hand)


def test_siblings_are_never_likelier_than_the_ones_before() -> None:
    for row in by_depth_and_rank([0.0, 0.1, 0.5, 1.0], [0.63, 0.144, 0.045]):
        assert list(row) == sorted(row, reverse=True)
        assert sum(row) <= 1.0


def test_break_even_is_where_the_speedup_ends_for_good() -> None:
    assert break_even(lambda batch: 2.0 if batch < 23 else 1.0) == 23
    assert break_even(lambda batch: 1.0) == 1
    assert break_even(lambda batch: 1.5) is None
    # A dip in between is not the end.
    assert break_even(lambda batch: 0.9 if 10 <= batch < 20 or batch >= 256 else 1.5) == 256


def test_prediction_of_a_machine_that_computes_slowly() -> None:
    """Reading takes 40 ms and a row 1 ms: with perfect drafts that cost nothing 16 of them fit twice into a read."""
    machine = Hardware("toy", 1e9, {"fp32": 1e9, "bf16": 20e9, "int8": 1e9}, 0.0, 0.0, 0.5, 1.0)
    target = ModelFigures("toy", 10_000_000)
    found = predict(target, machine, Drafting("d", "draft_model", ModelFigures("d", 0), [1.0] * 16), context=0)
    assert [(plan.num_nodes, round(plan.speedup, 6)) for plan in found.plans[:2]] == [(16, 17.0), (16, 17 * 40 / 40)]
    # From 40 sequences on a row of draft costs what a row of plain decoding does, and brings as much: nothing is won.
    assert found.break_even_batch == 40


def test_acceptance_of_the_command_line() -> None:
    assert parse_acceptance(None) is None
    assert parse_acceptance("0.7") == [0.7] * 16
    assert parse_acceptance("0.9,0.5") == [0.9, 0.5]
    for wrong in ("1.5", "-0.1", "x", "", "0.5,", "nan", ",".join(["0.5"] * 17)):
        with pytest.raises(ConfigError, match="--acceptance"):
            parse_acceptance(wrong)


def test_machines_by_name_file_and_near_miss(tmp_path: Path) -> None:
    assert hardware_of("H100") is KNOWN["h100"]
    with pytest.raises(ConfigError, match="did you mean 'rtx4090'"):
        hardware_of("rtx490")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"bandwidth": 1e11, "flops": {"fp32": 1e12, "bf16": 2e12, "int8": 4e12}}))
    mine = hardware_of(str(path))
    assert (mine.name, mine.bandwidth, mine.flops_for("int4")) == ("mine", 1e11, 4e12)
    for text in ("{", "[]", '{"bandwith": 1}', '{"bandwidth": -1, "flops": {"fp32": 1, "bf16": 1, "int8": 1}}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            hardware_of(str(path))


def test_the_interval_of_a_median_is_exact_by_counting() -> None:
    assert median_interval([3.0]) == Interval(3.0, 3.0, 3.0, 0.0)
    assert median_interval([2.0, 1.0]) == Interval(1.5, 1.0, 2.0, 0.5)
    assert median_interval([1.0, 5.0, 2.0, 4.0, 3.0]) == Interval(3.0, 1.0, 5.0, 0.9375)
    # Of nine the second to the eighth: 1 - 2 (1 + 9) / 512. The third to the seventh would miss in 92 of 512.
    found = median_interval([float(i) for i in range(1, 10)])
    assert (found.median, found.low, found.high) == (5.0, 2.0, 8.0)
    assert found.coverage == pytest.approx(1 - 20 / 512)


@pytest.mark.parametrize("num_values", range(2, 9))
def test_the_interval_covers_as_often_as_it_says(num_values: int) -> None:
    """Every way in which values may fall below (0) or above (1) the true median, which is 0.5."""
    hits = 0
    for sides in product((0.0, 1.0), repeat=num_values):
        interval = median_interval(sides)
        hits += interval.low < 0.5 < interval.high
    assert hits / 2**num_values == pytest.approx(median_interval([0.0] * num_values).coverage)


def test_prompts_are_cut_to_the_time() -> None:
    cost = ForwardCost((1, 64), (0,), [(0.01, 0.02)])
    prompts = [[1] * 64] * 6
    # A prompt takes 0.02 s to read and a token 0.01 s; a run may take 0.8 x 150 / (5 x 4) = 6 s: five of 1.02 s.
    assert fit_to_time(prompts, 100, cost, num_contenders=4, seconds=150.0) == (prompts[:5], 100)
    # 1.6 s are 0.4 s for each of four; 0.1 s are too little for anything.
    assert fit_to_time(prompts, 100, cost, num_contenders=4, seconds=40.1) == (prompts[:4], 38)
    assert fit_to_time(prompts, 100, cost, num_contenders=4, seconds=2.5) == (prompts[:4], 16)
    assert fit_to_time(prompts, 4, cost, num_contenders=4, seconds=0.001) == (prompts[:4], 4)
    assert fit_to_time(prompts[:1], 100, cost, num_contenders=4, seconds=12.5) == (prompts[:1], 48)


class Clocked:
    comparable = True

    def __init__(self, name: str, clock: list[float]) -> None:
        self.name, self._clock = name, clock

    def prepare(self) -> None:
        self._clock[0] += 1.0

    def run(self, prompts: object) -> Sample:
        self._clock[0] += 4.0
        return Sample(4.0, [[1]])


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 1), (19.9, 1), (20.0, 2), (35.0, 3), (10_000.0, 20)])
def test_rounds_run_as_long_as_one_more_fits(seconds: float, rounds: int) -> None:
    clock, results = [0.0], Results()
    contenders = [Clocked("none", clock), Clocked("ngram", clock)]
    measure(contenders, [], seconds, results, lambda name: None, clock=lambda: clock[0])
    assert [len(of) for of in results.samples.values()] == [rounds, rounds]


def stats_of(steps: int, accepted: list[int], nodes: int, draft_s: float, step_s: float) -> EngineStats:
    return EngineStats(
        draft_s=draft_s,
        other_s=step_s - draft_s,
        num_steps=steps,
        num_verifications=steps,
        num_drafts=steps if nodes else 0,
        num_draft_tokens=nodes * steps,
        num_accepted_tokens=sum(accepted),
        accepted_at_depth=accepted,
    )


COST = ForwardCost((1, 2, 64), (0,), [(1.0, 1.1, 7.3)])  # a second, and a tenth for each further row


def test_speed_in_a_batch_by_hand() -> None:
    here = Conditions(COST, 0.0, rest=0.2, rest_each=0.05)
    # 10 steps of 4 draft tokens: 0.1 s of drafting and 1.4 s of forward in each, and 0.3 s that is neither.
    profile = Profile.of([stats_of(10, [8, 4, 2, 0], 4, 1.0, 18.0)], here, runs_model=False)
    assert (profile.drafted, profile.nodes, profile.accepted) == (1.0, 4.0, (0.8, 0.4, 0.2, 0.0))
    assert (profile.draft_s, profile.rest_s) == pytest.approx((0.1, 0.3))
    # One sequence, cut at 1, 2, 3, 4: tokens over forward, drafting and rest, against 1 / 1.2.
    one = max(t / (1.0 + 0.1 * k + 0.1 + 0.3) for k, t in enumerate((1.8, 2.2, 2.4, 2.4), 1))
    assert profile.plan(1, here).speedup == pytest.approx(1.2 * one)
    # Four: 4 (1 + k) rows, 4 x 0.1 of drafting, 0.2 + 3 x 0.05 + 4 x 0.1 of rest, against 1.3 + 0.35.
    four = max(t / (1.0 + 0.1 * (4 + 4 * k - 1) + 0.4 + 0.75) for k, t in enumerate((1.8, 2.2, 2.4, 2.4), 1))
    plan = profile.plan(4, here)
    assert plan.speedup == pytest.approx(1.65 * four)
    assert plan.tokens_per_step == pytest.approx(2.2)
    assert (plan.depth, plan.num_nodes) == (2, 2.0)


def test_what_a_model_drafts_is_shared_by_a_batch() -> None:
    here = Conditions(COST, 0.0)
    lookup = Profile(1.0, 1.0, (0.5,), 0.2, 0.0)
    model = Profile(1.0, 1.0, (0.5,), 0.2, 0.0, runs_model=True)
    assert lookup.plan(1, here).step_s == pytest.approx(model.plan(1, here).step_s) == pytest.approx(1.3)
    assert lookup.plan(11, here).step_s == pytest.approx(1 + 0.1 * 21 + 11 * 0.2)
    assert model.plan(11, here).step_s == pytest.approx(1 + 0.1 * 21 + 2 * 0.2)  # 11 rows take twice as long as one


def test_what_plain_steps_take_beside_the_forward_comes_from_a_batch_that_ran() -> None:
    one = Results({"none": [Sample(1.0, [[1]], stats_of(10, [], 0, 0.0, 12.0))]})
    many = Results({"none": [Sample(1.0, [[1]] * 8, stats_of(10, [], 0, 0.0, 26.0))]})
    here = Conditions.of(one, many, COST, 0.0)
    assert here.rest == pytest.approx(0.2)
    assert here.rest_s(8) == pytest.approx(2.6 - 1.7)  # 8 rows take 1.7
    assert Conditions.of(one, Results(), COST, 0.0).rest_each == 0.0


def test_a_batch_is_expected_to_be_as_full_as_it_was() -> None:
    """Eight without drafts, but only four with them: sequences ended at different times."""
    one = {"none": stats_of(10, [], 0, 0.0, 12.0), "ngram": stats_of(10, [8, 4], 2, 1.0, 16.0)}
    many = {"none": stats_of(10, [], 0, 0.0, 26.0), "ngram": stats_of(10, [32, 16], 2, 4.0, 40.0)}
    many["none"].num_verifications, many["ngram"].num_verifications = 80, 40
    results, batched = (
        Results({name: [Sample(of.step_s, [[1]] * 8, of)] for name, of in stats.items()}) for stats in (one, many)
    )
    specs = {name: {"method": name} for name in one}
    check = advice(results, batched, specs, COST, context=0, exact=True)["batch_check"]
    assert check["mean_sequences"] == {"plain": 8, "drafting": 4}
    # Beside the forward a plain step takes 0.2 s, and 0.1 s for each further sequence; one with drafts 0.3 s, and
    # 0.1 s of drafting. A forward of M rows takes 1 + 0.1 (M - 1) s.
    step_s = (1 + 0.1 * 11) + 4 * 0.1 + (0.2 + 3 * 0.1) + 4 * 0.1
    assert check["expected_speedup"] == pytest.approx((4 * 2.2 / step_s) * (2.6 / 8))


def advice_of(speeds: dict[str, list[float]], *, wrong: str | None = None, exact: bool = True) -> dict[str, object]:
    results = Results(
        {
            name: [
                Sample(10.0 / speed, [[2 if name == wrong else 1] * 10], stats_of(10, [], 0, 0.0, 12.0))
                for speed in of
            ]
            for name, of in speeds.items()
        }
    )
    specs = {name: {"method": name} for name in speeds}
    return advice(results, Results(), specs, COST, context=10, exact=exact)


def test_the_fastest_is_advised_if_it_is_surely_faster() -> None:
    found = advice_of({"none": [1.0] * 5, "ngram": [2.0, 2.1, 1.9, 2.0, 2.2], "suffix": [1.5, 1.6, 2.0, 1.4, 1.5]})
    assert (found["recommended"], found["drafter"], found["as_good"]) == ("ngram", {"method": "ngram"}, ["suffix"])
    unsure = advice_of({"none": [1.0] * 3, "ngram": [1.4, 0.9, 1.5]})
    assert (unsure["recommended"], unsure["drafter"], unsure["best"]) == ("none", {"method": "none"}, "ngram")
    nothing = advice_of({"none": [1.0] * 3, "ngram": [0.5, 0.6, 0.5]})
    assert nothing["recommended"] == "none"
    assert json.dumps(nothing)


def test_a_drafter_with_other_outputs_is_not_advised_where_they_must_be_equal() -> None:
    speeds = {"none": [1.0] * 3, "ngram": [3.0] * 3, "suffix": [2.0] * 3}
    assert advice_of(speeds, wrong="ngram")["recommended"] == "suffix"
    assert advice_of(speeds, wrong="ngram", exact=False)["recommended"] == "ngram"


def test_roofline_check_counts_only_steady_moments() -> None:
    bandwidths = iter([1e9, 1e9, 2e9, 2e9, *[2e9] * 40])
    seconds = iter([9.0, 0.2, 5.0, 0.1, *[0.1] * 40])
    found = roofline_check(1e8, lambda: next(seconds), lambda: next(bandwidths))
    assert found is not None
    assert found["samples"] == 7
    assert found["predicted_over_measured"] == pytest.approx(0.5)
    flapping = iter([1e9, 2e9] * 40)
    assert roofline_check(1e8, lambda: 0.1, lambda: next(flapping)) is None


def test_lines_to_paste() -> None:
    config = {"model": "my model", "weights": "int8", "dtype": "auto", "group_size": 64}
    spec = {"method": "draft_model", "model": "d", "depth": 3}
    assert python_line(config, spec) == (
        "llm = LLM('my model', decoding={'method': 'draft_model', 'model': 'd', 'depth': 3}, weights='int8')"
    )
    assert cli_line(config, spec) == (
        "outrider generate PROMPT --model 'my model' --weights int8 --decoding draft_model --draft-model d "
        "--decoding-config '{\"depth\": 3}'"
    )
    spec = {"method": "auto", "draft_model": "d"}
    assert cli_line({"model": None}, spec) == "outrider generate PROMPT --decoding auto --draft-model d"
    assert cli_line({"model": None}, {"method": "none"}) == "outrider generate PROMPT --decoding none"
