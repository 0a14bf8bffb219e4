"""What is to be done with a file, and what became of it."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

# "full" is of a disk, and ends a run: it is in no manifest.
State = Literal["done", "failed", "full"]


class Job(NamedTuple):
    """A video file that is to be purified.

    name: its path below the source folder, with "/"; the key of its row. Bytes that are not UTF-8 stand as "\\udcff".
    source: where it is.
    output: path of its purified file below the folder of outputs, with "/".
    """

    name: str
    source: str
    output: str

    @property
    def key(self) -> str:
        """A digest of the name, 32 hex digits."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:32]


def printable(text: str) -> str:
    """A text in UTF-8; what is not stands as in a job's name."""
    return text.encode("utf-8", "backslashreplace").decode()


class Row(NamedTuple):
    """What became of a job; what it does not have is None. Nothing here depends on when or where the work was done.

    name, output: the job's.
    size, input_digest: bytes of the source, and its SHA-256.
    output_size, output_digest: those of the output.
    settings, weights: digests of the settings and of the models' weights.
    frames: of the video.
    warnings: what the output could not hold, a line each.
    error: why there is no output.
    """

    name: str
    output: str
    state: State
    size: int | None = None
    input_digest: str | None = None
    output_size: int | None = None
    output_digest: str | None = None
    settings: str | None = None
    weights: str | None = None
    frames: int | None = None
    warnings: str | None = None
    error: str | None = None
