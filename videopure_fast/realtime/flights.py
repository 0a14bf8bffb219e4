"""What is known of a clip that was submitted, and of one that is in flight."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from ..purifier import Purifier
from ..runtime import readback
from ..sampling import Chain, ClipStep
from .serving import Answer, Listener, Progress

Clock = Callable[[], float]
Stage = Literal["encode", "evaluate", "vote", "decode", "end"]


@dataclass(eq=False)
class Request:
    """A clip that was submitted.

    deadline: on the server's clock, or infinite. steps: its depth T. progress: who is told of each step.
    """

    clip: Tensor
    future: Future[Answer]
    submitted: float
    deadline: float
    steps: int
    progress: Listener | None = None

    @property
    def kind(self) -> tuple[tuple[int, ...], int]:
        """What the time of a clip depends on."""
        return tuple(self.clip.shape), self.steps


Ended: TypeAlias = tuple[Request, "Answer | BaseException"]


class Encoded(NamedTuple):
    """What the stages after the encoder need of a clip: latents (1, 4, F, h, w), and for voting its flow
    (1, F-1, 2, h, w)."""

    target: Tensor
    flow: Tensor | None
    chain: Chain


@dataclass(eq=False)
class Flight:
    """A clip on its way through the stages.

    purifier: with the clip's depth. alone: it shares no evaluation, since a group in which it was has failed.
    shared: clips in flight, summed over its iterations. steps: those of the loops that are still to come, and pending
    the votes to decode, the next one last. decoded, logits: of the votes that were decoded, (3, F, H, W) and (K,).
    news: what its caller will be told at the end of the iteration.
    """

    request: Request
    purifier: Purifier
    started: float
    alone: bool = False
    stage: Stage = "encode"
    flags: readback.Readback = field(default_factory=readback.Readback)
    times: dict[str, float] = field(default_factory=dict)
    iterations: int = 0
    shared: int = 0
    encoded: Encoded | None = None
    steps: list[ClipStep] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    noise_preds: list[Tensor] = field(default_factory=list)
    votes: Tensor | None = None
    pending: list[int] = field(default_factory=list)
    decoded: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    news: list[Progress] = field(default_factory=list)
    result: Answer | BaseException | None = None

    def spent(self, now: float) -> float:
        """Seconds that were its own, of those that it has shared with others in flight."""
        return (now - self.started) * self.iterations / self.shared if self.shared else 0.0
