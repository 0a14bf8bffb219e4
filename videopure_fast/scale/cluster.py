"""Jobs done by workers on many machines, or on the cores and GPUs of this one, as a data set of Ray Data."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ray_cluster
from .local import MakeWorker
from .rows import Job, Row

_MISSING = (
    "purify-dataset needs Ray: pip install 'videopure-fast[scale]'; without it, "
    "`torchrun --nproc-per-node 1 -m videopure_fast purify-dataset ...` does the same, one process a GPU"
)
_STORE = 2**27  # bytes of Ray's store of objects: rows alone go through it
_TASKS = 64  # for each worker at least, so that the last ones end together
_MOST_ROWS = 8  # of a task, which come together: Ray's own work for a task takes 10 ms of a core
_QUEUED = 2  # tasks a worker: one that it does, and one that waits, so that it never does
_DEATHS = 3  # of workers in a row before they are ready


@dataclass(frozen=True)
class Pool:
    """How many workers there are, and the cores and GPUs of each, as Ray counts them."""

    workers: int
    num_cpus: float
    num_gpus: float


def choose_pool(
    nodes: Sequence[Mapping[str, float]],
    *,
    small: bool,
    workers: int | None,
    num_cpus: float | None,
    num_gpus: float | None,
) -> Pool:
    """The pool that is asked for; where nothing is, a worker a GPU with its share of the cores, or else one a core for
    a small model, and one a machine for others. These shares shrink, to a core at least, until `workers` have room.

    nodes: "CPU" and "GPU" of each machine. ValueError for more workers than have room: Ray would wait without end.
    """
    machines = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    if num_gpus is None:
        num_gpus = 1.0 if any(gpus for _, gpus in machines) else 0.0
    least = workers or 1
    if num_cpus is None:
        num_cpus = _share(machines, num_gpus, small)
        while num_cpus > 1 and _room(machines, num_cpus, num_gpus) < least:
            num_cpus = max(1.0, num_cpus - 1)
    room = _room(machines, num_cpus, num_gpus)
    if room < least:
        seen = ", ".join(f"{cpus:g} cores and {gpus:g} GPUs" for cpus, gpus in machines)
        raise ValueError(
            f"there is room for {room} workers of {num_cpus:g} cores and {num_gpus:g} GPUs, and not for {least}: ask "
            f"for fewer or smaller ones, or start more machines first; seen: {seen}"
        )
    return Pool(workers or room, num_cpus, num_gpus)


def _share(machines: Sequence[tuple[float, float]], num_gpus: float, small: bool) -> float:
    """The cores of a worker where no number is asked for: as many as it may have on each machine that has any.

    machines: cores and GPUs of each.
    """
    if num_gpus:
        shares = [cpus // (gpus // num_gpus) for cpus, gpus in machines if cpus and gpus >= num_gpus]
    else:
        shares = [1.0] if small else [cpus for cpus, _ in machines if cpus]
    return max(1.0, min(shares, default=1.0))


def _room(machines: Sequence[tuple[float, float]], num_cpus: float, num_gpus: float) -> int:
    """How many workers fit."""
    return sum(int(min(cpus / num_cpus, gpus / num_gpus if num_gpus else math.inf)) for cpus, gpus in machines)


@contextlib.contextmanager
def connected(address: str | None, *, cpus: float | None = None) -> Iterator[list[dict[str, float]]]:
    """A Ray cluster with Ray Data, as `ray_cluster.connected` has it."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error
    with ray_cluster.connected(address, cpus=cpus, store=_STORE) as nodes:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield nodes


def run_on_ray(jobs: Sequence[Job], make_worker: MakeWorker, pool: Pool) -> Generator[Row, None, None]:
    """The rows of jobs, as they are done. A worker that dies is made anew, and its jobs are done by it.

    make_worker: makes what does a job, in a process of Ray's. Rows and jobs go through Ray as JSON, which has any name.
    RuntimeError if Ray gives up.
    """
    import ray
    import ray.data

    if not jobs:
        return
    rows_of_task = min(_MOST_ROWS, max(1, len(jobs) // (pool.workers * _TASKS)))
    tasks = math.ceil(len(jobs) / rows_of_task)
    _set_up(ray.data.DataContext.get_current())
    items = [{"row": json.dumps(job)} for job in jobs]
    compute = ray.data.ActorPoolStrategy(size=min(pool.workers, tasks), max_tasks_in_flight_per_actor=_QUEUED)
    rows = ray.data.from_items(items, override_num_blocks=tasks).map(
        _Actor, fn_constructor_args=(make_worker,), compute=compute, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus
    )
    del items
    try:
        for batch in rows.iter_batches(batch_size=None, prefetch_batches=0):
            yield from (Row(*json.loads(text)) for text in batch["row"])
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray ended the work: {_last_line(error)}") from error


class _Actor:
    """A worker as Ray Data calls it: once a row."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._worker = make_worker()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"row": json.dumps(self._worker(Job(*json.loads(row["row"]))))}


def _set_up(context: Any) -> None:
    """Settings of Ray Data; of those that its versions do not all have, the ones that are there."""
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": -1,  # a long video takes hours
        "max_consecutive_actor_init_deaths": _DEATHS,
    }
    for name, value in wanted.items():
        if hasattr(context, name):
            setattr(context, name, value)


def _last_line(error: BaseException) -> str:
    """The last line of an error of Ray's, which begins with the text of the worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
