"""Benchmark of a purifier over settings: throughput and latency on this machine. Runs are saved, drawn and compared."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import atomic_write
from ..inputs import LEAST_SIDE, check_decoder
from ..machine import PeakMemory, describe_device, installed, nvidia_smi, synchronize
from ..models.prior import load_decoder
from ..ops.backend import use_backend
from ..purifier import Purifier
from .plot import Panel, Series, draw
from .profile import profile

KIND = "videopure-fast bench"
FULL_DECODER = "full"
DTYPES = ("float16", "bfloat16", "float32", "float64")
_LINES = {"p50": "-", "p95": "--", "p99": ":"}  # percentile of a call's latency -> its line style
# Largest accepted mean |difference| of pixels in [0, 1] between a backend and the reference, by dtype. In half
# precision the two round at different places.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_LEAST_CALLS = 3
_CHECK_CALLS = 5  # the reference takes about as long as two calls of the fast forms on a CPU


class Setting(NamedTuple):
    """One point of the sweep. The first three fields choose the models; a change of them loads models again.

    backend: what `use_backend` accepts. decoder: "full", the VAE's own, or a lossy one that `Purifier.from_pretrained`
    accepts. height, width in pixels; frames of a clip; batch in clips a call.
    """

    backend: str
    dtype: str
    decoder: str
    height: int
    width: int
    frames: int
    batch: int

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.frames}x{self.height}x{self.width}"
        return f"{self.backend} {self.dtype} {self.decoder} {shape}"


class _TimeUp(Exception):
    """Raised between steps of the reference when its time is up."""


class Limits(NamedTuple):
    """How long one setting is timed: until `repeats` calls or `seconds` have passed, but three calls at least.

    The reference's clip may take as many seconds too, or as long as five first calls.
    """

    repeats: int = 50
    seconds: float = 10.0


def sweep(
    *,
    backends: Sequence[str],
    dtypes: Sequence[str],
    decoders: Sequence[str] = (FULL_DECODER,),
    sizes: Sequence[tuple[int, int]],
    frames: Sequence[int],
    batches: Sequence[int],
) -> list[Setting]:
    """Every combination of the values. ValueError for a value that no purifier accepts."""
    for name in backends:
        with use_backend(name):
            pass
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"unknown dtype {', '.join(sorted(unknown))}; accepted: {', '.join(DTYPES)}")
    for what, given, least in (
        ("batch", batches, 1),
        ("frames", frames, 2),
        ("size", [side for size in sizes for side in size], LEAST_SIDE),
    ):
        if small := [value for value in given if value < least]:
            raise ValueError(f"{what} must be {least} or more, got {small[0]}")
    combined = itertools.product(backends, dtypes, decoders, sizes, frames, sorted(set(batches)))
    return [
        Setting(backend, dtype, decoder, *size, length, batch)
        for backend, dtype, decoder, size, length, batch in combined
    ]


def measure(
    model: str | os.PathLike[str],
    settings: Sequence[Setting],
    *,
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    return_votes: bool = True,
    stages: bool = True,
    progress: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Time each setting on clips of noise. Yields the run, which all rows share, then a row for each setting.

    return_votes: decode all votes, as a DefendedClassifier needs them, or the last alone. stages: also profile each
    setting. options: device, flow and config overrides for `Purifier.from_pretrained`.

    The first call of a setting may load, compile and capture; it is reported apart. A row has the reason under
    "not_measured", and no times, if its backend cannot run it, if memory does not suffice, or if its first clip differs
    from the reference backend's by more than TOLERANCE. The row of a lossy decoder has the mean |difference| of its
    first clip from the full decoder's.
    """

    def purifier_of(setting: Setting) -> Purifier:
        decoder = None if setting.decoder == FULL_DECODER else setting.decoder
        return Purifier.from_pretrained(model, dtype=getattr(torch, setting.dtype), decoder=decoder, **options)

    purifier = purifier_of(settings[0])
    for decoder in {setting.decoder for setting in settings} - {FULL_DECODER}:
        check_decoder(purifier.vae, load_decoder(decoder, dtype=torch.float32))  # fails now rather than hours later
    yield _describe_run(model, purifier, limits, return_votes)
    with tqdm(total=len(settings) * limits.repeats, unit="call", disable=not progress) as bar:
        # A captured graph keeps the backend it was captured with, so a new backend needs a new purifier.
        groups = [list(group) for _, group in itertools.groupby(settings, lambda setting: setting[:3])]
        for group in groups:
            if group is not groups[0]:
                del purifier  # two models at once may not fit in memory
                gc.collect()
                purifier = purifier_of(group[0])
            for setting in group:
                bar.set_description(str(setting))
                before = bar.n
                with use_backend(setting.backend):
                    try:
                        row = _measure_one(purifier, setting, limits, return_votes, stages, bar)
                    except RuntimeError as error:  # an op has no backend, or memory does not suffice
                        row = {"not_measured": str(error).splitlines()[0]}
                bar.update(limits.repeats - (bar.n - before))
                yield {**setting._asdict(), **row}


def _measure_one(
    purifier: Purifier, setting: Setting, limits: Limits, return_votes: bool, stages: bool, bar: Any
) -> dict[str, Any]:
    device = purifier.unet.device
    shape = (3, setting.frames, setting.height, setting.width)
    noise = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(setting.batch)]
    clips = torch.stack(noise).to(device)

    def call() -> tuple[float, Tensor]:
        synchronize(device)
        start = time.perf_counter()
        purified = purifier(clips, return_votes=return_votes, generator=torch.Generator().manual_seed(0))
        synchronize(device)
        return time.perf_counter() - start, purified

    with torch.no_grad():
        first_seconds, purified = call()
        allowed_seconds = max(limits.seconds, _CHECK_CALLS * first_seconds)
        try:
            with use_backend("reference"):
                difference = _difference(purifier, clips[:1], purified[:1], return_votes, allowed_seconds)
        except _TimeUp:
            why = f"the reference's clip took more than {allowed_seconds:.3g} s, and nothing was compared"
            return {"not_measured": f"{why}; a larger --seconds lets it end"}
        if not difference <= TOLERANCE[setting.dtype]:  # written so that NaN fails too
            allowed = f"more than {TOLERANCE[setting.dtype]:g}"
            return {"not_measured": f"differs from the reference by {difference:.3g} a pixel on average, {allowed}"}
        loss = None if purifier.decoder is None else _decoder_loss(purifier, clips[:1], purified[:1], return_votes)
        del purified
        memory = PeakMemory(device)
        seconds: list[float] = []
        stop = time.perf_counter() + limits.seconds
        while len(seconds) < limits.repeats and (len(seconds) < _LEAST_CALLS or time.perf_counter() < stop):
            seconds.append(call()[0])
            bar.update()
        peak = memory.read()
    return {
        "first_call_seconds": first_seconds,
        "calls": len(seconds),
        "clips_per_second": setting.batch * len(seconds) / sum(seconds),
        "call_seconds": _quantiles(seconds),
        "seconds_per_clip": _quantiles([second / setting.batch for second in seconds]),
        "peak_bytes": peak,
        "mean_difference_from_reference": difference,
        "mean_difference_from_full_decoder": loss,
        "profile": profile(purifier, clips, return_votes=return_votes).to_dict() if stages else None,
    }


def _difference(
    purifier: Purifier, clip: Tensor, purified: Tensor, return_votes: bool, allowed_seconds: float = math.inf
) -> float:
    """Mean |difference| of `purified` from what the purifier, as it is now, makes of the clip alone, eagerly.

    _TimeUp if its steps take longer than that.
    """
    stop = time.perf_counter() + allowed_seconds

    def watch(*_step: Any) -> None:
        synchronize(clip.device)
        if time.perf_counter() > stop:
            raise _TimeUp

    generator = torch.Generator().manual_seed(0)
    expected = purifier(clip, return_votes=return_votes, generator=generator, capture=False, callback=watch)
    return (purified.double() - expected.double()).abs().mean().item()


def _decoder_loss(purifier: Purifier, clip: Tensor, purified: Tensor, return_votes: bool) -> float:
    """Mean |difference| of `purified` from what the full decoder makes of the clip."""
    lossy, purifier.decoder = purifier.decoder, None
    try:
        return _difference(purifier, clip, purified, return_votes)
    finally:
        purifier.decoder = lossy


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    values = torch.tensor(seconds, dtype=torch.float64)
    shares = torch.tensor([0, 5, 25, 50, 75, 95, 99, 100], dtype=torch.float64)
    found = values.quantile(shares / 100).tolist()
    names = ("min", "p5", "p25", "p50", "p75", "p95", "p99", "max")
    return {"mean": values.mean().item(), **dict(zip(names, found, strict=True))}


def _describe_run(
    model: str | os.PathLike[str], purifier: Purifier, limits: Limits, return_votes: bool
) -> dict[str, Any]:
    device = purifier.unet.device
    gpu = nvidia_smi(device, driver="driver_version", power_limit_w="power.limit", most_sm_mhz="clocks.max.sm")
    names = ("videopure-fast", "torch", "diffusers", "triton", "opencv-python-headless", "xformers")
    return {
        "kind": KIND,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "device": describe_device(device),
            "processor": describe_device(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "power_limit_w": gpu["power_limit_w"],
            "most_sm_mhz": gpu["most_sm_mhz"],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in names},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": gpu["driver"],
        },
        "settings": {
            "model": str(model),
            "method": purifier.config.method,
            "inversion_steps": purifier.config.inversion_steps,
            "decode_chunk": purifier.config.decode_chunk,
            "max_frames": purifier.max_frames,
            "flow": getattr(purifier.flow, "__name__", type(purifier.flow).__name__),
            "votes": "all" if return_votes else "last",
        },
        "limits": limits._asdict(),
        "rows": [],
    }


def save(run: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a run as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(run, indent=2) + "\n")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a saved run. ValueError if there is no such file, or if it is not a run."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        run = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict) or run.get("kind") != KIND:
        raise ValueError(f"{path} is no run: its kind is not {KIND!r}; accepted: a file written by {KIND} --json")
    return run


class Pair(NamedTuple):
    """A setting that both runs measured: its name, and the row of each run."""

    name: str
    a: dict[str, Any]
    b: dict[str, Any]


def compare(a: Mapping[str, Any], b: Mapping[str, Any], *, anyway: bool = False) -> list[Pair]:
    """The settings that two runs have in common.

    Versions may differ. ValueError if the runs differ in their machine or settings, or on an axis of the sweep where
    each has a single value. `anyway` compares them all the same: such an axis is ignored, and its name becomes "*".
    """
    different = [
        f"{name} ({a[part].get(name)} and {b[part].get(name)})"
        for part in ("machine", "settings")
        for name in sorted({*a[part], *b[part]})
        if a[part].get(name) != b[part].get(name)
    ]
    rows = [[row for row in run["rows"] if "not_measured" not in row] for run in (a, b)]
    axes = list(Setting._fields)
    for axis in Setting._fields:
        values = [{row[axis] for row in measured} for measured in rows]
        if all(len(found) == 1 for found in values) and values[0] != values[1]:
            different.append(f"{axis} ({next(iter(values[0]))} and {next(iter(values[1]))})")
            axes.remove(axis)
    if different and not anyway:
        raise ValueError(f"these runs differ in {', '.join(different)}; --anyway compares them all the same")
    known = {tuple(row[axis] for axis in axes): row for row in rows[0]}
    pairs = []
    for row in rows[1]:
        key = tuple(row[axis] for axis in axes)
        if key in known:
            name = str(Setting._make(row[axis] if axis in axes else "*" for axis in Setting._fields))
            pairs.append(Pair(name, known[key], row))
    if not pairs:
        raise ValueError("these runs measured no setting in common")
    return pairs


def plot(run: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Latency percentiles and throughput over the batch size, to an .svg or .png file.

    ImportError where matplotlib is missing.
    """
    rows = [row for row in run["rows"] if "not_measured" not in row]
    batches = sorted({row["batch"] for row in rows})
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['backend']}, {row['dtype']}, {row['decoder']}, {row['frames']}x{row['height']}x{row['width']}"
        named.setdefault(name, []).append(row)
    latency, throughput = [], []
    for name, found in named.items():
        x = [batches.index(row["batch"]) for row in found]
        for percentile, line in _LINES.items():
            latency.append(Series(name, x, [row["call_seconds"][percentile] for row in found], line=line))
        throughput.append(Series(name, x, [row["clips_per_second"] for row in found]))
    ticks = [str(batch) for batch in batches]
    title = "p50 (solid), p95 (dashed), p99 (dotted)"
    panels = [
        Panel(title, "clips a call", "seconds a call", latency, ticks),
        Panel("throughput", "clips a call", "clips a second", throughput, ticks),
    ]
    settings, where = run["settings"], f"{run['machine']['device']}, torch {run['versions']['torch']}"
    what = f"{settings['model']}, {settings['method']} T={settings['inversion_steps']}, {settings['votes']} votes"
    draw(panels, list(named), path, note=f"{what}, {where}")
