"""Prompts of every workload: what they are made of, that they are always the same, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from outrider.bench import editing, held_out
from outrider.bench.data_sets import data_set_prompts
from outrider.bench.editing import edit_prompt, edit_prompts
from outrider.bench.workloads import WORKLOADS, Workload, open_workload, random_prompts
from outrider.cli.prompts import chosen_workload
from outrider.errors import ConfigError, PromptError

FUNCTION = "def add(first, other):\n    total = first\n    total += other\n    print(total)\n    return total\n"


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


# --- editing


def test_an_edit_prompt_is_rewritten_versions_and_the_beginning_of_the_last() -> None:
    made = edit_prompt(FUNCTION)
    assert made is not None
    prompt, rest = made
    versions = [FUNCTION.replace("total", name) for name in ("value", "item", "result")]
    assert prompt.startswith(FUNCTION + "\n\n# total renamed to value\n" + versions[0])
    assert "# total renamed to item\n" + versions[1] in prompt
    assert (prompt + rest).endswith("# total renamed to result\n" + versions[2].rstrip("\n"))
    assert prompt.endswith("    result = first")
    assert rest.count("\n") == 3


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    return 1\n",  # no variable
        "def f(self):\n    return len(self.x) + len(self.y)\n",  # none of its own
        "def f(value, item, result, data):\n    return value + value\n",  # the new names are taken
        "    def f(a):\n  return a + a",  # no code
    ],
)
def test_what_has_nothing_to_rename_makes_no_prompt(code: str) -> None:
    assert edit_prompt(code) is None


def test_names_are_renamed_as_words() -> None:
    made = edit_prompt("def f(on):\n    once = on + on\n    return once, on\n")
    assert made is not None
    assert "    once = value + value\n" in made[0]


def test_edit_prompts_are_of_chosen_functions_and_always_the_same() -> None:
    prompts, source = edit_prompts(8)
    assert edit_prompts(8) == (prompts, source)
    assert len(set(prompts)) == 8
    assert "held-out" in source
    for prompt in prompts:
        assert prompt.count(" renamed to ") == editing.NUM_REWRITES
    many, _ = edit_prompts(200)
    assert len(many) == 200
    assert many[:8] == prompts


def test_built_in_edits_where_there_is_no_library_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "held_out_files", list)
    prompts, source = edit_prompts(3)
    assert "built-in" in source
    assert prompts[0] == prompts[2] != prompts[1]


def test_chosen_functions_are_of_held_out_modules() -> None:
    modules = json.loads(held_out.HELD_OUT.read_text())["modules"]
    chosen = json.loads(editing.CHOSEN.read_text())
    assert len(chosen["functions"]) >= 16
    for name, _ in chosen["functions"]:
        assert any(name == f"{module}.py" or name.startswith(f"{module}/") for module in modules), name


# --- random tokens


def test_random_prompts_are_the_same_for_a_vocabulary_and_without_special_tokens() -> None:
    prompts = random_prompts(3, 50, 20, special=(0, 7))
    assert prompts == random_prompts(3, 50, 20, special=(0, 7))
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(len(prompt) == 50 for prompt in prompts)
    assert {token for prompt in prompts for token in prompt} == set(range(20)) - {0, 7}


def test_the_random_workload_is_hot() -> None:
    workload = open_workload("random", 2)
    assert workload.temperature >= 1.5
    assert len(workload.encode(encode, vocab_size=9, room=5)) == 2


# --- data sets


def spec_bench(path: Path) -> Path:
    records = [{"category": c, "turns": [f"{c} {i}", "more"]} for c in ("math", "qa") for i in range(3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_spec_bench_takes_its_categories_in_turn(tmp_path: Path) -> None:
    prompts, source = data_set_prompts("spec_bench", str(spec_bench(tmp_path / "question.jsonl")))
    assert prompts == ["math 0", "qa 0", "math 1", "qa 1", "math 2", "qa 2"]
    assert source == "question.jsonl, 6 prompts"
    assert data_set_prompts("spec_bench", str(tmp_path))[0] == prompts


def test_humaneval_packed_or_not(tmp_path: Path) -> None:
    data = b'{"prompt": "def f():"}\n{"prompt": "def g():"}\n'
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(data))
    assert data_set_prompts("humaneval", str(tmp_path))[0] == ["def f():", "def g():"]
    (tmp_path / "HumanEval.jsonl").write_bytes(data)
    assert data_set_prompts("humaneval", str(tmp_path / "HumanEval.jsonl"))[0] == ["def f():", "def g():"]


def test_prompts_of_a_data_set_that_have_no_room_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * size}) + "\n" for size in (9, 3, 9, 4)))
    workload = open_workload("humaneval", 2, str(path))
    assert [len(ids) for ids in workload.encode(encode, vocab_size=128, room=5)] == [3, 4]
    with pytest.raises(PromptError, match=r"at most 3 tokens: got 1, expected 2"):
        workload.encode(encode, vocab_size=128, room=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no records"),
        (b"not json\n", "JSONDecodeError"),
        (b'{"text": 1}\n', "'prompt'"),
        (b"[1]\n", "without"),
        (b"\x1f\x8bbroken", "BadGzipFile|EOFError|error"),
        (b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_files_that_are_no_data_set(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=words):
        data_set_prompts("humaneval", str(path))


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        open_workload("spec_bench", 1)
    with pytest.raises(PromptError, match=r"none of question\.jsonl"):
        open_workload("spec_bench", 1, str(tmp_path))
    with pytest.raises(PromptError, match="No such file"):
        open_workload("humaneval", 1, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"poetry.*code, edit"):
        open_workload("poetry", 1)
    with pytest.raises(ConfigError, match="--data"):
        open_workload("code", 1, "file")


# --- the command line's choice


def test_a_count_or_a_file(tmp_path: Path) -> None:
    assert chosen_workload(None, None, None, 3).count == 3
    assert chosen_workload(None, "5", None, 3).name == "code"
    assert chosen_workload("edit", "2", None, 3).name == "edit"
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab"}\n{"prompt_token_ids": [5, 6]}\n')
    workload = chosen_workload(None, str(path), None, 3)
    ids = workload.encode(encode, vocab_size=128, room=1)  # a user's own prompts are never passed over
    assert (workload.name, ids) == ("file", [[97, 98], [5, 6]])
    with pytest.raises(ConfigError, match="one of them"):
        chosen_workload("code", str(path), None, 3)


def test_records_name_workload_and_hash() -> None:
    record = Workload("code", "somewhere", 2, ["a", "bc"]).record([[1], [2, 3]])
    assert record["workload"] == "code"
    assert record["num_tokens"] == [1, 2]
    assert record["sha256"] != Workload("code", "somewhere", 2, ["a", "bc"]).record([[1], [2, 4]])["sha256"]
    assert set(WORKLOADS) == {"code", "edit", "random", "spec_bench", "humaneval"}
