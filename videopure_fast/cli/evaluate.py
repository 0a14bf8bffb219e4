"""The commands that compare defenses under attack: demo and evaluate. They import what they need when they run."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from .console import console
from .datasets import DatasetName, build_dataset, check_options
from .options import Device, Dtype, Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..evaluation.plan import ThreatModel
    from ..purifier import Purifier

_DEMO_CLIPS = 4  # clips shown in the demo's video
_MOST_CLIPS, _MOST_SEEDS = 1_000_000, 1000  # every batch of them is held in a list

_CLASSIFIER, _CLIPS, _ATTACKER, _DEFENSE, _REPORT = (
    f"The {name}" for name in ("classifier", "clips", "attacker", "defense", "report")
)

AttackName = Literal["pgd", "mim", "apgd"]
LossName = Literal["ce", "dlr", "margin"]


def demo(
    clips: Annotated[int, typer.Option(min=1, max=_MOST_CLIPS, help="Clips to draw.")] = 16,
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
    from .. import tiny
    from ..evaluation import benchmark, standard_threat
    from ..evaluation.report import accuracy_table
    from ..files import check_writable, make_folder
    from ..purifier import Purifier

    if not 0 < eps <= 255:
        raise ValueError(f"--eps must be more than 0 and at most 255, in 1/255, got {eps}")
    if json_file is not None:
        check_writable(json_file)
    gray_box = standard_threat("gray-box", clips, steps=steps, step_size=eps / 2 / 255)
    make_folder(out)
    report = benchmark(
        tiny.load_classifier(),
        Purifier.from_pretrained("tiny", device="cpu"),
        _draw_tiny,
        threats=[gray_box],
        eps=eps / 255,
        defenses=("none", "VAE round trip", "mean of 5 frames", "videopure"),
        count=clips,
        seeds=(seed,),
        batch=16,
        repeats=1,
        classes=tiny.CLASSES,
        source={"clips": f"packaged clips of seed {seed}"},
        checks=False,
    )
    console.print(accuracy_table(report.rows))
    report.strip(out / "strip.png", attack=f"PGD, {eps:g}/255")
    report.video(out / "demo.mp4", clips=_DEMO_CLIPS)
    console.print(f"Pictures: {out / 'strip.png'}\nVideo, clean | attacked | purified: {out / 'demo.mp4'}")
    if json_file is not None:
        report.to_json(json_file)
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
        typer.Option(help="Mean of the Hugging Face model's pixels: 0.485,0.456,0.406.", rich_help_panel=_CLASSIFIER),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Their standard deviation, as --mean.", rich_help_panel=_CLASSIFIER)
    ] = None,
    surrogate_classifier: Annotated[
        str | None,
        typer.Option(
            help="The attacker's own classifier for --threat transfer; as --classifier.", rich_help_panel=_CLASSIFIER
        ),
    ] = None,
    dataset: Annotated[
        DatasetName | None,
        typer.Option(
            show_default="folder with --videos, else tiny",
            help="Where clips come from: tiny is drawn, folder has a folder for each class, and the others are read by "
            "their --annotations.",
            rich_help_panel=_CLIPS,
        ),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(help="The data set's folder of videos: FOLDER/class/video.mp4.", rich_help_panel=_CLIPS),
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
            help="Folders and Kinetics: the classifier's class names, one a line, where the data set has not all.",
            rich_help_panel=_CLIPS,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=2, show_default="32; 16 for the packaged classifier", help="Frames of a clip.", rich_help_panel=_CLIPS
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(show_default="2; 1", help="Every stride-th frame of a video is taken.", rich_help_panel=_CLIPS),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(show_default="256; 32", help="Pixels of a video's shorter side.", rich_help_panel=_CLIPS),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(show_default="224; 32", help="Side of the square cut from its center.", rich_help_panel=_CLIPS),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode videos.", rich_help_panel=_CLIPS)] = 0,
    threat: Annotated[
        list[str] | None,
        typer.Option(
            show_default="gray-box and bpda",
            help="What the attacker has: transfer, gray-box, query, bpda or exact. May be given repeatedly.",
            rich_help_panel=_ATTACKER,
        ),
    ] = None,
    attack: Annotated[
        AttackName, typer.Option(help="Attack for gray-box, bpda and exact.", rich_help_panel=_ATTACKER)
    ] = "pgd",
    loss: Annotated[LossName, typer.Option(help="Loss that it maximizes.", rich_help_panel=_ATTACKER)] = "ce",
    eps: Annotated[
        str, typer.Option(help="l_inf bounds in 1/255, one or several: 4,8.", rich_help_panel=_ATTACKER)
    ] = "4,8",
    steps: Annotated[int, typer.Option(min=1, help="Iterations of gradient attacks.", rich_help_panel=_ATTACKER)] = 10,
    step_size: Annotated[
        float,
        typer.Option(
            help="Step size in 1/255 of pgd, mim and transfer; apgd chooses its own.", rich_help_panel=_ATTACKER
        ),
    ] = 2,
    eot: Annotated[
        int,
        typer.Option(
            min=1, help="Calls averaged at each step, against randomized defenses.", rich_help_panel=_ATTACKER
        ),
    ] = 1,
    restarts: Annotated[
        int, typer.Option(min=1, help="Runs of which each clip keeps the best.", rich_help_panel=_ATTACKER)
    ] = 1,
    queries: Annotated[
        int, typer.Option(min=1, help="Queries of --threat query, which uses Square.", rich_help_panel=_ATTACKER)
    ] = 500,
    defense: Annotated[
        list[str] | None,
        typer.Option(
            show_default="none, VAE round trip, mean of 5 frames, ddim_inversion, ddim, videopure",
            help='A name, or "module:function" of your own. May be given repeatedly; "all" is every registered one.',
            rich_help_panel=_DEFENSE,
        ),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            help='Adds the diffusing defenses at this T to "all", as "videopure, T=2".', rich_help_panel=_DEFENSE
        ),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_CLIPS,
            show_default="32, or all where there are less",
            help="Attacked for each seed.",
            rich_help_panel=_CLIPS,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, max=_MOST_SEEDS, help="Each has clips and draws of its own.", rich_help_panel=_CLIPS),
    ] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, help="Predictions of each clip by a randomized defense.", rich_help_panel=_DEFENSE)
    ] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Clips in memory at once.", rich_help_panel=_CLIPS)] = 8,
    checks: Annotated[
        bool, typer.Option(help="Also check gradients and attacks, on two clips.", rich_help_panel=_REPORT)
    ] = True,
    model: Model = "tiny",
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path, typer.Option(help="Folder of record, table and pictures; made if absent.", rich_help_panel=_REPORT)
    ] = Path("evaluation"),
) -> None:
    """Compare defenses of a classifier: accuracy under attack, threat model by threat model, with 95 % intervals.

    What is done stays in OUT/record.json, and after an interruption the same command goes on from there. It ends with
    OUT/table.csv, report.json, accuracy.svg (against eps, and against latency) and strip.png (a clip clean, attacked,
    purified, and the difference). From Python, `videopure_fast.evaluation.benchmark` does the same.

    Threats, in order of knowledge: transfer (gradients of another classifier), gray-box (of the classifier itself),
    query (logits of the defense), bpda (the classifier's gradients at the defense's output) and exact (the defense's
    own gradients). The last three know the defense: its robustness is the lowest accuracy under any of them.

    Examples:

    ```
      videopure-fast evaluate --clips 8 --eps 4
      videopure-fast evaluate --threat gray-box --threat bpda --threat exact --clips 128 --seeds 3
      videopure-fast evaluate --classifier my_models:video_classifier --videos FOLDER
      videopure-fast evaluate --classifier my_models:video_classifier --dataset ucf101 --videos UCF-101 \\
        --annotations ucfTrainTestlist --model ali-vilab/text-to-video-ms-1.7b --batch 1
      videopure-fast evaluate --classifier MCG-NJU/videomae-base-finetuned-kinetics --mean 0.485,0.456,0.406 \\
        --std 0.229,0.224,0.225 --dataset kinetics400 --videos val --annotations val.csv --batch 1 ...
    ```
    """
    import torch

    from .. import tiny
    from ..evaluation import benchmark, standard_threat
    from ..evaluation.benchmark import DEFAULT_COUNT, DEFAULT_DEFENSES, DEFAULT_THREATS, default_count, make_plan
    from ..files import make_folder
    from ..purifier import Purifier

    if not 0 < step_size < math.inf:
        raise ValueError(f"--step-size must be more than 0, in 1/255, got {step_size}")
    sizes = _numbers("eps", eps)
    if not all(0 < size <= 255 for size in sizes):
        raise ValueError(f"--eps must be more than 0 and at most 255, in 1/255, got {eps}")
    if any(name is not None and ":" in name for name in (classifier, surrogate_classifier, *(defense or ()))):
        sys.path.append(os.getcwd())  # where "module:function" is looked for; a console script's path lacks it
    gradient: dict[str, Any] = {"attack": attack, "steps": steps, "step_size": step_size / 255, "loss": loss}
    gradient |= {"eot": eot, "restarts": restarts, "queries": queries}
    if dataset is None:
        dataset = "tiny" if videos is None else "folder"
    # Threat refuses unknown names. Typer has no lists of literals.
    chosen = cast("Sequence[ThreatModel]", threat or DEFAULT_THREATS)
    threats = [standard_threat(name, clips or DEFAULT_COUNT, **gradient) for name in chosen]
    if any(one.threat_model == "transfer" for one in threats) != (surrogate_classifier is not None):
        raise ValueError("--threat transfer and --surrogate-classifier, the classifier to attack for it, go together")
    options: dict[str, Any] = {
        "threats": threats,
        "count": clips or DEFAULT_COUNT,
        "eps": [size / 255 for size in sizes],
    }
    options |= {"defenses": _defenses(defense or DEFAULT_DEFENSES, depth or ())}
    options |= {"seeds": range(seeds), "batch": batch, "repeats": repeats}
    make_plan(**options)  # reports bad options before the models are loaded
    colors = _colors((classifier, surrogate_classifier), mean, std)
    sampling = {"frames": frames, "stride": stride, "resize": resize, "crop": crop}
    files = {"videos": videos, "annotations": annotations, "labels": labels, "classes": classes}
    check_options(dataset, sampling | files)
    source = None if dataset == "tiny" else build_dataset(dataset, files, sampling, classifier)
    if source is not None and clips is None:
        options["count"] = default_count(len(source), range(seeds))
    make_folder(out)
    purifier = Purifier.from_pretrained(model, device=device, dtype=None if dtype is None else getattr(torch, dtype))
    defended, surrogate = (_classifier(name, colors, purifier) for name in (classifier, surrogate_classifier))
    assert defended is not None
    names = {"classifier": classifier, "surrogate_classifier": surrogate_classifier, **colors}
    try:
        report = benchmark(
            defended,
            purifier,
            _draw_tiny if source is None else source,
            surrogate=surrogate,
            record=out / "record.json",
            classes=tiny.CLASSES if source is None else source.classes,
            source={**names, "dataset": dataset, "model": model},
            workers=workers,
            checks=checks,
            **options,
        )
    except KeyboardInterrupt:
        console.print(f"Stopped. What is done stays in {out / 'record.json'}: the same command goes on from there.")
        raise
    except torch.OutOfMemoryError as error:
        less = "a smaller --batch, with another --out" if batch > 1 else "fewer --frames or a smaller --crop"
        raise ValueError(f"a batch of {batch} does not fit in the accelerator's memory; try {less}") from error
    console.print(report)
    report.save(out)
    console.print(f"Table, report and pictures: {out}")


def _defenses(names: Sequence[str], depths: Sequence[int]) -> tuple[str, ...]:
    """The names, with "all" replaced by those of all registered defenses, also at other depths."""
    from ..defense import defense_names
    from ..inputs import check_count

    for depth in depths:
        check_count("--depth", depth, least=0, most=49)
    if "all" in names:
        known = defense_names(depths)
        return (*known, *(name for name in names if name not in (*known, "all")))
    if idle := [depth for depth in depths if not any(name.endswith(f", T={depth}") for name in names)]:
        raise ValueError(f"--depth {idle[0]} is of no defense asked for; say --defense 'videopure, T={idle[0]}'")
    return tuple(names)


def _draw_tiny(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Packaged clips (count, 3, 16, 32, 32) of a seed from `start` on, and their labels."""
    from .. import tiny

    clips, labels = tiny.sample_clips(start + count, seed)
    return clips[start:], labels[start:]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option} must be numbers, such as 4,8; got {text!r}") from None


def _colors(names: Sequence[str | None], mean: str | None, std: str | None) -> dict[str, list[float] | None]:
    """The numbers of --mean and --std. ValueError where a Hugging Face model lacks them, or no model would use them."""
    named = [name for name in names if name not in (None, "tiny") and ":" not in str(name)]
    if (mean is None, std is None) != (not named, not named):
        raise ValueError(
            f"--mean and --std are of Hugging Face models, which need both; got {named or 'no such model'}"
        )
    given = (("mean", mean), ("std", std))
    return {option: None if text is None else _numbers(option, text) for option, text in given}


def _classifier(name: str | None, colors: dict[str, list[float] | None], purifier: Purifier) -> nn.Module | None:
    """The classifier of that name on the purifier's device."""
    from ..adapters import load_classifier

    return (
        None if name is None else load_classifier(name, mean=colors["mean"], std=colors["std"]).to(purifier.unet.device)
    )
