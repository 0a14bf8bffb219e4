"""A Ray cluster that is joined, or a Ray of this machine alone, for as long as a block lasts."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_FOLDER = "videopure-fast-ray-"
# Nothing is sent to Ray's makers, and its C++ says on stderr only what ends it.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


@contextlib.contextmanager
def connected(
    address: str | None,
    *,
    store: int,
    cpus: float | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[list[dict[str, float]]]:
    """Join the Ray cluster at an address, or start one of this machine, and leave or end it.

    Yields the resources of each of its machines. For this machine's own cluster, store: bytes of memory for what goes
    from process to process; cpus: cores that it is to have at least, as Ray counts them. environment: variables for
    Ray's processes, where they are not set. RuntimeError where there is no such cluster.
    """
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    variables = {**_QUIET, **environment}
    with contextlib.ExitStack() as ended:
        for name in variables.keys() - os.environ.keys():
            os.environ[name] = variables[name]
            ended.callback(os.environ.pop, name, None)
        if address is None:
            options |= {"include_dashboard": False, "object_store_memory": store, "_temp_dir": _new_folder(ended)}
            options |= {} if cpus is None else {"num_cpus": max(math.ceil(cpus), os.cpu_count() or 1)}
        handler = signal.getsignal(signal.SIGTERM)
        ended.callback(ray.shutdown)
        try:
            with _hushed():
                ray.init(address=address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"at {address}" if address else "on this machine"
            raise RuntimeError(f"there is no Ray cluster {where}: {' '.join(str(error).split())}") from error
        finally:
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)  # Ray has set one of its own
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Within the block nothing is written to stderr: Ray's C++ says there that it has read its level of logging."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _new_folder(ended: contextlib.ExitStack) -> str:
    """A folder for what Ray writes; it is deleted at the end. Those of killed processes are deleted at once.

    It is not in TMPDIR, which may be too long a path for the sockets in it.
    """
    root = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    for folder in root.glob(f"{_FOLDER}*"):
        match = re.fullmatch(rf"{_FOLDER}(\d+)-\w+", folder.name)
        if match and not _lives(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)
    made = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-", dir=root)
    ended.callback(shutil.rmtree, made, ignore_errors=True)
    return made


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
