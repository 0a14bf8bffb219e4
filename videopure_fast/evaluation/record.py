"""Records of evaluations, which survive an interruption: the outcome of each batch of a plan against each defense."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import atomic_write
from ..inputs import check_count, check_number
from .plan import EvalBatch, Plan

_MAX_RECORD = 2**28  # bytes


class Record:
    """The finished entries of a plan, in a JSON file that is replaced as a whole at each addition.

    Attributes:
        entries: by `EvalBatch.name(defense)`; each is what `runner.evaluate` adds.
        skipped: path -> reason, for the clips that could not be read.
        machines: descriptions of the machines, with versions, on which entries were made.

    ValueError for a file that is no record, or the record of another plan.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        self._path, self.plan = Path(path), plan
        self.entries: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.machines: list[dict[str, Any]] = []
        if not self._path.exists():
            return
        if self._path.stat().st_size > _MAX_RECORD:
            raise ValueError(f"{self._path} is larger than a record can be, {_MAX_RECORD >> 20} MiB")
        try:
            saved = json.loads(self._path.read_text())
            self.entries, self.skipped = dict(saved["entries"]), dict(saved.get("skipped", {}))
            self.machines = [dict(machine) for machine in saved.get("machines", [])]
            if (known := saved["hash"]) == plan.hash:
                sizes = {batch.name(name): batch.clips for batch in plan.batches() for name in plan.defenses}
                if unknown := sorted(self.entries.keys() - sizes.keys()):
                    raise ValueError(f"the plan has no batch {unknown[0]!r}: are settings in another order?")
                for name, entry in self.entries.items():
                    _check_entry(sizes[name], **entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"{self._path} is no record of an evaluation ({type(error).__name__}: {error})") from error
        if known != plan.hash:
            raise ValueError(
                f"{self._path} is the record of another plan, which differs in {_difference(saved, plan)}: "
                "name another file or folder"
            )

    def add(self, name: str, entry: dict[str, Any], machine: dict[str, Any] | None = None) -> None:
        """Add an entry under its name and save the record."""
        self.entries[name] = entry
        self.machines += [] if machine is None or machine in self.machines else [machine]
        content = {
            "hash": self.plan.hash,
            "plan": asdict(self.plan),
            "machines": self.machines,
            "skipped": self.skipped,
            "entries": self.entries,
        }
        with atomic_write(self._path) as file:
            file.write_text(json.dumps(content))

    def clips(self, batch: EvalBatch) -> int | None:
        """How many of a batch's clips could be read; None where no entry of the batch is done."""
        entries = (self.entries.get(batch.name(name)) for name in self.plan.defenses)
        return next((len(entry["right"]) for entry in entries if entry and entry["right"] is not None), None)


@contextmanager
def exclusive_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a lock on the path against other processes of this machine; ValueError if another one holds it.

    The lock ends with its process, also when that is killed. Systems without `fcntl` have no lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"videopure-fast-{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process works on {path}") from error
        yield


def _difference(saved: dict[str, Any], plan: Plan) -> str:
    """The names of a plan's fields that differ from those of a saved record."""
    theirs, mine = saved.get("plan"), json.loads(json.dumps(asdict(plan)))
    if not isinstance(theirs, dict):
        return "its hash"
    return ", ".join(name for name in mine if theirs.get(name) != mine[name]) or "its hash"


def _check_entry(clips: int, *, right: list[int] | None, **cost: Any) -> None:
    """ValueError or TypeError unless the entry is one that `runner.evaluate` adds for a batch of `clips` clips.

    right: for each clip that could be read, the number of right predictions; None where the attack has no access.
    """
    if right is not None:
        _check_counts(clips, right, **cost)
    elif cost:
        raise ValueError(f"the entry of an unavailable attack must have no cost, got {cost}")


def _check_counts(clips: int, right: list[int], *, repeats: int, seconds: float, peak_bytes: int | None) -> None:
    counts = [repeats, *right] if isinstance(right, list) else [None]
    if not all(type(n) is int and 0 <= n <= repeats for n in counts) or repeats < 1 or len(right) > clips:
        raise ValueError(f"the entry of a batch of {clips} clips has {right!r} right predictions of {repeats!r}")
    check_number("seconds", seconds)
    check_count("peak_bytes", 0 if peak_bytes is None else peak_bytes, least=0)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of the module's state dict, 16 hex digits; ties a record to these weights."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + _bytes(value))
    return found.hexdigest()[:16]


def clips_digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' shapes and values, 16 hex digits; ties a record to these clips and labels."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return found.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
