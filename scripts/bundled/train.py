"""The joint stage: target and draft learn in one loop.

Each step the target takes a cross-entropy step, and the draft learns from the target's detached logits
of that same forward, so distillation costs no second forward.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundled.common import CHUNK, check_same_settings, save_state
from bundled.corpus import ChunkStream
from bundled.model import DRAFT_SHAPE, TARGET_SHAPE, Shape, build_model


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on. `tokens` alone may change on resume."""

    tokens: int = 14_500_000
    seed: int = 0
    vocab: int = 4096
    chunks_per_step: int = 4
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_tokens: int = 400_000
    decay_share: float = 0.5  # the last share of the run, in which the rate falls linearly to zero
    long_share: float = 0.15  # the last share of the run, with rows of CHUNK rather than `short_len`
    short_len: int = 512
    bf16: bool = True


def learning_rate(tokens_seen: int, config: TrainConfig) -> float:
    """Warm-up, constant, then linear decay to zero, as a function of the tokens seen."""
    decay_tokens = config.decay_share * config.tokens
    warmup = min(1.0, (tokens_seen + 1) / max(1, config.warmup_tokens))
    decay = min(1.0, max(0.0, (config.tokens - tokens_seen) / max(1.0, decay_tokens)))
    return config.lr * min(warmup, decay)


def row_length(tokens_seen: int, config: TrainConfig) -> int:
    """Short rows for most of the run, the whole context at its end."""
    return CHUNK if tokens_seen >= (1 - config.long_share) * config.tokens else config.short_len


def joint_loss(target_logits: Tensor, draft_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(target's cross-entropy with the labels, draft's cross-entropy with the target's distribution).

    The second has the gradient of KL(target || draft); nothing flows from it into the target.
    """
    target_log_probs = target_logits.flatten(0, 1).float().log_softmax(-1)  # [B * T, V]
    target_loss = F.nll_loss(target_log_probs, labels.flatten())
    target_probs = target_log_probs.detach().exp()
    draft_log_probs = draft_logits.flatten(0, 1).float().log_softmax(-1)
    draft_loss = -(target_probs * draft_log_probs).sum(-1).mean()
    return target_loss, draft_loss


def build_optimizers(models: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embeddings and the norms."""
    named = list(models.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n]
    embeddings = [p for n, p in named if "embed_tokens" in n]
    norms = [p for n, p in named if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [muon, adamw]


def apply_step(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of each optimizer at this rate; the gradients are gone after it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def check_finite(losses: tuple[float, ...], steps: int) -> None:
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"loss is {losses} at step {steps}; lower --lr")


def load_models(path: Path) -> tuple[dict[str, Any], nn.ModuleDict]:
    """A joint checkpoint and the models in it."""
    state = torch.load(path, weights_only=True)
    vocab = state["config"]["vocab"]
    models = nn.ModuleDict({n: build_model(Shape(**shape), vocab, 0) for n, shape in state["shapes"].items()})
    models.load_state_dict(state["models"])
    return state, models


class Trainer:
    """Both models, their optimizers and the number of tokens seen: all that a checkpoint holds."""

    loss_names: ClassVar[tuple[str, ...]] = ("target", "draft")

    def __init__(
        self,
        config: TrainConfig,
        stream: ChunkStream,
        target_shape: Shape = TARGET_SHAPE,
        draft_shape: Shape = DRAFT_SHAPE,
        compiled: bool = False,
    ) -> None:
        self.config, self.stream = config, stream
        self.shapes = {"target": target_shape, "draft": draft_shape}
        self.models = nn.ModuleDict(
            {name: build_model(shape, config.vocab, config.seed) for name, shape in self.shapes.items()}
        )
        self.optimizers = build_optimizers(self.models, config.lr, config.weight_decay)
        self.tokens_seen = 0
        self.steps = 0
        self.seconds = 0.0
        self._loss = torch.compile(self._forward_loss, dynamic=False) if compiled else self._forward_loss

    def _forward_loss(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.bf16):
            target_logits = self.models["target"](input_ids=inputs, use_cache=False).logits
            draft_logits = self.models["draft"](input_ids=inputs, use_cache=False).logits
        return joint_loss(target_logits, draft_logits, labels)

    def step(self) -> tuple[float, float]:
        """One optimizer step for both models; returns their losses."""
        started = time.perf_counter()
        c = self.config
        inputs, labels = self.stream.batch(
            self.steps * c.chunks_per_step, c.chunks_per_step, row_length(self.tokens_seen, c)
        )
        target_loss, draft_loss = self._loss(inputs, labels)
        (target_loss + draft_loss).backward()
        for model in self.models.values():
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        apply_step(self.optimizers, self.rate)
        self.steps += 1
        self.tokens_seen += inputs.numel()
        self.seconds += time.perf_counter() - started
        losses = target_loss.item(), draft_loss.item()
        check_finite(losses, self.steps)
        return losses

    @property
    def rate(self) -> float:
        return learning_rate(self.tokens_seen, self.config)

    @property
    def total_tokens(self) -> int:
        return self.config.tokens

    @property
    def done(self) -> bool:
        return self.tokens_seen >= self.config.tokens

    def summary(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "progress": {
                "steps": self.steps,
                "tokens_seen": self.tokens_seen,
                "seconds": self.seconds,
            },
            "config": asdict(self.config),
            "shapes": {name: asdict(shape) for name, shape in self.shapes.items()},
        }

    def save(self, path: Path) -> None:
        state = {
            **self.summary(),
            "models": self.models.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        save_state(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        shapes = {name: asdict(shape) for name, shape in self.shapes.items()}
        check_same_settings(
            path, asdict(self.config) | {"shapes": shapes}, state["config"] | {"shapes": state["shapes"]}
        )
        self.models.load_state_dict(state["models"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps = state["progress"]["steps"]
        self.tokens_seen = state["progress"]["tokens_seen"]
        self.seconds = state["progress"]["seconds"]
