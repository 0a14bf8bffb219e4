"""The command `latency`: how long clips take on a server that others use too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast, get_args

import typer

from .console import console
from .options import Device, Model, Steps, Votes

if TYPE_CHECKING:
    from torch import Tensor

    from ..purifier import Purifier
    from ..realtime.arrivals import Arrival
    from ..realtime.study import Build, ServiceTimes, Setting

_SCENARIOS = {"singlestream": "SingleStream", "multistream": "MultiStream", "server": "Server", "offline": "Offline"}
_SERVER_LOAD = 0.8  # of the Server scenario, as a share of what one clip after another allows
_DEADLINE_CLIPS = 3  # its deadline where none is given, in times of a clip
_CLIPS = 8  # different clips, which take turns


def latency(
    model: Model = "tiny",
    load: Annotated[
        str, typer.Option(help="Loads to offer, in percent of what one clip after another allows.")
    ] = "50,80,95",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the highest load whose p95 meets the deadline; some ten runs.")
    ] = False,
    cameras: Annotated[
        int | None, typer.Option(min=1, help="Offer the clips of so many cameras, rather than loads.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames a second of a camera.")] = 25,
    hop: Annotated[int, typer.Option(min=1, help="Frames from one clip of a camera to its next.")] = 16,
    arrivals: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Offer clips at the moments of a JSON list: seconds, or [seconds, source, deadline, steps].",
        ),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Let MLCommons' LoadGen run these instead: singlestream,server."),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="SECONDS", help="From when a clip is due to its answer; several: cameras take turns."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Clips in flight at most; one or several: 1,4.")] = "1",
    queue: Annotated[int, typer.Option(min=1, help="Clips that wait at most.")] = 64,
    policy: Annotated[
        str, typer.Option(help="What a full queue does: block, reject or drop-oldest; one or several.")
    ] = "block",
    order: Annotated[
        str, typer.Option(help="Who is next: fifo, first come, or edf, the earliest deadline; one or several.")
    ] = "fifo",
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long each run offers clips; --arrivals says it itself.")
    ] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of the moments at which clips are due.")] = 0,
    votes: Votes = "all",
    steps: Steps = None,
    device: Device = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Save the study here, after every run.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw latency against load: .svg or .png.")
    ] = None,
    timeline_file: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE", help="Draw the clips of the last run: .svg or .png.")
    ] = None,
) -> None:
    """Measure how long clips take on this machine while others wait.

    Who times one clip after another sees no queue: the next clip comes when the server is free. Cameras and users do
    not wait for that. Here every clip is due at a moment that was fixed before, and its latency counts from then (an
    open loop). So without options: how latency grows with the load, in two minutes for the packaged prior.

    MLPerf's four scenarios, by MLCommons' LoadGen (pip install 'videopure-fast[latency]'):

    ```
    singlestream  One clip at a time; the next when the last is answered.
                  Figure: p90 of a clip. For one user who waits. No queue.
    multistream   Four clips at a time; the next four when all are answered.
                  Figure: p99 of the four. For four cameras in step.
    server        Clips at random moments, at 80 % load, others waiting or not.
                  Figure: p99, which is to meet the deadline. For many users.
    offline       All clips at once.
                  Figure: clips a second. For files, where nobody waits.
    ```

    Runs may be shorter than MLPerf's ten minutes; the output then says so.

    Several settings, such as --batch 1,4 or --policy reject,drop-oldest, are compared on the same arrivals.

    Examples:

    ```
    videopure-fast latency --plot load.svg --timeline clips.svg
    videopure-fast latency --sweep --deadline 1.5
    videopure-fast latency --cameras 3 --deadline 2 --batch 1,4
    videopure-fast latency --scenario singlestream,server --seconds 60
    ```
    """
    from ..files import check_writable, clashing
    from ..inputs import check_number
    from ..measure.plot import check_picture
    from ..realtime import study, tables
    from ..realtime.arrivals import cameras as of_cameras
    from ..realtime.arrivals import recorded
    from ..realtime.loadgen import import_loadgen
    from ..realtime.queueing import Order, Policy

    check_number("--fps", fps, zero=False)
    if json_file is not None:
        check_writable(json_file)
    for picture in filter(None, (plot_file, timeline_file)):
        check_picture(picture)
    written = [path for path in (json_file, plot_file, timeline_file) if path is not None]
    if (clash := clashing([] if arrivals is None else [arrivals], written)) is not None:
        raise ValueError(f"cannot write {clash}: it is another FILE of this call, too; accepted: one for each")
    if sum((sweep, cameras is not None, arrivals is not None, scenario is not None)) > 1:
        raise ValueError("--sweep, --cameras, --arrivals and --scenario say what to offer; accepted: one of them")
    deadlines = [] if deadline is None else _numbers("deadline", deadline)
    if sweep and len(deadlines) != 1:
        raise ValueError("--sweep needs one --deadline SECONDS")
    loads = [percent / 100 for percent in _numbers("load", load)]
    settings = [
        study.Setting(*chosen)
        for chosen in itertools.product(
            [int(limit) for limit in _numbers("batch", batch)],
            [queue],
            _names("policy", policy, get_args(Policy)),
            _names("order", order, get_args(Order)),
        )
    ]
    scenarios = [] if scenario is None else _names("scenario", scenario, tuple(_SCENARIOS))
    recorded_arrivals = None if arrivals is None else recorded(arrivals)
    if scenarios:
        if len(settings) > 1:
            raise ValueError(f"--scenario is given {len(settings)} settings of the server; accepted: one")
        import_loadgen()
    if plot_file is not None and (scenarios or arrivals):
        raise ValueError("--plot draws latency against load, which --scenario and --arrivals do not have")
    if timeline_file is not None and scenarios:
        raise ValueError("--timeline draws the clips of a run, which LoadGen keeps to itself")
    purifier, clips = _prepare(model, steps, device)
    frames = clips[0].shape[1]
    live = (
        None if cameras is None else of_cameras(cameras, seconds=seconds, rate=fps, window=frames, hop=hop, seed=seed)
    )
    bench = _Bench(_builder(purifier, clips[0], votes), settings, clips, seconds, deadlines, seed)
    depth = purifier.config.inversion_steps
    with bench.build(study.Setting()) as server:
        service = study.measure_service(server, clips[0], depth=depth)
    said = {"model": model, "steps": depth, "votes": votes, "shape": [*clips[0].shape], "service": service._asdict()}
    said |= {"seconds": seconds, "deadlines": deadlines, "seed": seed}
    made: dict[str, Any] = {**study.new_study(purifier.unet.device, **said), "scenarios": []}

    if scenarios:
        found = bench.scenarios(service, scenarios)
    elif sweep:
        found = bench.sweep(service)
    elif recorded_arrivals is not None:
        found = bench.compare(None, recorded_arrivals)
    elif live is not None and cameras is not None:
        found = bench.compare(cameras * fps / hop * service.clip_seconds(), live)
    else:
        found = itertools.chain.from_iterable(bench.load(service, one) for one in loads)
    for row in found:
        made["scenarios" if scenarios else "rows"].append(row)
        if json_file is not None:
            study.save(made, json_file)
    if scenarios:
        _print_scenarios(made["scenarios"])
    else:
        _print_rows(made["rows"], service)
        console.print(tables.camera_sentence(service, rate=fps, hop=hop))
    if json_file is not None:
        console.print(f"Numbers: {json_file}")
    _draw(made["rows"], plot_file, timeline_file, deadlines)


def _prepare(model: str, steps: int | None, device: str | None) -> tuple[Purifier, list[Tensor]]:
    """The purifier, and clips of the shape that it is usually given: the packaged ones, or noise."""
    import torch

    from ..purifier import Purifier

    overrides = {} if steps is None else {"inversion_steps": steps}
    purifier = Purifier.from_pretrained(model, device=device, **overrides)
    if model == "tiny":
        from .. import tiny

        clips, _ = tiny.sample_clips(_CLIPS, seed=0)
        return purifier, list(clips.to(purifier.unet.device))
    noise = torch.rand((2, 3, 32, 224, 224), generator=torch.Generator().manual_seed(0))
    return purifier, list(noise.to(purifier.unet.device))


def _builder(purifier: Purifier, clip: Tensor, votes: str) -> Build:
    """Makes the server of a setting, ready for clips of this shape."""
    from ..realtime.stream import StreamPurifier

    def build(setting: Setting) -> StreamPurifier:
        server = StreamPurifier(purifier, return_votes=votes == "all", **setting._asdict())
        server.warmup(clip.shape)
        return server

    return build


class _Bench(NamedTuple):
    """What all runs of a call share. Its methods yield a row a run."""

    build: Build
    settings: Sequence[Setting]
    clips: Sequence[Tensor]
    seconds: float
    deadlines: Sequence[float]
    seed: int

    def load(self, service: ServiceTimes, load: float) -> Iterator[dict[str, Any]]:
        """Every setting at a share of what one clip after another allows."""
        from ..realtime.arrivals import poisson

        return self.compare(load, poisson(load / service.clip_seconds(), seconds=self.seconds, seed=self.seed))

    def compare(self, load: float | None, arrivals: Sequence[Arrival]) -> Iterator[dict[str, Any]]:
        """Every setting on the same arrivals."""
        from ..realtime import study
        from ..realtime.arrivals import with_deadlines

        if not arrivals:
            raise ValueError(f"no clip is due within {self.seconds:g} s; accepted: a longer --seconds")
        if self.deadlines:
            arrivals = with_deadlines(arrivals, self.deadlines)
        for setting in self.settings:
            with _progress(len(arrivals), "" if load is None else f"{load:.0%} load") as update:
                yield study.run(self.build, setting, self.clips, arrivals, progress=update, load=load)

    def sweep(self, service: ServiceTimes) -> Iterator[dict[str, Any]]:
        """The runs by which the highest load is found, by load."""
        from ..realtime import study

        (deadline,) = self.deadlines
        options: dict[str, Any] = {"deadline": deadline, "seconds": self.seconds, "seed": self.seed}
        for setting in self.settings:
            with _progress(None, "sweep") as update:
                found, tried = study.carried_load(self.build, setting, self.clips, service, **options, progress=update)
            yield from sorted(tried, key=lambda row: row["load"])
            seen = "no load that was tried has" if found is None else f"a load of {found:.0%} has"
            console.print(f"{setting}: {seen} a p95 within {deadline:g} s.")

    def scenarios(self, service: ServiceTimes, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """LoadGen's figures of each scenario, with the first setting."""
        from ..realtime.loadgen import Plan, Scenario, run_scenario

        alone = service.clip_seconds()
        deadline = self.deadlines[0] if self.deadlines else _DEADLINE_CLIPS * alone
        for name in names:
            scenario = cast("Scenario", _SCENARIOS[name])
            plan = Plan(scenario, self.seconds, alone, rate=_SERVER_LOAD / alone, deadline=deadline, seed=self.seed)
            with self.build(self.settings[0]) as server, _progress(None, name) as update:
                yield run_scenario(server, self.clips, plan, progress=update)


@contextmanager
def _progress(total: int | None, what: str) -> Iterator[Callable[[], None]]:
    """A bar of clips within the block, whose value moves it on."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="clip", desc=what, leave=False) as bar:
        yield lambda: bar.update() and None


def _print_rows(rows: Sequence[dict[str, Any]], service: ServiceTimes) -> None:
    """A table for each setting, narrow enough for a terminal of 80 columns, and what they say in words."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..realtime import tables

    for name in dict.fromkeys(map(tables.name_of, rows)):
        table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for column in tables.HEADER:
            table.add_column(column, justify="right")
        for row in rows:
            if tables.name_of(row) == name:
                table.add_row(*tables.cells(row))
        console.print(table)
    console.print(tables.LEGEND)
    for sentence in tables.sentences(service, rows):
        console.print(sentence)
    if error := next((row["summary"]["error"] for row in rows if row["summary"]["error"]), None):
        raise RuntimeError(f"clips failed; the first: {error}")


def _print_scenarios(runs: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..realtime import tables

    table = Table(title="MLPerf's scenarios by LoadGen", caption=tables.scenario_note(runs))
    for column in tables.SCENARIO_HEADER:
        table.add_column(column, justify="left" if column == tables.SCENARIO_HEADER[0] else "right")
    for figures in runs:
        table.add_row(*tables.scenario_cells(figures))
    console.print(table)


def _draw(
    rows: Sequence[dict[str, Any]], plot_file: Path | None, timeline_file: Path | None, deadlines: Sequence[float]
) -> None:
    from ..realtime import figures

    if plot_file is not None:
        figures.draw_load(rows, plot_file, deadline=min(deadlines, default=None))
        console.print(f"Picture: {plot_file}")
    if timeline_file is not None and rows:
        figures.draw_timeline(rows[-1], timeline_file)
        console.print(f"Picture: {timeline_file}")


def _numbers(option: str, text: str) -> list[float]:
    """Positive numbers. --batch takes whole ones; the server checks that."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    whole = option == "batch"
    if not found or not all(0 < number < float("inf") and (not whole or number == int(number)) for number in found):
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"--{option} must be positive {kind}, such as 1,4; got {text!r}")
    return found


def _names(option: str, text: str, accepted: Sequence[str]) -> list[Any]:
    found = [part.strip() for part in text.split(",")]
    if unknown := [name for name in found if name not in accepted]:
        raise ValueError(f"unknown {option} {unknown[0]!r}; accepted: {', '.join(accepted)}, one or several")
    return found
