"""The commands `outrider bench kernels` and `outrider bench forward`: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from outrider.bench import forward
from outrider.bench.forward import BandwidthProbe
from outrider.cli.app import app
from outrider.kernels import native

needs_kernels = pytest.mark.skipif(not native.is_available(), reason="no compiled kernels")


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small probe that always agrees with itself, and the threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(forward, "probe_bytes", lambda: 1 << 16)
    monkeypatch.setattr(BandwidthProbe, "__call__", lambda self: 50e9)
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@needs_kernels
def test_forward_command_prints_and_writes_one_object_and_a_picture(steady: None, tmp_path: Path) -> None:
    output, picture = tmp_path / "result.json", tmp_path / "slack.png"
    result = run(
        *("forward", "--params", "12M", "--weights", "int4, bf16", "--rows", "4,1", "--context", "3"),
        *("--prefill", "8", "--repeats", "2", "--threads", "1"),
        *("--json", "--output", str(output), "--plot", str(picture)),
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads(output.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [(row["weights"], row["m"]) for row in record["rows"]] == [
        ("bf16", 1),
        ("bf16", 4),
        ("int4", 1),
        ("int4", 4),
    ]
    keys = {"weights", "m", "ms", "ms_min", "ms_max", "gbps", "share", "gflops", "kernel_ms", "num_samples"}
    for row in [*record["rows"], *record["prefill"]]:
        assert keys <= row.keys()
        assert row["num_samples"] == row["num_tried"] == 2
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert 0 < row["kernel_ms"] <= row["ms_max"]
    assert [row["m"] for row in record["prefill"]] == [8, 8]
    config = record["config"]
    assert (config["threads"], config["isa"], config["rows"]) == (1, native.isa(), [1, 4])
    assert config["weight_bytes"]["bf16"] == 2 * config["num_params"]
    assert record["probe"]["num_probes"] == 2 * 6 + 1
    assert {"versions", "machine", "commit", "date"} <= record.keys()


@needs_kernels
def test_a_forward_of_several_sequences_has_the_tokens_of_all(steady: None) -> None:
    result = run(
        *("forward", "--params", "12M", "--weights", "int4", "--rows", "1,2", "--sequences", "3", "--context", "20"),
        *("--prefill", "0", "--repeats", "1", "--json"),
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert [row["m"] for row in record["rows"]] == [3, 6]
    assert (record["config"]["sequences"], record["config"]["rows"]) == (3, [3, 6])
    assert_one_error_line(run("forward", "--sequences", "0"), "--sequences", "1 to 1024")


@needs_kernels
def test_kernels_command_prints_a_table_of_the_bundled_model(steady: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 1.0, 1.0))
    result = run("kernels", "--rows", "1,2", "--repeats", "2", "--weights", "int8")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("bundled model (6M weights read), linear layers alone")
    cells = [line.split() for line in lines if line.split()[:1] == ["int8"]]
    assert [(row[1], row[-1]) for row in cells] == [("1", "2/2"), ("2", "2/2")]
    assert cells[0][4] == "1.00"
    assert "in kernels" not in result.stdout
    assert "Kept 4 of 4 runs" in lines[-2]
    assert "load average 100.0" in lines[-1]


@needs_kernels
def test_an_interruption_prints_what_there_is(steady: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter([50e9] * 3)

    def probe(self: BandwidthProbe) -> float:
        try:
            return next(probes)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(BandwidthProbe, "__call__", probe)
    result = run("forward", "--params", "12M", "--weights", "int4", "--rows", "1,2,4", "--json")
    assert result.exit_code == 130
    assert [row["m"] for row in json.loads(result.stdout)["rows"]] == [1, 2]
    assert result.stderr == "interrupted\n"


@needs_kernels
@pytest.mark.parametrize("command", ["kernels", "forward"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "int3"), ("--weights", "'int3'", "bf16")),
        (("--weights", ""), ("--weights", "''")),
        (("--rows", "0"), ("--rows", "1 to 4096")),
        (("--rows", "1,5000"), ("--rows", "5000")),
        (("--rows", "1,x"), ("--rows", "'1,x'", "integers")),
        (("--repeats", "0"), ("--repeats", "1 to 1000")),
        (("--group-size", "48"), ("--group-size", "48", "(32, 64, 128)")),
        (("--threads", "0"), ("--threads",)),
        (("--params", "huge"), ("--params", "'huge'", "0.5B")),
        (("--params", "1M"), ("--params", "at least")),
        (("--params", "900B"), ("memory", "GiB needed", "--weights")),
        (("--params", "1B", "--model", "folder"), ("--model and --params", "both")),
        (("--model", ""), ("--model", "nothing")),
        (("--model", "no/such/folder"), ("config.json", "--params")),
        (("--plot", "picture.doc"), ("--plot", ".png")),
        (("--output", "no/such/folder/result.json"), ("No such file",)),
    ],
)
def test_bad_options_are_one_line(command: str, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_error_line(run(command, *arguments), *words)


@needs_kernels
def test_a_context_beyond_the_model_is_refused() -> None:
    result = run("forward", "--context", "1000")
    assert_one_error_line(result, "--context", "1064 positions", "at most 1024")
    assert_one_error_line(run("forward", "--prefill", "-1"), "--prefill")


@pytest.mark.parametrize(("isa", "words"), [("reference", ("compiled kernels", "OUTRIDER_ISA")), ("z80", ("'z80'",))])
def test_there_is_nothing_to_measure_without_kernels(
    isa: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    assert_one_error_line(run("kernels", "--params", "12M"), *words)


def assert_one_error_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
