"""The command line's entry point: the commands, and how each of them may end.

Exit status: 0 done, 1 a check failed (`verify`), 2 bad input, 130 interrupted, 141 the pipe's reader is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from outrider.cli.advise import advise
from outrider.cli.bench import bench_app
from outrider.cli.datastore import datastore_app
from outrider.cli.demo import demo
from outrider.cli.generate import generate
from outrider.cli.methods import methods
from outrider.cli.quantize import quantize
from outrider.cli.serve import serve
from outrider.cli.verify import verify
from outrider.errors import OutriderError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


_UsageError: Any = typer.BadParameter.__base__  # click's, wherever typer has it from


class _Commands(TyperGroup):
    """Turns what users cause into one line on stderr and an exit status, for every command."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        with _one_line_of_usage():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _one_line_of_usage():
                result = super().invoke(ctx)
            sys.stdout.flush()
        except OutriderError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Python flushes stdout once more at exit, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except OSError as error:
            what = f"{error.filename}: got {error.strerror}" if error.filename else f"got {error}"
            return _fail(f"{what}, expected a file or folder that can be used; check its name and permissions")
        return result


@contextmanager
def _one_line_of_usage() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if error.ctx is None or type(error).__name__ == "NoArgsIsHelpError":  # the help itself
            raise
        _fail(f"{error.format_message().rstrip('.')}; see `{error.ctx.command_path} --help`")


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(EXIT_BAD_INPUT)


app = typer.Typer(
    cls=_Commands,
    help="Lossless parallel decoding: the same tokens as plain decoding, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(serve)
app.command()(verify)
app.add_typer(bench_app, name="bench")
app.command()(quantize)
app.add_typer(datastore_app, name="datastore")
app.command()(advise)
app.command()(methods)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from outrider import __version__

        print(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def _outrider(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; does not return."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a narrow terminal is no reason to lose a text
    app()
