"""The second stage: the target is frozen, the draft learns from it on the corpus and on its own text.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundled.common import CHUNK, check_same_settings, log, save_state
from bundled.corpus import ChunkStream
from bundled.generate import GenerateConfig, weights_digest
from bundled.train import apply_step, build_optimizers, check_finite


@dataclass(frozen=True)
class DistillConfig:
    """What a run depends on. `tokens` alone may change on resume."""

    tokens: int = 7_000_000
    seed: int = 0
    chunks_per_step: int = 2
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_tokens: int = 100_000
    own_share: float = 0.6  # of the steps, on the target's own text
    argmax_weight: float = 0.4  # of the target's most likely token beside its distribution
    bf16: bool = True
    own_text: GenerateConfig = field(default_factory=GenerateConfig)


def frozen_target(target: Any) -> Any:
    """A copy with the weights that are exported: rounded to bf16, in fp32."""
    return copy.deepcopy(target).to(torch.bfloat16).float().eval().requires_grad_(False)


def load_distilled(path: Path, source: dict[str, str]) -> dict[str, Any] | None:
    """The checkpoint, or None where there is none for this joint checkpoint."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["settings"]["source"] != source:
        log(f"{path} is for another target or draft; leaving it aside")
        return None
    return state


def cosine_rate(tokens_seen: int, config: DistillConfig) -> float:
    """Warm-up, then half a cosine to zero, as a function of the tokens seen."""
    warmup = min(1.0, (tokens_seen + 1) / max(1, config.warmup_tokens))
    done = min(1.0, tokens_seen / config.tokens)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * done))


def distill_loss(target_logits: Tensor, draft_logits: Tensor, argmax_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL(target || draft), share of positions with the same argmax)."""
    target_logits = target_logits.detach().flatten(0, 1).float()  # [B * T, V]
    log_p = target_logits.log_softmax(-1)
    log_q = draft_logits.flatten(0, 1).float().log_softmax(-1)
    p = log_p.exp()
    best = target_logits.argmax(-1)
    kl = (p * (log_p - log_q)).sum(-1).mean()
    loss = (1 - argmax_weight) * kl + argmax_weight * F.nll_loss(log_q, best)
    agreement = (log_q.detach().argmax(-1) == best).float().mean()
    return loss, kl.detach(), agreement


class Distiller:
    """The draft, its optimizers and the number of tokens seen: all that a checkpoint holds."""

    loss_names: ClassVar[tuple[str, ...]] = (
        "KL corpus",
        "KL own text",
        "agreement corpus",
        "agreement own text",
    )

    def __init__(
        self,
        config: DistillConfig,
        models: nn.ModuleDict,
        stream: ChunkStream,
        own_rows: np.ndarray,
        *,
        compiled: bool = False,
    ) -> None:
        """models: of the joint stage. own_rows: [rows, T] that its target wrote."""
        if config.chunks_per_step * CHUNK % own_rows.shape[1]:
            raise ValueError(f"rows of {own_rows.shape[1]} tokens do not fill steps of {CHUNK} tokens")
        self.config, self.stream, self.own_rows = config, stream, own_rows
        self.target = frozen_target(models["target"])
        self.draft: Any = copy.deepcopy(models["draft"])
        self.source = self.source_of(models)
        self.optimizers = build_optimizers(self.draft, config.lr, config.weight_decay)
        self.tokens_seen = 0
        self.steps = 0
        self.seconds = 0.0
        self._recent = [(0.0, 0.0), (0.0, 0.0)]
        self._loss = torch.compile(self._forward_loss, dynamic=False) if compiled else self._forward_loss

    @staticmethod
    def source_of(models: nn.ModuleDict) -> dict[str, str]:
        """What says which joint checkpoint a distilled draft belongs to."""
        return {name: weights_digest(model) for name, model in models.items()}

    def _forward_loss(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.bf16):
            with torch.no_grad():
                target_logits = self.target(input_ids=inputs, use_cache=False).logits
            draft_logits = self.draft(input_ids=inputs, use_cache=False).logits
        return distill_loss(target_logits, draft_logits, self.config.argmax_weight)

    def _own_steps(self, steps: int) -> int:
        """How many of the first `steps` are on the target's own text, spread evenly."""
        return int(steps * self.config.own_share)

    def batch(self) -> tuple[Tensor, bool]:
        """The inputs of this step, a function of its number, and whether they are the target's own."""
        c = self.config
        own_before = self._own_steps(self.steps)
        if self._own_steps(self.steps + 1) == own_before:
            first = (self.steps - own_before) * c.chunks_per_step
            return self.stream.batch(first, c.chunks_per_step, CHUNK)[0], False
        size = c.chunks_per_step * CHUNK // self.own_rows.shape[1]
        picked = []
        for n in range(own_before * size, (own_before + 1) * size):
            epoch, position = divmod(n, len(self.own_rows))
            order = np.random.default_rng([c.seed, epoch]).permutation(len(self.own_rows))
            picked.append(self.own_rows[order[position]])
        return torch.from_numpy(np.stack(picked).astype(np.int64)), True

    def step(self) -> tuple[float, ...]:
        started = time.perf_counter()
        inputs, own = self.batch()
        loss, kl, agreement = self._loss(inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        apply_step(self.optimizers, self.rate)
        self.steps += 1
        self.tokens_seen += inputs.numel()
        self.seconds += time.perf_counter() - started
        check_finite((loss.item(),), self.steps)
        self._recent[own] = (kl.item(), agreement.item())
        (corpus_kl, corpus_agreement), (own_kl, own_agreement) = self._recent
        return corpus_kl, own_kl, corpus_agreement, own_agreement

    @property
    def rate(self) -> float:
        return cosine_rate(self.tokens_seen, self.config)

    @property
    def total_tokens(self) -> int:
        return self.config.tokens

    @property
    def done(self) -> bool:
        return self.tokens_seen >= self.config.tokens

    def settings(self) -> dict[str, Any]:
        return asdict(self.config) | {"source": self.source}

    def save(self, path: Path) -> None:
        state = {
            "progress": {"steps": self.steps, "tokens_seen": self.tokens_seen, "seconds": self.seconds},
            "settings": self.settings(),
            "draft": self.draft.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        save_state(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        check_same_settings(path, self.settings(), state["settings"])
        self.draft.load_state_dict(state["draft"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state["progress"].items():
            setattr(self, name, value)
