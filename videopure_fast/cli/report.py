"""The command `report`: the results as a page to look at."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from .console import console


def report(
    results: Annotated[
        Path, typer.Option(help="Folder of results: bench/results of a checkout of the sources, or a copy of it.")
    ] = Path("bench/results"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, an HTML file.")] = Path("report.html"),
    demo: Annotated[bool, typer.Option(help="Also attack and purify packaged clips, and show them.")] = True,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Make a page of the results: speed by technique, accuracy by threat, latency, and clips that play.

    It is one HTML file that needs nothing else, no script and no network. Its figures are those of the files that
    `make bench`, `make gpu`, `make study` and `make latency` have written; it says what was not measured.

    Examples:

    ```
      videopure-fast report
      videopure-fast report --results results --out results.html --no-demo
    ```
    """
    from ..web.report import write_report

    note = "The clips are attacked and purified now, which takes some seconds; --no-demo leaves them out."
    size = write_report(results, out, demo=demo, announce=lambda: console.print(note))
    console.print(f"Wrote {out}, {size / 2**20:.2g} MiB")
    if show:
        webbrowser.open(out.resolve().as_uri())
