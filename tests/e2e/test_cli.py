"""The command line as its users meet it: results, exit status, and one line for everything they get wrong."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import outrider.llm
from outrider import LLM, SamplingParams, __version__
from outrider.cli.app import app
from outrider.cli.options import EngineOptions
from outrider.config import DRAFTER_CONFIGS
from outrider.engine.bundled import BUNDLED_TARGET
from outrider.kernels import native
from outrider.losslessness.explain import Explanation
from outrider.models.llama import LlamaModel
from tests.tiny_models import make_tiny

PROMPT = "def quicksort("
# `all` leaves out what needs a file, and of the methods that load a second model all but the plain one.
LEFT_OUT = {"none", "datastore", "self_draft", "universal_draft", "staged", "sorted_draft"}
ALL = ["none", *(name for name in DRAFTER_CONFIGS if name not in LEFT_OUT)]
SHORT = ("--max-tokens", "8", "--seed", "7")
COMMAND = [sys.executable, "-c", "from outrider.cli.app import main; main()"]


@pytest.fixture(scope="module", autouse=True)
def one_load() -> Iterator[None]:
    """Load each model once for all commands that run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.llm, "load_target", functools.cache(outrider.llm.load_target))
        yield


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def assert_one_error_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


# --- generate


def test_json_has_a_line_for_the_prompt() -> None:
    result = run("generate", PROMPT, "--json", "--temperature", "0.8", "--logprobs", "2", *SHORT)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (record,) = records(result.stdout)
    assert record["index"] == 0
    assert record["prompt"] == PROMPT
    assert record["finish_reason"] == "length"
    assert record["seed"] == 7
    assert record["lossless"] is True
    assert len(record["token_ids"]) == len(record["logprobs"]) == 8
    assert record["logprobs"][0][0]["token_id"] == record["token_ids"][0]
    assert record["metrics"]["num_output_tokens"] == 8
    assert record["metrics"]["latency_s"] >= record["metrics"]["time_to_first_token_s"] > 0


def test_commands_give_what_the_library_gives() -> None:
    params = SamplingParams(
        temperature=0.9,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={65: 3.0, 70: -2.5},
        min_tokens=2,
        max_tokens=12,
        stop=["return", "\n\n"],
        stop_token_ids=[9],
        ignore_eos=True,
        seed=3,
    )
    expected = LLM(decoding="none").generate(PROMPT, params)[0].outputs[0]
    options = (
        "--temperature 0.9 --top-k 40 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty 0.1 --logit-bias 65=3 --logit-bias 70=-2.5 --min-tokens 2 --max-tokens 12 --seed 3 "
        "--stop-token-id 9 --ignore-eos --stop return"
    )
    result = run("generate", PROMPT, "--json", *options.split(), "--stop", "\n\n", "--decoding", "none")
    (record,) = records(result.stdout)
    assert (record["text"], record["token_ids"]) == (expected.text, expected.token_ids)


def test_text_stream_and_json_agree() -> None:
    options = ("--decoding", "ngram", "--max-tokens", "24", "--seed", "1", "--temperature", "0.8")
    text = run("generate", PROMPT, *options).stdout
    (record,) = records(run("generate", PROMPT, "--json", *options).stdout)
    assert text == record["text"] + "\n"
    assert run("generate", PROMPT, "--stream", *options).stdout == text


def test_several_samples_of_a_prompt() -> None:
    (record,) = records(run("generate", PROMPT, "--json", "-n", "3", *SHORT).stdout)
    assert len(record["outputs"]) == 3
    assert record["text"] == record["outputs"][0]["text"]
    assert len({tuple(sample["token_ids"]) for sample in record["outputs"]}) == 3
    lines = run("generate", PROMPT, "-n", "2", *SHORT).stdout.splitlines()
    assert f"=== prompt 1 of 1, sample 2 of 2: {PROMPT}" in lines


def test_prompt_from_standard_input_is_the_whole_text() -> None:
    (record,) = records(run("generate", "-", "--json", *SHORT, stdin="def f():\n    pass\n").stdout)
    assert record["prompt"] == "def f():\n    pass\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("lines.txt", "def f(\r\n\n  class A:\n", ["def f(", "  class A:"]),
        ("set.jsonl", '{"prompt": "a\\nb", "id": 3}\n\n{"prompt": "c"}\n', ["a\nb", "c"]),
        ("set.txt", '{"prompt": "a"}\n{"prompt_token_ids": [5, 6]}', ["a", None]),
        ("bom.txt", "\ufeffx = 1\n", ["x = 1"]),
    ],
)
def test_prompts_from_a_file_come_in_order(tmp_path: Path, name: str, content: str, expected: list) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    result = run("generate", "--prompts", str(path), "--json", "--max-tokens", "2")
    found = records(result.stdout)
    assert [record["prompt"] for record in found] == expected
    assert [record["index"] for record in found] == list(range(len(expected)))
    piped = run("generate", "--prompts", "-", "--json", "--max-tokens", "2", stdin=content.encode())
    assert [record["prompt"] for record in records(piped.stdout)] == expected


def test_engine_options_reach_the_engine() -> None:
    options = (
        "--verification tree_rejection --exactness numerical --dtype float32 --cache-gb 0.5 --max-num-seqs 2 "
        "--max-batch-tokens 64 --decoding recycling"
    )
    settings = ("--decoding-config", '{"depth": 2, "max_nodes": 3}')
    result = run("generate", PROMPT, "--json", *SHORT, *options.split(), *settings)
    assert result.exit_code == 0, result.output
    assert len(records(result.stdout)[0]["token_ids"]) == 8


def test_results_are_appended_and_resumed(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a = \nb = \nc = \nd = \n")
    results = tmp_path / "results.jsonl"
    command = ("generate", "--prompts", str(prompts), "--output", str(results), *SHORT)
    assert run(*command).stdout == ""
    complete = {record["index"]: record["token_ids"] for record in records(results.read_text())}
    assert sorted(complete) == [0, 1, 2, 3]

    lines = results.read_text().splitlines(keepends=True)
    results.write_text(lines[0] + lines[2] + lines[3][:20])  # killed in the middle of a line
    again = run(*command, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert len(records(again.stdout)) == 2
    assert {record["index"]: record["token_ids"] for record in records(results.read_text())} == complete
    assert run(*command, "--resume", "--json").stdout == ""

    results.write_text(lines[0] + lines[1][:20])
    run(*command)  # without --resume everything is done again, on lines of its own
    assert len(records("".join(results.read_text().splitlines(keepends=True)[2:]))) == 4


def test_resume_refuses_results_of_something_else(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = ("generate", PROMPT, "--output", str(results), *SHORT)
    run(*command)
    assert_one_error_line(run(*command, "--resume", "--temperature", "0.5"), "line 1", "other settings")
    other = ("generate", "other", "--output", str(results), *SHORT, "--resume")
    assert_one_error_line(run(*other), "line 1", "other prompts")
    results.write_text("something else\n")
    assert_one_error_line(run(*command, "--resume"), "line 1", "something else")


def test_a_prompt_without_usable_logits_does_not_spoil_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(decoding="none")
    right, (poisoned,) = llm.model.forward, llm.tokenizer.encode("#")

    def forward(batch, cache):
        logits = right(batch, cache)
        rows = batch.token_ids if batch.logits_rows is None else batch.token_ids[batch.logits_rows]
        logits[rows == poisoned] = float("nan")
        return logits

    monkeypatch.setattr(llm.model, "forward", forward)
    monkeypatch.setattr(llm.model, "choose", lambda *_, **__: None)
    path = tmp_path / "prompts.txt"
    path.write_text(f"#\n{PROMPT}\n")
    options = ("--decoding", "none", "--temperature", "0", "--max-tokens", "2")
    result = run("generate", "--prompts", str(path), "--json", *options)
    assert result.exit_code == 2
    bad, good = records(result.stdout)
    assert bad.keys() == {"index", "prompt", "error"}
    assert len(good["token_ids"]) == 2
    assert len(result.stderr.splitlines()) == 1


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate", ["prompt", "nothing"]),
        ("generate {empty}", ["prompt", "no text"]),
        ("generate x --prompts y", ["prompt", "an argument and --prompts"]),
        ("generate x --temperature nan", ["temperature", "nan"]),
        ("generate x --temperature -1", ["temperature", "-1"]),
        ("generate x --top-p 0", ["top_p"]),
        ("generate x --min-p 1.5", ["min_p"]),
        ("generate x --max-tokens 0", ["max_tokens"]),
        ("generate x --seed -1", ["seed"]),
        ("generate x -n 0", ["n", "[1, 128]"]),
        ("generate x --stop {empty}", ["stop string"]),
        ("generate x --logit-bias 5", ["--logit-bias", "ID=BIAS"]),
        ("generate x --logit-bias 5=nan", ["logit_bias"]),
        ("generate x --logit-bias 999999=1", ["logit_bias token id", "999999"]),
        ("generate x --stop-token-id 999999", ["stop token id", "999999"]),
        ("generate x --decoding telepathy", ["unknown drafter", "telepathy", "ngram"]),
        ("generate x --decoding ngram --draft-model y", ["--draft-model", "ngram"]),
        ("generate x --decoding ngram --decoding-config {{", ["--decoding-config", "invalid JSON"]),
        ("generate x --decoding ngram --decoding-config [1]", ["--decoding-config", "JSON object"]),
        ('generate x --decoding ngram --decoding-config {{"depht":3}}', ["depht", "did you mean 'depth'"]),
        ("generate x --verification hope", ["verification", "hope"]),
        ("generate x --exactness almost", ["exactness", "almost"]),
        ("generate x --dtype int8", ["dtype", "int8"]),
        ("generate x --weights int3", ["weights", "int3", "int4"]),
        ("generate x --group-size 48", ["group_size", "48"]),
        ("generate x --cache-dtype int4", ["cache.dtype", "int4"]),
        ("generate x --device quantum", ["device", "quantum"]),
        ("generate x --cache-gb 0", ["memory_gb"]),
        ("generate x --cache-gb nan", ["memory_gb"]),
        ("generate x --max-num-seqs 0", ["max_num_seqs"]),
        ("generate x --threads 0", ["--threads"]),
        ("generate x --model {empty}", ["--model"]),
        ("generate x --model /no/such/folder", ["/no/such/folder"]),
        ("generate x --stream --json", ["--stream"]),
        ("generate x --stream -n 2", ["--stream"]),
        ("generate x --resume", ["--resume", "--output"]),
        ("generate x --output /no/such/folder/file", ["/no/such/folder/file"]),
        ("generate --prompts /no/such/file", ["/no/such/file", "No such file"]),
        ("verify --prompts 0", ["--prompts"]),
        ("verify --batch-sizes 1,x", ["--batch-sizes"]),
        ("verify --batch-sizes 0", ["--batch-sizes"]),
        ("verify --temperatures 0,hot", ["--temperatures"]),
        ("verify --temperatures 0.5 --verification rejection", ["exact in distribution"]),
        ("verify --decoding telepathy", ["telepathy"]),
        ("verify --output /no/such/folder/file", ["/no/such/folder/file"]),
        ("bench decode --repeats 0", ["--repeats"]),
        ("bench decode --decoding telepathy", ["telepathy"]),
        ("bench decode --temperature -1", ["temperature"]),
        ("bench decode --max-tokens -4", ["max_tokens", "-4"]),
        ("bench decode --draft-model /no/such/folder", ["/no/such/folder", "nothing there"]),
        ("bench decode --telepathy", ["--telepathy", "bench decode --help`"]),
        ("telepathy", ["telepathy", "--help`"]),
        ("--telepathy", ["--telepathy", "--help`"]),
        ("methods telepathy", ["telepathy", "methods --help`"]),
        ("advise --seconds soon", ["--seconds", "advise --help`"]),
        ("datastore build -o x", ["files"]),
        ("datastore build /no/such/file -o x", ["/no/such/file", "expected a readable file"]),
        ("datastore build / -o x", ["Is a directory"]),
        ("datastore build /dev/null -o x", ["nothing in any of them"]),
        ("datastore build /etc/passwd -o /no/such/folder/x", ["--output", "/no/such/folder/x", "create it"]),
        ("datastore build /etc/passwd -o /", ["--output", "the folder /"]),
        ("datastore info /no/such/file", ["/no/such/file", "expected", "check its name"]),
        ("bench decode --output /no/such/folder/file", ["/no/such/folder/file"]),
        ("demo {empty}", ["prompt"]),
        ("demo --temperature nan", ["temperature"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: str, words: list[str]) -> None:
    parts = [part.format(empty="") for part in arguments.split()]
    assert_one_error_line(run(*parts), *words)


def test_an_unknown_level_of_instructions() -> None:
    environment = {**os.environ, "OUTRIDER_ISA": "sse9"}
    done = subprocess.run([*COMMAND, "generate", "x"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: OUTRIDER_ISA: got 'sse9', expected one of")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_weights_reach_the_model(weights: str) -> None:
    llm = EngineOptions(weights=weights, group_size=32, cache_dtype="bfloat16").load("none")
    assert isinstance(llm.model, LlamaModel) or not native.is_available()
    assert (llm.config.weights, llm.config.group_size) == (weights, 32)
    if native.is_available():
        assert llm.config.exactness == "bitwise"
        assert llm.engine.cache.keys[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["no lines"]),
        ("blank.txt", b"\n \n", ["no lines"]),
        ("latin.txt", b"caf\xe9\n", ["0xe9", "offset 3", "UTF-8"]),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "invalid JSON"]),
        ("other.jsonl", b'{"text": "a"}\n', ["line 1", "prompt"]),
        ("number.jsonl", b'{"prompt": 3}\n', ["line 1", "prompt"]),
        ("surrogate.jsonl", b'{"prompt": "\\ud800"}\n', ["line 1", "character 0"]),
        ("ids.jsonl", b'{"prompt_token_ids": [1, 999999]}\n', ["prompt token id", "999999"]),
        ("words.jsonl", b'{"prompt_token_ids": ["a"]}\n', ["prompt token id"]),
        ("none.jsonl", b'{"prompt_token_ids": []}\n', ["no tokens"]),
        ("long.txt", b"x " * 3000, ["prompt length", "shorten"]),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_one_error_line(run("generate", "--prompts", str(path), "--decoding", "none"), *words)


def test_bad_model_folders(tmp_path: Path) -> None:
    assert_one_error_line(run("generate", "x", "--model", str(tmp_path)), "config.json")
    folder = make_tiny("llama", tmp_path / "tiny")
    for path in folder.glob("*token*"):
        path.unlink()
    assert_one_error_line(run("generate", "x", "--model", str(folder)), "tokenizer")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_one_error_line(run("generate", "x", "--model", str(folder)), "pickle")


def test_own_model_wants_a_draft_for_draft_model() -> None:
    result = run("generate", "x", "--model", BUNDLED_TARGET, "--decoding", "draft_model")
    assert_one_error_line(result, "draft model", "--draft-model")


def test_usage_errors_end_with_status_2() -> None:
    for arguments in (["generate", "x", "--max-tokens", "many"], ["generate", "x", "--no-such"], ["divine"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


# --- verify, bench, demo


def test_verify_finds_equal_outputs_in_bitwise_mode(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = "--prompts 3 --max-tokens 6 --batch-sizes 1,2 --exactness bitwise --temperatures 0,1"
    result = run("verify", *options.split(), "--output", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    # 2 settings x 3 prompts x (drafters x 2 batch sizes + plain decoding at batch 2)
    num_outputs = 2 * 3 * (2 * (len(ALL) - 1) + 1)
    assert report["num_outputs"] == report["num_equal"] == num_outputs
    assert {cell["drafter"] for cell in report["cells"]} == set(ALL)
    assert f"{num_outputs} of {num_outputs} outputs are equal" in result.stdout


@pytest.mark.parametrize(("verdict", "status"), [("tie", 0), ("bug", 1)])
def test_verify_fails_for_bugs_and_not_for_ties(monkeypatch: pytest.MonkeyPatch, verdict: str, status: int) -> None:
    from outrider.losslessness import report
    from outrider.models.llama import LlamaModel
    from outrider.verification.coupled import CoupledRule, VerifyResult

    right = CoupledRule.verify

    def shifted(self, trees, target_log_probs, decisions):
        paths = right(self, trees, target_log_probs, decisions).paths
        drafted = trees.num_nodes > len(trees.trees)
        return VerifyResult(
            tuple(type(path)(path.accepted_nodes, (path.next_token + drafted) % 4096) for path in paths),
            (None,) * len(paths),
        )

    if verdict == "tie":

        def explain(model, divergence):
            return Explanation("tie", "by decree", divergence.position, 1, 2, top_two=((1, 0.0), (2, 0.0)))

        monkeypatch.setattr(report, "explain_divergence", explain)
    monkeypatch.setattr(CoupledRule, "verify", shifted)
    monkeypatch.setattr(LlamaModel, "choose", lambda *_, **__: None)  # so that the rule is asked
    options = "--decoding recycling --prompts 2 --max-tokens 12 --batch-sizes 1 --temperatures 0 --json"
    result = run("verify", *options.split())
    assert result.exit_code == status, result.output
    found = json.loads(result.stdout)
    assert found["num_ties" if verdict == "tie" else "num_bugs"] > 0
    assert {mismatch["verdict"] for mismatch in found["mismatches"]} == {verdict}


def test_verify_restricts_rejection_rules_to_greedy() -> None:
    options = "--verification rejection --decoding ngram --prompts 2 --max-tokens 4 --batch-sizes 1 --json"
    result = run("verify", *options.split(), "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert {cell["setting"] for cell in json.loads(result.stdout)["cells"]} == {"greedy", "greedy, penalties"}


def test_bench_decode_records_everything(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    options = "--prompts 2 --max-tokens 6 --repeats 2 --dtype float32 --output"
    result = run("bench", "decode", *options.split(), str(path))
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    names = [of["name"] for of in record["results"]]
    ours, theirs = ALL, ["plain", "assisted", "prompt lookup"]
    assert names == ours + [f"transformers {name}" for name in theirs]
    assert all(len(of["samples"]) == 2 for of in record["results"])
    assert all(of["num_equal"] == of["num_outputs"] == 2 for of in record["results"])
    assert record["results"][0]["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert record["prompts"]["count"] == 2
    assert re.fullmatch("[0-9a-f]{64}", record["prompts"]["sha256"])
    assert {"command", "commit", "versions", "machine", "config", "warm_up", "repeats", "date"} <= record.keys()
    assert all(name in result.stdout for name in names)


def test_bench_decode_in_batches_and_sampled() -> None:
    options = "--prompts 3 --max-tokens 4 --repeats 1 --batch-size 2 --temperature 0.8 --decoding none --json"
    record = json.loads(run("bench", "decode", *options.split()).stdout)
    plain, theirs = record["results"]
    assert theirs["name"] == "transformers plain"  # assisted decoding there is for single prompts
    assert theirs["num_equal"] is None
    assert plain["num_equal"] == 3


def test_demo_shows_code_and_speeds() -> None:
    result = run("demo", "--max-tokens", "8", "--temperature", "0.8")
    assert result.exit_code == 0, result.output
    assert "def flatten(items):" in result.stdout
    for name in ("none", "ngram", "recycling", "draft_model"):
        assert re.search(rf"{name} .*x .*/1", result.stdout)


# --- the process


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    # A shell's background jobs ignore interruptions, and so would what they start.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND[-1]}"
    command = [*COMMAND[:-1], code, *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, **options)


def test_version_and_help_need_no_torch() -> None:
    code = "import sys\nsys.argv = ['outrider', *sys.argv[1:]]\nfrom outrider.cli.app import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    for arguments, expected in (
        (["--version"], f"outrider {__version__}\n"),
        (["bench", "decode", "--help"], "--repeats"),
        (["serve", "--help"], "--served-model-name"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert expected in done.stdout
        assert done.stderr == "False\n"


def test_an_interruption_loses_nothing_and_is_quiet(tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("".join(f"x{i} = \n" for i in range(4000)))
    options = ("--max-num-seqs", "1", "--max-tokens", "40", "--decoding", "none", "--ignore-eos", "--seed", "1")
    process = start("generate", "--prompts", str(prompts), "--output", str(results), *options)
    deadline = time.monotonic() + 120
    while (not results.exists() or results.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (stdout, stderr) == ("", "interrupted\n")
    found = records(results.read_text())
    assert 2 <= len(found) < 4000
    assert all(len(record["token_ids"]) == 40 for record in found)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x = \n" * 32)
    process = start("generate", "--prompts", str(prompts), "--json", "--max-num-seqs", "1", "--max-tokens", "4")
    assert process.stdout is not None
    assert process.stdout.readline().startswith('{"index": 0')
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
