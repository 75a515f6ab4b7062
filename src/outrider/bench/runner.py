"""Measuring decoding: contenders take turns over the same prompts, and their outputs are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET
from outrider.engine.stats import EngineStats
from outrider.errors import OutriderError
from outrider.llm import LLM
from outrider.models.loader import folder_of
from outrider.sampling.params import SamplingParams

PLAIN = "none"
WARM_UP_PROMPT = "def main():\n"
PROMPT_LOOKUP_TOKENS = 10  # what transformers' documentation uses


@dataclass(frozen=True)
class Sample:
    """One timed run over all prompts.

    Attributes:
        seconds: of wall time, prefill included.
        token_ids: the output of each prompt.
        stats: the engine's counters and times; None for other engines.
    """

    seconds: float
    token_ids: list[list[int]]
    stats: EngineStats | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


class Contender(Protocol):
    """One way to decode.

    Attributes:
        name: in tables and results.
        comparable: whether its output must be plain decoding's.
    """

    name: str
    comparable: bool

    def prepare(self) -> None:
        """Forget what earlier runs taught it, and warm up."""
        ...

    def run(self, prompts: Sequence[list[int]]) -> Sample:
        """Decode all prompts, timed."""
        ...


class OutriderContender:
    """A drafter of ours.

    Args:
        llm: shares its weights; without prefix caching, so that every run computes its prompts.
        drafter: its specification.
        params: of all prompts, with a seed.
    """

    comparable = True

    def __init__(
        self, name: str, llm: LLM, drafter: Mapping[str, Any], params: SamplingParams, batch_size: int
    ) -> None:
        self.name = name
        self._base, self._drafter, self._params, self._batch_size = llm, drafter, params, batch_size
        self._llm = llm

    def prepare(self) -> None:
        """A new drafter, because some learn from every text that they see; then a few tokens as warm-up."""
        self._llm = self._base.with_decoding(self._drafter)
        self._llm.generate(WARM_UP_PROMPT, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        self._llm.engine.stats = EngineStats()

    def run(self, prompts: Sequence[list[int]]) -> Sample:
        """Decode all prompts, `batch_size` at a time."""
        outputs: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(prompts), self._batch_size):
            batch = [{"prompt_token_ids": ids} for ids in prompts[first : first + self._batch_size]]
            outputs += [output.outputs[0].token_ids for output in self._llm.generate(batch, self._params)]
        return Sample(time.perf_counter() - start, outputs, self._llm.engine.stats)


class TransformersContender:
    """`generate()` of transformers on the same weights: plain, assisted, or with prompt lookup.

    Args:
        module: the model, with transformers' own attention.
        context_length: the most positions that it is asked for.
        options: of `generate`, beside the common ones.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        params: SamplingParams,
        *,
        batch_size: int,
        context_length: int,
        options: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.comparable = params.greedy
        self._module, self._batch_size, self._context_length = module, batch_size, context_length
        sampling = (
            {"do_sample": False}
            if params.greedy
            else {"do_sample": True, "temperature": params.temperature, "top_k": 0}
        )
        self._options = {"max_new_tokens": params.max_tokens, "pad_token_id": 0, **sampling, **options}

    def prepare(self) -> None:
        """Nothing but a few tokens as warm-up."""
        self._generate([[1] * 8], max_new_tokens=8)

    def run(self, prompts: Sequence[list[int]]) -> Sample:
        """Decode all prompts, `batch_size` at a time, padded on the left."""
        outputs: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(prompts), self._batch_size):
            outputs += self._generate(prompts[first : first + self._batch_size])
        return Sample(time.perf_counter() - start, outputs)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], **options: Any) -> list[list[int]]:
        width = max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=self._module.device)
        mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self._module.device
        )
        room = self._context_length - width
        options = {**self._options, **options}
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        try:
            result = self._module.generate(padded, attention_mask=mask, **options)
        except Exception as error:  # it raises anything on a combination that it does not support
            raise _failed(self.name, error) from error
        eos = self._module.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        return [_until_end(row, ends) for row in result[:, width:].tolist()]


def _until_end(token_ids: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end-of-sequence token; padding follows it."""
    return token_ids[: next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))]


def transformers_contenders(
    llm: LLM, draft_model: str | None, params: SamplingParams, batch_size: int
) -> list[TransformersContender]:
    """Plain, and for single prompts assisted and prompt-lookup decoding (transformers has no batches there).

    Args:
        llm: whose model and dtype to use.
        draft_model: assistant; None is the bundled draft for the bundled model, and no assistant otherwise.

    Raises:
        OutriderError: transformers cannot load a model that we could.
    """
    config, dtype = llm.config, llm.model.dtype
    module = _load_module(config.model or BUNDLED_TARGET, config.revision, dtype, config.device)

    def contender(kind: str, **options: Any) -> TransformersContender:
        return TransformersContender(
            f"transformers {kind}",
            module,
            params,
            batch_size=batch_size,
            context_length=llm.model.context_length,
            options=options,
        )

    contenders = [contender("plain")]
    if batch_size == 1:
        draft = draft_model or (BUNDLED_DRAFT if config.model is None else None)
        if draft is not None:
            assistant = _load_module(draft, None, dtype, config.device)
            contenders.append(contender("assisted", assistant_model=assistant))
        contenders.append(contender("prompt lookup", prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS))
    return contenders


def _load_module(path: str, revision: str | None, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = folder_of(path, revision)
    try:
        module: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # as above
        raise _failed(f"loading {path} into transformers", error) from error
    return module.to(device).eval()


def _failed(what: str, error: Exception) -> OutriderError:
    return OutriderError(
        f"{what} failed", got=f"{type(error).__name__}: {error}", remedy="leave it out with --no-transformers"
    )


@dataclass
class Results:
    """Samples of every contender, by repeat.

    Attributes:
        samples: ``name -> [repeat]``; a contender that an interruption kept from a repeat has fewer.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def complete(self) -> dict[str, list[Sample]]:
        """Contenders with at least one sample."""
        return {name: samples for name, samples in self.samples.items() if samples}

    def num_equal(self, name: str) -> int | None:
        """How many outputs equal plain decoding's in every repeat; None where plain decoding has not run."""
        plain = self.samples.get(PLAIN)
        if not plain:
            return None
        runs = [sample.token_ids for sample in self.samples[name]]
        return sum(all(run[i] == expected for run in runs) for i, expected in enumerate(plain[0].token_ids))


def run_rounds(
    contenders: Sequence[Contender],
    prompts: Sequence[list[int]],
    repeats: int,
    results: Results,
    on_start: Callable[[str], None],
    *,
    keep_going: Callable[[], bool] = lambda: True,
) -> None:
    """Time every contender once per repeat, each repeat beginning with the next one.

    Slow changes of the machine then touch all of them alike.

    Args:
        prompts: token ids.
        results: filled as the runs end, so that an interruption leaves the finished ones.
        on_start: called with a contender's name before it runs.
        keep_going: asked before each repeat.
    """
    for contender in contenders:
        results.samples.setdefault(contender.name, [])
    for repeat in range(repeats):
        if not keep_going():
            return
        turn = repeat % len(contenders)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            on_start(contender.name)
            contender.prepare()
            results.samples[contender.name].append(contender.run(prompts))


def sample_record(sample: Sample) -> dict[str, Any]:
    """A sample as a JSON object, without the tokens."""
    record = {
        "seconds": sample.seconds,
        "num_tokens": sample.num_tokens,
        "tokens_per_s": sample.tokens_per_s,
    }
    return record if sample.stats is None else {**record, "stats": asdict(sample.stats)}
