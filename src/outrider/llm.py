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
from outrider.errors import NumericsError, PromptError, SamplingParamsError
from outrider.inputs.prompt import Prompt, check_prompt, check_token_ids, encode_prompt
from outrider.outputs import CompletionOutput, RequestOutput
from outrider.request import Request
from outrider.sampling.noise import child_seed, fresh_seed
from outrider.sampling.params import SamplingParams

DETOKENIZER_CONTEXT = 8  # prompt tokens that the first output token's text may depend on


@dataclass(eq=False)
class _Job:
    """One prompt and the requests that sample it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    requests: list[Request]


class LLM:
    """A model with a drafter in front of it; not for use from several threads at once.

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
        jobs = self._jobs(prompts, sampling_params)
        self._run_jobs(jobs, on_output)
        outputs = [self._output(job) for job in jobs]
        for job in jobs:
            for request in job.requests:
                if isinstance(request.error, NumericsError):
                    request.error.outputs = outputs
                    raise request.error
        return outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt; yields the output so far after each step that adds text, then the final one.

        The text only ever grows: what may still turn out to be a stop string is held back. Closing the iterator
        aborts the request.
        """
        (job,) = self._jobs([prompt], sampling_params, streaming=True)
        shown = [""] * len(job.requests)
        for request in job.requests:
            self.engine.add(request)
        try:
            while not all(request.finished for request in job.requests):
                self.engine.step()
                texts = [self._text(request) for request in job.requests]
                if texts != shown and not all(request.finished for request in job.requests):
                    shown = texts
                    yield self._output(job)
            for request in job.requests:
                if request.error is not None:
                    raise request.error
            yield self._output(job)
        finally:
            self._abort(job.requests)

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
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self.tokenizer.render_chat(conversation, **template_variables)  # type: ignore[arg-type]
            # The template writes the special tokens itself.
            prompts.append({"prompt": text, "add_special_tokens": False})
        return self.generate(prompts, sampling_params)

    def _jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        streaming: bool = False,
    ) -> list[_Job]:
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
        return [self._job(*of, streaming=streaming) for of in zip(names, prompts, each, strict=True)]

    def _job(self, name: str, prompt: Prompt, params: SamplingParams, *, streaming: bool) -> _Job:
        vocab_size, context_length = self.model.vocab_size, self.model.context_length
        text, token_ids = encode_prompt(prompt, self.tokenizer, name=name)
        check_prompt(token_ids, vocab_size=vocab_size, context_length=context_length, name=name)
        check_token_ids(params.logit_bias, vocab_size, name="logit_bias token id")
        check_token_ids(params.stop_token_ids, vocab_size, name="stop token id")
        job_id = f"request-{next(self._ids)}"
        seed = fresh_seed() if params.seed is None else params.seed
        if params.max_tokens is None:
            max_length = min(context_length, max(self.engine.cache.num_positions, len(token_ids) + 1))
        else:
            max_length = min(context_length, len(token_ids) + params.max_tokens)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        requests = [
            Request(
                request_id=f"{job_id}-{i}",
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
        return _Job(job_id, text, token_ids, requests)

    def _run_jobs(self, jobs: Sequence[_Job], on_output: Callable[[int, RequestOutput], None] | None) -> None:
        job_of = {request: job for job in jobs for request in job.requests}
        requests = list(job_of)
        pending = deque(requests)
        index_of = {job: index for index, job in enumerate(jobs)}
        num_unfinished = {job: len(job.requests) for job in jobs}
        try:
            while pending or self.engine.has_unfinished:
                while pending and len(self.engine.scheduler.waiting) < self.config.scheduler.max_num_seqs:
                    self.engine.add(pending.popleft())
                for request in self.engine.step():
                    job = job_of.get(request)
                    if job is None or not request.finished:
                        continue
                    num_unfinished[job] -= 1  # several samples of a prompt may end in one step
                    if on_output is not None and num_unfinished[job] == 0:
                        on_output(index_of[job], self._output(job))
        finally:
            self._abort(requests)

    def _abort(self, requests: Sequence[Request]) -> None:
        """After an interruption: nothing of these requests stays in the engine."""
        for request in requests:
            if not request.finished:
                self.engine.abort(request)

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

    def _output(self, job: _Job) -> RequestOutput:
        outputs = []
        for index, request in enumerate(job.requests):
            failed = request.finish_reason == "error"
            for alternatives in request.logprobs:
                for token_id, logprob in alternatives.items():
                    if logprob.decoded_token is None:
                        logprob.decoded_token = self.tokenizer.token(token_id)
            outputs.append(
                CompletionOutput(
                    index=index,
                    text="" if failed else self._text(request),
                    token_ids=[] if failed else request.output_token_ids,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                    seed=request.seed,
                    logprobs=list(request.logprobs) if request.params.logprobs is not None else None,
                    metrics=request.metrics,
                    lossless=self.engine.rule.lossless,
                )
            )
        return RequestOutput(job.request_id, job.prompt, job.prompt_token_ids, outputs)
