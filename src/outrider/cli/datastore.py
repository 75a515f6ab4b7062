"""`outrider datastore`: a corpus as a file that the datastore drafter looks continuations up in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.console import note, progress_bar, stdout_console
from outrider.cli.options import OUTPUT, option
from outrider.errors import ConfigError

PIECE_BYTES = 1 << 17  # of a text that is tokenised at once

datastore_app = typer.Typer(
    help="Build and inspect corpora for the datastore drafter (REST).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@datastore_app.command()
def build(
    files: Annotated[list[Path], typer.Argument(help="Texts in UTF-8; each is a document of its own.")],
    *,
    output: Annotated[Path, option("--output", "-o", help="Where to write the datastore.", panel=OUTPUT)],
    model: opt.Model = None,
    revision: opt.Revision = None,
    max_memory: Annotated[
        int,
        option(
            "--max-memory",
            help="Most MiB for sorting; a corpus of more than 20,000 tokens per MiB gets several chunks.",
            panel=OUTPUT,
        ),
    ] = 1024,
    json_out: opt.JsonOut = False,
) -> None:
    """Tokenise texts with a model's tokenizer and sort what stands in them.

    The file appears under its name when it is whole; after an interruption, give the same command again.
    """
    if max_memory < 1:
        raise ConfigError("--max-memory", got=max_memory, expected="1 or more MiB")
    _check_corpus(files)
    _check_output(output)
    from outrider.drafting.sources.datastore_build import DatastoreWriter
    from outrider.engine.build import BUNDLED_TARGET
    from outrider.inputs.tokenizer import Tokenizer
    from outrider.models.loader import load_tokenizer

    start = time.perf_counter()
    tokenizer = Tokenizer(load_tokenizer(model or BUNDLED_TARGET, revision=revision))
    writer = DatastoreWriter(
        output,
        vocab_size=max(tokenizer.vocab.values()) + 1,
        fingerprint=tokenizer.fingerprint,
        max_memory_bytes=max_memory << 20,
    )
    with writer, progress_bar() as progress:
        is_empty = True
        task = progress.add_task("bytes", total=sum(file.stat().st_size for file in files))
        for file in files:
            for piece in _pieces(file):
                is_empty = False
                text = piece.decode("utf-8", errors="replace")
                writer.add(tokenizer.encode(text, add_special_tokens=False))
                progress.advance(task, len(piece))
            writer.end_document()
        if is_empty:  # the writer leaves nothing behind
            raise ConfigError("texts", got="nothing in any of them", expected="text to look continuations up in")
        note("sorting")
    _report(output, json_out, seconds=round(time.perf_counter() - start, 3))


@datastore_app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A datastore.")],
    *,
    check: Annotated[bool, option("--check", help="Read all of it and compare its checksum.", panel=OUTPUT)] = False,
    json_out: opt.JsonOut = False,
) -> None:
    """Say what stands in a datastore."""
    from outrider.drafting.sources.datastore_file import check_body, read_header

    if check:
        check_body(path, read_header(path))
    _report(path, json_out)


def _check_corpus(files: Sequence[Path]) -> None:
    """Find out now, not after the others, that a text cannot be read.

    Raises:
        ConfigError: one cannot.
    """
    for file in files:
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            raise ConfigError(
                f"text {file}",
                got=error.strerror,
                expected="a readable file",
                remedy="check its name and permissions",
            ) from error


def _check_output(path: Path) -> None:
    """Find out now, not after sorting, that no file can have this name."""
    if path.is_dir():
        raise ConfigError("--output", got=f"the folder {path}", expected="the name of a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError("--output", got=f"{path}, in no existing folder", expected="one", remedy="create it first")


def _pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces that end with a line where lines are not enormous."""
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece + file.readline(PIECE_BYTES)


def _report(path: Path, json_out: bool, **more: Any) -> None:
    from rich.table import Table

    from outrider.drafting.sources.datastore_file import read_header

    header = read_header(path)
    record = {
        "path": str(path),
        "documents": header.num_documents,
        "tokens": header.num_tokens,
        "chunks": len(header.chunk_lengths),
        "bytes": header.file_bytes,
        "vocab_size": header.vocab_size,
        "vocab_fingerprint": header.fingerprint.hex(),
        **more,
    }
    if json_out:
        print(json.dumps(record))
        return
    table = Table(title=str(path), show_header=False, title_justify="left")
    for name, value in list(record.items())[1:]:
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    stdout_console().print(table)
