"""Train the bundled pair of models (target and draft) on the running Python's standard library.

    python scripts/train_bundled.py all                   # every stage that is not done yet
    python scripts/train_bundled.py train --tokens 12e6   # resume with a smaller total: decay comes earlier
    python scripts/train_bundled.py distill --tokens 4e6  # the same for the draft's second stage
    python scripts/train_bundled.py export                # weights of the last checkpoints, at any time
    python scripts/train_bundled.py evaluate              # held-out figures and the model card

Stages: corpus and tokenizer; joint training of both models in one loop; distillation, in which the
target is frozen and the draft learns from it on the corpus and on text that the target wrote itself;
export; evaluation.

In both training stages everything is a pure function of (seed, tokens seen): the batches, the learning
rate and the sequence length. So a run that was stopped and resumed equals one that was not, and the
total may be changed on resume. Ctrl-C saves a checkpoint and exits. Needs torch >= 2.9 (for Muon).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bundled.card import model_card
from bundled.common import log, quiet_transformers, write_json, write_text_atomic
from bundled.corpus import ChunkStream, prepare
from bundled.distill import DistillConfig, Distiller, frozen_target, load_distilled
from bundled.evaluate import evaluate
from bundled.generate import GenerateConfig, generate
from bundled.loop import train_loop
from bundled.model import export_models
from bundled.train import TrainConfig, Trainer, load_models

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_WORK = ROOT / "build" / "bundled"
DEFAULT_OUT = ROOT / "src" / "outrider" / "bundled"

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, rich_markup_mode=None)

Work = Annotated[Path, typer.Option(help="Checkpoints and the token cache.")]
Out = Annotated[Path, typer.Option(help="Where the exported models go.")]
Tokens = Annotated[float, typer.Option(help="Total tokens; may change on resume.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the order of the data.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Compiled = Annotated[bool, typer.Option(help="Use torch.compile (faster; needs a C++ compiler).")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
SaveEvery = Annotated[float, typer.Option(help="Seconds between checkpoints.")]
ExportEvery = Annotated[float, typer.Option(help="Seconds between exports; 0: none.")]


def open_stream(work: Path, seed: int) -> ChunkStream:
    if not (work / "corpus.json").exists():
        raise typer.BadParameter(f"{work} holds no corpus; run the command 'prepare' first")
    return ChunkStream(np.load(work / "tokens.npy"), np.load(work / "offsets.npy"), seed)


def joint_checkpoint(work: Path) -> Path:
    path = work / "checkpoint.pt"
    if not path.exists():
        raise typer.BadParameter(f"{work} holds no checkpoint; run the command 'train' first")
    return path


@app.command("prepare")
def prepare_command(work: Work = DEFAULT_WORK, out: Out = DEFAULT_OUT) -> None:
    """Collect the corpus, train the tokenizer and encode."""
    prepare(work, out, TrainConfig.vocab)


@app.command("train")
def train_command(
    *,
    work: Work = DEFAULT_WORK,
    out: Out = DEFAULT_OUT,
    tokens: Tokens = TrainConfig.tokens,
    lr: Rate = TrainConfig.lr,
    seed: Seed = TrainConfig.seed,
    threads: Threads = 2,
    save_every: SaveEvery = 120,
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
        write_json(work / "export.json", trainer.summary() | {"distill": None})

    return train_loop(trainer, checkpoint, save_every, export_every, export)


@app.command("distill")
def distill_command(
    *,
    work: Work = DEFAULT_WORK,
    tokens: Tokens = DistillConfig.tokens,
    rows: Annotated[int, typer.Option(help="Rows of the target's own text.")] = GenerateConfig.rows,
    lr: Rate = DistillConfig.lr,
    seed: Seed = DistillConfig.seed,
    threads: Threads = 2,
    save_every: SaveEvery = 120,
    compiled: Compiled = False,
) -> bool:
    """Freeze the target and train the draft on: on the corpus and on text that the target writes."""
    quiet_transformers()
    torch.set_num_threads(threads)
    state, models = load_models(joint_checkpoint(work))
    if state["progress"]["tokens_seen"] < state["config"]["tokens"]:
        log("the joint stage is not finished; this draft will be for the target as it is now")
    target = frozen_target(models["target"])
    own_text = GenerateConfig(rows=rows, seed=seed)
    own_rows = generate(target, open_stream(work, seed), work / "continuations", own_text)
    if own_rows is None:
        return False
    config = DistillConfig(tokens=int(tokens), lr=lr, seed=seed, own_text=own_text)
    distiller = Distiller(config, models, open_stream(work, seed + 1), own_rows, compiled=compiled)
    checkpoint = work / "distill.pt"
    if load_distilled(checkpoint, distiller.source) is not None:
        distiller.load(checkpoint)
        log(f"resumed at {distiller.tokens_seen:,} of {config.tokens:,} tokens")
    return train_loop(distiller, checkpoint, save_every)


@app.command("export")
def export_command(work: Work = DEFAULT_WORK, out: Out = DEFAULT_OUT) -> None:
    """Write the last checkpoints' weights, also while training runs."""
    quiet_transformers()
    state, models = load_models(joint_checkpoint(work))
    record: dict[str, Any] = {k: state[k] for k in ("progress", "config", "shapes")} | {"distill": None}
    distilled = load_distilled(work / "distill.pt", Distiller.source_of(models))
    if distilled is not None:
        models["draft"].load_state_dict(distilled["draft"])
        record["distill"] = {k: distilled[k] for k in ("progress", "settings")}
    export_models(models, work / "tokenizer", out)
    write_json(work / "export.json", record)
    log(f"exported at {state['progress']['tokens_seen']:,} tokens, distilled: {distilled is not None}; {out}")


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
    *,
    work: Work = DEFAULT_WORK,
    out: Out = DEFAULT_OUT,
    tokens: Tokens = TrainConfig.tokens,
    distill_tokens: Annotated[float, typer.Option(help="Total tokens of 'distill'.")] = DistillConfig.tokens,
    threads: Threads = 2,
    compiled: Compiled = False,
) -> None:
    """Every stage that is not done yet."""
    prepare_command(work, out)
    if not train_command(work=work, out=out, tokens=tokens, threads=threads, compiled=compiled):
        raise typer.Exit(130)
    if not distill_command(work=work, tokens=distill_tokens, threads=threads, compiled=compiled):
        raise typer.Exit(130)
    export_command(work, out)
    evaluate_command(work, out, threads=threads)


if __name__ == "__main__":
    app()
