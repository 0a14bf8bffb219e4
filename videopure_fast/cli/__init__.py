"""The command line `videopure-fast`: demo, evaluate, purify, warmup, bench, info.

A command parses its options, calls, and prints. It imports what it needs when it runs, so that --help is quick.
"""

from __future__ import annotations

import signal
import sys
import warnings

import typer

from . import bench, evaluate, info, purify, warmup

app = typer.Typer(
    help="Removes adversarial perturbations from videos with a text-to-video diffusion model (arXiv 2501.14999).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (evaluate.demo, evaluate.evaluate, purify.purify, warmup.warmup, bench.bench, info.info):
    app.command()(_command)


def main() -> None:
    """Run the command line. Bad input ends in one sentence on stderr and exit status 1."""
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # batch systems end jobs so: clean up as for Ctrl-C
    try:
        app(prog_name="videopure-fast")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
