"""GPTQ over a whole model, decoder layer by decoder layer, each on what the quantised layers before it put out.

A decoder layer is run where it stands, by the model's own forward, so that its masks and positions are the model's:
the layers before it only replay the last one's recorded output, and the forward ends behind it. What is kept is one
layer's Hessians and one hidden state per calibration token. A model whose layers cannot be replayed (shared layers,
caches between layers) runs whole forwards instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from outrider.errors import ConfigError
from outrider.kernels.packed import PackedWeight, dequantize
from outrider.quantization.gptq import InputStatistics, gptq_int4

# Finished parts of an earlier run by name, so that an interrupted one goes on.
Finished = Mapping[str, Mapping[str, PackedWeight]]

_BATCH_TOKENS = 2048
_SEQUENCE_TOKENS = 512
_LEAST_TOKENS = 32
_MOST_CHARACTERS = 64  # of the text, for each token asked for
_HESSIAN_BYTES = 1 << 31  # at once, where whole forwards are run


class _Stop(Exception):
    """Ends a forward behind the layer that it was run for."""


class Calibration:
    """The quantisation of a module's linear layers by GPTQ, in parts that can be kept and taken up again.

    Attributes:
        parts: names of the parts in order, and the linear layers in each: one part a decoder layer, then the rest.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], token_ids: Tensor, group_size: int) -> None:
        """Look at the module.

        Args:
            module: a causal language model in evaluation mode on the CPU; its linear weights are overwritten.
            names: of the linear layers to quantise, in the module.
            token_ids: int64 [num_sequences, length].
            group_size: 32, 64 or 128.
        """
        self._module = module
        self._linears = {name: module.get_submodule(name) for name in names}
        self._group_size = group_size
        per_batch = max(1, _BATCH_TOKENS // token_ids.shape[1])
        self._batches = token_ids.split(per_batch)
        self._layers = _decoder_layers(module, self._linears, token_ids[:1, :8])
        self.parts = self._plan()

    def run(
        self, finished: Finished, on_part: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[str, dict[str, PackedWeight]]]:
        """Quantise part after part, yielding each when it is done; `finished` ones are taken over, not yielded.

        Args:
            on_part: called when a part is done or taken over.

        Raises:
            ModelLoadError: weights or activations that are not finite.
        """
        recorded: list[Any] = []  # what layer `index - 1` put out for each batch; empty: run the layers before
        for index, (part, names) in enumerate(self.parts.items()):
            position = min(index, len(self._layers))
            if part in finished:
                result = dict(finished[part])
            else:
                result = self._quantize(names, position, recorded)
                yield part, result
            self._replace(result)
            if position < len(self._layers) and (recorded or part not in finished):
                recorded = self._outputs(position, recorded)
            on_part()

    def _plan(self) -> dict[str, list[str]]:
        """Linear layers by the decoder layer that they are in; others together, as many as memory allows."""
        module_names = {id(part): name for name, part in self._module.named_modules()}
        parts: dict[str, list[str]] = {}
        rest = list(self._linears)
        for index, layer in enumerate(self._layers):
            prefix = f"{module_names[id(layer)]}."
            parts[f"layer_{index:04}"] = [name for name in rest if name.startswith(prefix)]
            rest = [name for name in rest if not name.startswith(prefix)]
        num_bytes = 0
        for name in rest:
            size = 4 * _matrix(self._linears[name]).shape[1] ** 2
            if num_bytes == 0 or num_bytes + size > _HESSIAN_BYTES:
                parts[f"rest_{len(parts):04}"], num_bytes = [], 0
            parts[next(reversed(parts))].append(name)
            num_bytes += size
        return parts

    def _quantize(self, names: Sequence[str], position: int, recorded: Sequence[Any]) -> dict[str, PackedWeight]:
        """The linear layers of a part, rounded for their inputs in all batches."""
        statistics = {name: InputStatistics(_matrix(self._linears[name]).shape[1]) for name in names}
        with ExitStack() as hooks:
            for name in names:
                hook = _input_hook(statistics[name])
                hooks.enter_context(self._linears[name].register_forward_pre_hook(hook))
            self._outputs(position, list(recorded))
        packed = {}
        for name in names:
            hessian = statistics.pop(name).hessian
            packed[name] = gptq_int4(_matrix(self._linears[name]), hessian, self._group_size, name)
        return packed

    def _outputs(self, position: int, recorded: list[Any]) -> list[Any]:
        """What the layer at `position` puts out for each batch; `recorded`: of the layer before, replaced by it."""
        outputs = recorded or [None] * len(self._batches)
        for number, batch in enumerate(self._batches):
            outputs[number] = run_to_layer(self._module, self._layers, position, batch, outputs[number])
        return outputs

    def _replace(self, packed: Mapping[str, PackedWeight]) -> None:
        with torch.no_grad():
            for name, weight in packed.items():
                _matrix(self._linears[name]).copy_(dequantize(weight))


def calibration_ids(tokenizer: Any, text: str, num_tokens: int, context_length: int) -> Tensor:
    """Sequences spread evenly over a text, beginning as the tokenizer begins texts.

    Args:
        tokenizer: of transformers.
        num_tokens: at most so many in all, and at least one sequence.
        context_length: of the model.

    Returns:
        int64 [num_sequences, length], length at most 512.

    Raises:
        ConfigError: a text that is too short to say anything.
    """
    body = tokenizer(text[: num_tokens * _MOST_CHARACTERS], verbose=False)["input_ids"]
    start = body[:1] if body[:1] == [tokenizer.bos_token_id] else []
    body = body[len(start) :]
    length = min(_SEQUENCE_TOKENS, context_length, num_tokens, len(body)) - len(start)  # of the text in a sequence
    if length < _LEAST_TOKENS:
        raise ConfigError(
            "calibration",
            got=f"{length} tokens in a sequence",
            expected=f"{_LEAST_TOKENS} or more",
            remedy="give it more text and more tokens",
        )
    num_sequences = max(1, min(num_tokens, len(body)) // (length + len(start)))
    step = len(body) // num_sequences
    return torch.tensor([start + body[row * step : row * step + length] for row in range(num_sequences)])


def run_to_layer(module: nn.Module, layers: Sequence[nn.Module], position: int, batch: Tensor, replayed: Any) -> Any:
    """What the layer at `position` puts out, its predecessors replaying the output of the one just before it.

    Args:
        position: an index of layers; their number runs the whole forward, and returns None.
        batch: token ids [B, T].
        replayed: the output of layer `position - 1`; None runs the predecessors.
    """
    output: Any = None

    def stop(_module: nn.Module, _args: Any, result: Any) -> None:
        nonlocal output
        output = result
        raise _Stop

    with ExitStack() as stack:
        if replayed is not None:
            for layer in layers[:position]:
                stack.enter_context(_replaying(layer, replayed))
        if position < len(layers):
            stack.enter_context(layers[position].register_forward_hook(stop))
        stack.enter_context(suppress(_Stop))
        _forward(module, batch)
    return output


def _input_hook(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _module, args: statistics.add(args[0])


@contextmanager
def _replaying(layer: nn.Module, output: Any) -> Iterator[None]:
    forward = layer.forward
    layer.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        layer.forward = forward


def _decoder_layers(module: nn.Module, linears: Mapping[str, nn.Module], batch: Tensor) -> list[nn.Module]:
    """The layers of the decoder, in order, if each can be run on the replayed output of the one before."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 0]
    wanted = {id(part) for part in linears.values()}
    best = max(lists, key=lambda part: sum(id(inner) in wanted for inner in part.modules()), default=None)
    if best is None:
        return []
    layers = list(best)
    outputs: list[Any] = []
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda _, _args, result: outputs.append(result)))
        _forward(module, batch)
    if len(outputs) != len(layers):
        return []
    try:
        replays = [run_to_layer(module, layers, index, batch, outputs[index - 1]) for index in range(1, len(layers))]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return []  # a layer takes more from the others than its input
    pairs = zip(replays, outputs[1:], strict=True)
    return layers if all(torch.equal(_hidden(replay), _hidden(output)) for replay, output in pairs) else []


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _forward(module: nn.Module, batch: Tensor) -> None:
    with torch.inference_mode():
        module(input_ids=batch, use_cache=False)


def _matrix(linear: nn.Module) -> Tensor:
    """The weight as [N, K], a view."""
    assert isinstance(linear, nn.Linear | Conv1D)
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T
