"""From a folder or a hub id to a model that is known to run right: everything checked, nothing executed.

Weights are read from safetensors only and no code of a checkpoint is run. What transformers lets pass with a
warning (tensors that are missing and stay random, shapes that do not fit) is an error here.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from outrider.errors import ConfigError, ModelLoadError, OutriderError, UnsupportedModelError
from outrider.kernels import native
from outrider.kernels.packed import WeightFormat
from outrider.models.llama import LEAN_MODEL_TYPES, load_llama, why_not_lean
from outrider.models.model import Model
from outrider.models.packed_linear import HeldWeights, require_finite, swap_linears
from outrider.models.probe import probe_lean_path, probe_model
from outrider.models.transformers_model import WHAT_RUNS, TransformersModel
from outrider.quantization.tensor_files import first_line, read_json
from outrider.quantization.weights import DEFAULT_GROUP_SIZE, WeightSource, open_weights

_DOWNLOADED = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_PLAIN_FORMATS: dict[torch.dtype, WeightFormat] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GENERATIVE_CLASS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", re.IGNORECASE)


def load_model(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    weights: WeightFormat | Literal["auto"] = "auto",
    group_size: int = DEFAULT_GROUP_SIZE,
    cache_dtype: str = "auto",
    device: str = "cpu",
    row_invariant: bool = False,
) -> Model:
    """Load a causal language model and prove by a probe that it computes what transformers alone would.

    On a CPU with compiled kernels the Llama family takes the lean path. Everything else runs in transformers' module,
    its linear layers swapped for ours on a CPU with compiled kernels, or if `weights` or the checkpoint ask for it.

    Args:
        path_or_hub_id: a folder with config.json and safetensors, or ``owner/name`` on the Hugging Face hub
            (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply).
        revision: branch, tag or commit on the hub.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        weights: "auto", "fp32", "bf16", "int8" or "int4", as `EngineConfig` describes.
        group_size: of int4.
        cache_dtype: of keys and values: "auto" (as `dtype`), "float32", "bfloat16" or "int8".
        row_invariant: prepare for the bitwise mode (`check_row_invariance` proves it).

    Raises:
        ModelLoadError: nothing there, or incomplete, or damaged.
        UnsupportedModelError: no causal language model, or one that would run wrong.
        ConfigError: an unknown dtype, a device that is not there, or what cannot be had on it.
    """
    _check_device_and_dtypes(device, dtype, cache_dtype)
    wanted = _Wanted(str(path_or_hub_id), dtype, weights, group_size, cache_dtype, device)
    folder = folder_of(path_or_hub_id, revision)
    with quiet_transformers():
        config = read_config(folder)
        source = open_weights(folder, None if weights == "auto" else weights)
        if device == "cpu" and dtype != "float16" and _runs_lean(config):
            return _load_lean(folder, config, source, wanted)
        module = _load_module(folder, config, source, wanted)
        model = TransformersModel(module, name=wanted.name, row_invariant=row_invariant)
        probe_model(model)
    return model if cache_dtype == "auto" else model.with_cache_dtype(_CACHE_DTYPES[cache_dtype])


@dataclass(frozen=True)
class _Wanted:
    """What `load_model` was asked for."""

    name: str
    dtype: str
    weights: WeightFormat | Literal["auto"]
    group_size: int
    cache_dtype: str
    device: str


def _load_lean(folder: Path, config: PretrainedConfig, source: WeightSource, wanted: _Wanted) -> Model:
    chosen = _stored_dtype(config) if wanted.dtype == "auto" else _DTYPES[wanted.dtype]
    return load_llama(
        folder,
        config,
        source,
        format=(_PLAIN_FORMATS[chosen] if wanted.weights == "auto" else wanted.weights),
        group_size=wanted.group_size,
        dtype=chosen,
        cache_dtype=chosen if wanted.cache_dtype == "auto" else _CACHE_DTYPES[wanted.cache_dtype],
        name=wanted.name,
    )


def _load_module(folder: Path, config: PretrainedConfig, source: WeightSource, wanted: _Wanted) -> PreTrainedModel:
    """transformers' module in evaluation mode, its linear layers on our kernels where they can and should be."""
    weights, held = wanted.weights, source.held is not None
    asked, on_cpu = held or weights != "auto", wanted.device == "cpu"
    if asked and not on_cpu:
        raise ConfigError(
            "weights",
            got=f"{source.held} in {folder}, on {wanted.device}" if held else f"{weights} on {wanted.device}",
            expected="a plain checkpoint and 'auto' on devices other than the CPU",
            remedy="use device='cpu'" if held else "use device='cpu', or leave weights at 'auto' and set dtype",
        )
    dtype = _DTYPES.get(wanted.dtype) or (_stored_dtype(config) if asked else "auto")
    module = read_module(folder, config, dtype, source if held else None)
    module = module.to(wanted.device).eval().requires_grad_(False)
    require_finite(module, folder)
    if asked or (on_cpu and native.is_available() and module.dtype in _PLAIN_FORMATS):
        plain = _PLAIN_FORMATS.get(module.dtype, "fp32")
        # What a quantised checkpoint keeps plain stays plain.
        swap_linears(module, plain if held or weights == "auto" else weights, plain, wanted.group_size)
    return module


def _runs_lean(config: PretrainedConfig) -> bool:
    """Whether the lean path computes what a module of this configuration would."""
    if not native.is_available() or config.model_type not in LEAN_MODEL_TYPES:
        return False
    try:
        reason = why_not_lean(config)
        if reason is None:
            probe_lean_path(config)
    except Exception as error:  # nonsense in a configuration, which the universal path names
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason is not None:
        getLogger("outrider").warning("not on the fast path for its family, but through transformers: %s", reason)
    return reason is None


def _stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a checkpoint asks to be computed in; the kernels take bfloat16 for float16."""
    return torch.float32 if config.dtype in (None, torch.float32) else torch.bfloat16


def load_tokenizer(path_or_hub_id: str | Path, *, revision: str | None = None) -> Any:
    """The fast or slow tokenizer of a model folder or hub id.

    Raises:
        ModelLoadError: there is none, or it is damaged or needs code of the checkpoint.
    """
    folder = folder_of(path_or_hub_id, revision)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelLoadError(
            f"tokenizer of {folder}",
            got="no tokenizer file",
            expected=f"one of {', '.join(_TOKENIZER_FILES)}",
            remedy="copy the tokenizer files of the model next to config.json",
        )
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelLoadError(
                f"tokenizer of {folder} cannot be read", got=first_line(error), remedy="check its files"
            ) from error


def _check_device_and_dtypes(device: str, dtype: str, cache_dtype: str) -> None:
    for name, value, known in (("dtype", dtype, _DTYPES), ("cache.dtype", cache_dtype, _CACHE_DTYPES)):
        if value != "auto" and value not in known:
            raise ConfigError(name, got=repr(value), expected=f"'auto' or one of {', '.join(known)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(
            "device",
            got=repr(device),
            expected="a device of this machine, such as 'cpu'",
            remedy=first_line(error),
        ) from error
    if cache_dtype == "int8" and not (device == "cpu" and native.is_available()):
        raise ConfigError(
            "cache.dtype",
            got=f"int8 on {device}" if device != "cpu" else "int8 without compiled kernels",
            expected="auto, float32 or bfloat16",
            remedy="use device='cpu'" if device != "cpu" else "install a C++ compiler and reinstall outrider",
        )


def folder_of(path_or_hub_id: str | Path, revision: str | None, *, files: Sequence[str] = _DOWNLOADED) -> Path:
    """The local folder, downloaded if it is a hub id.

    Args:
        files: patterns of what is downloaded.
    """
    name = str(path_or_hub_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError("revision", got=f"{revision!r} with the local folder {folder}", expected="a hub id")
        return folder
    if folder.exists():
        raise ModelLoadError(
            f"model {folder}", got="a file", expected="a folder with config.json and safetensors files"
        )
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelLoadError(
            f"model folder {folder}",
            got="nothing there",
            expected="an existing folder, or a hub id owner/name",
        )
    return _download(name, revision, files)


def _download(hub_id: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet_already = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        remedy = "accept its licence on the hub and set HF_TOKEN"
        raise ModelLoadError(f"model {hub_id} is gated", got=first_line(error), remedy=remedy) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"model {hub_id}",
            got="neither a local folder nor a model on the hub",
            remedy="check the name; for a private model set HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"model {hub_id}",
            got="no local folder, no cached copy and no connection to the hub",
            remedy="pass the path of a folder, or download it where there is a connection (to HF_HOME)",
        ) from error
    except Exception as error:  # HTTP, validation and file system errors share no base class
        remedy = "check the name, the revision and the connection"
        raise ModelLoadError(f"download of {hub_id} failed", got=first_line(error), remedy=remedy) from error
    finally:
        if not quiet_already:
            enable_progress_bars()


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a causal language model that transformers knows without code of the checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"model folder {folder}", got="no config.json", expected="a Hugging Face model folder")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        custom = " and code of its own (auto_map), which outrider never runs" if "auto_map" in raw else ""
        raise UnsupportedModelError(
            f"{path}",
            got=f"model_type {model_type!r}{custom}",
            expected="a type that transformers knows",
            remedy=WHAT_RUNS,
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configuration classes validate with several exception types
        raise ModelLoadError(f"{path} is not valid", got=first_line(error), remedy="restore the file") from error
    architectures = raw.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    if (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or config.is_encoder_decoder
        or not all(_GENERATIVE_CLASS.search(str(name)) for name in architectures)
    ):
        raise UnsupportedModelError(
            f"{folder}",
            got=f"{', '.join(map(str, architectures)) or model_type}",
            expected="a decoder-only causal language model",
            remedy=WHAT_RUNS,
        )
    return config


def read_module(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype | str, held: WeightSource | None = None
) -> Any:
    """The module with every one of its tensors from the checkpoint, but for the packed layers that `held` has."""
    loaded: Any  # with output_loading_info a pair, which the stubs do not say
    if held is not None:
        vars(config).pop("quantization_config", None)  # or transformers would ask for the method's own library
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            quantization_config=None if held is None else HeldWeights(held),
        )
    except OutriderError:
        raise
    except Exception as error:  # anything that a model class raises on an unexpected configuration
        raise ModelLoadError(
            f"model {folder} cannot be built",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected="weights and a configuration that fit together",
            remedy="check config.json against the weights",
        ) from error
    module, report = loaded
    mismatched = [str(key) for key in report["mismatched_keys"]]
    if mismatched:
        raise ModelLoadError(
            f"weights of {folder}",
            got=f"{len(mismatched)} tensors of other shapes, such as {mismatched[0]}",
            expected="the shapes that config.json asks for",
            remedy="use config.json and weights of the same model",
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"weights of {folder}",
            got=f"{len(missing)} tensors missing, such as {', '.join(missing[:3])}",
            expected=f"every tensor of {type(module).__name__} (missing ones would be random)",
            remedy="download all files of the model; adapters must be merged into their base model first",
        )
    return module


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, reports or warnings of transformers on stderr: what matters is an error of ours."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
