"""At every load: the model over our cache and attention against its own eager forward, or it is refused.

Many model classes of transformers accept a flattened batch and answer with wrong logits: they ignore the
attention interface, the positions or the mask. Only a comparison finds that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.errors import ModelLoadError, UnsupportedModelError
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch, rows_of
from outrider.models.llama import LlamaModel, head_dim_of
from outrider.models.model import Model
from outrider.models.packed_linear import packed_formats
from outrider.models.transformers_model import WHAT_RUNS, TransformersModel, use_eager_attention
from outrider.quantization.tensor_files import LoadedTensors
from outrider.quantization.weights import DEFAULT_GROUP_SIZE, WeightSource
from outrider.token_tree import TokenTree

_SHORT_WINDOW = 4  # real windows are thousands of positions; this one ends inside the probe

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Accepted error of a row, as a fraction of its logits' spread; a wrong mask or position costs about 1."""

Rows = tuple[Sequence[int], Sequence[int]]  # token ids and parents


class CachedRun:
    """Sequences over a cache of their own, stepped as the engine would.

    Args:
        num_positions: room per sequence.
    """

    def __init__(
        self, model: Model, *, block_size: int, num_positions: int, num_sequences: int, row_invariant: bool
    ) -> None:
        self._model, self._row_invariant = model, row_invariant
        self._cache = KVCache(
            model.layer_shapes,
            num_blocks=num_sequences * (-(-num_positions // block_size)),
            block_size=block_size,
            dtype=model.cache_dtype,
            device=model.device,
            prefix_caching=False,
        )

    def step(self, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
        """Forward rows of several sequences, in order; logits ``[num_rows, vocab]`` of each."""
        sequences = []
        for sequence_id, (token_ids, parents) in rows.items():
            if sequence_id not in self._cache:
                self._cache.admit(sequence_id, token_ids)
            context = self._cache.num_computed(sequence_id)
            slots = self._cache.reserve(sequence_id, len(token_ids))
            sequences.append(SequenceRows(token_ids, parents, context, slots, range(len(token_ids))))
        batch = ForwardBatch(sequences, self._model.device, row_invariant=self._row_invariant)
        logits = self._model.forward(batch, self._cache)
        return dict(zip(rows, logits.split([len(sequence.token_ids) for sequence in sequences]), strict=True))

    def commit(self, kept_rows: Mapping[str, Sequence[int]]) -> None:
        """Keep these rows of the last step; sequences that are not named lose theirs."""
        self._cache.commit({name: SequenceCommit(kept, kept) for name, kept in kept_rows.items()})

    def feed(self, sequence_id: str, token_ids: Sequence[int]) -> Tensor:
        """Step one sequence by a chain and commit all of it; logits ``[num_rows, vocab]``."""
        logits = self.step({sequence_id: (token_ids, range(-1, len(token_ids) - 1))})[sequence_id]
        self.commit({sequence_id: range(len(token_ids))})
        return logits

    def committed(self, sequence_id: str) -> list[Tensor]:
        """Keys, then values, of each layer at the committed positions ``[num_computed, heads, width]``."""
        slots = torch.from_numpy(self._cache.reserve(sequence_id, 0)).to(self._model.device)
        return [cache.index_select(0, slots) for cache in (*self._cache.keys, *self._cache.values)]


def probe_model(model: TransformersModel) -> None:
    """Compare a ragged batch with a chunked prefill and trees against the model's own eager forward per path.

    Sliding windows are also tried with a length of a few positions, which shows if the right layers slide.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding, or a forward fails.
    """
    _compare(model, model, "with its own attention")
    config = model.config
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or all(params.sliding_window is None for params in model.attention_params):
        return
    config.sliding_window = _SHORT_WINDOW
    try:
        _compare(model, model.with_sliding_window(_SHORT_WINDOW), "in its sliding windows")
    finally:
        config.sliding_window = window


def probe_lean_path(config: PretrainedConfig) -> None:
    """Compare the lean path with transformers on a small random model of the same kind, in float32.

    All that a configuration says beside sizes (rotary embedding, biases, norms, windows) is the model's own; so the
    weights, which may be many and quantised, need not be loaded twice.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding, or a forward fails.
    """
    small = _small_twin(config)
    generator = torch.Generator().manual_seed(0)
    module = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    for tensor in module.parameters():
        tensor.data.normal_(0, 0.1, generator=generator).add_(tensor.ndim == 1)
    lean = LlamaModel(
        small,
        WeightSource(LoadedTensors(module.state_dict(), Path("memory"))),
        format="fp32",
        group_size=DEFAULT_GROUP_SIZE,
        dtype=torch.float32,
        cache_dtype=torch.float32,
        name=config.model_type,
    )
    _compare(TransformersModel(module, name=config.model_type), lean, "on the lean path")


def _small_twin(config: PretrainedConfig) -> PretrainedConfig:
    """The same kind of model, small: narrow layers, few of them, windows of a few positions."""
    small = copy.deepcopy(config)
    group = config.num_attention_heads // config.num_key_value_heads
    small.head_dim = head_dim_of(config)
    small.hidden_size, small.intermediate_size, small.vocab_size = 32, 48, 64
    small.num_key_value_heads = min(2, config.num_key_value_heads)
    small.num_attention_heads = small.num_key_value_heads * group
    kinds = list(getattr(config, "layer_types", None) or ())
    chosen = sorted({kinds.index(kind) for kind in kinds}) or range(min(2, config.num_hidden_layers))
    small.num_hidden_layers = len(chosen)
    if kinds:
        small.layer_types = [kinds[index] for index in chosen]
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = _SHORT_WINDOW
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    return small


def _compare(model: TransformersModel, twin: Model, what: str) -> None:
    """Refuse `model` unless `twin`, which has its weights, agrees with the module's eager forward."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.vocab_size, (length,), generator=generator).tolist() for length in (11, 5, 1)]
    drafts = torch.randint(model.vocab_size, (6,), generator=generator).tolist()
    trees = [
        TokenTree((prompts[0][-1], *drafts), (-1, 0, 0, 1, 1, 2, 5)),
        TokenTree.root_only(prompts[1][-1]),
        TokenTree.chain(prompts[2][-1], drafts[:3]),
    ]
    try:
        ours = _logits_of_nodes(twin, prompts, trees)
        paths = [
            [*prompt, *(tree.tokens[node] for node in tree.path(leaf))]
            for prompt, tree in zip(prompts, trees, strict=True)
            for leaf in range(tree.num_nodes)
        ]
        with _eager(model):
            eager = torch.stack([_eager_logits(model, [path])[0] for path in paths])
            other = _eager_logits(model, paths)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's own code may raise anything on a batch of this form
        raise UnsupportedModelError(
            f"model cannot run: its forward failed with {type(error).__name__}: {error}", remedy=WHAT_RUNS
        ) from error
    if not eager.isfinite().any(dim=-1).all() or eager.isnan().any():
        raise ModelLoadError(
            "model weights",
            got="NaN or infinite logits from the model's own forward",
            expected="finite numbers",
            remedy="check the checkpoint, or load it with dtype='float32'",
        )
    tolerance, quantile = _tolerance_of(model)
    noise = _error(other, eager, quantile)
    if not noise < tolerance:
        raise UnsupportedModelError(
            "model cannot run: a token's logits depend on what follows it or on other sequences",
            got=f"a relative change of {noise:.2g}",
            expected=f"below {tolerance:g} for {model.dtype}",
            remedy=WHAT_RUNS,
        )
    error = _error(ours, eager, quantile)
    if not error < tolerance:
        raise UnsupportedModelError(
            f"model cannot run: its logits over outrider's cache differ from its own eager forward {what}",
            got=f"a relative error of {error:.2g}",
            expected=f"below {tolerance:g} for {model.dtype} (eager against itself: {noise:.2g})",
            remedy=WHAT_RUNS,
        )


def _tolerance_of(model: TransformersModel) -> tuple[float, float]:
    """The accepted error, and the quantile over rows of which it is asked."""
    # Where linear layers round their inputs, the last bit of attention may decide which way.
    rounds = bool(packed_formats(model.module) - {"fp32"})
    tolerance = _TOLERANCE[torch.bfloat16] if rounds else _TOLERANCE.get(model.dtype, _TOLERANCE[torch.float32])
    # Below float32, rounding alone may send a few rows of a mixture to other experts; errors spoil more rows.
    return tolerance, 0.75 if model.is_mixture and (rounds or model.dtype != torch.float32) else 1.0


def _error(logits: Tensor, truth: Tensor, quantile: float) -> float:
    """A quantile over rows of root mean square error over spread of the logits; NaN where any logit is."""
    spread = truth.std(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors = (logits - truth).square().mean(dim=-1).sqrt() / spread
    if errors.isnan().any():
        return float("nan")
    return errors.quantile(quantile).item()


def _logits_of_nodes(model: Model, prompts: Sequence[Sequence[int]], trees: Sequence[TokenTree]) -> Tensor:
    """Logits ``[all nodes, vocab]`` over our cache: parts of prompts first, then the rest and all trees."""
    row_invariant = isinstance(model, TransformersModel) and model.row_invariant
    run = CachedRun(model, block_size=4, num_positions=20, num_sequences=len(prompts), row_invariant=row_invariant)
    chunks = [list(prompt[: len(prompt) // 2]) for prompt in prompts]
    rows = {str(i): (chunk, range(-1, len(chunk) - 1)) for i, chunk in enumerate(chunks) if chunk}
    run.step(rows)
    run.commit({name: range(len(tokens)) for name, (tokens, _) in rows.items()})
    rests = [prompt[len(chunk) : -1] for prompt, chunk in zip(prompts, chunks, strict=True)]
    logits = run.step({str(i): rows_of(tree, rests[i]) for i, tree in enumerate(trees)})
    return torch.cat([logits[str(i)][len(rest) :] for i, rest in enumerate(rests)])


@torch.inference_mode()
def _eager_logits(model: TransformersModel, paths: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``[len(paths), vocab]`` of each path's last token; shorter paths are padded after their end."""
    longest = max(len(path) for path in paths)
    padded = torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths], device=model.device)
    logits = model.module(input_ids=padded, use_cache=False).logits
    last = torch.tensor([len(path) - 1 for path in paths], device=model.device)
    return logits[torch.arange(len(paths), device=model.device), last].float()


@contextmanager
def _eager(model: TransformersModel) -> Iterator[None]:
    """The module as transformers alone would run it: eager attention, and its own experts."""
    use_eager_attention(model.module)
    model.use_own_experts(False)
    try:
        yield
    finally:
        model.use_own_attention()
        model.use_own_experts(model.row_invariant)
