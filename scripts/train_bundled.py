"""Train the bundled pair of models (target and draft) on the running Python's standard library.

    python scripts/train_bundled.py all                 # every stage that is not done yet
    python scripts/train_bundled.py train --tokens 12e6 # resume with a smaller total: decay comes earlier
    python scripts/train_bundled.py export              # weights of the last checkpoint, at any time
    python scripts/train_bundled.py evaluate            # held-out figures and the model card

Both models learn in ONE loop: each step the target takes a cross-entropy step, and the draft learns
from the target's detached logits of that same forward, so distillation costs no second forward.

Everything is a pure function of (seed, tokens seen): the batches, the learning rate and the sequence
length. So a run that was stopped and resumed equals one that was not, and the total may be changed
on resume. Ctrl-C saves a checkpoint and exits. Needs torch >= 2.9 (for Muon).

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_WORK = ROOT / "build" / "bundled"
DEFAULT_OUT = ROOT / "src" / "outrider" / "bundled"

END_OF_TEXT = "<|endoftext|>"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CHUNK = 1024  # tokens; the context length, and the unit in which the corpus is shuffled and counted

# Modules that neither model nor the tokenizer ever sees, relative to the standard library. An entry
# stands for `entry.py` and for everything in the package `entry/`.
HELD_OUT_MODULES: tuple[str, ...] = (
    *("argparse", "ast", "calendar", "cmd", "colorsys", "csv", "difflib", "fractions", "graphlib"),
    *("heapq", "http/client", "json", "queue", "sched", "shelve", "shlex", "statistics", "textwrap"),
    *("test/test_argparse", "test/test_ast", "test/test_calendar", "test/test_cmd"),
    *("test/test_colorsys", "test/test_csv", "test/test_difflib", "test/test_fractions"),
    *("test/test_graphlib", "test/test_heapq", "test/test_httplib", "test/test_json"),
    *("test/test_queue", "test/test_sched", "test/test_shelve", "test/test_shlex"),
    *("test/test_statistics", "test/test_textwrap"),
)

# Third-party code, generated tables and data that happens to end in .py.
EXCLUDED_PREFIXES: tuple[str, ...] = (
    *("site-packages/", "dist-packages/", "encodings/", "pydoc_data/", "lib2to3/tests/data/"),
    *("test/encoded_modules/", "test/test_lib2to3/data/", "msilib/", "_sysconfigdata", "config-"),
    *("html/entities.py", "stringprep.py", "keyword.py", "token.py"),
)

# Splits before BPE merges, after the pattern of GPT-4's tokenizer: a word takes one leading mark or
# space, newlines end a run of punctuation, and a run of indentation is one piece less its last space.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Shape:
    """The sizes of one Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


TARGET_SHAPE = Shape(hidden=256, layers=6, heads=8, kv_heads=4, ffn=896)
DRAFT_SHAPE = Shape(hidden=128, layers=2, heads=4, kv_heads=2, ffn=352)


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on. `tokens` alone may change on resume."""

    tokens: int = 18_000_000
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


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    """Our own progress is enough; its bars would fill a log file."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def write_text_atomic(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(record, indent=2) + "\n")


# ---------------------------------------------------------------------------------------- corpus


def is_held_out(path: str) -> bool:
    """Whether a path relative to the standard library belongs to a held-out module."""
    return any(path == f"{module}.py" or path.startswith(f"{module}/") for module in HELD_OUT_MODULES)


def is_data(text: str) -> bool:
    """Whether a file is mostly escaped data or long lines rather than code."""
    lines = text.splitlines()
    if not lines:
        return True
    escaped = sum(1 for line in lines if re.search(r"\\[xuU][0-9a-fA-F]", line))
    return escaped > 0.15 * len(lines) or len(text) / len(lines) > 120


def read_source(path: Path) -> str | None:
    """The file as text with its own line endings, or None where it is not valid UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def collect_corpus(stdlib: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(training files, held-out files) as {relative path: text}, without exact duplicates."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    seen: set[str] = set()
    paths = sorted((p.relative_to(stdlib).as_posix(), p) for p in stdlib.rglob("*.py"))
    for held_out_first in (True, False):  # so that a held-out file's duplicate is never trained on
        for name, path in paths:
            if is_held_out(name) != held_out_first or "__pycache__" in name:
                continue
            if name.startswith(EXCLUDED_PREFIXES) or "/site-packages/" in name:
                continue
            text = read_source(path)
            if text is None or is_data(text):
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            (held_out if held_out_first else train)[name] = text
    return train, held_out


def write_held_out(path: Path, held_out: dict[str, str]) -> None:
    """Tell benchmarks which files of any Python's standard library the models never saw."""
    record = {
        "note": "Paths relative to sysconfig.get_path('stdlib'); not seen in training. A module "
        "stands for module.py and for everything under module/, in any Python version.",
        "modules": list(HELD_OUT_MODULES),
        "python": platform.python_version(),
        "files": sorted(held_out),
    }
    write_json(path, record)


# ------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab: int) -> Any:
    """A byte-level BPE tokenizer as a transformers fast tokenizer; decoding gives back every byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CHUNK,
        clean_up_tokenization_spaces=False,
    )


def prepare(work: Path, out: Path, vocab: int) -> None:
    """Stages corpus and tokenizer: writes tokens, document offsets and counts into the work folder."""
    if (work / "corpus.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = collect_corpus(Path(sysconfig.get_path("stdlib")))
    log(f"corpus: {len(train)} files for training, {len(held_out)} held out")
    tokenizer = train_tokenizer(list(train.values()), vocab)
    tokenizer.save_pretrained(work / "tokenizer")
    encoded = tokenizer.backend_tokenizer.encode_batch(list(train.values()), add_special_tokens=False)
    documents = [[*e.ids, tokenizer.eos_token_id] for e in encoded]
    np.save(work / "tokens.npy", np.concatenate([np.asarray(d, dtype=np.uint16) for d in documents]))
    np.save(work / "offsets.npy", np.cumsum([0, *map(len, documents)]))
    write_held_out(out / "held_out.json", held_out)
    counts = {
        "python": platform.python_version(),
        "files": len(train),
        "bytes": sum(len(t.encode()) for t in train.values()),
        "tokens": sum(map(len, documents)),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(t.encode()) for t in held_out.values()),
    }
    log(f"corpus: {counts}")
    write_json(work / "corpus.json", counts)


class ChunkStream:
    """The endless training stream: per epoch, shuffled documents cut into shuffled chunks.

    Chunk n is a pure function of (seed, n). Chunk c of an epoch covers tokens
    [phase + c * CHUNK, phase + (c + 1) * CHUNK] of its stream: one more than CHUNK, for the labels.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, seed: int) -> None:
        self.tokens, self.offsets, self.seed = tokens, offsets, seed
        self.chunks_per_epoch = (len(tokens) - 1) // CHUNK - 1
        if self.chunks_per_epoch < 1:
            raise ValueError(f"corpus has {len(tokens)} tokens; expected more than {2 * CHUNK}")
        self._epoch = -1

    def _load_epoch(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.offsets) - 1)
        parts = [self.tokens[self.offsets[d] : self.offsets[d + 1]] for d in order]
        self._stream = np.concatenate(parts)[int(random.integers(CHUNK)) :]
        self._order = random.permutation(self.chunks_per_epoch)
        self._epoch = epoch

    def chunk(self, n: int) -> np.ndarray:  # [CHUNK + 1]
        epoch, position = divmod(n, self.chunks_per_epoch)
        if epoch != self._epoch:
            self._load_epoch(epoch)
        start = int(self._order[position]) * CHUNK
        return self._stream[start : start + CHUNK + 1]

    def batch(self, first: int, num_chunks: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each [B, T] with B * T == num_chunks * CHUNK and T == length."""
        rows = np.stack([self.chunk(n) for n in range(first, first + num_chunks)]).astype(np.int64)
        inputs, labels = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        return inputs.reshape(-1, length), labels.reshape(-1, length)


# -------------------------------------------------------------------------------------- training


def learning_rate(tokens_seen: int, config: TrainConfig) -> float:
    """Warm-up, constant, then linear decay to zero, as a function of the tokens seen."""
    decay_tokens = config.decay_share * config.tokens
    warmup = min(1.0, (tokens_seen + 1) / max(1, config.warmup_tokens))
    decay = min(1.0, max(0.0, (config.tokens - tokens_seen) / max(1.0, decay_tokens)))
    return config.lr * min(warmup, decay)


def row_length(tokens_seen: int, config: TrainConfig) -> int:
    """Short rows for most of the run, the whole context at its end."""
    return CHUNK if tokens_seen >= (1 - config.long_share) * config.tokens else config.short_len


def build_model(shape: Shape, vocab: int, seed: int) -> Any:
    """A randomly initialised Llama whose deeper projections start smaller (as in GPT-2)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CHUNK,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * shape.layers))
    return model


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


class Trainer:
    """Both models, their optimizers and the number of tokens seen: all that a checkpoint holds."""

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
        self.optimizers = self._build_optimizers()
        self.tokens_seen = 0
        self.steps = 0
        self.seconds = 0.0
        self._loss = torch.compile(self._forward_loss, dynamic=False) if compiled else self._forward_loss

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the layers, AdamW for the embeddings and the norms."""
        named = list(self.models.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n]
        embeddings = [p for n, p in named if "embed_tokens" in n]
        norms = [p for n, p in named if p.ndim == 1]
        c = self.config
        muon = torch.optim.Muon(
            matrices, lr=c.lr, weight_decay=c.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": c.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=c.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        return [muon, adamw]

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
        rate = learning_rate(self.tokens_seen, c)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens_seen += inputs.numel()
        self.seconds += time.perf_counter() - started
        losses = target_loss.item(), draft_loss.item()
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"loss is {losses} at step {self.steps}; lower --lr")
        return losses

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
        temporary = path.with_name(path.name + ".partial")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        ours, theirs = asdict(self.config), state["config"]
        changed = {k: (v, theirs.get(k)) for k, v in ours.items() if k != "tokens" and theirs.get(k) != v}
        shapes = {name: asdict(shape) for name, shape in self.shapes.items()}
        if changed or shapes != state["shapes"]:
            raise ValueError(
                f"checkpoint {path} was made with other settings: {changed or state['shapes']}; "
                "only --tokens may change on resume; choose another --work folder"
            )
        self.models.load_state_dict(state["models"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps = state["progress"]["steps"]
        self.tokens_seen = state["progress"]["tokens_seen"]
        self.seconds = state["progress"]["seconds"]


class ProgressReport:
    """A progress bar on a terminal, else a line now and then."""

    def __init__(self, total: int, every_seconds: float = 30.0) -> None:
        self.total, self.every = total, every_seconds
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last = (time.perf_counter(), -1)
        self._losses: tuple[float, float] | None = None

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("training", total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            log(text)

    def update(self, trainer: Trainer, losses: tuple[float, float]) -> None:
        old = self._losses or losses
        self._losses = (0.95 * old[0] + 0.05 * losses[0], 0.95 * old[1] + 0.05 * losses[1])
        text = f"target {self._losses[0]:.3f}  draft {self._losses[1]:.3f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.tokens_seen, description=text)
            return
        now, (then, tokens_then) = time.perf_counter(), self._last
        if tokens_then < 0:
            self._last = (now, trainer.tokens_seen)
        elif now - then >= self.every:
            speed = (trainer.tokens_seen - tokens_then) / (now - then)
            left = (self.total - trainer.tokens_seen) / speed / 60
            rate = learning_rate(trainer.tokens_seen, trainer.config)
            self.line(
                f"{trainer.tokens_seen:,}/{self.total:,} tokens  {text}  lr {rate:.2e}  "
                f"{speed:,.0f} tokens/s  {left:.0f} min left"
            )
            self._last = (now, trainer.tokens_seen)


def train_loop(
    trainer: Trainer,
    checkpoint: Path,
    save_every: float,
    export_every: float,
    export: Callable[[], None],
) -> bool:
    """Train until done (True) or until Ctrl-C or SIGTERM (False); a checkpoint is saved either way."""
    stop: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in STOP_SIGNALS}
    last_save = last_export = time.perf_counter()
    try:
        with ProgressReport(trainer.config.tokens) as report:
            while not trainer.done and not stop:
                report.update(trainer, trainer.step())
                now = time.perf_counter()
                if now - last_save >= save_every:
                    trainer.save(checkpoint)
                    last_save = now
                if export_every and now - last_export >= export_every:
                    export()
                    report.line(f"exported at {trainer.tokens_seen:,} tokens")
                    last_export = now
            trainer.save(checkpoint)
            report.line(
                f"{'stopped' if stop else 'done'} at {trainer.tokens_seen:,} tokens; saved {checkpoint}"
            )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return not stop


# ---------------------------------------------------------------------------------------- export


def export_models(models: nn.ModuleDict, tokenizer_folder: Path, out: Path) -> None:
    """Write out/target and out/draft: bf16 weights, configs and tokenizer, each folder replaced at once."""
    from transformers import GenerationConfig

    for name, model in models.items():
        folder, partial = out / name, out / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        weights = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
        copy: Any = type(model)(model.config).to(torch.bfloat16)
        copy.load_state_dict(weights)
        copy.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
        copy.save_pretrained(partial)
        (partial / "model.safetensors").chmod(0o644)  # it comes readable by its owner alone
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, partial / path.name)
        old = out / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------ evaluation


def load_pair(out: Path) -> tuple[Any, Any, Any]:
    """The exported (target, draft, tokenizer); the bf16 weights compute in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = [
        AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        for name in ("target", "draft")
    ]
    return pair[0], pair[1], AutoTokenizer.from_pretrained(out / "target")


@torch.inference_mode()
def score_text(
    target: nn.Module, draft: nn.Module, ids: list[int], stride: int = CHUNK // 2
) -> dict[str, float]:
    """Sums over the tokens of one document, each seen with at least CHUNK - stride tokens before it.

    nll in nats; `agree` counts equal argmaxes; `overlap` sums sum_v min(p, q), the probability that
    rejection sampling accepts a draft token at temperature 1.
    """
    sums: dict[str, float] = dict.fromkeys(("tokens", "target_nll", "draft_nll", "agree", "overlap"), 0.0)
    tokens = torch.tensor([0, *ids])  # end-of-text comes before every document
    scored = 0  # tokens[1 : scored + 1] are done
    while scored < len(ids):
        end = min(len(ids), CHUNK if scored == 0 else scored + stride)
        start = max(0, end - CHUNK)
        window, labels = tokens[None, start:end], tokens[scored + 1 : end + 1]
        log_p, log_q = (
            model(input_ids=window, use_cache=False).logits[0, scored - start :].log_softmax(-1)
            for model in (target, draft)
        )
        sums["tokens"] += len(labels)
        sums["target_nll"] += F.nll_loss(log_p, labels, reduction="sum").item()
        sums["draft_nll"] += F.nll_loss(log_q, labels, reduction="sum").item()
        sums["agree"] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        sums["overlap"] += torch.minimum(log_p, log_q).exp().sum().item()
        scored = end
    return sums


def evaluate_text(target: nn.Module, draft: nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """Bits per byte of both models and how often they agree, on whole files."""
    total: dict[str, float] = {}
    for text in texts:
        for key, value in score_text(target, draft, tokenizer(text, verbose=False)["input_ids"]).items():
            total[key] = total.get(key, 0.0) + value
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "files": len(texts),
        "bytes": num_bytes,
        "tokens": total["tokens"],
        "target_loss": total["target_nll"] / total["tokens"],
        "draft_loss": total["draft_nll"] / total["tokens"],
        "target_bits_per_byte": total["target_nll"] / math.log(2) / num_bytes,
        "draft_bits_per_byte": total["draft_nll"] / math.log(2) / num_bytes,
        "top1_agreement": total["agree"] / total["tokens"],
        "overlap": total["overlap"] / total["tokens"],
    }


def accepted_per_step(matches: list[bool], length: int) -> tuple[int, int]:
    """(accepted tokens, steps) of greedy chains of `length` draft tokens over one continuation.

    matches[i]: the draft's greedy token after the target's first i tokens is the target's own. An
    accepted prefix IS the target's text, so these flags say what every chain along it would do.
    """
    accepted = steps = position = 0
    while position < len(matches):
        run = 0
        while run < length and position + run < len(matches) and matches[position + run]:
            run += 1
        accepted, steps, position = accepted + run, steps + 1, position + run + 1
    return accepted, steps


def held_out_prompts(texts: list[str], tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, spread over the files, each starting at a line."""
    random = np.random.default_rng(0)
    long_enough = [text for text in texts if len(text) > 16 * length]
    prompts = []
    for n in range(count):
        text = long_enough[n * len(long_enough) // count]
        start = text.index("\n", int(random.integers(len(text) // 2))) + 1
        prompts.append(tokenizer(text[start : start + 16 * length], verbose=False)["input_ids"][:length])
    return prompts


@torch.inference_mode()
def evaluate_acceptance(
    target: Any, draft: Any, prompts: list[list[int]], num_tokens: int
) -> dict[str, float]:
    """Tokens per step of greedy chain drafting along the target's greedy continuations."""
    inputs = torch.tensor(prompts)  # [B, T]: prompts of one length, so no padding
    output = target.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    greedy = draft(input_ids=output, use_cache=False).logits.argmax(-1)
    sums = {length: [0, 0] for length in (4, 6)}
    for row in range(len(prompts)):
        new = output[row, inputs.shape[1] :].tolist()
        end = new.index(0) + 1 if 0 in new else len(new)  # up to and with end-of-text
        guess = greedy[row, inputs.shape[1] - 1 :].tolist()
        matches = [guess[i] == new[i] for i in range(end)]
        for length, counts in sums.items():
            accepted, steps = accepted_per_step(matches, length)
            counts[0] += accepted
            counts[1] += steps
    result: dict[str, float] = {"prompts": len(prompts), "tokens_per_prompt": num_tokens}
    for length, (accepted, steps) in sums.items():
        result[f"accepted_per_step_{length}"] = accepted / steps
        result[f"tokens_per_step_{length}"] = accepted / steps + 1
    return result


def evaluate(out: Path, max_files: int, num_prompts: int) -> dict[str, Any]:
    """All held-out figures of the exported pair."""
    target, draft, tokenizer = load_pair(out)
    _, held_out = collect_corpus(Path(sysconfig.get_path("stdlib")))
    texts = [text for _, text in sorted(held_out.items())]
    if max_files:
        texts = texts[:: max(1, math.ceil(len(texts) / max_files))]
    prompts = held_out_prompts(texts, tokenizer, num_prompts, 256)
    record: dict[str, Any] = {"acceptance": evaluate_acceptance(target, draft, prompts, 128)}
    log(f"acceptance: {record['acceptance']}")
    record["held_out"] = evaluate_text(target, draft, tokenizer, texts)
    log(f"held out: {record['held_out']}")
    sizes = {"target": target, "draft": draft}
    record["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in sizes.items()}
    return record


CARD = """\
# The bundled pair

Two small Llama models trained from scratch on Python's own standard library, so that everything can
be tried and tested with real text, real weights and real acceptance without a download.
{unfinished}
| | target | draft |
|---|---|---|
| parameters | {target_parameters:,} | {draft_parameters:,} |
| layers, hidden, FFN | {t[layers]}, {t[hidden]}, {t[ffn]} | {d[layers]}, {d[hidden]}, {d[ffn]} |
| heads, KV heads | {t[heads]}, {t[kv_heads]} | {d[heads]}, {d[kv_heads]} |
| held-out bits per byte | {h[target_bits_per_byte]:.3f} | {h[draft_bits_per_byte]:.3f} |
| held-out loss per token (nats) | {h[target_loss]:.3f} | {h[draft_loss]:.3f} |

Both: context 1,024 tokens, tied embeddings, bf16 weights, a byte-level BPE tokenizer of
{vocab:,} tokens that gives back every byte; `<|endoftext|>` (id 0) ends a document.

**The draft for the target**, on text neither has seen: the same most likely token at
{h[top1_agreement]:.1%} of {h[tokens]:,.0f} positions; overlap of the distributions (the chance that
a sampled draft token is accepted at temperature 1) {h[overlap]:.1%}. Greedy chains along the target's
own greedy continuations of {a[prompts]} held-out prompts ({a[tokens_per_prompt]} tokens each):
{a[accepted_per_step_4]:.2f} accepted tokens a step with 4 draft tokens,
{a[accepted_per_step_6]:.2f} with 6; with the bonus token {a[tokens_per_step_4]:.2f} and
{a[tokens_per_step_6]:.2f}.

## Data

The `.py` files of the standard library of CPython {c[python]}, its tests included: {c[files]:,} files,
{c[bytes]:,} bytes, {c[tokens]:,} tokens, without exact duplicates, generated tables and files that
are mostly escaped data. CPython is copyright of the Python Software Foundation and its contributors,
under the PSF License Agreement version 2 (PSF-2.0); some files of the library carry other permissive
notices of their own.

Held out as whole modules with their tests ({c[held_out_files]} files, {c[held_out_bytes]:,} bytes):
`held_out.json` lists them, so that they can be found in any Python's standard library. The figures
above are over {h[files]} of them ({h[bytes]:,} bytes), every token with up to 1,024 tokens before it
and, past a file's beginning, at least 512.

## Training

One loop for both: the target by cross-entropy, the draft by the target's own distribution in the same
forward. {steps:,} steps, {tokens_seen:,} tokens ({epochs:.1f} epochs) of a planned {tokens:,}; bf16
autocast with fp32 weights; Muon for matrices, AdamW for embeddings and norms; peak rate {lr:g}, falling
linearly to zero over the last {decay_share:.0%}; rows of {short_len} tokens, of 1,024 in the last
{long_share:.0%}; seed {seed}; {hours:.1f} hours on two CPU cores that had other work as well.

    python scripts/train_bundled.py all

does all of it again: corpus, tokenizer, training, export, evaluation and this page. Another Python
version gives another corpus, and so other weights.

## Limits

They continue Python in the style of the standard library and know little else: no instructions, no
chat, no other language to speak of. What they write is often not valid or not sensible, and greedy
continuations fall into loops, which also raises acceptance. They may repeat passages of the standard
library, with its licence. They are for trying, testing and measuring decoding, not for use as models.
"""


def model_card(work: Path, record: dict[str, Any]) -> str:
    """The model card from the figures of the corpus, the exported checkpoint and the evaluation."""
    exported = json.loads((work / "export.json").read_text())
    corpus = json.loads((work / "corpus.json").read_text())
    config, progress = exported["config"], exported["progress"]
    unfinished = progress["tokens_seen"] < config["tokens"]
    return CARD.format(
        unfinished="\n**Early weights of an unfinished run, for development.**\n" if unfinished else "",
        t=exported["shapes"]["target"],
        d=exported["shapes"]["draft"],
        target_parameters=record["parameters"]["target"],
        draft_parameters=record["parameters"]["draft"],
        h=record["held_out"],
        a=record["acceptance"],
        c=corpus,
        epochs=progress["tokens_seen"] / corpus["tokens"],
        hours=progress["seconds"] / 3600,
        steps=progress["steps"],
        tokens_seen=progress["tokens_seen"],
        **config,
    )


# --------------------------------------------------------------------------------------- commands

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, rich_markup_mode=None)

Work = Annotated[Path, typer.Option(help="Checkpoints and the token cache.")]
Out = Annotated[Path, typer.Option(help="Where the exported models go.")]


def open_stream(work: Path, seed: int) -> ChunkStream:
    if not (work / "corpus.json").exists():
        raise typer.BadParameter(f"{work} holds no corpus; run the command 'prepare' first")
    return ChunkStream(np.load(work / "tokens.npy"), np.load(work / "offsets.npy"), seed)


@app.command("prepare")
def prepare_command(work: Work = DEFAULT_WORK, out: Out = DEFAULT_OUT) -> None:
    """Collect the corpus, train the tokenizer and encode."""
    prepare(work, out, TrainConfig.vocab)


Tokens = Annotated[float, typer.Option(help="Total tokens; may change on resume.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the order of the data.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Compiled = Annotated[bool, typer.Option(help="Use torch.compile (faster; needs a C++ compiler).")]
ExportEvery = Annotated[float, typer.Option(help="Seconds between exports; 0: none.")]


@app.command("train")
def train_command(
    *,
    work: Work = DEFAULT_WORK,
    out: Out = DEFAULT_OUT,
    tokens: Tokens = TrainConfig.tokens,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = TrainConfig.lr,
    seed: Seed = TrainConfig.seed,
    threads: Threads = 2,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120,
    export_every: ExportEvery = 0,
    compiled: Compiled = False,
) -> bool:
    """Train both models, from the last checkpoint where there is one."""
    quiet_transformers()
    torch.set_num_threads(threads)
    config = TrainConfig(tokens=int(tokens), lr=lr, seed=seed)
    trainer = Trainer(config, open_stream(work, seed), compiled=compiled)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        log(f"resumed at {trainer.tokens_seen:,} of {config.tokens:,} tokens")

    def export() -> None:
        export_models(trainer.models, work / "tokenizer", out)
        write_json(work / "export.json", trainer.summary())

    return train_loop(trainer, checkpoint, save_every, export_every, export)


@app.command("export")
def export_command(work: Work = DEFAULT_WORK, out: Out = DEFAULT_OUT) -> None:
    """Write the last checkpoint's weights, also while training runs."""
    quiet_transformers()
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    shapes = {name: Shape(**shape) for name, shape in state["shapes"].items()}
    vocab = state["config"]["vocab"]
    models = nn.ModuleDict({name: build_model(shape, vocab, 0) for name, shape in shapes.items()})
    models.load_state_dict(state["models"])
    export_models(models, work / "tokenizer", out)
    write_json(work / "export.json", {k: state[k] for k in ("progress", "config", "shapes")})
    log(f"exported at {state['progress']['tokens_seen']:,} tokens to {out}")


@app.command("evaluate")
def evaluate_command(
    work: Work = DEFAULT_WORK,
    out: Out = DEFAULT_OUT,
    max_files: Annotated[int, typer.Option(help="Held-out files to score; 0: all.")] = 0,
    prompts: Annotated[int, typer.Option(help="Prompts for acceptance.")] = 48,
    threads: Threads = 2,
) -> None:
    """Held-out figures of the exported pair, and the model card made from them."""
    quiet_transformers()
    torch.set_num_threads(threads)
    record = evaluate(out, max_files, prompts)
    write_json(work / "evaluation.json", record)
    write_text_atomic(out / "MODEL_CARD.md", model_card(work, record))


@app.command("all")
def all_command(
    work: Work = DEFAULT_WORK,
    out: Out = DEFAULT_OUT,
    tokens: Tokens = TrainConfig.tokens,
    threads: Threads = 2,
    compiled: Compiled = False,
) -> None:
    """Every stage that is not done yet."""
    prepare_command(work, out)
    if not train_command(work=work, out=out, tokens=tokens, threads=threads, compiled=compiled):
        raise typer.Exit(130)
    export_command(work, out)
    evaluate_command(work, out, threads=threads)


if __name__ == "__main__":
    app()
