"""What the results files say: the ways to purify, the stages of a GPU, and accuracies under attack.

bench/report.py makes its tables of the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .report_files import Value, printable, read

UNMEASURED, OLDER = "not measured", "†"
USUAL = "ours, 1x32x224x224"  # in the names of a GPU's rows of one clip
_CPU = "a CPU"
LEAST_SHOWN = 0.5e-3  # seconds of a kind of operation
_SIDES = 5  # of a shape: clips, channels, frames, height, width

# The ways to purify by their names in the results: what each is, and what is said of it beside that.
NAMES = {
    "authors": ("(1) the authors' algorithm", " as written"),
    "authors-xformers": ("(2) the same", " with xformers' attention"),
    "authors-compiled": ("(3a) the same compiled", ": max-autotune, channels last"),
    "algebra": ("the algebra alone", ", on diffusers' modules"),
    "algebra-captured": ("the algebra", " in one CUDA graph"),
    "algebra-compiled": ("(3b) the algebra compiled", ": max-autotune, channels last"),
    "algebra-inductor": ("(3c) the algebra compiled", ": reduce-overhead, channels last"),
    "ours-eager": ("ours", " without its CUDA graph"),
    "ours": ("ours", ""),
}
# What each of them adds something to.
BUILDS_ON = {
    **{"authors-xformers": "authors", "authors-compiled": "authors", "algebra": "authors"},
    **{"algebra-captured": "algebra", "algebra-compiled": "algebra", "algebra-inductor": "algebra"},
    **{"ours-eager": "algebra", "ours": "ours-eager"},
}
OWN = ("authors", "algebra", "ours-eager", "ours")  # the way from the authors' algorithm to ours


class Way(NamedTuple):
    """How long a way to purify takes: median and interquartile range of seconds for so many clips.

    mean_error: of float16 against float32. older: it was measured with other sources than the last row of its file.
    """

    name: str
    clips: int
    median: float
    iqr: float
    peak_memory: float | None
    launches: int | None
    mean_error: float | None
    older: bool = False


class Comparison(NamedTuple):
    """The ways that were measured on one machine on the same clips.

    machine: "a CPU" or a GPU's name. clips: words for the clips, models and settings. command, made: how, where and, of
    a GPU, when. day: of a CPU, where it is known. batches: of how many clips there are rows.
    """

    machine: str
    clips: str
    command: str
    made: str
    batches: list[int]
    ways: Mapping[tuple[str, int], Way]
    day: str = ""

    @property
    def is_gpu(self) -> bool:
        return self.machine != _CPU

    @property
    def digits(self) -> int:
        """Decimals of seconds that are shown."""
        return 3 if self.is_gpu else 2

    def times(self, way: Way) -> float | None:
        """How many times as fast as the authors' algorithm on as many clips; None where that was not measured."""
        first = self.ways.get(("authors", way.clips))
        return None if first is None or not way.median else first.median / way.median

    def before(self, way: Way) -> Way | None:
        """The way that this one builds on; where that was not measured, the one before it."""
        name = BUILDS_ON.get(way.name)
        while name is not None and (name, way.clips) not in self.ways:
            name = BUILDS_ON.get(name)
        return None if name is None else self.ways[name, way.clips]


def cpu_comparison(result: Value) -> Comparison | None:
    """That of `make bench`; None where no purification was measured."""
    rows = [row for row in result["benchmarks"] if row.get("path")]
    if not rows:
        return None
    ways = [_way(row) for row in rows]
    batches = sorted({way.clips for way in ways})
    row, machine = rows[-1], result["machine_info"]
    size = size_of(row["shape"].counts(_SIDES)[2:])
    moment = result.get("datetime")
    return Comparison(
        _CPU,
        f"clips of {size} by the packaged prior, T={row['steps'].count()}, {row['dtype'].text()}",
        "make bench",
        f"on {machine['cpu'].text()}, {row['threads'].count()} threads, torch {row['torch'].shown()}, "
        f"Python {machine['python'].shown()}",
        batches,
        {(way.name, way.clips): way for way in ways},
        "" if moment is None else moment.text()[:10],
    )


def gpu_comparison(rows: Value) -> Comparison | None:
    """That of `make gpu` on its largest clips; None where no purification was measured."""
    found = [row for _, row in rows.items()]
    last = max(found, key=lambda row: row["time"].text(), default=None)
    measured = [row for row in found if row.get("path") and row.get("median") and _text(row, "flow") == "given"]
    if last is None or not measured:
        return None
    usual = max(measured, key=lambda row: (row["frames"].count() * (row["clips"].count() == 1), row["height"].count()))
    shape = [usual[side].count() for side in ("frames", "height", "width")]
    chosen = [row for row in measured if [row[side].count() for side in ("frames", "height", "width")] == shape]
    ways = [_way(row)._replace(older=_text(row, "commit") != _text(last, "commit")) for row in chosen]
    full = _text(usual, "model") == "full"
    weights = "random weights in full size" if full else "a small model, whose times mean nothing"
    return Comparison(
        _text(usual, "gpu") or "no GPU",
        f"clips of {size_of(shape)}, T={usual['steps'].count()}, {usual['dtype'].text()}, {weights}, a given flow",
        "make gpu",
        f"on {usual['time'].text()[:10]}: driver {_text(usual, 'driver')}, {_text(usual, 'power_limit_w')} W, "
        f"{_text(usual, 'sm_mhz_just_after')} MHz, torch {_text(usual, 'torch')}, CUDA {_text(usual, 'cuda')}, "
        f"cuDNN {_text(usual, 'cudnn')}, triton {_text(usual, 'triton')}, diffusers {_text(usual, 'diffusers')}, "
        f"Python {_text(usual, 'python')}; sources {_text(usual, 'commit')}",
        sorted({way.clips for way in ways}),
        {(way.name, way.clips): way for way in ways},
    )


def _way(row: Value) -> Way:
    peak, launches, error = (row.get(key) for key in ("peak_memory", "launches", "mean_error"))
    return Way(
        row["path"].text(),
        row["clips"].count(),
        row["median"].number(),
        row["iqr"].number(),
        None if peak is None else peak.number(),
        None if launches is None else launches.count(),
        None if error is None else error.number(),
    )


def _text(row: Value, key: str) -> str | None:
    return None if (found := row.get(key)) is None else found.shown()


def size_of(shape: list[int]) -> str:
    frames, height, width = shape
    return f"{frames} frames of {height}x{width}"


# Stages of a GPU


class Share(NamedTuple):
    """Seconds of one clip on a GPU that a stage, or a kind of operation in it, takes.

    profile: in the first profile, whose gaps between kernels do not count. predicted: before the change that it led to.
    outcome: measured afterwards; None where it was not.
    """

    stage: str
    kind: str
    profile: float
    predicted: float
    launches: int
    outcome: float | None


def outcomes(rows: Value) -> dict[str, float]:
    """Seconds that one clip has taken: of each stage, and of each kind of operation in it, as "stage: kind"."""
    found: dict[str, float] = {}
    if staged := rows.get(f"stages: {USUAL}"):
        found = {stage: timing["median"].number() for stage, timing in staged["stages"].items()}
    if found and (clip := rows.get(f"purification: {USUAL}")) and (median := clip.get("median")):
        found |= {"host": median.number() - sum(found.values()), "clip": median.number()}
    if profiled := rows.get(f"kernels: {USUAL}"):
        for stage, kernels in profiled["stages"].items():
            found |= {f"{stage}: {kind}": row["seconds"].number() for kind, row in kernels["kinds"].items()}
    return found


def shares(prediction: Value, measured: Mapping[str, float]) -> list[Share]:
    """The stages of bench/predict.py, each followed by its kinds of operation. measured: what `outcomes` returns."""

    def share(row: Value, stage: str, kind: str = "") -> Share:
        name = f"{stage}: {kind}" if kind else stage
        profile, predicted = row["profile"].number(), row["predicted"].number()
        return Share(stage, kind, profile, predicted, row["launches"].count(), measured.get(name))

    found = []
    for stage, row in prediction["stages"].items():
        found += [share(row, stage), *(share(one, stage, kind) for kind, one in row["kinds"].items())]
    return found


# Accuracies

SUMMARY = ("none", "mean of 5 frames", "ddim", "videopure")  # the defenses that a short table shows
PARTS = ("gray-box", "adaptive")  # the parts of the study that it shows
# What the attacker has, in order of knowledge: part of the study, threat model.
THREATS = {
    "transfer": ("transfer", "transfer"),
    "query": ("query", "query"),
    "gray-box, PGD-20": ("bpda", "gray-box"),
    "BPDA, PGD-20": ("bpda", "bpda"),
    "exact, PGD-20": ("exact", "exact"),
    "exact, APGD-20 on the margin": ("exact apgd", "exact"),
    "minimum": ("adaptive", "adaptive"),
}


class Cell(NamedTuple):
    """A row of the study: the accuracy of a defense on n clips, with its 95 % interval."""

    part: str
    threat_model: str
    eps: float
    defense: str
    n: int
    accuracy: float
    low: float
    high: float
    seconds: float | None


class Study(NamedTuple):
    """The rows of `make study`.

    cells: by defense, part, threat model and eps. plain_cells: those that are clean or in the gray box, by defense and
    eps. seconds: of a clip, by defense, all measured in one part. checks: name, whether it passed, what was seen. made:
    where seconds were measured.
    """

    cells: Mapping[tuple[str, str, str, float], Cell]
    plain_cells: Mapping[tuple[str, float], Cell]
    seconds: Mapping[str, float]
    checks: list[tuple[str, bool, str]]
    made: str

    def cell(self, defense: str, part: str, threat_model: str, eps: float) -> Cell | None:
        return self.cells.get((defense, part, threat_model, eps))

    def plain(self, defense: str, eps: float = 0.0) -> Cell | None:
        """The cell of a defense in the gray box, which has the most clips; clean where eps is 0."""
        return self.plain_cells.get((defense, eps))

    def sizes(self, part: str) -> list[float]:
        """The sizes of attacks in a part, the smallest first."""
        return sorted({cell.eps for cell in self.cells.values() if cell.part == part and cell.eps})


def study(result: Value) -> Study:
    cells = [_cell(row) for row in result["rows"]]
    checks = [(check["name"].text(), check["passed"].flag(), check["seen"].text()) for check in result["checks"]]
    machines = result["machines"].get("cost") or ()
    made = [
        f"on {one['device'].text()}, {one['threads'].count()} threads, torch {one['torch'].shown()}" for one in machines
    ]
    plain = [cell for cell in cells if cell.part.startswith("gray-box") or cell.part == "depths"]
    return Study(
        {(cell.defense, cell.part, cell.threat_model, cell.eps): cell for cell in cells},
        {(cell.defense, cell.eps): cell for cell in plain},
        {cell.defense: cell.seconds for cell in cells if cell.part == "cost" and cell.seconds is not None},
        checks,
        "; ".join(made),
    )


def _cell(row: Value) -> Cell:
    accuracy, low, high = (row[key].number() for key in ("accuracy", "low", "high"))
    if not 0 <= low <= accuracy + 1e-9 <= high + 2e-9 <= 1 + 3e-9:
        raise ValueError(f"{row.file}: {row.path} has the accuracy {accuracy:g} between {low:g} and {high:g}")
    seconds = row.get("seconds_per_clip")
    names = (row["part"].text(), row["threat_model"].text(), row["eps"].number(), row["defense"].text())
    return Cell(*names, row["n"].count(), accuracy, low, high, None if seconds is None else seconds.number())


# Latency


class Run(NamedTuple):
    """Clips offered to a server at a load, a share of what it can do.

    setting, title: words for how the server was set, and for how many clips it takes at once. curve: it was simulated
    at a load between those that were measured. latency, stages: seconds by percentile, and mean seconds by stage.
    cells: those of `realtime.tables`.
    """

    setting: str
    title: str
    load: float
    simulated: bool
    curve: bool
    latency: Mapping[str, float]
    stages: Mapping[str, float]
    cells: list[str]


class Latency(NamedTuple):
    """The runs of `make latency` by load, and where and when they were measured."""

    runs: list[Run]
    made: str


def latency(result: Value) -> Latency:
    machine = result["machine"]
    runs = [_run(row) for row in result["rows"] if _text(row, "part") in ("load", "curve")]
    device, threads, torch = machine["device"].text(), machine["threads"].count(), machine["torch"].shown()
    made = f"on {device}, {threads} threads, torch {torch}, {result['created'].text()[:10]}"
    return Latency(sorted((run for run in runs if run.latency), key=lambda run: run.load), made)


def _run(row: Value) -> Run:
    from ..realtime.study import Setting
    from ..realtime.tables import cells

    summary, load = row["summary"], row["load"].number()
    for name in ("answered_per_second", "in_time", "utilization"):
        summary[name].number()
    taken = {name: summary.get(name) for name in ("latency", "stages", "queue_age")}  # None where none was answered
    found = {
        name: {} if part is None else {key: one.number() for key, one in part.items()} for name, part in taken.items()
    }
    try:
        setting, shown = Setting(**row["setting"].found), cells(row.found)
        title = "one clip at a time" if setting.max_batch == 1 else f"up to {setting.max_batch:d} clips at a time"
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{row.file}: {row.path} is no run of a study of latency: {error!r}") from error
    simulated, curve = row["simulated"].flag(), _text(row, "part") == "curve"
    words, *shown = (printable(one) for one in (str(setting), *shown))
    return Run(words, title, load, simulated, curve, found["latency"], found["stages"], shown)


# The folder


class Gpu(NamedTuple):
    """What was measured on a GPU. shares: empty where nothing was predicted. seconds: those of `outcomes`."""

    comparison: Comparison
    shares: list[Share]
    seconds: Mapping[str, float]


class Results(NamedTuple):
    """What a folder has; None, or an empty list, for what it lacks."""

    folder: Path
    cpu: Comparison | None
    gpus: list[Gpu]
    study: Study | None
    latency: Latency | None


def read_results(folder: Path) -> Results:
    """Read the results in a folder. ValueError where there is no folder, or a file is not as it should be."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; accepted: one of results, such as bench/results of a checkout")
    bench, robustness, loads = (read(folder / f"{name}.json") for name in ("cpu", "robustness-tiny", "latency-cpu"))
    gpus = []
    for file in sorted(folder.glob("*.json")):
        found = read(file) if file.is_file() else None
        if found is None or not isinstance(found.found, dict) or found.found.get("kind") != "gpu":
            continue
        if (comparison := gpu_comparison(found["rows"])) is not None:
            prediction, measured = read(file.with_name(f"{file.stem}-prediction.json")), outcomes(found["rows"])
            gpus.append(Gpu(comparison, [] if prediction is None else shares(prediction, measured), measured))
    return Results(
        folder,
        None if bench is None else cpu_comparison(bench),
        gpus,
        None if robustness is None else study(robustness),
        None if loads is None else latency(loads),
    )
