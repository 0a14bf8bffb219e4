"""The commands that judge a defence: demo and evaluate. They import what they need when they run."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .checks import Check
    from .datasets import ClipSampling, VideoDataset
    from .evaluation import Defence
    from .records import Plan, Record, Threat
    from .tables import Accuracy

    Draw = Callable[[int, int, int], tuple[Tensor, Tensor]]

# Brackets in file names are no markup.
console = Console(markup=False, highlight=False, soft_wrap=True)

_DEFENCES = ("none", "VAE round trip", "mean of 5 frames", "ddim_inversion", "ddim", "videopure")
_DEMO_CLIPS = 4  # in its video
_CHECKED_CLIPS = 2
_SOURCE_CLIPS = 32


_CLASSIFIER, _CLIPS, _ATTACKER, _DEFENCE, _REPORT = (
    f"The {name}" for name in ("classifier", "clips", "attacker", "defence", "report")
)


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class DatasetName(str, Enum):
    tiny = "tiny"
    ucf101 = "ucf101"
    kinetics400 = "kinetics400"
    something_something_v2 = "something-something-v2"


class ThreatName(str, Enum):
    transfer = "transfer"
    gray_box = "gray-box"
    query = "query"
    bpda = "bpda"
    exact = "exact"


class AttackName(str, Enum):
    pgd = "pgd"
    mim = "mim"
    apgd = "apgd"


class LossName(str, Enum):
    ce = "ce"
    dlr = "dlr"
    margin = "margin"


def demo(
    clips: Annotated[int, typer.Option(min=1, help="Clips to draw.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Which clips to draw.")] = 0,
    eps: Annotated[float, typer.Option(max=255, help="Attack's l_inf bound, in 1/255; more than 0.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Attack's PGD steps, each of eps/2.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for strip.png and demo.mp4; made if absent.")] = Path("demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write settings and results here.")] = None,
) -> None:
    """Attack packaged clips, purify them, and show how a classifier fares.

    Needs no download. The clips show drawn sprites; their class is the sprite's motion. 16 clips take less than
    a minute on two CPU cores. `videopure-fast evaluate` is for classifiers, clips and attacks of your own.

    Examples:

    ```
      videopure-fast demo
      videopure-fast demo --clips 64 --eps 8 --json demo.json
    ```
    """
    import tempfile

    from . import evaluation, pictures, tiny
    from .profiling import check_writable
    from .purifier import Purifier
    from .records import Plan, Threat
    from .tables import table

    if json_file is not None:
        check_writable(json_file)
    gray = Threat("gray-box", "pgd", {"steps": steps, "step_size": eps / 2 / 255}, clips)
    plan = Plan(
        source=f"packaged clips of seed {seed}",
        threats=(Threat("none", clips=clips), gray),
        defences=("none", "VAE round trip", "mean of 5 frames", "videopure"),
        eps=(eps / 255,),
        seeds=(seed,),
        repeats=1,
    )
    _make_folder(out)
    classifier = tiny.load_classifier()
    available = evaluation.defences(Purifier.from_pretrained("tiny", device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        record = evaluation.evaluate(plan, classifier, available, _draw_tiny, path, progress=True)
    rows = table(record)
    console.print(_accuracy_table(rows))
    cell = (gray, plan.eps[0], "videopure")
    found = evaluation.examples(record, *cell, _DEMO_CLIPS, classifier, available, _draw_tiny)
    pictures.write_strip(found, tiny.CLASSES, out / "strip.png", threat=f"PGD, {eps:g}/255", defence="videopure")
    pictures.write_side_by_side(found, tiny.CLASSES, out / "demo.mp4")
    console.print(f"Pictures: {out / 'strip.png'}\nVideo, clean | attacked | purified: {out / 'demo.mp4'}")
    if json_file is not None:
        _write_report(json_file, plan, rows)
        console.print(f"Numbers: {json_file}")


def evaluate(
    classifier: Annotated[
        str,
        typer.Option(
            help='"tiny", "package.module:function" returning a module, or a Hugging Face model.',
            rich_help_panel=_CLASSIFIER,
        ),
    ] = "tiny",
    mean: Annotated[
        str | None,
        typer.Option(help="Of the Hugging Face model's pixels: 0.485,0.456,0.406.", rich_help_panel=_CLASSIFIER),
    ] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.", rich_help_panel=_CLASSIFIER)] = None,
    other: Annotated[
        str | None,
        typer.Option(
            help="The attacker's own classifier for --threat transfer; as --classifier.", rich_help_panel=_CLASSIFIER
        ),
    ] = None,
    dataset: Annotated[
        DatasetName,
        typer.Option(
            help="Where clips come from; all but tiny take --videos and --annotations.", rich_help_panel=_CLIPS
        ),
    ] = DatasetName.tiny,
    videos: Annotated[
        Path | None, typer.Option(help="The data set's folder of videos.", rich_help_panel=_CLIPS)
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="UCF-101's folder of splits, Kinetics' CSV, or Something-Something's JSON file.",
            rich_help_panel=_CLIPS,
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Something-Something's labels.json.", rich_help_panel=_CLIPS)
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Kinetics: the classifier's class names, one a line, where the CSV has not all of them.",
            rich_help_panel=_CLIPS,
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a data set's clip.", rich_help_panel=_CLIPS)] = 32,
    stride: Annotated[int, typer.Option(help="Every stride-th frame of a video is taken.", rich_help_panel=_CLIPS)] = 2,
    resize: Annotated[int, typer.Option(help="Pixels of a video's shorter side.", rich_help_panel=_CLIPS)] = 256,
    crop: Annotated[
        int, typer.Option(help="Side of the square that is cut from its centre.", rich_help_panel=_CLIPS)
    ] = 224,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode videos.", rich_help_panel=_CLIPS)] = 0,
    threat: Annotated[
        list[ThreatName] | None,
        typer.Option(
            show_default="gray-box and bpda",
            help="What the attacker has. May be given repeatedly.",
            rich_help_panel=_ATTACKER,
        ),
    ] = None,
    attack: Annotated[
        AttackName, typer.Option(help="Of gray-box, bpda and exact.", rich_help_panel=_ATTACKER)
    ] = AttackName.pgd,
    loss: Annotated[LossName, typer.Option(help="What that attack raises.", rich_help_panel=_ATTACKER)] = LossName.ce,
    eps: Annotated[
        str, typer.Option(help="l_inf bounds in 1/255, one or several: 4,8.", rich_help_panel=_ATTACKER)
    ] = "4,8",
    steps: Annotated[int, typer.Option(min=1, help="Of an attack by gradient.", rich_help_panel=_ATTACKER)] = 10,
    step_size: Annotated[
        float, typer.Option(help="In 1/255, of pgd, mim and transfer; apgd finds its own.", rich_help_panel=_ATTACKER)
    ] = 2,
    eot: Annotated[
        int,
        typer.Option(min=1, help="Calls averaged at each step, against random defences.", rich_help_panel=_ATTACKER),
    ] = 1,
    restarts: Annotated[
        int, typer.Option(min=1, help="Runs of which each clip keeps the best.", rich_help_panel=_ATTACKER)
    ] = 1,
    queries: Annotated[int, typer.Option(min=1, help="Of --threat query, by Square.", rich_help_panel=_ATTACKER)] = 500,
    defence: Annotated[
        list[str] | None,
        typer.Option(
            show_default=", ".join(_DEFENCES),
            help='May be given repeatedly; "all" is every one there is.',
            rich_help_panel=_DEFENCE,
        ),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            help='Also offer the diffusing defences at this T, as "videopure, T=2".', rich_help_panel=_DEFENCE
        ),
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Attacked for each seed.", rich_help_panel=_CLIPS)] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Each has clips and draws of its own.", rich_help_panel=_CLIPS)] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, help="Predictions of each clip by a random defence.", rich_help_panel=_DEFENCE)
    ] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Clips in memory at once.", rich_help_panel=_CLIPS)] = 8,
    checks: Annotated[
        bool, typer.Option(help="Also check gradients and attacks, on two clips.", rich_help_panel=_REPORT)
    ] = True,
    model: Annotated[
        str,
        typer.Option(help='"tiny", a folder, or a Hugging Face text-to-video repository.', rich_help_panel=_DEFENCE),
    ] = "tiny",
    device: Annotated[
        str | None,
        typer.Option(
            show_default="the accelerator, else cpu", help='"cpu", "cuda", "cuda:1", "mps".', rich_help_panel=_DEFENCE
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            show_default="float16 on an accelerator, else float32",
            help="Precision of the purifier.",
            rich_help_panel=_DEFENCE,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of record, table and pictures; made if absent.", rich_help_panel=_REPORT)
    ] = Path("evaluation"),
) -> None:
    """Judge defences of a classifier: accuracy under attack, threat model by threat model, with 95 % intervals.

    What is done stays in OUT/record.json, and after an interruption the same command goes on from there. It ends with
    OUT/table.csv, report.json, accuracy.svg (against eps, and against latency) and strip.png (a clip clean, attacked,
    purified, and the difference).

    Threats, in order of knowledge: transfer (gradients of another classifier), gray-box (of the classifier itself),
    query (logits of the defence), bpda (the classifier's gradients at the defence's output) and exact (the defence's
    own gradients). The last three know the defence: it is as good as the worst of them.

    Examples:

    ```
      videopure-fast evaluate --clips 8 --eps 4
      videopure-fast evaluate --threat gray-box --threat bpda --threat exact --clips 128 --seeds 3
      videopure-fast evaluate --classifier my_models:video_classifier --dataset ucf101 --videos UCF-101 \\
        --annotations ucfTrainTestlist --model ali-vilab/text-to-video-ms-1.7b --batch 1
      videopure-fast evaluate --classifier MCG-NJU/videomae-base-finetuned-kinetics --mean 0.485,0.456,0.406 \\
        --std 0.229,0.224,0.225 --dataset kinetics400 --videos val --annotations val.csv --batch 1 ...
    ```
    """
    import torch

    from . import datasets, evaluation, tiny
    from .purifier import Purifier
    from .records import Plan, weights_digest

    if not 0 < step_size < math.inf:
        raise ValueError(f"--step-size must be more than 0, in 1/255, got {step_size}")
    if frames < 2:
        raise ValueError(f"--frames must be 2 or more, got {frames}")
    numbers = _numbers("eps", eps)
    if not all(0 < number <= 255 for number in numbers):
        raise ValueError(f"--eps must be more than 0 and at most 255, in 1/255, got {eps}")
    known = evaluation.defence_names(tuple(depth or ()))
    wanted = known if "all" in (defence or ()) else tuple(defence or _DEFENCES)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown defences {', '.join(unknown)}; accepted: all, {', '.join(known)}")
    gradient = {"loss": loss.value, "eot": eot, "restarts": restarts}
    threats = _threats(threat, attack, steps, step_size, gradient, queries, clips)
    if any(one.access == "transfer" for one in threats) != (other is not None):
        raise ValueError("--threat transfer and --other, the classifier to attack for it, go together")
    # All but the subject, which needs the models: what is wrong with it is found before they are loaded.
    plan = Plan(
        source="",
        threats=threats,
        defences=wanted,
        eps=tuple(number / 255 for number in numbers),
        seeds=tuple(range(seeds)),
        batch=batch,
        repeats=repeats,
    )
    colours = _colours((classifier, other), mean, std)
    names, draw, source = tiny.CLASSES, _draw_tiny, None
    if dataset is not DatasetName.tiny:
        sampling = datasets.ClipSampling(frames, stride, resize, crop)
        source = _dataset(dataset, videos, annotations, labels, classes, sampling)
        names, draw = source.classes, datasets.draws(source, clips, workers)
        if seeds * clips > len(source):
            raise ValueError(f"{seeds} x {clips} clips are more than the data set's {len(source)} videos")
    elif videos or annotations or labels or classes:
        raise ValueError("the packaged clips take no --videos, --annotations, --labels or --classes: give --dataset")
    _make_folder(out)
    purifier = Purifier.from_pretrained(
        model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value)
    )
    place = purifier.unet.device
    shape = (frames, crop, crop) if source else (tiny.clips.FRAMES, tiny.clips.SIZE, tiny.clips.SIZE)
    sample = torch.full((2, 3, *shape), 0.5, device=place)
    judge, attacker = (_classifier(name, colours, sample, len(names)) for name in (classifier, other))
    available = evaluation.defences(purifier, depths=tuple(depth or ()))
    subject = {"classifier": classifier, "other": other, **colours, "dataset": dataset.value, "model": model}
    subject |= {"dtype": str(purifier.unet.dtype), "config": asdict(purifier.config)}
    modules = (judge, attacker, purifier)
    subject["digests"] = [None if module is None else weights_digest(module) for module in modules]
    if source is not None:
        subject |= {"videos": source.digest, "sampling": asdict(source.sampling)}
    plan = replace(plan, source=json.dumps(subject))

    def draw_there(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        drawn, labels = draw(seed, start, count)
        return drawn.to(place), labels.to(place)

    try:
        record = evaluation.evaluate(
            *(plan, judge, available, draw_there, out / "record.json"),
            other=attacker,
            skipped=None if source is None else source.skipped,
            progress=True,
        )
    except KeyboardInterrupt:
        console.print(f"Stopped. What is done stays in {out / 'record.json'}: the same command goes on from there.")
        raise
    cast = _Cast(judge, attacker, available, draw_there, names)
    _report(record, cast, out, place, thorough=checks)


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# What is asked for


def _threats(
    names: list[ThreatName] | None,
    attack: AttackName,
    steps: int,
    step_size: float,
    gradient: dict[str, Any],
    queries: int,
    clips: int,
) -> tuple[Threat, ...]:
    from .records import Threat

    asked = {"queries": queries, **({} if gradient["eot"] == 1 else {"eot": gradient["eot"]})}
    step = {"steps": steps, "step_size": step_size / 255}
    own = {"steps": steps} if attack is AttackName.apgd else step
    changed = {name: value for name, value in gradient.items() if value not in ("ce", 1)}  # others make names long
    found = [Threat("none", clips=clips)]
    for name in names or (ThreatName.gray_box, ThreatName.bpda):
        if name is ThreatName.transfer:
            found.append(Threat("transfer", "temporal_translation", step, clips))
        elif name is ThreatName.query:
            found.append(Threat("query", "square", asked, clips))
        else:
            found.append(Threat(name.value, attack.value, own | changed, clips))
    return tuple(found)


def _dataset(
    name: DatasetName,
    videos: Path | None,
    annotations: Path | None,
    labels: Path | None,
    classes: Path | None,
    sampling: ClipSampling,
) -> VideoDataset:
    from .datasets import VideoDataset

    if videos is None or annotations is None:
        raise ValueError(f"--dataset {name.value} needs --videos and --annotations")
    if name is DatasetName.ucf101:
        return VideoDataset.ucf101(videos, annotations, sampling=sampling)
    if name is DatasetName.kinetics400:
        names = None if classes is None else classes.read_text().splitlines()
        return VideoDataset.kinetics400(videos, annotations, classes=names, sampling=sampling)
    if labels is None:
        raise ValueError(f"--dataset {name.value} needs --labels")
    return VideoDataset.something_something_v2(videos, annotations, labels, sampling=sampling)


def _draw_tiny(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    from . import tiny

    clips, labels = tiny.sample_clips(start + count, seed)
    return clips[start:], labels[start:]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option} must be numbers, such as 4,8; got {text!r}") from None


def _colours(names: Sequence[str | None], mean: str | None, std: str | None) -> dict[str, Any]:
    """The options' numbers; ValueError where they are missing, or of nothing."""
    named = [name for name in names if name not in (None, "tiny") and ":" not in name]
    if (mean is None, std is None) != (not named, not named):
        raise ValueError(
            f"--mean and --std are of Hugging Face models, which need both; got {named or 'no such model'}"
        )
    return {name: text and _numbers(name, text) for name, text in (("mean", mean), ("std", std))}


def _classifier(name: str | None, colours: dict[str, Any], clips: Tensor, classes: int) -> nn.Module | None:
    """By its name, on the clips' device, and tried on them before any work: the code of others may fail in any way."""
    import torch

    from .adapters import load_classifier

    if name is None:
        return None
    if ":" in name:
        sys.path.append(os.getcwd())  # where "module:function" is looked for; a script's own path has it not
    module = load_classifier(name, **colours).to(clips.device)
    try:
        with torch.no_grad():
            logits = module(clips)
    except Exception as error:
        raise ValueError(f"classifier {name!r} fails on clips {tuple(clips.shape)}: {error}") from error
    seen = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if seen != (len(clips), classes):
        raise ValueError(
            f"classifier {name!r} returns {seen} for {len(clips)} clips of {classes} classes; accepted: logits "
            f"({len(clips)}, {classes}), in the order of the data set's classes"
        )
    return module


# What is shown and written


class _Cast(NamedTuple):
    """Who takes part: the classifier, the attacker's own, the defences by name, the clips and their classes."""

    classifier: nn.Module
    other: nn.Module | None
    available: Mapping[str, Defence]
    draw: Draw
    classes: Sequence[str]


def _report(record: Record, cast: _Cast, out: Path, device: torch.device, *, thorough: bool) -> None:
    """Table, report, CSV file and pictures; then, if thorough, the checks that need work, and the report with them."""
    from .checks import order_checks
    from .tables import inaccessible, table

    randomised = [name for name in record.plan.defences if cast.available[name].randomised]
    rows, checks = table(record, randomised=randomised), order_checks(record)

    def write() -> None:
        found = [check._asdict() for check in checks]
        _write_report(out / "report.json", record.plan, rows, device=device, checks=found, skipped=record.skipped)

    console.print(_accuracy_table(rows))
    for access, names in inaccessible(record).items():
        console.print(f"No {access} attack on {', '.join(names)}: no gradient.")
    for note in _weaknesses(record.plan, randomised):
        console.print(f"Mind: {note}")
    if record.skipped:
        console.print(f"{len(record.skipped)} videos could not be read; report.json names them.")
    write()
    _write_csv(out / "table.csv", rows)
    _draw_pictures(record, rows, cast, out)
    if thorough:
        checks += _sanity_checks(record.plan, cast)
        write()
    if checks:
        console.print(_check_table(checks))
    console.print(f"Table, report and pictures: {out}")


def _weaknesses(plan: Plan, randomised: Sequence[str]) -> Iterator[str]:
    """What makes these attacks weaker than they could be."""
    from .records import ADAPTIVE

    attacks = [threat for threat in plan.threats if threat.access != "none"]
    if randomised and any(threat.settings.get("eot", 1) == 1 for threat in attacks if threat.access in ADAPTIVE):
        yield f"{', '.join(randomised)} draw anew at each call; --eot averages over several of them."
    reach = min(threat.settings.get("steps", 1) * threat.settings.get("step_size", math.inf) for threat in attacks)
    if reach < 2 * max(plan.eps):
        yield f"--steps of --step-size reach {255 * reach:g}/255, less than from side to side of the largest eps."


def _accuracy_table(rows: Sequence[Accuracy]) -> Table:
    table = Table("defence", box=None, title="Accuracy, its 95 % interval, and the share right in every repeat")
    table.caption = "MB: the most memory held, on a CPU by the whole process"
    table.caption_justify = "left"
    for column in ("clips", "accuracy", "interval", "worst", "s/clip", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in rows:
        title = "the least that any of these attacks left" if row.access == "adaptive" else row.threat
        if (title, row.eps) != last:
            table.add_section()
            table.add_row(title + (f", eps {255 * row.eps:g}/255" if row.eps else ""))
            last = (title, row.eps)
        table.add_row(
            f"  {row.defence}",
            str(row.n),
            f"{row.accuracy:.3f}",
            f"{row.low:.2f}-{row.high:.2f}",
            f"{row.worst:.3f}",
            "-" if row.seconds_per_clip is None else f"{row.seconds_per_clip:.2g}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        )
    return table


def _check_table(checks: Sequence[Check]) -> Table:
    table = Table("check", "", "seen", box=None, title="Can this be believed?")
    for check in checks:
        table.add_row(check.name, "pass" if check.passed else "FAIL", check.seen)
    return table


def _sanity_checks(plan: Plan, cast: _Cast) -> list[Check]:
    """Of the plan's last defence: of its exact gradient where it has one, else of BPDA's."""
    import torch

    from .checks import Check, effort_check, gradient_check, reach_check, source_check, stand_in_check

    name, eps = plan.defences[-1], plan.eps[-1]
    defence, classifier, count = cast.available[name], cast.classifier, plan.threats[0].clips
    batches = (cast.draw(seed, 0, min(count, _CHECKED_CLIPS)) for seed in plan.seeds)
    clips, labels = next((batch for batch in batches if len(batch[1])), (None, None))
    if clips is None:
        return [Check(f"{name}: checks", False, "not made: none of the first clips could be read")]
    exact, bpda = (defence.logits(classifier, how, torch.Generator().manual_seed(0)) for how in ("exact", "bpda"))
    target = exact or bpda
    todo = {"an attack that goes on": lambda: effort_check(target, clips, labels, eps=eps, steps=6)}
    todo["an attack without bounds"] = lambda: reach_check(target, clips, labels)
    if exact is not None:
        todo["BPDA's gradient"] = lambda: stand_in_check(exact, bpda, clips, labels)
    if defence.purifier is not None:
        todo["the exact gradient"] = lambda: gradient_check(defence.purifier, classifier, clips[:1], labels[:1])
    if cast.other is not None:
        more = cast.draw(plan.seeds[0], 0, min(count, _SOURCE_CLIPS))  # it is small, and two clips tell little
        todo["the attacker's own classifier"] = lambda: source_check(cast.other, *more, eps=eps, batch=plan.batch)
    found = []
    with console.status("") as status:
        for what, run in todo.items():
            status.update(f"checking {name}: {what}")
            try:
                check = run()
            except Exception as error:  # a classifier without float64, too little memory, ...
                check = Check(what, False, f"not made: {type(error).__name__}: {str(error).splitlines()[0]}")
            found.append(check._replace(name=f"{name}: {check.name}"))
    return found


def _draw_pictures(record: Record, rows: Sequence[Accuracy], cast: _Cast, out: Path) -> None:
    """The last defence's: of the first threat that has one, the clip that it rescues most clearly."""
    from . import pictures
    from .evaluation import examples
    from .tables import rescued

    if all(row.access in ("none", "adaptive") for row in rows):
        return
    pictures.draw_accuracy(rows, out / "accuracy.svg", note="bars: 95 % intervals")
    name = record.plan.defences[-1]
    for threat in record.plan.threats[1:]:
        cell = (threat, record.plan.eps[0], name)
        if rescued(record, *cell):
            found = examples(record, *cell, 1, cast.classifier, cast.available, cast.draw, other=cast.other)
            met = f"{threat.title}, {255 * record.plan.eps[0]:g}/255"
            pictures.write_strip(found, cast.classes, out / "strip.png", threat=met, defence=name)
            return


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write to {path}: it is a file")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write to {path}")


def _write_report(
    path: Path, plan: Plan, rows: Sequence[Accuracy], *, device: torch.device | str = "cpu", **more: Any
) -> None:
    import torch

    from .profiling import describe_device, replacing

    report = {
        "plan": asdict(plan),
        "hash": plan.hash,
        "versions": {name: installed(name) for name in ("videopure-fast", "torch", "diffusers")},
        "device": describe_device(torch.device(device)),
        "threads": torch.get_num_threads(),
        "rows": [row._asdict() for row in rows],
        **more,
    }
    with replacing(path) as file:
        file.write_text(json.dumps(report, indent=2) + "\n")


def _write_csv(path: Path, rows: Sequence[Accuracy]) -> None:
    from .profiling import replacing
    from .tables import Accuracy

    with replacing(path) as file, file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Accuracy._fields)
        writer.writerows(rows)
