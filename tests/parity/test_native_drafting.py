"""What drafting computes in compiled code, against the same in Python: equal to the bit, orders included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.bench.replay import Recording, SyntheticTarget, replay
from outrider.config import drafter_config
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.context_recycling import GREEDY_CHOSEN, GREEDY_SEEN
from outrider.drafting.context_table import PlaceNoise, learn_chosen, new_table
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.recycled_text import PythonText, new_rates, new_text
from outrider.drafting.sources import datastore_build
from outrider.drafting.sources.anpd import PythonModel, new_model
from outrider.drafting.sources.calibration import Calibration, PythonBins
from outrider.drafting.sources.datastore import PythonSearch, new_search
from outrider.drafting.sources.datastore import SearchLimits as DatastoreLimits
from outrider.drafting.sources.datastore_build import SORT_BYTES_PER_TOKEN, DatastoreWriter
from outrider.drafting.sources.datastore_file import open_datastore
from outrider.drafting.sources.hash_index import PythonIndex, new_index
from outrider.drafting.sources.matches import END_OF_TEXT, MAX_LENGTH, weighted_paths
from outrider.drafting.sources.suffix_guesses import SuffixLimits, SuffixSearch, best_guesses
from outrider.drafting.sources.suffix_index import PythonCursor, PythonTree, new_cursor, new_tree
from outrider.drafting.sources.trigrams import PythonMatrix, SearchLimits, new_matrix, search
from outrider.drafting.top_tokens import top_tokens
from outrider.drafting.tree_merge import WeightedPath, merge_paths
from outrider.kernels import native
from outrider.kernels.drafting import compiled, largest
from outrider.kernels.native import MAXIMA_BLOCK, REFERENCE
from outrider.sampling.noise import Purpose, gumbel_noise, rank_with_noise
from outrider.token_tree import TokenTree
from tests.parity.kernel_levels import LEVELS, use_level, use_threads

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiled code to compare with")

MASK = 2**64 - 1
TOKENS = st.integers(0, 3)


def plain(paths: list[WeightedPath]) -> list[tuple[list[int], list[float]]]:
    return [(list(path.tokens), list(path.confidences)) for path in paths]


@given(
    st.lists(st.tuples(st.lists(TOKENS, max_size=6), st.integers(0, MAX_LENGTH)), max_size=12),
    st.integers(0, 6),
    st.sampled_from([list, tuple, lambda tokens: np.array(tokens, dtype=np.int64)]),
)
def test_weighted_paths(candidates: list[tuple[list[int], int]], max_paths: int, kind: type) -> None:
    candidates.sort(key=lambda candidate: -candidate[1])
    compiled = weighted_paths([(kind(tokens), length) for tokens, length in candidates], max_paths)
    with use_level(REFERENCE):
        assert plain(compiled) == plain(weighted_paths(candidates, max_paths))


@given(
    st.lists(st.lists(st.tuples(TOKENS, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])), max_size=6), max_size=8),
    st.integers(0, 12),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_merged_trees(found: list[list[tuple[int, float]]], max_nodes: int, max_depth: int, least: float) -> None:
    paths = [WeightedPath([token for token, _ in path], [prob for _, prob in path]) for path in found]
    compiled = merge_paths(7, paths, max_nodes, max_depth=max_depth, min_path_prob=least)
    with use_level(REFERENCE):
        python = merge_paths(7, paths, max_nodes, max_depth=max_depth, min_path_prob=least)
    assert compiled.tokens == python.tokens
    assert compiled.parents == python.parents
    assert compiled.confidences == python.confidences


@given(
    st.lists(TOKENS, min_size=2, max_size=60),
    st.lists(st.tuples(st.none() | TOKENS, TOKENS, TOKENS), max_size=20),
    st.tuples(st.sampled_from([2, 5, 100]), st.integers(1, 5), st.sampled_from([0.1, 0.5, 0.9])),
    st.builds(
        SearchLimits,
        num_candidates=st.integers(1, 5),
        exploration=st.sampled_from([0.0, 0.1, 3.0]),
        max_nodes=st.integers(0, 20),
        max_depth=st.integers(0, 6),
        min_path_prob=st.sampled_from([0.001, 0.01, 0.2]),
    ),
)
def test_trigrams(
    text: list[int],
    observed: list[tuple[int | None, int, int]],
    settings: tuple[int, int, float],
    limits: SearchLimits,
) -> None:
    """Learnt in pieces, in a matrix of its own and in a shared one."""
    compiled = [new_matrix(*settings), new_matrix(*settings)]
    python = [PythonMatrix(*settings), PythonMatrix(*settings)]
    for own, shared in (compiled, python):
        own.learn_text(text[: len(text) // 2], 1)
        own.learn_text(text, max(1, len(text) // 2))
        for before, last, token in observed:
            shared.learn(before, last, token)
    assert not any(isinstance(matrix, PythonMatrix) for matrix in compiled)
    assert list(map(len, compiled)) == list(map(len, python))
    for before, last in ((text[-2], text[-1]), (None, text[-1]), (0, 1)):
        assert plain(search(compiled, before, last, limits)) == plain(search(python, before, last, limits))


@given(
    seed=st.integers(0, MASK),
    position=st.integers(0, 2**40),
    purpose=st.sampled_from(Purpose),
    temperature=st.sampled_from([0.05, 1.0, 3.0]),
    vocab_size=st.sampled_from([40, 4097, 131072]),
    count=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-5, 3.0]),
)
def test_ranks_with_noise(
    *,
    seed: int,
    position: int,
    purpose: Purpose,
    temperature: float,
    vocab_size: int,
    count: int,
    spread: float,
) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.choice(vocab_size, 32, replace=False)
    logits = (spread * generator.standard_normal(32)).astype(np.float32)

    def ranks() -> list[int]:
        return rank_with_noise(
            tokens,
            logits,
            count,
            temperature=temperature,
            seed=seed,
            position=position,
            purpose=purpose,
            vocab_size=vocab_size,
        )

    found = ranks()
    with use_level(REFERENCE):
        assert found == ranks()
    keys = logits + np.float32(temperature) * gumbel_noise(seed, position, purpose, vocab_size)[tokens]
    assert found == tokens[np.argsort(-keys, kind="stable")][:count].tolist()


@given(
    st.lists(
        st.tuples(
            st.lists(st.lists(st.tuples(TOKENS, st.floats(0.0, 1.0)), max_size=4), max_size=5),
            st.lists(TOKENS, max_size=5),
        ),
        max_size=40,
    )
)
def test_corrections(steps: list[tuple[list[list[tuple[int, float]]], list[int]]]) -> None:
    """Over so many steps that old observations are halved: the first step is taken again and again."""
    compiled_bins, python = Calibration(), PythonBins()
    for found, new_tokens in [*steps, *steps[:1] * 250]:
        paths = [WeightedPath([token for token, _ in path], [prob for _, prob in path]) for path in found]
        assert plain(compiled_bins.corrected("r", paths)) == plain(python.corrected("r", paths))
        for bins in (compiled_bins, python):
            bins.observe("r", new_tokens)
            bins.observe("other", new_tokens)


@given(
    pieces=st.lists(st.lists(st.sampled_from([0, 1, 2, END_OF_TEXT]), max_size=12), max_size=6),
    tokens=st.lists(TOKENS, max_size=24),
    lengths=st.sampled_from([(3, 1), (4, 3, 2, 1), (20, 17, 2), (1,)]),
    depth=st.integers(0, 6),
    per_length=st.integers(0, 5),
    most=st.integers(0, 12),
    periodic=st.booleans(),
)
def test_copies(
    *,
    pieces: list[list[int]],
    tokens: list[int],
    lengths: tuple[int, ...],
    depth: int,
    per_length: int,
    most: int,
    periodic: bool,
) -> None:
    """Of a text that grows by pieces, behind other tokens and behind its own end."""
    indexes = new_index(lengths), PythonIndex(lengths)
    assert not isinstance(indexes[0], PythonIndex)
    text: list[int] = []
    for piece in pieces:
        text += piece
        for index in indexes:
            index.append(piece)
        for end in (tokens, text):
            found, python = (
                [
                    (list(path), length)
                    for path, length in index.copies(end, depth, per_length=per_length, most=most, periodic=periodic)
                ]
                for index in indexes
            )
            assert found == python
    assert len(indexes[0]) == len(indexes[1]) == len(text)


@given(
    seed=st.integers(0, MASK),
    levels=st.sampled_from([(3, 1), (16, 8, 4, 3, 2, 1), (2,), (20, 4)]),
    num_candidates=st.integers(1, 5),
    limits=st.tuples(st.integers(0, 20), st.integers(0, 6), st.sampled_from([0.001, 0.01, 0.4])),
)
def test_ngram_models(
    seed: int, levels: tuple[int, ...], num_candidates: int, limits: tuple[int, int, float]
) -> None:
    """Of a text that grows by pieces and repeats itself; of paths that are equally likely, the order too."""
    rng = np.random.default_rng(seed)
    vocab_size, repeats = rng.integers(2, 12), rng.random()
    models = new_model(levels), PythonModel(levels)
    assert not isinstance(models[0], PythonModel)
    text: list[int] = []
    for size in rng.integers(0, 12, 8):
        for _ in range(size):
            is_repeat = len(text) > 17 and rng.random() < repeats
            text.append(text[-17] if is_repeat else int(rng.integers(vocab_size)))
        for model in models:
            model.extend(text)
        found, python = (
            [(list(tokens), list(probs)) for tokens, probs in model.paths(num_candidates, *limits)]
            for model in models
        )
        assert found == python


# Mostly repeats, so that edges are split, joined and followed for long.
STEPS = st.lists(st.one_of(TOKENS, st.sampled_from(["repeat", "repeat", "end", "forget"])), max_size=100)


@given(
    STEPS,
    st.lists(TOKENS, min_size=1, max_size=40),
    st.integers(2, 9),
    st.builds(
        SuffixSearch,
        num_pending=st.just(1),
        escape=st.sampled_from([2.0, 12.0]),
        deepest=st.integers(1, 8),
        num_matches=st.integers(1, 4),
        max_spec_factor=st.sampled_from([0.7, 1.0, 16.0]),
    ),
    st.builds(
        SuffixLimits,
        max_nodes=st.integers(0, 12),
        max_depth=st.integers(0, 8),
        min_path_prob=st.sampled_from([0.0, 0.05, 0.4]),
    ),
)
def test_suffix_trees(
    steps: list[int | str], other: list[int], max_depth: int, search: SuffixSearch, limits: SuffixLimits
) -> None:
    """Behind the text of the tree itself, and behind another one that grows beside it."""
    trees = new_tree(max_depth), PythonTree(max_depth)
    assert not isinstance(trees[0], PythonTree)
    cursors = new_cursor(trees[0]), PythonCursor(trees[1])
    current: list[int] = []
    for number, step in enumerate(steps):
        if step == "end":
            current = []
        elif step != "forget":
            current.append(step if isinstance(step, int) else current[-3] if len(current) > 2 else 0)
        is_between = not current and bool(trees[1].sequences())
        for tree in trees:
            if step == "end":
                tree.end_sequence()
            elif step != "forget":
                tree.extend(current[-1:])
            elif is_between:
                tree.forget_oldest()
        assert trees[0].version == trees[1].version
        assert len(trees[0]) == len(trees[1])
        assert plain(best_guesses(trees[0], search, limits)) == plain(best_guesses(trees[1], search, limits))
        if current:
            continue  # cursors look up ended sequences
        text = other[: 1 + number % len(other)]
        for cursor in cursors:
            cursor.follow(text, 1)
        past = SuffixSearch(0, search.escape, search.deepest, search.num_matches, search.max_spec_factor)
        assert plain(best_guesses(cursors[0], past, limits)) == plain(best_guesses(cursors[1], past, limits))
    assert trees[0].sequences() == trees[1].sequences()


@pytest.mark.parametrize("temperature", [None, 0.7, 1e-7], ids=["greedy", "noisy", "with ties"])
@given(
    steps=st.lists(
        st.tuples(
            st.lists(TOKENS, max_size=6),
            st.lists(st.tuples(TOKENS, st.integers(0, 9)), max_size=8),
            st.lists(TOKENS, min_size=1, max_size=3),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    ),
    max_context=st.integers(1, 9),
    num_candidates=st.integers(1, 4),
    capacity=st.sampled_from([64, 80, 10_000]),
    limits=st.tuples(st.integers(0, 12), st.integers(0, 6), st.sampled_from([0.001, 0.01, 0.2])),
    seed=st.integers(0, MASK),
)
def test_recycled_texts(
    *,
    temperature: float | None,
    steps: list[tuple[list[int], list[tuple[int, int]], list[int], bool]],
    max_context: int,
    num_candidates: int,
    capacity: int,
    limits: tuple[int, int, float],
    seed: int,
) -> None:
    """Trees, and what they teach about rates and contexts; two texts share a table, and some steps are not shown."""

    def trees() -> tuple[list[object], list[int]]:
        table = new_table(max_context, num_candidates, capacity)
        rates = new_rates(GREEDY_CHOSEN, GREEDY_SEEN, table.lengths, num_candidates)
        texts = [new_text(table, rates, max_context, num_candidates, capacity) for _ in range(2)]
        assert isinstance(texts[0], PythonText) == (native.isa() == REFERENCE)
        generator = np.random.default_rng(seed)
        known: list[list[int]] = [[0], [1, 2]]
        found: list[object] = []
        sizes = []
        for number, (seen, below, new_tokens, is_shown) in enumerate(steps):
            text, tokens = texts[number % 2], known[number % 2]
            tokens += seen
            noise = None if temperature is None else PlaceNoise(seed, len(tokens), temperature, 8)
            grown = text.grow(tokens, *limits, noise)
            found.append([list(part) for part in grown])
            others = [(token, above % (n + 1)) for n, (token, above) in enumerate(below)]
            other = (tokens[-1], *(token for token, _ in others)), (-1, *(above for _, above in others))
            tree = TokenTree(*(grown[:2] if number % 3 else other))
            rows = np.array([generator.permutation(5) for _ in tree.tokens])
            logits = generator.integers(0, 3, rows.shape).astype(np.float32)
            if is_shown:
                text.observe(tree, rows, logits, new_tokens)
            else:
                learn_chosen([table], tree.tokens[:1], tree, rows, logits)
            tokens += new_tokens
            sizes.append(len(table))
        return found, sizes

    found = trees()
    with use_level(REFERENCE):
        assert found == trees()


def test_trees_that_do_not_fit_are_refused() -> None:
    module = compiled()
    assert module is not None
    table = module.ContextTable(4, 2, 100)
    tokens, logits = np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3), dtype=np.float32)
    for tail, parents, rows, scores in (
        ([], [-1, 0], tokens, logits),
        ([1], [-1, 1], tokens, logits),
        ([1], [-1], tokens, logits),
        ([1], [-1, 0], tokens[:1], logits),
        ([1], [-1, 0], tokens, logits[:, :2]),
    ):
        with pytest.raises(ValueError, match=r"expected|tree without|parents"):
            module.learn_chosen([table], tail, [1, 2], parents, rows, scores)
    text = module.RecycledText(table, new_rates(GREEDY_CHOSEN, GREEDY_SEEN, [1, 2, 3, 4], 2), 4, 2, 100)
    with pytest.raises(ValueError, match="expected a row"):
        text.observe(TokenTree.chain(1, [2]), tokens[:1], logits, [1])
    with pytest.raises(ValueError, match="at least one"):
        text.grow([], 4, 4, 0.01, None)
    with pytest.raises(ValueError, match="more than 0"):
        text.grow([1], 4, 4, 0.0, None)
    assert len(table) == 0
    tree = module.SuffixTree(4)
    cursor = module.SuffixCursor(tree)
    with pytest.raises(RuntimeError, match="not ended"):
        tree.forget_oldest()
    tree.extend([1, 2])
    tree.end_sequence()
    with pytest.raises(RuntimeError, match="changed"):
        cursor.guesses(0, 2.0, (3, 1), 1.0, 4, 4, 0.0)


FINGERPRINT = bytes(32)


@pytest.fixture(scope="module", params=[100, 2**16], ids=["2 bytes", "4 bytes"])
def datastore(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several chunks."""
    path = tmp_path_factory.mktemp("datastore") / "store"
    rng = np.random.default_rng(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datastore_build, "MIN_CHUNK_TOKENS", 1)
        memory = 300 * SORT_BYTES_PER_TOKEN
        with DatastoreWriter(
            path, vocab_size=request.param, fingerprint=FINGERPRINT, max_memory_bytes=memory
        ) as writer:
            for size in (200, 1, 90, 300, 40):
                writer.add(rng.integers(0, 4, size).tolist())
                writer.end_document()
    return path


@given(
    st.lists(TOKENS, max_size=16),
    st.integers(2, 100),
    st.builds(
        DatastoreLimits,
        num_lengths=st.integers(1, 4),
        num_samples=st.sampled_from([1, 3, 32]),
        max_nodes=st.integers(1, 24),
        max_depth=st.integers(1, 12),
        min_path_prob=st.sampled_from([0.0, 0.05]),
    ),
)
def test_datastores(datastore: Path, query: list[int], num_proposed: int, limits: DatastoreLimits) -> None:
    store = open_datastore(datastore, fingerprint=FINGERPRINT)
    searches = new_search(store, num_proposed), PythonSearch(store, num_proposed)
    assert not isinstance(searches[0], PythonSearch)
    (length, found), (python_length, python) = (search(query, limits) for search in searches)
    assert length == python_length
    assert plain(found) == plain(python)


class _Recorded:
    """A drafter whose trees are kept."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.name, self.max_nodes = drafter.name, drafter.max_nodes
        self.returns_probs, self.reads_logits = drafter.returns_probs, drafter.reads_logits
        self.trees: list[tuple[object, ...]] = []

    def propose(self, contexts: list[DraftContext]) -> list[TokenTree]:
        trees = self._drafter.propose(contexts)
        self.trees += [(list(tree.tokens), list(tree.parents), list(tree.confidences or ())) for tree in trees]
        return trees

    def observe(self, outcomes: list[DraftOutcome]) -> None:
        self._drafter.observe(outcomes)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._drafter.release(request_id, finished)


def texts(vocab_size: int) -> Iterator[Recording]:
    """That repeat themselves with changes, and one another."""
    rng = np.random.default_rng(1)
    source = rng.integers(0, vocab_size, 150)
    for _ in range(3):
        changed = np.where(rng.random(150) < 0.05, rng.integers(0, vocab_size, 150), source)
        yield Recording([*source[20:].tolist(), *source[:90].tolist()], changed.tolist())


SOURCES = ["ngram", "anpd", "aded", "copy", "suffix", "history", "edit"]
SPECS: list[dict[str, object]] = [
    *({"method": method} for method in (*SOURCES, "recycling")),
    {"method": "ngram", "max_ngram": 20, "min_ngram": 3},
    {"method": "anpd", "levels": [20, 5, 1], "num_candidates": 2, "depth": 5},
    {"method": "copy", "references": [[1, 2, 3, 4, 5, 6, 7] * 3], "gammas": [17, 2]},
    {"method": "suffix", "request_tokens": 100, "max_match": 20, "history_tokens": 200},
    {"method": "recycling", "max_context": 64, "capacity": 128},
    {"method": "merge", "sources": SOURCES},
    {"method": "hierarchy", "levels": ["ngram", "history", "suffix", "copy"]},
]


@pytest.mark.parametrize("vocab_size", [12, 400])
@pytest.mark.parametrize("max_nodes", [5, 24])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "style", [DraftStyle(), DraftStyle("independent", chains_only=True)], ids=["trees", "chains"]
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values()))[:40])
def test_whole_drafters(
    spec: Mapping[str, object], style: DraftStyle, temperature: float, max_nodes: int, vocab_size: int
) -> None:
    """Node for node, with all that is learnt on the way."""

    def unused(*_: object) -> object:
        raise AssertionError("no draft model here")

    def trees() -> list[tuple[object, ...]]:
        parts = TargetParts(vocab_size, lambda: FINGERPRINT, unused, ForwardCost.unknown)  # type: ignore[arg-type]
        drafter = _Recorded(build_drafter(drafter_config({**spec, "max_nodes": max_nodes}), style, parts))
        target = SyntheticTarget(vocab_size)
        replay(drafter, list(texts(vocab_size)), max_nodes=max_nodes, target=target, temperature=temperature)  # type: ignore[arg-type]
        return drafter.trees

    found = trees()
    with use_level(REFERENCE):
        assert found == trees()
    assert len(found) > 3


def test_near_ties_are_left_to_numpy() -> None:
    module = compiled()
    assert module is not None
    tokens, logits = np.array([5, 7, 5]), np.array([1.0, -9.0, 1.0], dtype=np.float32)
    assert module.rank_with_noise(1, 2, 0, tokens, logits, 1.0, 1) == []
    assert module.rank_with_noise(1, 2, 0, tokens[:2], logits[:2], 1.0, 1) == [5]
    with pytest.raises(ValueError, match="one for each token"):
        module.rank_with_noise(1, 2, 0, tokens, logits[:2], 1.0, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab_size", [32, 100, 257, 4096, 5003, 66001])
@pytest.mark.parametrize("rounded", [False, True])
def test_largest_logits(level: str, vocab_size: int, rounded: bool) -> None:
    """Of equals the lowest come first, NaN last."""
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    if rounded:
        logits = logits.round()
    logits[1, ::3] = float("nan")
    logits[2] = float("nan")
    logits[3, 5:] = -float("inf")
    for count in (1, 8, 32):
        with use_level(level):
            found = largest(logits.numpy(), count)
            assert found is not None
        with use_level(REFERENCE):
            tokens, values = top_tokens(logits, count)
        assert found[0].tolist() == tokens.tolist()
        assert np.array_equal(found[1], values, equal_nan=True)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_largest_logits_of_any_number_of_threads(num_threads: int) -> None:
    for num_rows in (1, 2, 13, 61):  # one thread reads the first two alone, and may have read all before others wake
        logits = torch.randn(num_rows, 66001, generator=torch.Generator().manual_seed(num_rows)).numpy()
        with use_threads(num_threads):
            tokens, values = largest(logits, 32) or ()
        assert tokens.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :32].tolist()
        assert np.array_equal(values, np.take_along_axis(logits, tokens, axis=1))


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 3), dtype=np.float64), np.zeros((4, 6), dtype=np.float32)[:, ::2], np.zeros(3, np.float32)]
)
def test_rows_that_do_not_fit_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected contiguous float32"):
        largest(rows, 2)
    with pytest.raises(ValueError, match="expected contiguous float32"):
        largest(np.zeros((2, 3), dtype=np.float32), 4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab_size", [4096, 16384, 16500, 66001, 131072])
@pytest.mark.parametrize("kind", ["random", "rounded", "nan", "one block", "constant"])
def test_largest_logits_by_given_maxima(level: str, vocab_size: int, kind: str) -> None:
    """The same as without them, wherever the largest stand: in the last, shorter block, or all in one."""
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    if kind == "rounded":
        logits = logits.round()
    if kind == "nan":
        logits[1, 7], logits[2, :], logits[3, vocab_size // 2 :] = float("nan"), float("nan"), -float("inf")
    if kind == "one block":
        logits[0, -20:] += 50.0
        logits[1, 512:576] += 50.0
    if kind == "constant":
        logits[:] = 1.5
    starts = np.arange(0, vocab_size, MAXIMA_BLOCK)
    maxima = np.maximum.reduceat(logits.numpy(), starts, axis=1)
    for count in (1, 8, 32):
        with use_level(level):
            found, expected = largest(logits.numpy(), count, maxima), largest(logits.numpy(), count)
        assert found is not None
        assert expected is not None
        assert (found[0] == expected[0]).all()
        assert np.array_equal(found[1], expected[1], equal_nan=True)


def test_given_maxima_are_what_is_read() -> None:
    """Blocks whose maximum is said to be low are not looked at; maxima of another shape are refused."""
    logits = np.random.default_rng(0).standard_normal((2, 65536), dtype=np.float32)
    maxima = np.maximum.reduceat(logits, np.arange(0, 65536, MAXIMA_BLOCK), axis=1)
    best = int(logits[0].argmax())
    maxima[0, best // MAXIMA_BLOCK] = -9.0
    found = largest(logits, 4, maxima)
    assert found is not None
    assert best not in found[0][0]
    with pytest.raises(ValueError, match="maxima"):
        largest(logits, 4, maxima[:, 1:])
