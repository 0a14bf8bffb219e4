"""When the frames of a video are shown: time stamps put in order, the rate they mean, and the clock of a container."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Stamps: TypeAlias = NDArray[np.int64]
    Seconds: TypeAlias = NDArray[np.float64]

MAX_SECONDS = 10**10  # of a time stamp, some 300 years; ticks of any container then fit 64 bits
MISSING = -(2**63)  # stands for the time stamp of a frame that has none
_FINE = Fraction(1, 1000)  # seconds; repeated time stamps are told apart by a tick of this length at most
_AGREEMENT = Fraction(1, 50)  # a header's rate is believed if it is so near to the rate of the time stamps


def ordered(stamps: Stamps, time_base: Fraction, rate: Fraction) -> tuple[Stamps, Fraction]:
    """Strictly increasing time stamps, one for each of `stamps`, and their time base.

    Stamps are sorted: frames come out of a decoder in the order in which they are shown, but some containers store the
    order of decoding. A repeated stamp moves on by one tick; ticks longer than a millisecond are divided first. A
    MISSING one follows the frame before it by a frame's time at `rate`; if all are missing, so does every frame.
    """
    missing = stamps == MISSING
    if missing.all():
        return np.arange(len(stamps), dtype=np.int64), 1 / rate
    if missing.any():
        stamps = _filled(stamps, max(1, round(1 / (rate * time_base))))
    stamps = np.sort(stamps)
    if not np.diff(stamps).all() and time_base > _FINE:
        finer = math.ceil(time_base / _FINE)
        stamps, time_base = stamps * finer, time_base / finer
    return _spaced(stamps, 1), time_base


def median_rate(stamps: Stamps, time_base: Fraction, headers: Sequence[Fraction | None]) -> Fraction:
    """Frames per second by the median step between sorted time stamps, so that a few odd ones do not matter.

    headers: rates that the file states, which are exact; the one that is nearest to the time stamps is returned if it
    agrees with them. The first is returned if there are no two different time stamps.
    """
    stated = [Fraction(rate) for rate in headers if rate and rate > 0] or [Fraction(25)]
    known = np.unique(stamps[stamps != MISSING])
    steps = np.diff(known)
    if not len(steps):
        return stated[0]
    median = np.sort(steps)[(len(steps) - 1) // 2]
    # Steps of 33 and 34 ms are one rate, rounded to milliseconds; steps of 1 and 2 ticks are not.
    near = steps[abs(steps - median) <= (1 if median > 2 else 0)]
    step = Fraction(int(near.sum()), len(near)) * time_base

    def agrees(rate: Fraction) -> bool:
        if abs(1 / rate - step) <= max(step * _AGREEMENT, time_base / len(near)):
            return True
        # Steps that waver, but about this rate: most frames are shown within half a frame of its beat.
        frames = (known - known[0]) * float(time_base * rate)
        return bool(np.median(np.abs(frames - np.arange(len(known)))) <= 0.5)

    agreeing = [rate for rate in stated if agrees(rate)]
    if agreeing:
        return min(agreeing, key=lambda rate: abs(1 / rate - step))
    return (1 / step).limit_denominator(1001) or 1 / step


@dataclass(frozen=True)
class FrameClock:
    """Ticks at which a container shows frames.

    Attributes:
        tick_seconds: length of a tick.
        ticks: of the first frames, and where the last of these ends; the others follow at a constant rate. The first
            alone if the rate is constant from the start.
        rate: frames per second.
        least: ticks between two frames at least.
    """

    tick_seconds: Fraction
    ticks: Stamps
    rate: Fraction
    least: int

    @classmethod
    def constant(cls, start: Fraction, tick: Fraction, rate: Fraction, least: int = 1) -> FrameClock:
        """A clock of a constant rate that starts at a time in seconds."""
        return cls(tick, np.array([round(start / tick)], np.int64), rate, least)

    @classmethod
    def placed(cls, seconds: Seconds, tick: Fraction, rate: Fraction, least: int, most: float) -> FrameClock:
        """A clock that shows frames at the times given, and ends at the last of these, as nearly as it can.

        most: seconds between two frames at most.
        """
        ticks = _spaced(np.round(seconds / float(tick)).astype(np.int64), least)
        steps = np.minimum(np.diff(ticks), int(most / tick))
        return cls(tick, ticks[0] + np.concatenate([[0], np.cumsum(steps)]), rate, least)

    def __call__(self, frame: int) -> int:
        """The tick at which a frame is shown."""
        beyond = frame - (len(self.ticks) - 1)
        if beyond <= 0:
            return int(self.ticks[frame])
        return int(self.ticks[-1]) + max(self.least * beyond, round(beyond / (self.rate * self.tick_seconds)))

    def largest_shift(self, seconds: Seconds) -> float:
        """The largest difference, in seconds, to the times at which frames should be shown."""
        frames = np.arange(len(seconds))
        if len(self.ticks) > 1:
            shown = self.ticks[frames] * float(self.tick_seconds)
        else:
            shown = float(int(self.ticks[0]) * self.tick_seconds) + frames / float(self.rate)
        return float(np.abs(shown - seconds).max())


def _spaced(stamps: Stamps, least: int) -> Stamps:
    """Sorted stamps, each moved on to `least` after the one before it where it is nearer."""
    ramp: Stamps = least * np.arange(len(stamps), dtype=np.int64)
    return np.maximum.accumulate(stamps - ramp) + ramp


def _filled(stamps: Stamps, step: int) -> Stamps:
    """Time stamps with the missing ones counted on, or back, from the nearest known one before, or else behind."""
    filled = [None if stamp == MISSING else stamp for stamp in stamps.tolist()]
    for i, j in itertools.chain(itertools.pairwise(range(len(filled))), itertools.pairwise(range(len(filled))[::-1])):
        known = filled[i]
        if known is not None and filled[j] is None:
            filled[j] = known + step * (j - i)
    return np.array(filled, np.int64)
