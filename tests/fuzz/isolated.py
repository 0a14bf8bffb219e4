"""A function called in a worker process, so that a crash, a hang or a huge allocation is an outcome, not the end."""

import contextlib
import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

_START_SECONDS = 120  # for a worker to import what the function needs


class Outcome(NamedTuple):
    """How a call ended.

    Attributes:
        kind: "result", the name of the class of the exception that was raised, or "killed".
        value: the result, the exception's message, or what ended the worker, such as "signal 11".
    """

    kind: str
    value: Any


def run_isolated(
    function: Callable[[Any], Any], arguments: Iterable[Any], *, seconds: float, memory: int
) -> Iterator[Outcome]:
    """Call a function with each argument in turn, in a worker that lives until a call ends it, and yield the outcomes.

    The worker is forked from a server that has imported torch and av. The function is one of a module, its results can
    be pickled. A call that takes more than `seconds` is ended; `memory` is the number of bytes of address space that
    calls may take beyond what the worker has when it starts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "av", function.__module__])
    with contextlib.ExitStack() as worker:
        connection: Connection | None = None
        for argument in arguments:
            if connection is None:
                connection, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs, memory), daemon=True)
                process.start()
                theirs.close()
                worker.callback(_end, process, connection)
                assert connection.poll(_START_SECONDS) and connection.recv() == "ready"
            connection.send(argument)
            outcome = _await(connection, process, seconds)
            if outcome.kind == "killed":
                worker.close()
                connection = None
            yield outcome


def _await(connection: Connection, process: Any, seconds: float) -> Outcome:
    if not connection.poll(seconds):
        return Outcome("killed", f"no answer within {seconds} s")
    try:
        return connection.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        return Outcome("killed", f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit {code}")


def _end(process: Any, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection, memory: int) -> None:
    """Answer each argument with an outcome."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    connection.send("ready")
    with contextlib.suppress(EOFError):  # the parent has ended
        while True:
            argument = connection.recv()
            try:
                outcome = Outcome("result", function(argument))
            except BaseException as error:  # also SystemExit and KeyboardInterrupt: the parent judges
                outcome = Outcome(type(error).__name__, str(error))
            connection.send(outcome)
