"""The open-loop generator against theory, and what it says became of each clip."""

from __future__ import annotations

import gc
import math
import random
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from stub_servers import CLIPS, SleepingServer, VirtualClock, VirtualServer, service

from videopure_fast.realtime.arrivals import Arrival, poisson
from videopure_fast.realtime.load import offer
from videopure_fast.realtime.serving import Answer, Closed, DeadlineMissed, Dropped, QueueFull, Times
from videopure_fast.realtime.study import Setting, summarize


def mean_latency(load):
    """The mean of wait and service in M/D/1, in service times: the formula of Pollaczek and Khinchine."""
    return 1 + load / (2 * (1 - load))


def share_waiting_less(wait, load):
    """P(W <= wait) of M/D/1, the wait in service times: Crommelin's series."""
    terms = []
    for k in range(int(wait) + 1):
        reached = load * (k - wait)
        terms.append(reached**k / math.factorial(k) * math.exp(-reached))
    return (1 - load) * math.fsum(terms)


def latency_quantile(quantile, load):
    """A quantile of wait and service in M/D/1, in service times."""
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_waiting_less(middle, load) < quantile else (low, middle)
    return 1 + high


def test_the_formulas_agree_with_each_other():
    """The mean wait is the integral of the share that waits longer; a share of 1 - load does not wait."""
    for load in (0.5, 0.8):
        grid = np.linspace(0, 30, 30_001)
        longer = [1 - share_waiting_less(wait, load) for wait in grid]
        assert 1 + np.trapezoid(longer, grid) == pytest.approx(mean_latency(load), rel=1e-3)
        assert share_waiting_less(0, load) == pytest.approx(1 - load)


def test_on_a_virtual_clock_latency_is_that_of_the_theory():
    load, seconds = 0.8, 0.5
    drawn = random.Random(5)
    due, arrivals = 0.0, []
    for _ in range(300_000):
        due += drawn.expovariate(load / seconds)
        arrivals.append(Arrival(due))
    clock = VirtualClock()
    gc.disable()  # it would look at a million living objects again and again
    try:
        records = offer(VirtualServer(clock, seconds), CLIPS, arrivals, clock=clock)
    finally:
        gc.enable()
    summary = summarize(records)
    assert summary["answered"] == 300_000
    assert summary["latency"]["mean"] == pytest.approx(seconds * mean_latency(load), rel=0.05)
    assert summary["latency"]["p50"] == pytest.approx(seconds * latency_quantile(0.5, load), rel=0.05)
    assert summary["latency"]["p99"] == pytest.approx(seconds * latency_quantile(0.99, load), rel=0.05)
    assert summary["utilization"] == pytest.approx(load, rel=0.02)
    assert summary["lag"]["max"] < 1e-6


@pytest.mark.realtime
def test_in_wall_time_the_mean_latency_is_that_of_the_theory():
    load, seconds = 0.5, 0.006
    drawn = random.Random(5)
    due, arrivals = 0.0, []
    for _ in range(2000):
        due += drawn.expovariate(load / seconds)
        arrivals.append(Arrival(due))
    with SleepingServer(service(seconds, depth=0)) as server:
        summary = summarize(offer(server, CLIPS, arrivals))
    assert summary["answered"] == 2000
    assert summary["latency"]["mean"] == pytest.approx(seconds * mean_latency(load), rel=0.10)


def test_a_clip_that_a_full_queue_holds_up_has_waited_since_it_was_due():
    """Twenty clips are due at once, and the queue takes one: the last has waited for all others."""
    setting = Setting(queue_size=1)
    with SleepingServer(service(0.01), setting) as server:
        records = offer(server, CLIPS, [Arrival(0.0)] * 20)
    assert records[-1].submitted > 0.15
    assert records[-1].latency == pytest.approx(0.2, abs=0.04)
    since_submission = [record.times.done - record.submitted for record in records]
    assert max(since_submission) < 0.1  # this is what a closed loop would report


@pytest.mark.parametrize(("policy", "outcome"), [("reject", "refused"), ("drop-oldest", "dropped")])
def test_every_clip_has_an_outcome(policy, outcome):
    with SleepingServer(service(0.02), Setting(queue_size=2, policy=policy)) as server:
        records = offer(server, CLIPS, [Arrival(0.0, number) for number in range(10)])
    summary = summarize(records)
    assert summary["answered"] + summary[outcome] == summary["offered"] == 10
    assert 2 <= summary["answered"] <= 3
    kept = [record.source for record in records if record.outcome == "answered"]
    assert (9 in kept) == (policy == "drop-oldest")


class Scripted:
    """Ends the clip of each moment as told: an Answer after no time, or an error, raised at once or by the future."""

    def __init__(self, *ends, raises=False):
        self.ends, self.raises, self.given = list(ends), raises, []

    def submit(self, clip, **options):
        self.given.append(options)
        end = self.ends[len(self.given) - 1]
        future = Future()
        if end is None:
            now = time.monotonic()
            future.set_result(Answer(clip, None, None, None, Times(*[now] * 6)))
        elif self.raises:
            raise end
        elif end == "cancelled":
            future.cancel()
        else:
            future.set_exception(end)
        return future


@pytest.mark.parametrize("raises", [True, False])
def test_errors_become_outcomes(raises):
    ends = (None, Dropped("a"), QueueFull("b"), Closed("c"), DeadlineMissed("d"), ArithmeticError("e"))
    records = offer(Scripted(*ends, raises=raises), CLIPS, [Arrival(0.0)] * 6)
    outcomes = [record.outcome for record in records]
    assert outcomes == ["answered", "dropped", "refused", "refused", "missed", "failed"]
    assert records[-1].error == "ArithmeticError: e" and summarize(records)["error"] == "ArithmeticError: e"


def test_a_canceled_clip_is_a_refused_one():
    (record,) = offer(Scripted("cancelled"), CLIPS, [Arrival(0.0)])
    assert record.outcome == "refused"


def test_a_server_is_told_depth_and_what_remains_of_the_deadline():
    server = Scripted(None, None)
    records = offer(server, CLIPS, [Arrival(0.0, deadline=2.0), Arrival(0.0, steps=3)])
    first, second = server.given
    assert 1.9 < first["deadline"] <= 2.0 and "steps" not in first
    assert second == {"steps": 3}
    assert records[0].deadline == 2.0 and records[0].in_time and records[1].deadline is None


def test_a_clip_that_could_not_be_submitted_in_time_is_missed():
    class Slow(Scripted):
        def submit(self, clip, **options):
            time.sleep(0.1)
            return super().submit(clip, **options)

    server = Slow(None)
    first, second = offer(server, CLIPS, [Arrival(0.0), Arrival(0.01, deadline=0.05)])
    assert first.outcome == "answered" and second.outcome == "missed" and second.submitted is None
    assert len(server.given) == 1


def test_an_interruption_cancels_what_waits():
    futures = []

    class Silent:
        def submit(self, clip, **options):
            futures.append(Future())
            return futures[-1]

    def interrupt():
        if len(futures) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offer(Silent(), CLIPS, poisson(1000, seconds=1), progress=interrupt)
    assert len(futures) == 3 and all(future.cancelled() for future in futures)


def test_nothing_to_offer_is_refused():
    for clips, arrivals in (([], [Arrival(0.0)]), (CLIPS, [])):
        with pytest.raises(ValueError, match="accepted: one of each or more"):
            offer(Scripted(), clips, arrivals)


def test_no_thread_is_left():
    before = threading.active_count()
    with SleepingServer(service(0.001)) as server:
        offer(server, CLIPS, [Arrival(0.0)])
    assert threading.active_count() == before
