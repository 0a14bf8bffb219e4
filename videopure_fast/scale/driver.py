"""A run over a data set: what is left to do, the rows as they come, the limits at which it stops, and its end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import make_folder
from .manifest import MANIFEST, Manifest, check_identity, locked, read_rows
from .rows import Job, Row
from .sources import STATE_FOLDER


class Rank(NamedTuple):
    """One of `world` processes that share the files of a data set and know nothing else of each other."""

    number: int
    world: int


class Counts(NamedTuple):
    """Files of a run: all of them; those settled before it; and since, those done, failed, and done with warnings.

    failed_before: of those settled before.
    """

    files: int
    before: int
    done: int = 0
    failed: int = 0
    warned: int = 0
    failed_before: int = 0

    def with_row(self, row: Row) -> Counts:
        """These counts, and one file more."""
        done = row.state == "done"
        warned = self.warned + bool(row.warnings)
        return self._replace(done=self.done + done, failed=self.failed + (not done), warned=warned)


def work_folder(out: Path, rank: Rank | None) -> Path:
    """Where the workers of a run write what is not complete; the run empties it."""
    return out / STATE_FOLDER / ("driver" if rank is None else f"rank-{rank.number}")


def purify_dataset(
    jobs: Sequence[Job],
    out: Path,
    identity: Mapping[str, Any],
    run: Callable[[Sequence[Job]], Generator[Row, None, None]],
    *,
    rank: Rank | None = None,
    retry_errors: bool = False,
    max_errors: int | None = None,
    report: Callable[[Counts], None] = lambda _: None,
    finish: Callable[[Sequence[Row]], None] = lambda _: None,
) -> Counts:
    """Run the jobs that are not settled, and keep their rows in the manifest of `out`.

    It may be ended at any moment and called again: what is in the manifest is not done again, and what is finished and
    not in it is adopted by the workers.

    Args:
        identity: what the outputs depend on; a folder has outputs of one identity.
        run: the rows of jobs, in any order.
        rank: does its share of the jobs, with a manifest of its own, which it merges into that of `out` at its end.
        retry_errors: also run the jobs that failed.
        max_errors: jobs that may fail; None: any number.
        report: is given the counts at the start and after each row.
        finish: is given all rows of `out` when the jobs are done.

    ValueError where others work in `out`, for another identity, and after too many errors; OSError for a full disk.
    """
    work = work_folder(out, rank)
    make_folder(work.parent)
    with locked(work.parent / "lock", shared=rank is not None), locked(work.with_suffix(".lock")):
        check_identity(out / MANIFEST, identity)
        shutil.rmtree(work, ignore_errors=True)
        make_folder(work)
        if rank is None:
            _merge(jobs, out, identity, _rank_manifests(out, None))
        share = jobs if rank is None else _share(jobs, rank)
        known = settled(share, out, retry_errors=retry_errors)
        todo = [job for job in share if job.name not in known]
        failed = sum(row.state == "failed" for row in known.values())
        counts = Counts(len(share), len(known), failed_before=failed)
        del known
        report(counts)
        path = out / MANIFEST if rank is None else out / f"manifest-{rank.number}.sqlite"
        with (
            contextlib.closing(Manifest(path, identity)) as manifest,
            contextlib.closing(run(todo)) as rows,
        ):
            for row in rows:
                if row.state == "full":
                    raise OSError(f"the disk of {out} is full: make room there, and the same command goes on")
                manifest.add([row])
                counts = counts.with_row(row)
                report(counts)
                if max_errors is not None and counts.failed > max_errors:
                    raise ValueError(
                        f"stopped, since {counts.failed} files failed, the last of them {row.name}: {row.error}"
                    )
        shutil.rmtree(work, ignore_errors=True)
        with locked(work.parent / "merge.lock", wait=True):  # the last rank's end sees the rows of all
            _merge(jobs, out, identity, [] if rank is None else _rank_manifests(out, rank))
            finish(read_rows(out / MANIFEST))
    return counts


def _share(jobs: Sequence[Job], rank: Rank) -> list[Job]:
    """The jobs of a rank. A name alone says whose it is, also where ranks do not see the same files."""
    return [job for job in jobs if int(job.key, 16) % rank.world == rank.number]


def settled(jobs: Sequence[Job], out: Path, *, retry_errors: bool) -> dict[str, Row]:
    """The rows of jobs, by name, that are in the manifests of `out` and hold.

    A row does not hold where the output is gone or has another size, or the source has; retry_errors: where it failed.
    """
    by_name = {job.name: job for job in jobs}
    # The manifest of all comes last: a rank that ends meanwhile puts its rows there before it deletes its own.
    manifests = [*_rank_manifests(out, None), out / MANIFEST]
    rows = (row for path in manifests for row in read_rows(path) if row.name in by_name)
    hold = [row for row in rows if _holds(row, by_name[row.name], out, retry_errors)]
    return {row.name: row for row in sorted(hold, key=lambda row: row.state == "done")}  # which a rank may have done


def _holds(row: Row, job: Job, out: Path, retry_errors: bool) -> bool:
    if row.output != job.output:
        return False
    if row.state == "failed":
        return not retry_errors
    with contextlib.suppress(OSError):  # a source that is gone was done before
        if os.stat(job.source).st_size != row.size:
            return False
    with contextlib.suppress(OSError):
        output = os.stat(out / row.output)
        return stat.S_ISREG(output.st_mode) and output.st_size == row.output_size
    return False


def _rank_manifests(out: Path, rank: Rank | None) -> list[Path]:
    """The manifests that ranks left in a folder; those for a rank to merge: its own, last, and those of former ranks
    beyond its world, of which each is merged by one."""
    names = os.listdir(out) if out.is_dir() else []
    found = {int(match[1]): match[0] for name in names if (match := re.fullmatch(_RANK_MANIFEST, name))}
    mine = (i for i in found if rank is None or i % rank.world == rank.number)
    return [out / found[i] for i in sorted(mine, reverse=True)]


_RANK_MANIFEST = r"manifest-(\d{1,9})\.sqlite"


def _merge(jobs: Sequence[Job], out: Path, identity: Mapping[str, Any], others: Iterable[Path]) -> None:
    """Put the rows of other manifests into that of `out`, later ones over earlier ones, and delete them.

    A row of an output that is there, and of its source as it is, gives way to such rows alone: what failed in a rank of
    a former run may have been done since.
    """
    by_name = {job.name: job for job in jobs}

    def done(row: Row) -> bool:
        job = by_name.get(row.name, Job(row.name, "", row.output))  # of another list: its source is not looked at
        return _holds(row, job, out, retry_errors=True)

    for path in others:
        check_identity(path, identity)
        known = {row.name: row for row in read_rows(out / MANIFEST)}
        rows = [row for row in read_rows(path) if row.name not in known or not done(known[row.name]) or done(row)]
        with contextlib.closing(Manifest(out / MANIFEST, identity)) as manifest:
            manifest.add(rows)
        path.unlink()
