"""StreamPurifier with the packaged prior over minutes of wall time: what it costs, whom it helps, and that it lasts."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest
from conftest import clips

from videopure_fast import Purifier
from videopure_fast.realtime import stream as stream_module
from videopure_fast.realtime.arrivals import bursts, poisson
from videopure_fast.realtime.batching import Batch
from videopure_fast.realtime.load import offer
from videopure_fast.realtime.serving import Answer, Times
from videopure_fast.realtime.stream import StreamPurifier
from videopure_fast.realtime.study import summarize

pytestmark = pytest.mark.realtime

SHAPE = (3, 16, 32, 32)
SHALLOW, DEEP = 1, 5


@pytest.fixture(scope="module")
def purifier():
    return Purifier.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def sent():
    return [clips(*SHAPE, seed=seed) for seed in range(4)]


@pytest.fixture
def service(purifier, sent):
    """Seconds of one clip on this machine, as it is now."""
    with StreamPurifier(purifier) as stream:
        stream.warmup(SHAPE)
        return seconds_of(stream, sent * 3) / 12


def seconds_of(stream, videos):
    began = time.perf_counter()
    for future in [stream.submit(video) for video in videos]:
        future.result()
    return time.perf_counter() - began


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_continuous_batching_costs_no_throughput(purifier, sent):
    """At most 5 % of it, clips in flight by turns against one after another, in alternating runs."""
    streams = [StreamPurifier(purifier, max_batch=most, queue_size=64) for most in (1, 4)]
    taken = {stream: [] for stream in streams}
    for stream in streams:
        stream.warmup(SHAPE)
    for _ in range(5):
        for stream in streams:
            taken[stream].append(seconds_of(stream, sent * 3))
    for stream in streams:
        stream.close()
    alone, shared = (statistics.median(taken[stream]) for stream in streams)
    print(f"one by one {alone / 12:.3f} s a clip, four in flight {shared / 12:.3f} s")
    assert shared <= alone / 0.95


def test_shallow_clips_are_answered_sooner(purifier, sent, service):
    """Bursts of shallow and deep clips: p50 of the shallow ones against first come, one by one."""
    depths = [DEEP, SHALLOW, DEEP, SHALLOW]
    share = statistics.mean((steps + 1) / (purifier.config.inversion_steps + 1) for steps in depths)
    arrivals = bursts(4, every=4 * share * service / 0.6, seconds=90, steps=depths, seed=1)
    found = {}
    for most in (1, 4):
        with StreamPurifier(purifier, max_batch=most, queue_size=64) as stream:
            stream.warmup(SHAPE)
            found[most] = offer(stream, sent, arrivals)
    shallow = [arrival.steps == SHALLOW for arrival in arrivals]
    medians = {
        most: statistics.median(one.latency for one, is_shallow in zip(records, shallow, strict=True) if is_shallow)
        for most, records in found.items()
    }
    for most, records in found.items():
        every = summarize(records)["latency"]
        print(f"{most} in flight: p50 of shallow clips {medians[most]:.3f} s; p95 of all {every['p95']:.3f} s")
    assert medians[4] <= 0.75 * medians[1]


def test_ten_minutes_at_ninety_percent(purifier, sent, service):
    """Nothing is lost, and memory is as after the first two minutes."""
    with StreamPurifier(purifier, queue_size=256) as stream:
        stream.warmup(SHAPE)
        held, answered = [], 0
        for minute in range(10):
            arrivals = poisson(0.9 / service, seconds=60, seed=minute)
            records = offer(stream, sent, arrivals)
            assert [record.outcome for record in records] == ["answered"] * len(arrivals)
            answered += len(arrivals)
            held.append(resident_bytes())
            p95 = summarize(records)["latency"]["p95"]
            print(f"minute {minute + 1}: {len(arrivals)} clips, p95 {p95:.3f} s, {held[-1] / 2**20:.0f} MiB")
        counts = stream.counts
    assert counts.answered == counts.submitted == answered
    assert max(held[2:]) <= 1.02 * held[1]


BOUND = 8  # clips that wait at most, below


def overload(stream, sent, service, policy):
    """A minute of twice the load, after which a queue that is full to its bound empties; returns the share lost."""
    waiting, twice = [], poisson(2 / service, seconds=60, seed=2)
    records = offer(stream, sent, twice, progress=lambda: waiting.append(stream.counts.waiting))
    found = summarize(records)
    assert max(waiting) == BOUND
    lost = found["refused" if policy == "reject" else "dropped"]
    assert lost + found["answered"] == len(records)
    futures = [stream.submit(sent[0]) for _ in range(BOUND)]
    began = time.monotonic()
    while stream.counts.waiting:
        time.sleep(0.01)
        assert time.monotonic() - began <= 2 * BOUND * service
    for future in futures:
        assert future.exception() is None
    return lost / len(records)


@pytest.mark.parametrize("policy", ["reject", "drop-oldest"])
def test_a_minute_of_twice_the_load(purifier, sent, service, policy):
    """The queue stays bounded, the policy is obeyed, and whoever still waits is served."""
    with StreamPurifier(purifier, queue_size=BOUND, policy=policy) as stream:
        stream.warmup(SHAPE)
        assert 0.35 < overload(stream, sent, service, policy) < 0.65


class SleepingBatch(Batch):
    """Sleeps for a time of its own at each step of each clip, and computes nothing."""

    STEP, STEPS = 0.005, 12  # seconds, and steps of a clip

    def advance(self):
        for flight in self.flights:
            time.sleep(self.STEP)
            flight.iterations += 1
        ended = [flight for flight in self.flights if flight.iterations == self.STEPS]
        self.flights = [flight for flight in self.flights if flight.iterations < self.STEPS]
        times = [Times(one.request.submitted, one.started, *[time.monotonic()] * 4) for one in ended]
        return [
            (one.request, Answer(one.request.clip, None, None, None, seen))
            for one, seen in zip(ended, times, strict=True)
        ]


@pytest.mark.parametrize("policy", ["reject", "drop-oldest"])
def test_latency_after_an_overload_is_as_before(purifier, sent, monkeypatch, policy):
    """The p95 at half of the load. The models sleep: on their own speed, which drifts, that figure depends too much."""
    monkeypatch.setattr(stream_module, "Batch", SleepingBatch)
    service = SleepingBatch.STEP * SleepingBatch.STEPS
    with StreamPurifier(purifier, queue_size=BOUND, policy=policy) as stream:

        def p95_at_half_load():
            found = summarize(offer(stream, sent, poisson(0.5 / service, seconds=60, seed=1)))
            assert found["answered"] == found["offered"]
            return found["latency"]["p95"]

        before = p95_at_half_load()
        lost = overload(stream, sent, service, policy)
        after = p95_at_half_load()
    print(f"p95 before {before:.3f} s, after {after:.3f} s; {lost:.0%} lost")
    assert 0.35 < lost < 0.65 and after <= 1.1 * before
