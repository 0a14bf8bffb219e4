"""The commands that judge a defense: demo and evaluate. They import what they need when they run."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .report import accuracy_table, console, report, write_report

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.datasets import VideoDataset
    from ..evaluation.record import Threat

_DEFENSES = ("none", "VAE round trip", "mean of 5 frames", "ddim_inversion", "ddim", "videopure")
_DEMO_CLIPS = 4  # in its video

_CLASSIFIER, _CLIPS, _ATTACKER, _DEFENSE, _REPORT = (
    f"The {name}" for name in ("classifier", "clips", "attacker", "defense", "report")
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

    from .. import tiny
    from ..evaluation import figures as pictures
    from ..evaluation import runner as evaluation
    from ..evaluation.record import Plan, Threat
    from ..evaluation.tables import table
    from ..files import check_writable, make_folder
    from ..purifier import Purifier

    if json_file is not None:
        check_writable(json_file)
    gray = Threat("gray-box", "pgd", {"steps": steps, "step_size": eps / 2 / 255}, clips)
    plan = Plan(
        source=f"packaged clips of seed {seed}",
        threats=(Threat("none", clips=clips), gray),
        defenses=("none", "VAE round trip", "mean of 5 frames", "videopure"),
        eps=(eps / 255,),
        seeds=(seed,),
        repeats=1,
    )
    make_folder(out)
    defenses = evaluation.defenses(Purifier.from_pretrained("tiny", device="cpu"))
    setup = evaluation.Setup(tiny.load_classifier(), defenses, _draw_tiny)
    with tempfile.TemporaryDirectory() as folder:
        record = evaluation.evaluate(plan, setup, Path(folder) / "record.json", progress=True)
    rows = table(record)
    console.print(accuracy_table(rows))
    found = evaluation.examples(record, gray, plan.eps[0], "videopure", _DEMO_CLIPS, setup)
    pictures.write_strip(found, tiny.CLASSES, out / "strip.png", threat=f"PGD, {eps:g}/255", defense="videopure")
    pictures.write_side_by_side(found, tiny.CLASSES, out / "demo.mp4")
    console.print(f"Pictures: {out / 'strip.png'}\nVideo, clean | attacked | purified: {out / 'demo.mp4'}")
    if json_file is not None:
        write_report(json_file, record, rows)
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
    frames: Annotated[
        int | None,
        typer.Option(min=2, show_default="32", help="Frames of a data set's clip.", rich_help_panel=_CLIPS),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(show_default="2", help="Every stride-th frame of a video is taken.", rich_help_panel=_CLIPS),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(show_default="256", help="Pixels of a video's shorter side.", rich_help_panel=_CLIPS),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(show_default="224", help="Side of the square cut from its center.", rich_help_panel=_CLIPS),
    ] = None,
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
        typer.Option(min=1, help="Calls averaged at each step, against random defenses.", rich_help_panel=_ATTACKER),
    ] = 1,
    restarts: Annotated[
        int, typer.Option(min=1, help="Runs of which each clip keeps the best.", rich_help_panel=_ATTACKER)
    ] = 1,
    queries: Annotated[int, typer.Option(min=1, help="Of --threat query, by Square.", rich_help_panel=_ATTACKER)] = 500,
    defense: Annotated[
        list[str] | None,
        typer.Option(
            show_default=", ".join(_DEFENSES),
            help='May be given repeatedly; "all" is every one there is.',
            rich_help_panel=_DEFENSE,
        ),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            help='Also offer the diffusing defenses at this T, as "videopure, T=2".', rich_help_panel=_DEFENSE
        ),
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Attacked for each seed.", rich_help_panel=_CLIPS)] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Each has clips and draws of its own.", rich_help_panel=_CLIPS)] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, help="Predictions of each clip by a random defense.", rich_help_panel=_DEFENSE)
    ] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Clips in memory at once.", rich_help_panel=_CLIPS)] = 8,
    checks: Annotated[
        bool, typer.Option(help="Also check gradients and attacks, on two clips.", rich_help_panel=_REPORT)
    ] = True,
    model: Annotated[
        str,
        typer.Option(help='"tiny", a folder, or a Hugging Face text-to-video repository.', rich_help_panel=_DEFENSE),
    ] = "tiny",
    device: Annotated[
        str | None,
        typer.Option(
            show_default="the accelerator, else cpu", help='"cpu", "cuda", "cuda:1", "mps".', rich_help_panel=_DEFENSE
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            show_default="float16 on an accelerator, else float32",
            help="Precision of the purifier.",
            rich_help_panel=_DEFENSE,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of record, table and pictures; made if absent.", rich_help_panel=_REPORT)
    ] = Path("evaluation"),
) -> None:
    """Judge defenses of a classifier: accuracy under attack, threat model by threat model, with 95 % intervals.

    What is done stays in OUT/record.json, and after an interruption the same command goes on from there. It ends with
    OUT/table.csv, report.json, accuracy.svg (against eps, and against latency) and strip.png (a clip clean, attacked,
    purified, and the difference).

    Threats, in order of knowledge: transfer (gradients of another classifier), gray-box (of the classifier itself),
    query (logits of the defense), bpda (the classifier's gradients at the defense's output) and exact (the defense's
    own gradients). The last three know the defense: it is as good as the worst of them.

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

    from .. import tiny
    from ..data import datasets
    from ..evaluation import runner as evaluation
    from ..evaluation.record import Plan, weights_digest
    from ..files import make_folder
    from ..inputs import check_count
    from ..purifier import Purifier

    if not 0 < step_size < math.inf:
        raise ValueError(f"--step-size must be more than 0, in 1/255, got {step_size}")
    numbers = _numbers("eps", eps)
    if not all(0 < number <= 255 for number in numbers):
        raise ValueError(f"--eps must be more than 0 and at most 255, in 1/255, got {eps}")
    for one in depth or ():
        check_count("--depth", one, least=0, most=49)
    known = evaluation.defense_names(tuple(depth or ()))
    wanted = known if "all" in (defense or ()) else tuple(defense or _DEFENSES)
    if unknown := [name for name in defense or () if name not in (*known, "all")]:
        raise ValueError(f"unknown defenses {', '.join(unknown)}; accepted: all, {', '.join(known)}")
    if idle := [one for one in depth or () if not any(name.endswith(f", T={one}") for name in wanted)]:
        raise ValueError(f"--depth {idle[0]} is of no defense asked for; say --defense 'videopure, T={idle[0]}'")
    gradient = {"loss": loss.value, "eot": eot, "restarts": restarts}
    threats = _threats(threat, attack, steps, step_size, gradient, queries, clips)
    if any(one.access == "transfer" for one in threats) != (other is not None):
        raise ValueError("--threat transfer and --other, the classifier to attack for it, go together")
    # All but the subject, which needs the models: what is wrong with it is found before they are loaded.
    plan = Plan(
        source="",
        threats=threats,
        defenses=wanted,
        eps=tuple(number / 255 for number in numbers),
        seeds=tuple(range(seeds)),
        batch=batch,
        repeats=repeats,
    )
    colors = _colors((classifier, other), mean, std)
    sampling = {"frames": frames, "stride": stride, "resize": resize, "crop": crop}
    files = {"videos": videos, "annotations": annotations, "labels": labels, "classes": classes}
    names, draw, source = tiny.CLASSES, _draw_tiny, None
    shape = (tiny.clips.FRAMES, tiny.clips.SIZE, tiny.clips.SIZE)
    _check_options(dataset, sampling | files)
    if dataset is not DatasetName.tiny:
        source = _dataset(dataset, files, {name: value for name, value in sampling.items() if value is not None})
        shape = (source.sampling.frames, source.sampling.crop, source.sampling.crop)
        names, draw = source.classes, datasets.draws(source, clips, workers)
        if seeds * clips > len(source):
            raise ValueError(f"{seeds} x {clips} clips are more than the data set's {len(source)} videos")
    make_folder(out)
    purifier = Purifier.from_pretrained(
        model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value)
    )
    place = purifier.unet.device
    sample = torch.full((2, 3, *shape), 0.5, device=place)
    judge, attacker = (_classifier(name, colors, sample, len(names)) for name in (classifier, other))
    subject = {"classifier": classifier, "other": other, **colors, "dataset": dataset.value, "model": model}
    subject |= {"dtype": str(purifier.unet.dtype), "config": asdict(purifier.config)}
    modules = (judge, attacker, purifier)
    subject["digests"] = [None if module is None else weights_digest(module) for module in modules]
    if source is not None:
        subject |= {"videos": source.digest, "sampling": asdict(source.sampling)}
    plan = replace(plan, source=json.dumps(subject))

    def draw_there(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        drawn, labels = draw(seed, start, count)
        return drawn.to(place), labels.to(place)

    setup = evaluation.Setup(judge, evaluation.defenses(purifier, tuple(depth or ())), draw_there, attacker)
    skipped = None if source is None else source.skipped
    try:
        record = evaluation.evaluate(plan, setup, out / "record.json", skipped=skipped, progress=True)
    except KeyboardInterrupt:
        console.print(f"Stopped. What is done stays in {out / 'record.json'}: the same command goes on from there.")
        raise
    except torch.OutOfMemoryError as error:
        less = "a smaller --batch, with another --out" if batch > 1 else "fewer --frames or a smaller --crop"
        raise ValueError(f"a batch of {batch} does not fit in the accelerator's memory; try {less}") from error
    report(record, setup, names, out, thorough=checks)


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
    from ..evaluation.record import Threat

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


# Of each data set: the options that it needs. All but the packaged clips may have those of sampling.
_NEEDS = {
    DatasetName.tiny: (),
    DatasetName.ucf101: ("videos", "annotations"),
    DatasetName.kinetics400: ("videos", "annotations"),
    DatasetName.something_something_v2: ("videos", "annotations", "labels"),
}


def _check_options(dataset: DatasetName, options: dict[str, Any]) -> None:
    """ValueError where a data set lacks an option, or would ignore one."""
    needs, given = _NEEDS[dataset], [name for name, value in options.items() if value is not None]
    if missing := [f"--{name}" for name in needs if name not in given]:
        raise ValueError(f"--dataset {dataset.value} needs {' and '.join(missing)}")
    may = () if dataset is DatasetName.tiny else ("frames", "stride", "resize", "crop")
    may += ("classes",) if dataset is DatasetName.kinetics400 else ()
    if ignored := [f"--{name}" for name in given if name not in (*needs, *may)]:
        raise ValueError(f"--dataset {dataset.value} takes no {' or '.join(ignored)}")


def _dataset(name: DatasetName, files: dict[str, Path | None], sampling: dict[str, int]) -> VideoDataset:
    from ..data.annotations import read_lines
    from ..data.datasets import ClipSampling, VideoDataset

    places, options = [files[option] for option in _NEEDS[name]], {"sampling": ClipSampling(**sampling)}
    if name is DatasetName.ucf101:
        return VideoDataset.ucf101(*places, **options)
    if name is DatasetName.something_something_v2:
        return VideoDataset.something_something_v2(*places, **options)
    classes = None if files["classes"] is None else read_lines(files["classes"])
    return VideoDataset.kinetics400(*places, classes=classes, **options)


def _draw_tiny(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    from .. import tiny

    clips, labels = tiny.sample_clips(start + count, seed)
    return clips[start:], labels[start:]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option} must be numbers, such as 4,8; got {text!r}") from None


def _colors(names: Sequence[str | None], mean: str | None, std: str | None) -> dict[str, Any]:
    """The options' numbers; ValueError where they are missing, or of nothing."""
    named = [name for name in names if name not in (None, "tiny") and ":" not in name]
    if (mean is None, std is None) != (not named, not named):
        raise ValueError(
            f"--mean and --std are of Hugging Face models, which need both; got {named or 'no such model'}"
        )
    return {name: text and _numbers(name, text) for name, text in (("mean", mean), ("std", std))}


def _classifier(name: str | None, colors: dict[str, Any], clips: Tensor, classes: int) -> nn.Module | None:
    """By its name, on the clips' device, and tried on them before any work: the code of others may fail in any way."""
    import torch

    from ..adapters import load_classifier

    if name is None:
        return None
    if ":" in name:
        sys.path.append(os.getcwd())  # where "module:function" is looked for; a script's own path has it not
    module = load_classifier(name, **colors).to(clips.device)
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
