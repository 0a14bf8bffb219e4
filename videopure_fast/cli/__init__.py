"""The command line `videopure-fast`, whose commands have a file each.

A command parses its options, calls, and prints. It imports what it needs when it runs, so that --help is quick.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from . import bench, evaluate, info, latency, purify, purify_dataset, report, serve, warmup, watch
from .environment import as_program, check_environment

app = typer.Typer(
    help="Removes adversarial perturbations from videos with a text-to-video diffusion model (arXiv 2501.14999).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _checked(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which looks at its environment first."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        check_environment()
        command(*arguments, **options)

    return run


for _command in (
    *(evaluate.demo, evaluate.evaluate, purify.purify, purify_dataset.purify_dataset, watch.watch, serve.serve),
    *(warmup.warmup, bench.bench, latency.latency, report.report, info.info),
):
    app.command()(_checked(_command))

# What users ask for may raise these: bad values and files, a backend that is not here, too large a number or nesting.
_ENDED = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError)


def main() -> None:
    """Run the command line. What cannot be done ends in one sentence on stderr and exit status 1.

    A program may call it: signal handlers, warnings and the environment are as they were when it ends.
    """
    with as_program():
        try:
            app(prog_name="videopure-fast")
        except _ENDED as error:
            print(f"error: {_sentence(error)}", file=sys.stderr)
            sys.exit(1)


def _sentence(error: Exception) -> str:
    """The error in one line. torch's errors go on with advice for its developers, and Python's own say too little."""
    if isinstance(error, (RuntimeError, ArithmeticError, MemoryError)):
        first = str(error).strip().partition("\n")[0]
        own = type(error) is RuntimeError and first
        return first if own else ": ".join(filter(None, [type(error).__name__, first]))
    return " ".join(str(error).split()) or type(error).__name__
