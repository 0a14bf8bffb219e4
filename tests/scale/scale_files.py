"""Small videos, jobs and workers for tests of data sets."""

import time
from pathlib import Path

import torch

from videopure_fast.data.video_writer import VideoWriter
from videopure_fast.scale.rows import Job, Row
from videopure_fast.scale.sources import output_name
from videopure_fast.scale.worker import FileWorker, Recipe

IDENTITY = {"size": 16, "weights": "ab"}
SECONDS_A_FILE = 0.2  # so that runs can be killed on the way


def write_video(path, frames=3, seed=0, side=16):
    """Noise of few levels, which every seed draws anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with VideoWriter(path, height=side, width=side, rate=10) as writer:
        for _ in range(frames):
            writer.write(torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8))
    return path


def make_job(source, root, suffix=".mp4"):
    name = Path(source).relative_to(root).as_posix()
    printable = name.encode("utf-8", "backslashreplace").decode()
    return Job(printable, str(source), output_name(printable, suffix))


def named_jobs(root, *names):
    """Jobs of files that have a byte each."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return [make_job(root / name, root) for name in names]


def small_recipe(out, **options):
    """A recipe that takes a fraction of a second a file."""
    options = {"device": "cpu", "size": 16, "overrides": {"inversion_steps": 0}} | options
    return Recipe(out=out, work=out / ".videopure-fast" / "driver", **options)


def contents(folder):
    """The bytes of all outputs and their digests by name, without the manifest and what runs write beside it."""
    inside = (path for path in folder.rglob("*") if path.is_file())
    own = ("manifest.sqlite", ".videopure-fast")
    return {
        str(name): (folder / name).read_bytes()
        for path in inside
        if (name := path.relative_to(folder)).parts[0] not in own
    }


class CopyingWorker(FileWorker):
    """A worker without models, whose outputs are copies; a file named "stuck" takes a minute."""

    def __init__(self, recipe):
        recipe.work.mkdir(parents=True, exist_ok=True)
        self._recipe, self._own, self._settings, self._weights = recipe, "own", "cd", "ab"

    def purify(self, source, target):
        if "stuck" in source.name:
            time.sleep(60)
        target.write_bytes(source.read_bytes())
        return 2


class CountingWorker(FileWorker):
    """A worker that notes in a file which videos it purifies, when it begins to, and takes its time for each."""

    def __init__(self, recipe, log):
        super().__init__(recipe)
        self._log = log

    def purify(self, source, target):
        with open(self._log, "a") as file:
            print(source.name, file=file, flush=True)
        time.sleep(SECONDS_A_FILE)
        return super().purify(source, target)


def done_row(job):
    return Row(job.name, job.output, "done", size=1, output_size=1)
