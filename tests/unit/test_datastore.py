"""REST's datastore: order and lookups against naive scans, and no file that is not whole and right is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from outrider.cli import datastore as command
from outrider.cli.app import app
from outrider.config import DatastoreConfig
from outrider.drafting.drafter import DraftContext
from outrider.drafting.sources import datastore_build
from outrider.drafting.sources.datastore import ESCAPE, DatastoreSource
from outrider.drafting.sources.datastore_build import SORT_BYTES_PER_TOKEN, DatastoreWriter, sorted_suffixes
from outrider.drafting.sources.datastore_file import (
    HEADER,
    HEADER_BYTES,
    SORTED_TOKENS,
    check_body,
    open_datastore,
    read_header,
)
from outrider.engine.build import BUNDLED_TARGET
from outrider.errors import ConfigError, LookupFileError, VocabularyMismatchError
from outrider.inputs.tokenizer import Tokenizer
from outrider.models.loader import load_tokenizer
from outrider.sampling.params import SamplingParams

FINGERPRINT = bytes(range(32))
GREEDY = SamplingParams(temperature=0.0)


def write(path: Path, documents: list[list[int]], *, vocab_size: int = 100, chunk_tokens: int = 1024) -> Path:
    with DatastoreWriter(
        path,
        vocab_size=vocab_size,
        fingerprint=FINGERPRINT,
        max_memory_bytes=chunk_tokens * SORT_BYTES_PER_TOKEN,
    ) as writer:
        for document in documents:
            writer.add(document[:3])
            writer.add(document[3:])
            writer.end_document()
    return path


def source(path: Path, *, vocab_size: int = 2**20, **settings: object) -> DatastoreSource:
    config = DatastoreConfig(path=str(path), **settings)  # type: ignore[arg-type]
    return DatastoreSource(config, vocab_size=vocab_size, vocab_fingerprint=lambda: FINGERPRINT)


def context(tokens: list[int], request_id: str = "r") -> DraftContext:
    return DraftContext(request_id, tokens, len(tokens), 64, 64, GREEDY, 0, frozenset())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datastore_build, "MIN_CHUNK_TOKENS", 1)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=150))
def test_suffixes_are_sorted(tokens: list[int]) -> None:
    order = sorted_suffixes(np.array(tokens, dtype=">u2")).tolist()
    assert sorted(order) == list(range(len(tokens)))
    suffixes = [tokens[at : at + SORTED_TOKENS] for at in order]
    assert suffixes == sorted(suffixes)


def documents() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 6, size).tolist() for size in (200, 1, 90, 300, 40)]


@pytest.mark.parametrize("vocab_size", [100, 2**16 - 1, 2**16, 150_000])
@pytest.mark.parametrize("chunk_tokens", [100, 641, 5000])
@pytest.mark.usefixtures("small_chunks")
def test_lookups_find_what_a_scan_finds(tmp_path: Path, chunk_tokens: int, vocab_size: int) -> None:
    """The longest suffix, and how often each token follows it; texts end at documents and at chunks."""
    texts = documents()
    path = write(tmp_path / "store", texts, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
    drafter = source(path, num_lengths=1, num_samples=4096, depth=1)
    corpus = [token for text in texts for token in (*text, -1)]
    chunks = [corpus[at : at + chunk_tokens] for at in range(0, len(corpus), chunk_tokens)]
    text = np.random.default_rng(4).integers(0, 6, 60).tolist()
    text += [90, 5, 1, 2]
    for end in range(1, len(text) + 1):
        followed: Counter[int] = Counter()
        longest = 0
        for length in range(16, 0, -1):
            query = text[max(0, end - length) : end]
            for chunk in chunks:
                for at in range(len(chunk) - len(query) + 1):
                    if chunk[at : at + len(query)] == query:
                        followed[chunk[at + len(query)] if at + len(query) < len(chunk) else -1] += 1
            if followed:
                longest = len(query)
                break
        total = followed.total() + len(followed) * ESCAPE / max(longest, 1)
        expected = {token: count / total for token, count in followed.items() if token >= 0}
        paths = drafter.continuations(context(text[:end]))
        assert {path.tokens[0]: path.confidences[0] for path in paths} == pytest.approx(expected)


def test_continuations_keep_their_ratios_in_a_sample(tmp_path: Path) -> None:
    texts = [[1, 2, 3, 4]] * 300 + [[1, 2, 5, 6]] * 100
    drafter = source(write(tmp_path / "store", texts, chunk_tokens=5000), num_samples=40, num_lengths=1, depth=2)
    best, second = drafter.continuations(context([9, 1, 2]))
    assert (best.tokens, second.tokens) == ([3, 4], [5, 6])
    assert best.confidences[0] == pytest.approx(300 / (400 + 2 * ESCAPE / 2))
    assert best.confidences[1] == pytest.approx(300 / (300 + ESCAPE / 3))


def test_a_shorter_suffix_with_many_more_matches_is_looked_at_too(tmp_path: Path) -> None:
    path = write(tmp_path / "store", [[7, 1, 2, 50], *[[1, 2, 60]] * 9, *[[2, 70]] * 9])
    assert {p.tokens[0] for p in source(path, num_lengths=1).continuations(context([7, 1, 2]))} == {50}
    assert {p.tokens[0] for p in source(path).continuations(context([7, 1, 2]))} == {50, 60}


def test_tokens_beyond_the_tokenizer_match_nothing(tmp_path: Path) -> None:
    drafter = source(write(tmp_path / "store", [[1, 2, 3]]))
    assert drafter.continuations(context([1, 2, 70_000])) == []
    assert drafter.continuations(context([1, 2, 70_000, 1]))[0].tokens == [2, 3]
    drafter.release("r")
    assert not drafter._last_match
    narrow = source(tmp_path / "store", vocab_size=3)
    assert narrow.continuations(context([1]))[0].tokens == [2], "a model may know fewer tokens than its tokenizer"


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_a_growing_context_is_matched_as_a_new_one(
    tmp_path_factory: pytest.TempPathFactory, text: list[int], data: st.DataObject
) -> None:
    drafter = source(write(tmp_path_factory.mktemp("d") / "store", documents()))
    end = 0
    while end < len(text):
        end = data.draw(st.integers(end + 1, len(text)))
        grown = drafter.continuations(context(text[:end]))
        assert grown == drafter.continuations(context(text[:end], f"new at {end}"))


# Files


def test_nothing_is_looked_for_where_nothing_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is proposed later is the same."""
    path = write(tmp_path / "store", [[1, 2, 3, 4, 5, 6, 7, 8]])
    asked, unasked = source(path), source(path)
    for length in range(1, 5):
        asked.continuations(context([1, 2, 3, 4, 5, 6][:length]))
        with monkeypatch.context() as patch:
            patch.setattr(unasked, "_search", None)
            assert not unasked.continuations(replace(context([1, 2, 3, 4, 5, 6][:length]), max_nodes=0))
    later = context([1, 2, 3, 4, 5, 6])
    assert unasked.continuations(later) == asked.continuations(later) != []


def test_a_damaged_datastore_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "store", documents())
    content = path.read_bytes()
    bad = tmp_path / "bad"

    def refused(damaged: bytes) -> None:
        bad.write_bytes(damaged)
        with pytest.raises(LookupFileError, match="build it again"):
            open_datastore(bad, fingerprint=FINGERPRINT)

    for length in [*range(0, HEADER_BYTES, 37), *range(HEADER_BYTES, len(content), 501), len(content) - 1]:
        refused(content[:length])
    refused(content + b"\0")
    refused(b"something else" * 1000)
    for bit in range(8 * (HEADER.size + 32 + 2)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(bytes(damaged))


def test_damage_behind_the_header_is_found_by_a_check_and_gives_no_foreign_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "store", documents())
    header = read_header(path)
    check_body(path, header)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        damaged[HEADER_BYTES:] ^= np.where(rng.random(len(content) - HEADER_BYTES) < 0.2, 255, 0).astype(np.uint8)
        path.write_bytes(damaged.tobytes())
        with pytest.raises(LookupFileError, match="damaged"):
            check_body(path, header)
        drafter = source(path)
        for last in range(6):
            for found in drafter.continuations(context([last], f"{last}")):
                assert all(0 <= token < 100 for token in found.tokens)


def test_a_datastore_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "store", documents())
    with pytest.raises(VocabularyMismatchError, match="outrider datastore build"):
        open_datastore(path, fingerprint=bytes(32))
    with pytest.raises(ConfigError, match="no path"):
        DatastoreSource(DatastoreConfig(), vocab_size=100, vocab_fingerprint=lambda: FINGERPRINT)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "store"

    def interrupted() -> None:
        with DatastoreWriter(path, vocab_size=10, fingerprint=FINGERPRINT, max_memory_bytes=1 << 20) as writer:
            writer.add([1] * 50_000)
            raise error

    with pytest.raises(error):
        interrupted()
    assert not list(tmp_path.iterdir())
    write(path, [[1, 2]])
    before = path.read_bytes()
    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == before
    assert [at.name for at in tmp_path.iterdir()] == ["store"]


def test_memory_bounds_the_chunks(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with DatastoreWriter(path, vocab_size=10, fingerprint=FINGERPRINT, max_memory_bytes=100_000) as writer:
        for _ in range(30):
            writer.add([1, 2, 3] * 100)
            assert sum(part.nbytes for part in writer._parts) < 100_000 / 10
    lengths = read_header(path).chunk_lengths
    assert len(lengths) == 5
    assert max(lengths) * SORT_BYTES_PER_TOKEN <= 100_000
    with pytest.raises(ConfigError):
        DatastoreWriter(path, vocab_size=10, fingerprint=FINGERPRINT, max_memory_bytes=1000)


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["datastore", *map(str, arguments)])


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"def {name[0]}(self):\n    return self.value\n" * 40)
    return [tmp_path / "a.py", tmp_path / "b.py"]


def test_build_and_info(tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PIECE_BYTES", 100)  # several pieces of a file
    result = run("build", *texts, "--output", tmp_path / "store", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["documents"] == 2
    tokenizer = Tokenizer(load_tokenizer(BUNDLED_TARGET))
    assert record["vocab_fingerprint"] == tokenizer.fingerprint.hex()
    said = json.loads(run("info", tmp_path / "store", "--check", "--json").stdout)
    assert said == {key: record[key] for key in said}
    drafter = DatastoreSource(
        DatastoreConfig(path=str(tmp_path / "store")),
        vocab_size=4096,
        vocab_fingerprint=lambda: tokenizer.fingerprint,
    )
    query = tokenizer.encode("x = 1\n\ndef a(self):\n    return self", add_special_tokens=False)
    tokens = list(drafter.continuations(context(query))[0].tokens)
    assert tokenizer.decode(tokens).startswith(".value\n")


def test_what_cannot_be_built_is_refused(tmp_path: Path, texts: list[Path]) -> None:
    out = tmp_path / "store"
    assert_refused(run("build", *texts, tmp_path / "missing", "--output", out), "missing")
    assert_refused(run("build", *texts, "--output", tmp_path / "nowhere" / "store"), "nowhere")
    assert_refused(run("build", *texts, "--output", out, "--max-memory", 0), "--max-memory")
    assert_refused(run("info", texts[0]), "another kind of file")
    assert not out.exists()


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces(_path: Path) -> Iterator[bytes]:
        yield b"def f():\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_pieces", pieces)
    result = run("build", *texts, "--output", tmp_path / "store")
    assert result.exit_code == 130
    assert sorted(at.name for at in tmp_path.iterdir()) == ["a.py", "b.py"]
