"""The command `watch`: live cameras through the purifier, a line a source."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import console
from .options import Device, Dtype, Flow, Model, Size, Steps, default_size

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ..purifier import Purifier
    from ..realtime.live import LiveOutput
    from ..realtime.stream import StreamPurifier
    from ..realtime.watcher import Record, Watcher

_WAITING = 2  # clips a source that wait at most, by default: an older one is stale
_TOGETHER = 4  # clips in flight on a GPU at most
_REFRESH, _SUMMARY = 0.25, 5.0  # seconds between two pictures of a terminal, and two lines where there is none

Policy = Literal["drop-oldest", "reject", "block"]


def watch(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A video file, which plays at its own pace; rtsp://, rtsps://, http://, https://, tcp:// or udp://; "
            "or a USB camera of Linux, such as /dev/video0. @FILE: the sources of a file, a line each.",
        ),
    ],
    classifier: Annotated[
        str | None,
        typer.Option(help='"tiny", or "package.module:function" returning a module: shows the label of each clip.'),
    ] = None,
    window: Annotated[int | None, typer.Option(show_default="the model's own", min=2, help="Frames of a clip.")] = None,
    hop: Annotated[
        int | None,
        typer.Option(
            show_default="--window less the model's overlap",
            min=1,
            help="New frames after which there is a clip. Overlaps are blended in the output.",
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(help="Seconds from a clip's last frame to its answer; a clip that cannot meet it is refused."),
    ] = None,
    policy: Annotated[
        Policy,
        typer.Option(
            help="When the queue is full: drop the oldest clip, reject the newest, or wait. Files then lose no "
            "frames, and cameras drop theirs before they are clips."
        ),
    ] = "drop-oldest",
    waiting: Annotated[
        int | None, typer.Option("--queue", show_default="2 a source", min=1, help="Clips that wait at most.")
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|rtsp://...",
            help="Where purified frames go, live: a new mp4, mkv or ts file, or a server that takes streams. "
            "One for each SOURCE, in their order.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Append to this file what came and what was decided, as lines of JSON: the start, each state of a "
            "camera, each clip, each end."
        ),
    ] = None,
    size: Size = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a picture after which a camera is opened anew.")
    ] = 5.0,
    model: Model = "tiny",
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    flow: Flow = None,
) -> None:
    """Purify live cameras, and classify what they show.

    Ends when all files have ended, or by Ctrl-C; cameras that go away are opened again. What is too much for the
    machine is dropped, and counted: frames that were in no clip, and clips that were dropped, rejected or late.

    The output has purified frames alone. Where a clip was not purified it has none, and a player shows the last one
    before. A frame is shown at most `window - 1` frames, and the time of a clip's answer, after it came; --deadline
    bounds that time.

    Passwords in addresses are not shown, nor recorded; but other users of the machine may see this command's own line,
    and with @FILE they see none there.

    Exit status 0 when files have ended or by Ctrl-C, 1 when a source, an output or the record has failed, and 130 by
    Ctrl-C while the models load.

    Examples:

    ```
    videopure-fast watch clip.mp4 --classifier tiny --record seen.jsonl
    videopure-fast watch rtsp://user:password@camera/live -o purified.mp4
    videopure-fast watch a.mp4 b.mp4 -o a.ts -o b.ts --policy block
    videopure-fast watch @cameras.txt --record seen.jsonl
    videopure-fast watch /dev/video0 --deadline 1.5 -o rtsp://host:8554/out
    ```
    """
    import torch

    from ..adapters import class_names
    from ..files import clashing
    from ..inputs import check_number
    from ..purifier import Purifier
    from ..realtime.cameras import check_source, listed_sources, source_name
    from ..realtime.live import LiveOutput
    from ..realtime.watcher import Record, watching

    if deadline is not None:
        check_number("--deadline", deadline, zero=False)
    sources = listed_sources(sources)
    for source in sources:
        check_source(source)
    if output and len(output) != len(sources):
        raise ValueError(f"--output is given {len(output)} times for {len(sources)} sources; accepted: one for each")
    if (clash := clashing(sources, [*(output or []), *([] if record is None else [str(record)])])) is not None:
        seen = f"cannot write {source_name(clash)}: it is a SOURCE, or another --output or --record, too"
        raise ValueError(f"{seen}; accepted: a place of its own for each")
    outputs = [LiveOutput(target) for target in output] if output else None
    notes = None if record is None else Record(record)
    overrides = {} if steps is None else {"inversion_steps": steps}
    purifier = Purifier.from_pretrained(
        model, device=device, dtype=None if dtype is None else getattr(torch, dtype), flow=flow, **overrides
    )
    module = None if classifier is None else _classifier(classifier, purifier)
    window, hop = _window(window, hop, purifier)
    size, waiting = default_size(model, size), waiting or _WAITING * len(sources)
    settings: dict[str, Any] = {"window": window, "hop": hop, "size": size, "deadline": deadline}
    with ExitStack() as stack:
        if notes is not None:
            names: dict[str, Any] = {
                "cameras": [source_name(source) for source in sources],
                "model": model,
                "classifier": classifier,
            }
            names |= {"steps": purifier.config.inversion_steps, "flow": flow, "dtype": str(purifier.unet.dtype)[6:]}
            names |= {"device": str(purifier.unet.device), "queue": waiting, "timeout": timeout, "policy": policy}
            stack.enter_context(notes).write("start", **names, **settings)
        server = stack.enter_context(_server(purifier, module, policy, waiting))
        options: dict[str, Any] = {"lossless": policy == "block", "timeout": timeout}
        options |= {"outputs": outputs, "record": notes, "classes": None if module is None else class_names(module)}
        if purifier.unet.device.type == "cuda":
            options["prepare"] = cache(server.warmup)
        watchers = stack.enter_context(watching(sources, server, **options, **settings))
        try:
            _follow(watchers)
        except KeyboardInterrupt:
            console.print("Stopping.")
        finally:
            for watcher in watchers:
                watcher.camera.stop()
            server.close(cancel=True)  # after the end of all files nothing waits
    _summarize(watchers, outputs, notes)


def _server(purifier: Purifier, classifier: nn.Module | None, policy: Policy, waiting: int) -> StreamPurifier:
    from ..realtime.stream import StreamPurifier

    # Clips that share a processor are each as late as the last of them: they do where that makes them faster together.
    together = _TOGETHER if purifier.unet.device.type == "cuda" else 1
    return StreamPurifier(purifier, classifier, policy=policy, queue_size=waiting, max_batch=together)


def _classifier(name: str, purifier: Purifier) -> nn.Module:
    from ..adapters import load_classifier

    if ":" in name:
        sys.path.append(os.getcwd())  # where "module:function" is looked for; a console script's path lacks it
    return load_classifier(name).to(purifier.unet.device)


def _window(window: int | None, hop: int | None, purifier: Purifier) -> tuple[int, int]:
    """Frames of a clip, and new frames after which there is one, where they are not given."""
    from ..inputs import check_count

    check_count("--window", window or 2, least=2, most=purifier.max_frames)
    window = window or purifier.max_frames
    check_count("--hop", hop or 1, most=window)
    return window, hop or max(1, window - purifier.config.window_overlap)


def _follow(watchers: Sequence[Watcher]) -> None:
    """Show what the watchers do, until all have ended."""
    from rich.live import Live

    if console.is_terminal:
        with Live(console=console, get_renderable=lambda: _table(watchers), refresh_per_second=1 / _REFRESH):
            while any(watcher.running for watcher in watchers):
                time.sleep(_REFRESH)
        return
    shown = time.monotonic()
    while any(watcher.running for watcher in watchers):
        time.sleep(_REFRESH)
        if time.monotonic() - shown > _SUMMARY:
            shown = time.monotonic()
            console.print("\n".join(map(_line, watchers)))


def _cells(watcher: Watcher) -> dict[str, str]:
    """What is shown of a source, by title."""
    status = watcher.status
    purified = status.clips.get("purified", 0)
    return {
        "source": watcher.camera.name,
        "state": status.camera.state,
        "frames in": str(status.camera.frames),
        "dropped": str(status.camera.dropped),
        "damaged": str(status.camera.damaged),
        "clips": str(purified),
        "refused": str(sum(status.clips.values()) - purified),
        "label": status.label or "-",
        "latency": _seconds(status.latency),
        "queue age": _seconds(status.queue_age),
        "note": status.problem or "",
    }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _table(watchers: Sequence[Watcher]) -> Table:
    from rich.table import Table

    rows = [_cells(watcher) for watcher in watchers]
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*row.values())
    return table


def _line(watcher: Watcher) -> str:
    source, *cells = _cells(watcher).items()
    return f"{source[1]}: " + ", ".join(f"{title} {value}" for title, value in cells if value)


def _summarize(watchers: Sequence[Watcher], outputs: Sequence[LiveOutput] | None, record: Record | None) -> None:
    """Print how each source ended, and raise what failed for good."""
    for watcher in watchers:
        console.print(_line(watcher))
    for output in outputs or ():
        console.print(f"{output.name}: {output.written} purified frames, {output.dropped} dropped.")
    failures = [f"{watcher.camera.name}: {watcher.failure}" for watcher in watchers if watcher.failure]
    states = ((watcher.camera.name, watcher.camera.status) for watcher in watchers)
    failures += [f"{name}: {status.reason}" for name, status in states if status.state == "failed"]
    failures += [f"{output.name}: {output.failure}" for output in outputs or () if output.failure]
    failures += [f"the record: {record.failure}"] if record is not None and record.failure else []
    if failures:
        raise OSError("; ".join(failures))
