"""What every server of clips takes and answers: `StreamPurifier`, and the stubs of studies and tests in its place.

A server's times are seconds of one clock, by default time.monotonic.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, NamedTuple, Protocol

from torch import Tensor


class Refused(RuntimeError):
    """A clip that was not computed. Its subclasses say why."""


class QueueFull(Refused):
    """As many clips wait as the queue holds, and its policy is to reject new ones."""


class Dropped(Refused):
    """A newer clip took its place in a full queue."""


class DeadlineMissed(Refused):
    """Its answer could not have been there in time any more."""


class Closed(Refused):
    """The server was closed before its turn."""


class Times(NamedTuple):
    """When a clip passed each point, in seconds of the server's clock.

    submitted: it was given to the server. started: it left the queue. encoded, sampled, decoded: the stage had ended.
    done: its answer was there.
    """

    submitted: float
    started: float
    encoded: float
    sampled: float
    decoded: float
    done: float


class Progress(NamedTuple):
    """A step that a clip has taken: `done` of `total` of its stage.

    encode is one step, evaluate one for each evaluation of the UNet, and decode one for each vote that may be needed;
    fewer are where a label settles early. label: of the vote just decoded, where there is a classifier.
    """

    stage: Literal["encode", "evaluate", "decode"]
    done: int
    total: int
    label: int | None


Listener = Callable[[Progress], object]


class Answer(NamedTuple):
    """What a server makes of a clip.

    clip: purified, in the shape and dtype of the one submitted. votes: (V, 3, F, H, W), where they were asked for.
    logits: (V, K), of each vote, and label: the majority's; where there is a classifier.
    """

    clip: Tensor
    votes: Tensor | None
    logits: Tensor | None
    label: int | None
    times: Times


class ClipServer(Protocol):
    """Takes clips from any thread and answers each by a future of its own."""

    def submit(self, clip: Tensor, *, deadline: float | None = None) -> Future[Answer]:
        """A clip (3, F, H, W), floats in [0, 1] or uint8, to be answered within `deadline` seconds from now.

        QueueFull and Closed, TypeError and ValueError for bad arguments, are raised here; the future ends in an Answer,
        in Dropped, DeadlineMissed or Closed, or in what went wrong with this clip.
        """
        ...
