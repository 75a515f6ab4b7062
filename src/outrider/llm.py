"""The offline API: load a model once, generate for many prompts."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from outrider.config import (
    CacheConfig,
    DrafterConfig,
    EngineConfig,
    Exactness,
    SchedulerConfig,
    Weights,
    drafter_config,
    from_mapping,
)
from outrider.engine.build import build_engine, load_target
from outrider.engine.calibration import Progress
from outrider.engine.detokenizer import IncrementalDetokenizer
from outrider.errors import NumericsError, PromptError, QueueFullError, SamplingParamsError
from outrider.inputs.prompt import Prompt, chat_prompt, check_prompt, check_token_ids, encode_prompt
from outrider.outputs import CompletionOutput, RequestOutput
from outrider.request import Request
from outrider.sampling.noise import child_seed, fresh_seed
from outrider.sampling.params import SamplingParams

DETOKENIZER_CONTEXT = 8  # prompt tokens that the first output token's text may depend on


@dataclass(eq=False)
class Generation:
    """One prompt and the requests that sample it; `LLM` makes, runs and reads it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    requests: list[Request]

    @property
    def finished(self) -> bool:
        return all(request.finished for request in self.requests)

    @property
    def error(self) -> Exception | None:
        """Why a sample of it ended without a text; None if none did."""
        return next((request.error for request in self.requests if request.error is not None), None)


class LLM:
    """A model with a drafter in front of it; not for use from several threads at once.

    Whoever has a loop of their own, as a server has, takes what `generate` and `stream` are written on: `prepare` a
    generation, `add` it, `step` while `has_unfinished`, read it with `output` or `sample`, `abort` it.

    Args:
        model: a local folder or hub id (safetensors); None is the bundled model.
        decoding: "auto" (in every step the drafter that pays, or none); the name of a method, such as "ngram" (all:
            `outrider.config.DRAFTER_CONFIGS`); a mapping with key "method" and its settings; or a config.
        verification: "coupled" (the output is what plain decoding gives with the same seed), "rejection",
            "tree_rejection" or "multi_candidate" (exact in distribution).
        exactness: "numerical", "bitwise", or "auto": bitwise on a CPU with compiled kernels.
        dtype: "auto", "float32", "bfloat16" or "float16".
        weights: "auto", "fp32", "bf16", "int8" or "int4": what linear layers are packed or rounded to at load.
        group_size: inputs per scale of int4 weights: 32, 64 or 128.
        revision: of a hub id.
        cache, scheduler: settings of those components.

    Raises:
        OutriderError: anything wrong with the model or the settings, as its subclasses say.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        decoding: str | Mapping[str, Any] | DrafterConfig = "auto",
        verification: str = "coupled",
        exactness: Exactness = "auto",
        dtype: str = "auto",
        weights: Weights = "auto",
        group_size: int = 64,
        device: str = "cpu",
        revision: str | None = None,
        cache: Mapping[str, Any] | CacheConfig | None = None,
        scheduler: Mapping[str, Any] | SchedulerConfig | None = None,
        on_calibration: Progress | None = None,
    ) -> None:
        config = EngineConfig(
            model=model if model is None else os.fspath(model),
            revision=revision,
            dtype=dtype,
            weights=weights,
            group_size=group_size,
            device=device,
            exactness=exactness,
            verification=verification,
            decoding=drafter_config(decoding),
            cache=cache if isinstance(cache, CacheConfig) else from_mapping(CacheConfig, cache or {}, "cache"),
            scheduler=scheduler
            if isinstance(scheduler, SchedulerConfig)
            else from_mapping(SchedulerConfig, scheduler or {}, "scheduler"),
        )
        self.model, self.tokenizer, resolved = load_target(config)
        self.config = replace(config, exactness=resolved)
        self.engine = build_engine(self.config, self.model, self.tokenizer, on_calibration=on_calibration)
        self._ids = count()
        self._owners: dict[Request, Generation] = {}  # of the requests that are in the engine

    def with_decoding(
        self, decoding: str | Mapping[str, Any] | DrafterConfig, *, verification: str | None = None
    ) -> LLM:
        """Another LLM over the same loaded weights, with a cache and requests of its own."""
        other = copy(self)
        other.config = replace(
            self.config,
            decoding=drafter_config(decoding),
            verification=verification or self.config.verification,
        )
        other.engine = build_engine(other.config, self.model, self.tokenizer)
        other._owners = {}
        return other

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts together; outputs in the order of the prompts.

        Args:
            prompts: text, ``{"prompt": text}`` or ``{"prompt_token_ids": [...]}``, or a sequence of these.
            sampling_params: one for all prompts or one each; None is `SamplingParams()`.
            on_output: called with each prompt's index and output as soon as it is finished.

        Raises:
            PromptError, SamplingParamsError: before anything runs.
            NumericsError: the model gave NaN or infinite logits for a prompt; its attribute `outputs` holds all
                outputs, those of the other prompts complete.
        """
        generations = self._prepare_all(prompts, sampling_params)
        self._run(generations, on_output)
        outputs = [self.output(generation) for generation in generations]
        for generation in generations:
            if isinstance(generation.error, NumericsError):
                generation.error.outputs = outputs
                raise generation.error
        return outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt; yields the output so far after each step that adds text, then the final one.

        The text only ever grows: what may still turn out to be a stop string is held back. Closing the iterator
        aborts the request.
        """
        (generation,) = self._prepare_all([prompt], sampling_params, streaming=True)
        requests = generation.requests
        shown = [""] * len(requests)
        self.add(generation)
        try:
            while not generation.finished:
                self.step()
                texts = [self._text(request) for request in requests]
                if texts != shown and not generation.finished:
                    shown = texts
                    yield self.output(generation)
            if generation.error is not None:
                raise generation.error
            yield self.output(generation)
        finally:
            self.abort(generation)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of many, by the model's own chat template."""
        if not messages:
            raise PromptError("chat messages", got="none", expected="at least one")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [chat_prompt(conversation, self.tokenizer, **template_variables) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params)

    @property
    def has_unfinished(self) -> bool:
        return self.engine.has_unfinished

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, streaming: bool = False, name: str = "prompt"
    ) -> Generation:
        """What generating for a prompt takes, checked; nothing of it is in the engine yet.

        Args:
            streaming: its text will be asked for while it grows.
            name: what errors call this prompt.

        Raises:
            PromptError, SamplingParamsError: the prompt or the parameters cannot be used with this model.
            CacheError: it may grow beyond the cache.
        """
        vocab_size, context_length = self.model.vocab_size, self.model.context_length
        text, token_ids = encode_prompt(prompt, self.tokenizer, name=name)
        check_prompt(token_ids, vocab_size=vocab_size, context_length=context_length, name=name)
        check_token_ids(params.logit_bias, vocab_size, name="logit_bias token id")
        check_token_ids(params.stop_token_ids, vocab_size, name="stop token id")
        request_id = f"request-{next(self._ids)}"
        seed = fresh_seed() if params.seed is None else params.seed
        if params.max_tokens is None:
            max_length = min(context_length, max(self.engine.cache.num_positions, len(token_ids) + 1))
        else:
            max_length = min(context_length, len(token_ids) + params.max_tokens)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        requests = [
            Request(
                request_id=f"{request_id}-{i}",
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                params=params,
                seed=child_seed(seed, i),
                stop_token_ids=frozenset(eos) | frozenset(params.stop_token_ids),
                max_length=max_length,
                detokenizer=self._detokenizer(token_ids, params) if streaming or params.stop else None,
            )
            for i in range(params.n)
        ]
        self.engine.scheduler.check_fits(requests[0])
        return Generation(request_id, text, token_ids, requests)

    def add(self, generation: Generation) -> None:
        """Queue a generation: it joins the running batch at the next step that has room.

        Raises:
            QueueFullError: too many requests wait already; nothing of it was added.
        """
        try:
            for request in generation.requests:
                self.engine.add(request)
                self._owners[request] = generation
        except QueueFullError:
            self.abort(generation)
            raise

    def step(self) -> list[Generation]:
        """Run one step of everything that was added; returns the generations that got tokens or ended."""
        changed: dict[Generation, None] = {}
        for request in self.engine.step():
            generation = self._owners.pop(request) if request.finished else self._owners[request]
            changed[generation] = None  # several samples of one may have got tokens
        return list(changed)

    def abort(self, generation: Generation) -> None:
        """End a generation where it stands and free what it holds; the others do not notice."""
        for request in generation.requests:
            if not request.finished:
                self.engine.abort(request)
            self._owners.pop(request, None)

    def output(self, generation: Generation) -> RequestOutput:
        """A generation so far."""
        samples = [self.sample(generation, index) for index in range(len(generation.requests))]
        return RequestOutput(generation.request_id, generation.prompt, generation.prompt_token_ids, samples)

    def sample(self, generation: Generation, index: int, *, first_token: int = 0) -> CompletionOutput:
        """One sample of a generation so far.

        Its text is what can be shown already if the generation was prepared for streaming: it only ever grows.

        Args:
            first_token: `token_ids` and `logprobs` hold the output tokens from this one on.
        """
        request = generation.requests[index]
        failed = request.finish_reason == "error"
        for alternatives in request.logprobs[first_token:]:
            for token_id, logprob in alternatives.items():
                if logprob.decoded_token is None:
                    logprob.decoded_token = self.tokenizer.token(token_id)
        return CompletionOutput(
            index=index,
            text="" if failed else self._text(request),
            token_ids=[] if failed else request.token_ids[request.num_prompt_tokens + first_token :],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            seed=request.seed,
            logprobs=request.logprobs[first_token:] if request.params.logprobs is not None else None,
            metrics=request.metrics,
            lossless=self.engine.rule.lossless,
        )

    def _prepare_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        streaming: bool = False,
    ) -> list[Generation]:
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = sampling_params if sampling_params is not None else SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if not all(isinstance(p, SamplingParams) for p in each):
            raise SamplingParamsError(
                "sampling_params", got=repr(params)[:60], expected="SamplingParams, or one each"
            )
        if len(each) != len(prompts):
            raise SamplingParamsError(
                "sampling_params", got=f"{len(each)} for {len(prompts)} prompts", expected="one each"
            )
        names = [
            f"prompt {i} of {len(prompts)}" if len(prompts) > 1 else "prompt" for i in range(1, len(prompts) + 1)
        ]
        return [
            self.prepare(prompt, of, streaming=streaming, name=name)
            for name, prompt, of in zip(names, prompts, each, strict=True)
        ]

    def _run(self, generations: Sequence[Generation], on_output: Callable[[int, RequestOutput], None] | None) -> None:
        pending = deque(generations)
        index_of = {generation: index for index, generation in enumerate(generations)}
        try:
            with self.engine.on_its_cores():
                while pending or self.has_unfinished:
                    while pending and len(self.engine.scheduler.waiting) < self.config.scheduler.max_num_seqs:
                        self.add(pending.popleft())
                    for generation in self.step():
                        if on_output is not None and generation.finished and generation in index_of:
                            on_output(index_of[generation], self.output(generation))
        finally:  # after an interruption, too, nothing of these stays in the engine
            for generation in generations:
                self.abort(generation)

    def _detokenizer(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            lambda ids: self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens),
            context=prompt_token_ids[-DETOKENIZER_CONTEXT:],
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
        )

    def _text(self, request: Request) -> str:
        if request.detokenizer is not None:
            return request.detokenizer.text if request.finished else request.detokenizer.stable_text()
        output = request.output_token_ids
        if output and request.finish_reason == "stop":
            output = output[:-1]  # the end-of-sequence or stop token is no text
        detokenizer = self._detokenizer(request.prompt_token_ids, request.params)
        detokenizer.extend(output)
        return detokenizer.text
