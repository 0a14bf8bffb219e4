"""What a command sets in its process and asks of its environment. Nothing here imports torch."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# OpenMP's threads spin while they wait for each other, in GNU's runtime for 300,000 rounds. Beside another busy process
# they spin in vain for whole time slices. Fewer rounds cost a little alone, and much less beside a neighbor; so many
# hold a clip within four times its time alone. The extension's loops run in the runtime that torch has loaded, so this
# holds for them too. Intel's and LLVM's runtimes, such as macOS has, ignore the variable: their threads yield while
# they spin, and KMP_BLOCKTIME, which bounds that, is left to the user.
_BOUNDED_SPIN = {"GOMP_SPINCOUNT": "5000"}

_NUMBERS = (r"[1-9]\d{0,3}(\s*,\s*[1-9]\d{0,3})*", "a whole number from 1 to 9999")
_WAITING = {
    "GOMP_SPINCOUNT": (r"\d+\s*[kmgt]?|infinit[ey]", "a whole number, or infinity"),
    "KMP_BLOCKTIME": (r"\d+\s*([mu]?s)?|infinite", "a whole number of milliseconds, or infinite"),
    "OMP_WAIT_POLICY": (r"active|passive", "active or passive"),
}
# Variable -> the values that it may have, in any case, and these in words.
_ACCEPTED = {
    "OMP_NUM_THREADS": _NUMBERS,
    "MKL_NUM_THREADS": _NUMBERS,
    **_WAITING,
    "TRITON_INTERPRET": (r"[01]", "0 or 1"),
}


def check_environment() -> None:
    """ValueError for a variable of the environment that the package, or torch's threads, cannot understand."""
    for name, (accepted, words) in _ACCEPTED.items():
        value = os.environ.get(name, "").strip()
        if value and not re.fullmatch(accepted, value, re.IGNORECASE):
            raise ValueError(f"the environment variable {name} is {value!r}; accepted: {words}")
    from ..ops import backend  # which loads torch

    backend.in_use()


def wait_policy() -> str:
    """How OpenMP's threads wait for each other, as the environment has it."""
    chosen = [f"{name}={os.environ[name]}" for name in _WAITING if os.environ.get(name)]
    return ", ".join(chosen) or "as the OpenMP runtime's default says; GOMP_SPINCOUNT=5000 suits a shared machine"


@contextmanager
def as_program() -> Iterator[None]:
    """Within this block, what belongs to a process is as a command needs it; then it is as it was.

    OpenMP's threads spin for a bounded time, unless the user has chosen: its runtime reads that once, when torch loads
    it. Warnings are one line. SIGTERM, by which batch systems end jobs, cleans up as Ctrl-C does.
    """
    bounded = {} if "torch" in sys.modules or any(map(os.environ.get, _WAITING)) else _BOUNDED_SPIN
    path, excepthook, formatwarning = [*sys.path], sys.excepthook, warnings.formatwarning
    # Only the main thread may set a handler, and a handler of the caller's goes first.
    takes_signal = threading.current_thread() is threading.main_thread()
    takes_signal = takes_signal and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with warnings.catch_warnings():
        try:
            os.environ.update(bounded)
            warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
            if takes_signal:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            yield
        finally:
            if takes_signal:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            warnings.formatwarning, sys.excepthook, sys.path[:] = formatwarning, excepthook, path
            for name in bounded:
                os.environ.pop(name, None)
