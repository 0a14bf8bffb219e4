"""The command `purify-dataset`: whole data sets, by many processes, each file once."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import console, format_seconds
from .options import Dtype, Flow, Method, Model, Size, Steps, default_size

if TYPE_CHECKING:
    from ..data.datasets import VideoDataset
    from ..data.video_writer import Quality
    from ..purifier import Purifier
    from ..scale.cluster import Pool
    from ..scale.driver import Counts, Rank
    from ..scale.rows import Job, Row
    from ..scale.worker import FileWorker, Recipe

DatasetName = Literal["ucf101", "kinetics400", "something-something-v2"]
FormatName = Literal["mp4", "webm", "safetensors"]

_SAMPLE = 8  # files of which a dry run measures and estimates the work
_SHOWN = 5  # errors at the end
_PACE = 3600.0  # seconds of a run whose pace says how long the rest takes
_FILES, _OUTPUT, _WORKERS, _ERRORS = "The files", "The outputs", "The workers", "Errors"


def purify_dataset(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A folder of videos, with or without classes, or a text file of paths, one a line."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the outputs; made if absent.")],
    dataset: Annotated[
        DatasetName | None,
        typer.Option(help="Of SOURCE, only the videos in these annotations.", rich_help_panel=_FILES),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Those of --dataset, as in `evaluate`.", rich_help_panel=_FILES)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="labels.json of something-something-v2.", rich_help_panel=_FILES)
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            show_default="the list's own folder",
            help="Folder in which the paths of a list are; outputs keep their paths below it.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    output_format: Annotated[
        FormatName,
        typer.Option("--format", help="safetensors holds the tensors clip and seconds.", rich_help_panel=_OUTPUT),
    ] = "mp4",
    lossless: Annotated[
        bool, typer.Option("--lossless", help="mp4 and webm keep every pixel.", rich_help_panel=_OUTPUT)
    ] = False,
    crf: Annotated[
        int | None,
        typer.Option(
            show_default="17",
            help="Constant rate factor of mp4 (0 to 51) or webm (0 to 63); less is better.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    size: Size = None,
    model: Model = "tiny",
    method: Method = "videopure",
    steps: Steps = None,
    dtype: Dtype = None,
    flow: Flow = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of ddim and ddpm, for every file the same.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(show_default="as many as fit", min=1, help="Processes.", rich_help_panel=_WORKERS),
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(
            show_default="1 where there are GPUs", min=0, help="GPUs of each, as Ray counts.", rich_help_panel=_WORKERS
        ),
    ] = None,
    num_cpus: Annotated[
        float | None,
        typer.Option(
            show_default="1 for tiny, else its share",
            min=0.01,
            help="Cores of each, as Ray counts; also its threads.",
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            show_default="a cluster of this machine",
            help='Of a Ray cluster: "auto", or HOST:PORT.',
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that a file may take; more than 0.", rich_help_panel=_ERRORS)
    ] = None,
    max_errors: Annotated[
        int,
        typer.Option(
            min=0,
            help="Files that may fail in a run, or in a rank of torchrun; one more ends it.",
            rich_help_panel=_ERRORS,
        ),
    ] = 100,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Also do the files that failed before.", rich_help_panel=_ERRORS)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what is to be done, and estimate how long it takes.")
    ] = False,
) -> None:
    """Purify the videos of a whole data set, each once, on the cores or GPUs of this machine or of a Ray cluster.

    Outputs keep the paths of their videos below SOURCE, the times of their pictures and their sound. What became of
    every file is in OUT/manifest.sqlite, also why it failed. The same command goes on where one was stopped or killed.
    With --dataset, OUT gets annotations of the outputs in the same format.

    Needs Ray: pip install 'videopure-fast[scale]'. Started by torchrun it needs none: each rank does its share, with
    a manifest of its own, which is merged at the end.

    Examples:

    ```
      videopure-fast purify-dataset videos purified
      videopure-fast purify-dataset UCF-101 purified --dataset ucf101 --annotations ucfTrainTestlist --timeout 600
      videopure-fast purify-dataset videos purified --address auto --model ali-vilab/text-to-video-ms-1.7b
      torchrun --nproc-per-node 8 -m videopure_fast purify-dataset videos purified
    ```
    """
    from ..data.video import working_size
    from ..files import check_folder
    from ..scale.driver import purify_dataset as run_dataset
    from ..scale.driver import work_folder
    from ..scale.sources import check_apart, check_no_replacement
    from ..scale.worker import FileWorker, Recipe, settings_digest

    rank = _rank(workers, address)
    suffix = f".{output_format}"
    size = default_size(model, size)
    working_size(size, size, size)
    if timeout is not None and not 0 < timeout < float("inf"):
        raise ValueError(f"--timeout must be more than 0 seconds, got {timeout}")
    quality = _quality(suffix, lossless, crf)
    files = {"videos": videos, "annotations": annotations, "labels": labels}
    jobs, samples = _jobs(source, suffix, dataset, files)
    if source.is_dir() and dataset is None:
        check_apart(source, out)
    check_no_replacement(jobs, out)
    check_folder(out)
    with ExitStack() as ended:
        wanted = {"workers": workers, "num_cpus": num_cpus, "num_gpus": num_gpus}
        pool = _pool(ended, wanted, small=model == "tiny", address=address, rank=rank, dry_run=dry_run)
        recipe = Recipe(
            out=out.absolute(),
            work=work_folder(out, rank).absolute(),
            model=os.path.abspath(model) if model != "tiny" and os.path.isdir(model) else model,
            device=_device(pool, rank),
            dtype=dtype or ("float16" if pool.num_gpus else "float32"),
            flow=flow,
            overrides={"method": method, **({} if steps is None else {"inversion_steps": steps})},
            size=size,
            suffix=suffix,
            quality=quality,
            seed=seed,
            timeout=timeout,
            threads=max(1, int(pool.num_cpus)),
        )
        purifier = recipe.load(None if dry_run and pool.num_gpus else "cpu")
        identity = recipe.identity(purifier)
        if dry_run:
            _estimate(purifier, jobs, out, identity, recipe, pool, retry_errors)
            return
        del purifier
        recipe = replace(recipe, settings=settings_digest(identity), weights=identity["weights"])
        run = functools.partial(_run, functools.partial(FileWorker, recipe), pool, rank)
        options: dict[str, Any] = {"rank": rank, "retry_errors": retry_errors, "max_errors": max_errors}
        options |= {"report": ended.enter_context(_progress(rank))}
        if dataset is not None and samples is not None:
            options |= {"finish": functools.partial(_annotate, dataset, samples, jobs, out)}
        try:
            counts = run_dataset(jobs, out, identity, run, **options)
        except KeyboardInterrupt:
            console.print(f"Stopped. What is done stays in {out}: the same command goes on from there.")
            raise
    _summarize(counts, out, rank)


def _rank(workers: int | None, address: str | None) -> Rank | None:
    """This process among those that torchrun started; None if it did not."""
    from ..scale.driver import Rank

    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    if workers is not None or address is not None:
        raise ValueError("--workers and --address are of Ray; under torchrun --nproc-per-node says how many there are")
    return Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def _quality(suffix: str, lossless: bool, crf: int | None) -> Quality | None:
    from ..data.video_writer import check_quality

    if lossless and crf is not None:
        raise ValueError(f"--lossless and --crf {crf} exclude each other")
    quality: Quality | None = "lossless" if lossless else crf
    check_quality(suffix, quality)
    return quality


def _jobs(
    source: Path, suffix: str, dataset: DatasetName | None, files: dict[str, Path | None]
) -> tuple[list[Job], VideoDataset | None]:
    """The files to purify, and their data set where annotations say which they are and outputs can have some too."""
    from ..scale.annotations import READ_BACK
    from ..scale.sources import dataset_jobs, folder_jobs, listed_jobs
    from .datasets import build_dataset, check_options

    if dataset is not None:
        check_options(dataset, files | {"videos": source})
        if files["videos"] is not None:
            raise ValueError("with --dataset SOURCE is the folder of the videos; --videos is of lists")
        if suffix not in (*READ_BACK[dataset], ".safetensors"):
            raise ValueError(f"a data set of {dataset} has files in {' or '.join(READ_BACK[dataset])}: choose --format")
        samples = build_dataset(dataset, {**files, "videos": source, "classes": None}, {}, "")
        return dataset_jobs(samples, source, suffix), None if suffix == ".safetensors" else samples
    if ignored := [f"--{name}" for name in ("annotations", "labels") if files[name] is not None]:
        raise ValueError(f"{ignored[0]} needs --dataset, which says what it is")
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or list {source}")
    if not source.is_dir():
        return listed_jobs(source, files["videos"] or source.parent, suffix), None
    if files["videos"] is not None:
        raise ValueError(f"--videos is of a list; {source} is a folder")
    return folder_jobs(source, suffix), None


def _pool(
    ended: ExitStack, wanted: dict[str, Any], *, small: bool, address: str | None, rank: Rank | None, dry_run: bool
) -> Pool:
    """The workers of this run; a cluster of Ray's is joined or started, unless nothing is to be run by it."""
    import torch

    from ..scale.cluster import choose_pool, connected

    wanted = wanted if rank is None else wanted | {"workers": 1}
    # This machine has as many cores as the workers ask for, at least: they may share them.
    cpus = None if wanted["workers"] is None else wanted["workers"] * (wanted["num_cpus"] or 1)
    if rank is None and (address is not None or not dry_run):
        return choose_pool(ended.enter_context(connected(address, cpus=cpus)), small=small, **wanted)
    cores, gpus = float(os.cpu_count() or 1), float(torch.accelerator.device_count())
    if rank is not None:  # this machine's other ranks have their shares of both
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = min(gpus, wanted["num_gpus"] or 1.0)
    return choose_pool([{"CPU": max(cores, math.ceil(cpus or 1)), "GPU": gpus}], small=small and rank is None, **wanted)


def _device(pool: Pool, rank: Rank | None) -> str | None:
    """The device of a worker; None is the accelerator that Ray gives it."""
    import torch

    if not pool.num_gpus:
        return "cpu"
    place = torch.accelerator.current_accelerator()
    if rank is None or place is None:
        return None
    return f"{place.type}:{int(os.environ.get('LOCAL_RANK', '0')) % torch.accelerator.device_count()}"


def _run(
    make_worker: Callable[[], FileWorker], pool: Pool, rank: Rank | None, jobs: Sequence[Job]
) -> Generator[Row, None, None]:
    from ..scale.cluster import run_on_ray
    from ..scale.local import run_in_child

    return run_on_ray(jobs, make_worker, pool) if rank is None else run_in_child(jobs, make_worker)


def _annotate(kind: str, dataset: VideoDataset, jobs: Sequence[Job], out: Path, rows: Sequence[Row]) -> None:
    from ..scale.annotations import write_annotations

    write_annotations(kind, dataset, jobs, rows, out)


@contextmanager
def _progress(rank: Rank | None) -> Iterator[Callable[[Counts], None]]:
    """A bar over the files, and what is to be given the counts. Of several ranks the first shows its share."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[failed]} failed"),
        console=console,
        speed_estimate_period=_PACE,
        disable=rank is not None and rank.number > 0,
    ) as bar:
        task = bar.add_task("files", total=None, failed=0)

        def report(counts: Counts) -> None:
            done = counts.done + counts.failed
            bar.update(task, total=counts.files - counts.before, completed=done, failed=counts.failed)

        yield report


def _summarize(counts: Counts, out: Path, rank: Rank | None) -> None:
    from ..scale.manifest import MANIFEST, read_rows

    share = "" if rank is None else f"Rank {rank.number}: "
    console.print(
        f"{share}{counts.done} files done and {counts.failed} failed, {counts.before} settled before, "
        f"of {counts.files}: {out / MANIFEST}"
    )
    if counts.failed_before:
        console.print(f"Of those settled before, {counts.failed_before} had failed.")
    if counts.failed or counts.failed_before:
        failed = [row for row in read_rows(out / MANIFEST) if row.state == "failed"]
        for row in failed[:_SHOWN]:
            console.print(f"{row.name}: {row.error}")
        more = f" of all {len(failed)}" if len(failed) > _SHOWN else ""
        console.print(f"The manifest says why{more}; --retry-errors does the failed ones again.")
    if counts.warned:
        console.print(f"{counts.warned} outputs have warnings in the manifest, such as sound that they cannot hold.")


def _estimate(
    purifier: Purifier,
    jobs: Sequence[Job],
    out: Path,
    identity: dict[str, Any],
    recipe: Recipe,
    pool: Pool,
    retry_errors: bool,
) -> None:
    """Print what is to be done, and how long that may take, by a sample of it."""
    from ..data.video import probe, working_size
    from ..measure.estimate import estimate_seconds
    from ..scale.driver import settled
    from ..scale.manifest import MANIFEST, check_identity

    check_identity(out / MANIFEST, identity)
    known = settled(jobs, out, retry_errors=retry_errors)
    todo = [job for job in jobs if job.name not in known]
    console.print(f"{len(jobs)} files, {len(known)} of them settled and {len(todo)} to be done.")
    if failed := sum(row.state == "failed" for row in known.values()):
        console.print(f"Of those settled, {failed} have failed; --retry-errors does them again.")
    if pool.num_gpus and purifier.unet.device.type == "cpu":
        console.print("How long this takes is not known here: the workers have GPUs, and this machine has none.")
        return
    seconds, unreadable = [], 0
    for job in todo[:: max(1, len(todo) // _SAMPLE)][:_SAMPLE]:
        began = time.perf_counter()
        try:
            video = probe(job.source)
        except (OSError, ValueError):
            unreadable += 1
            continue
        shape = working_size(video.height, video.width, recipe.size)
        decoding = 2 * (time.perf_counter() - began)  # once to probe, once to read
        seconds.append((estimate_seconds(purifier, video.frames, *shape), decoding))
    computed = [work + decoding for work, decoding in seconds if work is not None]
    if unreadable:
        console.print(f"Of a sample of {unreadable + len(seconds)}, {unreadable} cannot be read.")
    if computed:
        workers = min(pool.workers, len(todo))
        seconds_of_all = len(todo) * sum(computed) / len(computed) / workers
        console.print(
            f"By the FLOPs of {len(computed)} of them on {purifier.unet.device}, and the time to decode them, "
            f"{workers} worker{'s' * (workers > 1)} may take about {format_seconds(seconds_of_all)}."
        )
    elif seconds:
        console.print("How long this takes is not known: this model's work cannot be counted.")
