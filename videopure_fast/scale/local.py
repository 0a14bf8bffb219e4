"""Jobs done one after another by a worker in a process of its own, which may die: as a rank of `torchrun` does them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing import connection
from typing import Any

from .rows import Job, Row

MakeWorker = Callable[[], Callable[[Job], Row]]
_PATIENCE = 5.0  # seconds for a worker to end when it is asked to


def run_in_child(jobs: Sequence[Job], make_worker: MakeWorker) -> Generator[Row, None, None]:
    """The rows of jobs, in order. A worker that dies is made anew, and goes on with the job at which it died.

    make_worker: can be pickled. What it raises is raised here; RuntimeError if it dies.
    """
    with contextlib.ExitStack() as child:
        pipe: connection.Connection | None = None
        for job in jobs:
            row: Row | None = None
            while row is None:
                if pipe is None:
                    pipe = _start(make_worker, child)
                try:
                    pipe.send(job)
                    row = pipe.recv()
                except (EOFError, OSError):
                    child.close()
                    pipe = None
            yield row


def _start(make_worker: MakeWorker, child: contextlib.ExitStack) -> connection.Connection:
    """The pipe to a new worker that is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_worker), daemon=True)
    process.start()
    theirs.close()
    child.callback(_end, process, ours)
    try:
        failure = ours.recv()
    except (EOFError, OSError):
        process.join()
        raise RuntimeError(f"a worker died as it began, with exit status {process.exitcode}") from None
    if failure is not None:
        raise failure
    return ours


def _end(process: Any, pipe: connection.Connection) -> None:
    pipe.close()
    process.terminate()
    process.join(_PATIENCE)
    process.kill()
    process.join()


def _serve(pipe: connection.Connection, make_worker: MakeWorker) -> None:
    """Answer jobs until the pipe, or the parent, is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = make_worker()
    except Exception as error:
        pipe.send(error)
        return
    pipe.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(worker(pipe.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
