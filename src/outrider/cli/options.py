"""Options that several commands share, and the engine that they ask for (no torch: `--help` is quick)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.bench.workloads import WORKLOADS
from outrider.cli.console import progress_bar
from outrider.config import (
    DRAFTER_CONFIGS,
    CacheConfig,
    DraftModelConfig,
    EngineConfig,
    SchedulerConfig,
    drafter_config,
)
from outrider.errors import ConfigError
from outrider.sampling.params import MAX_SEED, SamplingParams
from outrider.verification.descriptions import RULE_DESCRIPTIONS

if TYPE_CHECKING:
    from outrider.llm import LLM

MODEL, DRAFTING, SAMPLING, ENGINE, OUTPUT = "Model", "Drafting", "Sampling", "Engine", "Output"
MEASURING, SERVER = "Measuring", "Server"
MAX_THREADS, MAX_TOGETHER, MAX_REPEATS = 1024, 1000, 1000
_EXACTNESS = {"sample": "what plain decoding gives with the same seed", "distribution": "exact in distribution"}
VERIFICATION_HELP = "; ".join(
    f"{', '.join(name for name, rule in RULE_DESCRIPTIONS.items() if rule.exactness == exactness)} ({words})"
    for exactness, words in _EXACTNESS.items()
)


def option(*names: str, help: str, panel: str, metavar: str | None = None) -> Any:
    """A Typer option in a panel of the help page."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=True)


Model = Annotated[
    str | None,
    option("--model", "-m", help="Folder or hub id (safetensors); without it the bundled model.", panel=MODEL),
]
Revision = Annotated[str | None, option("--revision", help="Branch, tag or commit of the hub id.", panel=MODEL)]
Dtype = Annotated[str, option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.", panel=MODEL)]
WeightFormat = Annotated[
    str,
    option(
        "--weights",
        help="Linear layers as: auto (the checkpoint's), fp32, bf16, int8 or int4, rounded at load.",
        panel=MODEL,
    ),
]
GroupSize = Annotated[int, option("--group-size", help="Inputs per scale of int4: 32, 64 or 128.", panel=MODEL)]
Device = Annotated[str, option("--device", help="Torch device.", panel=MODEL)]

Drafter = Annotated[
    str | None,
    option(
        "--decoding",
        "-d",
        help=f"One of {', '.join(DRAFTER_CONFIGS)}. Default: {EngineConfig().decoding.method}.",
        panel=DRAFTING,
    ),
]
Drafters = Annotated[
    list[str] | None,
    option("--decoding", "-d", help="Names, or all (the default); repeat it or use commas.", panel=DRAFTING),
]
DraftModel = Annotated[
    str | None,
    option(
        "--draft-model",
        help="Folder or hub id of the draft model of a drafter that runs one; auto chooses from it, too.",
        panel=DRAFTING,
    ),
]
DrafterSettings = Annotated[
    str | None,
    option(
        "--decoding-config",
        help="More settings of the drafter as JSON, such as '{\"depth\": 6}'.",
        panel=DRAFTING,
        metavar="JSON",
    ),
]
Verification = Annotated[
    str,
    option(
        "--verification",
        help=VERIFICATION_HELP,
        panel=DRAFTING,
    ),
]

ExactnessMode = Annotated[
    str,
    option(
        "--exactness",
        help="bitwise (proven at start), numerical (equal up to ties), or auto: bitwise on a CPU with our kernels.",
        panel=ENGINE,
    ),
]
CacheGb = Annotated[float, option("--cache-gb", help="Most memory for keys and values, in GiB.", panel=ENGINE)]
CacheDtype = Annotated[
    str, option("--cache-dtype", help="Keys and values as: auto, float32, bfloat16 or int8.", panel=ENGINE)
]
MaxNumSeqs = Annotated[int, option("--max-num-seqs", help="Most sequences that run at once.", panel=ENGINE)]
MaxBatchTokens = Annotated[int, option("--max-batch-tokens", help="Most rows of a forward.", panel=ENGINE)]
Threads = Annotated[
    int | None, option("--threads", help="CPU threads; without it torch decides (OMP_NUM_THREADS).", panel=ENGINE)
]

BatchSize = Annotated[int, option("--batch-size", "-b", help="Prompts that run together.", panel=MEASURING)]
WorkloadName = Annotated[
    str | None,
    option("--workload", help=f"Kind of prompts: {', '.join(WORKLOADS)}. Default: code.", panel=MEASURING),
]
Prompts = Annotated[
    str | None,
    option("--prompts", "-p", help="How many prompts of the workload, or a file of prompts.", panel=MEASURING),
]
DataFile = Annotated[
    str | None,
    option("--data", help="File of the data set, for the workloads spec_bench and humaneval.", panel=MEASURING),
]
WorkloadTemperature = Annotated[
    float | None,
    option("--temperature", "-t", help="0 is greedy decoding. Default: 0; for random prompts 1.5.", panel=SAMPLING),
]

MaxTokens = Annotated[int, option("--max-tokens", help="Most tokens to generate per sequence.", panel=SAMPLING)]
Temperature = Annotated[float, option("--temperature", "-t", help="0 is greedy decoding.", panel=SAMPLING)]
Seed = Annotated[
    int | None,
    option("--seed", help="Of the keyed noise; the same seed gives the same text.", panel=SAMPLING),
]
JsonOut = Annotated[bool, option("--json", help="Print JSON.", panel=OUTPUT)]
OutputFile = Annotated[str | None, option("--output", "-o", help="Write the JSON to this file.", panel=OUTPUT)]


@dataclass(frozen=True)
class EngineOptions:
    """What the engine options of a command ask for; see `EngineConfig` for their meaning.

    Attributes:
        drafter: a method's name; None leaves the choice to `drafter_name`.
        drafter_settings: a JSON object with more settings of the drafter.
        threads: of torch and of our kernels; None leaves torch's own choice.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str = EngineConfig.dtype
    weights: str = EngineConfig.weights
    group_size: int = EngineConfig.group_size
    device: str = EngineConfig.device
    drafter: str | None = None
    draft_model: str | None = None
    drafter_settings: str | None = None
    verification: str = EngineConfig.verification
    exactness: str = EngineConfig.exactness
    cache_gb: float = CacheConfig.memory_gb
    cache_dtype: str = CacheConfig.dtype
    max_num_seqs: int = SchedulerConfig.max_num_seqs
    max_batch_tokens: int = SchedulerConfig.max_batch_tokens
    max_waiting: int = SchedulerConfig.max_waiting
    threads: int | None = None
    prefix_caching: bool = True

    @staticmethod
    def of(*groups: object, **settings: Any) -> EngineOptions:
        """What groups of options, whose fields are called as ours, and single ones ask for together."""
        return EngineOptions(**{name: value for group in groups for name, value in vars(group).items()}, **settings)

    @property
    def drafter_name(self) -> str:
        if self.drafter is not None:
            return self.drafter
        return EngineConfig().decoding.method

    def drafter_spec(self, name: str | None = None) -> dict[str, Any]:
        """What `LLM` takes as its drafter.

        Args:
            name: of the method; None is the one asked for.

        Raises:
            ConfigError: unknown method or setting, or a draft model for a method that has none.
        """
        name = name or self.drafter_name
        settings = _json_object(self.drafter_settings, "--decoding-config")
        if "method" in settings:
            raise ConfigError(
                "--decoding-config", got="a method", expected="settings", remedy="name it by --decoding"
            )
        spec = {"method": name, **settings}
        if self.draft_model is not None:
            if not _has_draft_model(name):
                known = ", ".join(filter(_has_draft_model, DRAFTER_CONFIGS))
                raise ConfigError("--draft-model", got=f"drafter {name!r}", expected=f"one of {known}")
            spec["draft_model" if name == "auto" else "model"] = self.draft_model
        drafter_config(spec)
        return spec

    def load(self, drafter: str | None = None) -> LLM:
        """Load the model; settings are checked first, because loading takes long.

        Args:
            drafter: method to load it with; None is the one asked for.

        Raises:
            OutriderError: a setting that cannot work, or a model that cannot be loaded.
        """
        spec = {"method": "none"} if drafter == "none" else self.drafter_spec(drafter)
        if self.model == "":
            raise ConfigError("--model", got="nothing", expected="a folder or hub id")
        cache: dict[str, Any] = {
            "memory_gb": self.cache_gb,
            "prefix_caching": self.prefix_caching,
            "dtype": self.cache_dtype,
        }
        scheduler = {
            "max_num_seqs": self.max_num_seqs,
            "max_batch_tokens": self.max_batch_tokens,
            "max_waiting": self.max_waiting,
        }
        CacheConfig(**cache)
        SchedulerConfig(**scheduler)
        model: dict[str, Any] = {
            "dtype": self.dtype,
            "weights": self.weights,
            "group_size": self.group_size,
            "exactness": self.exactness,
        }
        EngineConfig(**model)
        self.set_threads()
        from transformers.utils import logging

        from outrider.llm import LLM

        logging.set_verbosity_error()  # a warning beside our own error would say it twice
        with progress_bar() as bar:
            task = bar.add_task("measuring forwards", visible=False)
            return LLM(
                self.model,
                decoding=spec,
                verification=self.verification,
                **model,
                device=self.device,
                revision=self.revision,
                cache=cache,
                scheduler=scheduler,
                on_calibration=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )

    def set_threads(self) -> None:
        """Give torch the number of threads asked for.

        Raises:
            ConfigError: below one.
        """
        if self.threads is None:
            return
        require_in_range("--threads", self.threads, 1, MAX_THREADS)
        import torch

        torch.set_num_threads(self.threads)


def drafter_names(values: Sequence[str] | None, options: EngineOptions) -> list[str]:
    """Names given with repeats and commas, in order; `all` is every drafter that the models at hand allow.

    `datastore` is not among them: it needs a file.

    Raises:
        ConfigError: an unknown name.
    """
    has_draft = options.model is None or options.draft_model is not None
    # Of the methods that load a second model `all` has the plain one: the others are asked for by name.
    loaded = {name for name, config in DRAFTER_CONFIGS.items() if issubclass(config, DraftModelConfig)}
    left_out = {"none", "datastore", *loaded} - ({"draft_model"} if has_draft else set())
    every = [name for name in DRAFTER_CONFIGS if name not in left_out]
    names: list[str] = []
    for name in (part.strip() for value in values or ["all"] for part in value.split(",")):
        if name != "all" and name not in DRAFTER_CONFIGS:
            raise ConfigError(
                "unknown drafter", got=repr(name), expected=f"all, or some of {', '.join(DRAFTER_CONFIGS)}"
            )
        names.extend(every if name == "all" else [name])
    return list(dict.fromkeys(names))


def drafter_specs(names: Sequence[str], options: EngineOptions) -> dict[str, dict[str, Any]]:
    """A drafter specification for each name; `--decoding-config` maps names to settings here.

    Raises:
        ConfigError: an unknown drafter or setting.
    """
    settings = _json_object(options.drafter_settings, "--decoding-config")
    for name, of in settings.items():
        if name not in names or not isinstance(of, Mapping):
            raise ConfigError(
                "--decoding-config",
                got=f"{name!r}: {json.dumps(of)}",
                expected='settings by drafter, such as {"ngram": {...}}',
            )
    specs: dict[str, dict[str, Any]] = {}
    for name in names:
        spec = {"method": name, **settings.get(name, {})}
        if options.draft_model is not None and _has_draft_model(name):
            spec["draft_model" if name == "auto" else "model"] = options.draft_model
        drafter_config(spec)
        specs[name] = spec
    return specs


def require_in_range(name: str, value: float, low: float, high: float) -> None:
    """Raises:
    ConfigError: the option `name` has a value outside its bounds.
    """
    if not low <= value <= high:
        raise ConfigError(name, got=value, expected=f"{low} to {high}")


def parse_numbers(text: str, name: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers separated by commas.

    Raises:
        ConfigError: something else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        word = "integers" if kind is int else "numbers"
        raise ConfigError(name, got=repr(text), expected=f"{word} separated by commas") from error


def base_seed(seed: int | None, num_prompts: int) -> int:
    """The seed of the first of `num_prompts` prompts, each of which takes the next one; 0 without a wish."""
    SamplingParams(seed=seed)
    return min(seed or 0, MAX_SEED - num_prompts)


def _has_draft_model(name: str) -> bool:
    """Whether a method runs a draft model that users name."""
    config = DRAFTER_CONFIGS.get(name)
    if name == "auto":
        return True
    return config is not None and issubclass(config, DraftModelConfig) and name != "self_draft"


def _json_object(text: str | None, name: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(name, got=f"invalid JSON ({error})", expected="a JSON object") from error
    if not isinstance(value, dict):
        raise ConfigError(name, got=repr(text)[:60], expected="a JSON object")
    return value
