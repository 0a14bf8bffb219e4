import contextlib
import os
import signal
from functools import partial

import pytest
from dying_worker import DyingWorker, refuse
from scale_files import IDENTITY, done_row, named_jobs

from videopure_fast.scale.driver import Counts, Rank, purify_dataset, settled
from videopure_fast.scale.local import run_in_child
from videopure_fast.scale.manifest import MANIFEST, Manifest, locked, read_rows
from videopure_fast.scale.rows import Job, Row


@pytest.fixture
def places(tmp_path):
    names = [f"{i}.mp4" for i in range(5)]
    return named_jobs(tmp_path / "in", *names), tmp_path / "out"


class Run:
    """Rows of jobs in the place of workers'; remembers the jobs. `rows` are those that are not simply done."""

    def __init__(self, out, rows=()):
        self.out, self.rows, self.asked = out, {row.name: row for row in rows}, []

    def __call__(self, jobs):
        for job in jobs:
            self.asked.append(job.name)
            row = self.rows.get(job.name, done_row(job))
            if isinstance(row, Row) and row.state == "done":
                (self.out / job.output).write_bytes(b"y")
            yield row


def failed(job):
    return Row(job.name, job.output, "failed", error="damaged")


def test_what_is_settled_is_not_done_again(places):
    jobs, out = places
    run, seen = Run(out, [failed(jobs[1])]), []
    counts = purify_dataset(jobs[:3], out, IDENTITY, run, report=seen.append)
    assert counts == Counts(3, 0, done=2, failed=1) == seen[-1] and seen[0] == Counts(3, 0)
    assert [row.state for row in read_rows(out / MANIFEST)] == ["done", "failed", "done"]
    again, ended = Run(out), []
    assert purify_dataset(jobs, out, IDENTITY, again, finish=ended.append) == Counts(5, 3, done=2, failed_before=1)
    assert again.asked == ["3.mp4", "4.mp4"] and len(ended[0]) == 5
    retried = Run(out)
    assert purify_dataset(jobs, out, IDENTITY, retried, retry_errors=True) == Counts(5, 4, done=1)
    assert retried.asked == ["1.mp4"] and {row.state for row in read_rows(out / MANIFEST)} == {"done"}


def test_rows_that_no_longer_hold_are_done_again(places):
    jobs, out = places
    purify_dataset(jobs, out, IDENTITY, Run(out))
    assert [*settled(jobs, out, retry_errors=False)] == [job.name for job in jobs]
    (out / jobs[0].output).unlink()
    (out / jobs[3].output).write_bytes(b"")
    with open(jobs[1].source, "a") as file:
        file.write("more")
    os.unlink(jobs[2].source)  # was done before
    assert [*settled(jobs, out, retry_errors=False)] == ["2.mp4", "4.mp4"]


def test_too_many_errors_end_the_run(places):
    jobs, out = places
    run = Run(out, map(failed, jobs))
    with pytest.raises(ValueError, match=r"stopped, since 2 files failed, the last of them 1.mp4: damaged"):
        purify_dataset(jobs, out, IDENTITY, run, max_errors=1)
    assert [row.name for row in read_rows(out / MANIFEST)] == ["0.mp4", "1.mp4"]
    assert purify_dataset(jobs, out, IDENTITY, run, max_errors=3).failed == 3


def test_a_full_disk_ends_the_run_and_fails_no_file(places):
    jobs, out = places
    with pytest.raises(OSError, match="is full: make room there"):
        purify_dataset(jobs, out, IDENTITY, Run(out, [failed(jobs[2])._replace(state="full")]))
    assert [row.name for row in read_rows(out / MANIFEST)] == ["0.mp4", "1.mp4"]
    assert purify_dataset(jobs, out, IDENTITY, Run(out)) == Counts(5, 2, done=3)


def test_an_interruption_leaves_a_sound_manifest(places):
    jobs, out = places
    closed = []

    def interrupted(todo):
        try:
            yield from Run(out)(todo[:2])
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        purify_dataset(jobs, out, IDENTITY, interrupted)
    assert closed and len(read_rows(out / MANIFEST)) == 2
    assert purify_dataset(jobs, out, IDENTITY, Run(out)) == Counts(5, 2, done=3)


def test_one_driver_at_a_time(places):
    jobs, out = places

    def while_another_runs(todo):
        with pytest.raises(ValueError, match="another process works in"):
            purify_dataset(jobs, out, IDENTITY, Run(out))
        with pytest.raises(ValueError, match="another process works in"):
            purify_dataset(jobs, out, IDENTITY, Run(out), rank=Rank(0, 2))
        yield from Run(out)(todo)

    assert purify_dataset(jobs, out, IDENTITY, while_another_runs).done == 5


def test_a_driver_that_was_killed_holds_no_lock(places):
    jobs, out = places
    reads, writes = os.pipe()
    if (process := os.fork()) == 0:

        def waiting(_jobs):
            os.write(writes, b"!")
            signal.pause()
            yield

        purify_dataset(jobs, out, IDENTITY, waiting)
    os.read(reads, 1)
    with pytest.raises(ValueError, match="another process"), locked(out / ".videopure-fast" / "lock"):
        pass
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert purify_dataset(jobs, out, IDENTITY, Run(out)).done == 5


def test_other_settings_are_refused_before_any_work(places):
    jobs, out = places
    purify_dataset(jobs[:1], out, IDENTITY, Run(out))
    for rank in (None, Rank(0, 2)):
        run = Run(out)
        with pytest.raises(ValueError, match="made with size 16, and not with size 8"):
            purify_dataset(jobs, out, IDENTITY | {"size": 8}, run, rank=rank)
        assert not run.asked


def test_ranks_share_the_files_and_merge_their_manifests(places):
    jobs, out = places
    ranks, ended = [Run(out), Run(out)], []

    def second_within_first(todo):
        yield from ranks[0](todo)
        assert purify_dataset(jobs, out, IDENTITY, ranks[1], rank=Rank(1, 2)).done == len(ranks[1].asked)

    counts = purify_dataset(jobs, out, IDENTITY, second_within_first, rank=Rank(0, 2), finish=ended.append)
    assert counts.done == len(ranks[0].asked) and len(ended[0]) == 5
    shares = [[job.name for job in jobs if int(job.key, 16) % 2 == number] for number in range(2)]
    assert [rank.asked for rank in ranks] == shares and all(shares)
    assert [path.name for path in out.glob("*.sqlite")] == [MANIFEST]
    assert purify_dataset(jobs, out, IDENTITY, Run(out)) == Counts(5, 5)


def test_ranks_that_see_other_files_do_not_exchange_those_that_they_share(places):
    jobs, out = places
    runs = Run(out), Run(out)
    for run, seen, place in zip(runs, (jobs, jobs[1:]), (out / "all", out / "later"), strict=True):
        (place).mkdir(parents=True)
        run.out = place
        purify_dataset(seen, place, IDENTITY, run, rank=Rank(0, 2))
    assert [name for name in runs[0].asked if name != jobs[0].name] == runs[1].asked


def test_what_failed_in_a_former_rank_does_not_replace_what_is_done_since(places):
    jobs, out = places
    retried = next(job for job in jobs if int(job.key, 16) % 2)

    def killed(_todo):
        yield failed(retried)
        raise SystemExit

    with pytest.raises(SystemExit):
        purify_dataset(jobs, out, IDENTITY, killed, rank=Rank(2, 3))
    purify_dataset(jobs, out, IDENTITY, Run(out), rank=Rank(1, 2), retry_errors=True)
    assert retried not in settled(jobs, out, retry_errors=True)
    purify_dataset(jobs, out, IDENTITY, Run(out), rank=Rank(0, 2))  # merges the manifest of the third rank
    assert [row.state for row in read_rows(out / MANIFEST)] == ["done"] * 5
    assert [path.name for path in out.glob("*.sqlite")] == [MANIFEST]


def test_what_fails_where_the_output_is_gone_is_merged(places):
    jobs, out = places
    purify_dataset(jobs, out, IDENTITY, Run(out))
    (out / jobs[0].output).unlink()
    purify_dataset(jobs, out, IDENTITY, Run(out, [failed(jobs[0])]), rank=Rank(0, 1))
    assert [row.state for row in read_rows(out / MANIFEST)] == ["failed"] + ["done"] * 4


def test_what_a_killed_rank_has_done_has_not_failed(places):
    jobs, out = places
    purify_dataset(jobs, out, IDENTITY, Run(out, [failed(jobs[0])]))
    (out / jobs[0].output).write_bytes(b"y")
    with contextlib.closing(Manifest(out / "manifest-0.sqlite", IDENTITY)) as manifest:
        manifest.add([done_row(jobs[0])])
    assert {row.state for row in settled(jobs, out, retry_errors=False).values()} == {"done"}


def test_what_a_killed_rank_had_done_is_not_done_again(places):
    jobs, out = places

    def killed(todo):
        yield from Run(out)(todo[:1])
        raise SystemExit

    for rank in (Rank(0, 3), Rank(2, 3)):
        with pytest.raises(SystemExit):
            purify_dataset(jobs, out, IDENTITY, killed, rank=rank)
    assert {path.name for path in out.glob("*.sqlite")} == {"manifest-0.sqlite", "manifest-2.sqlite"}
    alone = Run(out)
    assert purify_dataset(jobs, out, IDENTITY, alone, rank=Rank(0, 1)) == Counts(5, 2, done=3)
    assert alone.asked == ["1.mp4", "3.mp4", "4.mp4"]
    assert len(read_rows(out / MANIFEST)) == 5 and [path.name for path in out.glob("*.sqlite")] == [MANIFEST]


def test_a_worker_that_dies_is_made_anew(tmp_path):
    jobs = [Job("a", "", "lives"), Job("b", "", "dies"), Job("c", "", "lives"), Job("d", "", "lives")]
    rows = [*run_in_child(jobs, partial(DyingWorker, tmp_path))]
    assert [row.name for row in rows] == ["a", "b", "c", "d"]
    processes = [row.frames for row in rows]
    assert processes[0] != processes[1] == processes[2] == processes[3] and os.getpid() not in processes
    with pytest.raises(ProcessLookupError):
        os.kill(processes[-1], 0)


def test_workers_that_cannot_begin(tmp_path):
    job = Job("a", "", "lives")
    with pytest.raises(ValueError, match="no such model"):
        next(run_in_child([job], refuse))
    with pytest.raises(RuntimeError, match="a worker died as it began, with exit status 3"):
        next(run_in_child([job], partial(DyingWorker, tmp_path, at_start=True)))
