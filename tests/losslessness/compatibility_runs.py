"""Tiny models of every model path and the drafters over them, for the compatibility matrix."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from outrider import LLM
from outrider.config import DrafterConfig, SelfDraftConfig, drafter_config
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.sources.datastore_build import DatastoreWriter
from outrider.engine import build, draft_models
from outrider.inputs.tokenizer import Tokenizer
from outrider.kernels import native
from outrider.losslessness.compatibility import PathRuns, parameter_settings, run_matrix
from outrider.losslessness.matrix import Matrix
from outrider.models.loader import load_tokenizer
from outrider.verification.build import RULE_NAMES
from tests.losslessness.engine_harness import CATALOGUE
from tests.tiny_models import make_tiny

FAMILIES = {"lean": "llama", "universal": "gpt2"}
VOCAB_SIZE = 128
MODES = ("numerical", "bitwise")
PATHS = tuple(f"{kind} {mode}" for kind in FAMILIES for mode in MODES)
PROMPTS = ([5, 9, 5, 9, 5, 9, 7, 5, 9, 5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 1, 4])
SETTINGS = parameter_settings(max_tokens=16, vocab_size=VOCAB_SIZE, stop="t1")
DRAFT_NOISE = 0.05  # of the draft's weights: right often, but not always


def available_paths() -> tuple[str, ...]:
    """Without compiled kernels there is no lean path."""
    return tuple(path for path in PATHS if native.is_available() or not path.startswith("lean"))


def make_models(folder: Path) -> None:
    """Write a target and a draft of each family, and a datastore, into `folder`."""
    for kind, family in FAMILIES.items():
        make_tiny(family, folder / kind)
        draft = make_tiny(family, folder / f"{kind}-draft")
        model = AutoModelForCausalLM.from_pretrained(draft)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(DRAFT_NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(draft)
    make_datastore(folder)


def make_datastore(folder: Path) -> None:
    """Random texts of the models' tokens."""
    fingerprint = Tokenizer(load_tokenizer(folder / "lean")).fingerprint
    generator = random.Random(0)
    path = folder / "datastore"
    with DatastoreWriter(path, vocab_size=VOCAB_SIZE, fingerprint=fingerprint, max_memory_bytes=1 << 16) as writer:
        for _ in range(50):
            writer.add([generator.randrange(3, VOCAB_SIZE) for _ in range(60)])
            writer.end_document()


class FixedCostRuns(PathRuns):
    """Runs whose planned trees do not depend on how fast the machine is."""

    def _build(self, config: DrafterConfig, rule: str, *, prefix_caching: bool) -> LLM:
        with (
            patch.object(build, "forward_cost_of", lambda *_, **__: ForwardCost.unknown()),
            patch.object(draft_models, "forward_cost_of", lambda *_, **__: ForwardCost((1, 64), (0,), [(0.1, 0.4)])),
        ):
            return super()._build(config, rule, prefix_caching=prefix_caching)


def path_runs(folder: Path, path: str) -> PathRuns:
    """Runs over one path's target, one of those that `make_models` wrote."""
    kind, mode = path.split()
    llm = LLM(
        folder / kind,
        decoding="none",
        exactness="bitwise" if mode == "bitwise" else "numerical",
        cache={"block_size": 4},
        scheduler={"max_num_seqs": 64, "max_batch_tokens": 1024},
    )
    return FixedCostRuns(path, llm, PROMPTS, SETTINGS)


def on_path(config: DrafterConfig, folder: Path, path: str) -> DrafterConfig:
    """A drafter as a path runs it, with the files that it needs."""
    draft = str(folder / f"{path.split(maxsplit=1)[0]}-draft")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model" and not isinstance(config, SelfDraftConfig):
            changes["model"] = draft
        elif field.name == "path":
            changes["path"] = str(folder / "datastore")
        elif field.name == "drafter":
            changes["drafter"] = on_path(drafter_config(value), folder, path)
        elif field.name == "drafters" and value is not None:
            changes["drafters"] = [on_path(drafter_config(inner), folder, path) for inner in value]
    return dataclasses.replace(config, **changes)


def measure(
    folder: Path,
    runs: Sequence[PathRuns],
    *,
    drafters: Sequence[str] = tuple(CATALOGUE),
    rules: Sequence[str] = RULE_NAMES,
    advance: Callable[[str], None] = lambda name: None,
) -> Matrix:
    """Run the matrix, or a part of it.

    Args:
        folder: of the models.
        runs: over the paths that are wanted.
    """
    return run_matrix(
        runs,
        {name: CATALOGUE[name] for name in drafters},
        lambda config, path: on_path(config, folder, path),
        rules=rules,
        parameters=list(SETTINGS),
        advance=advance,
    )
