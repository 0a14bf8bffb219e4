"""StreamPurifier: its answers are the purifier's, and no clip is lost, doubled or mixed up whatever befalls others."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from conftest import Classifier, build_purifier, clips
from torch import nn

from videopure_fast import DefendedClassifier, Purifier
from videopure_fast.realtime.batching import Batch
from videopure_fast.realtime.estimates import Estimates
from videopure_fast.realtime.serving import Answer, Closed, DeadlineMissed, Dropped, Progress, QueueFull, Times
from videopure_fast.realtime.stream import StreamPurifier
from videopure_fast.runtime import readback

SECONDS = 60


def videos(count, *shape, first=0):
    return [clips(*(shape or (3, 5, 16, 18)), seed=first + i) for i in range(count)]


def has_taken(stream, video, seconds):
    """From now on the stream takes it that clips like this one need so many seconds."""
    stream._batch.estimates._seconds[tuple(video.shape), stream._purifier.config.inversion_steps] = seconds


@pytest.fixture(scope="module")
def purifier():
    return build_purifier()


@pytest.mark.parametrize("method", ["videopure", "ddim_inversion"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_answers_are_the_purifiers_bit_for_bit(method, prompts):
    purifier = build_purifier(method=method, prompts=prompts, inversion_steps=2)
    sent = videos(5)
    with StreamPurifier(purifier, return_votes=True, max_batch=3) as stream:
        futures = [stream.submit(video) for video in sent]
        for video, future in zip(sent, futures, strict=True):
            answer = future.result(SECONDS)
            assert torch.equal(answer.votes, purifier(video, return_votes=True))
            assert torch.equal(answer.clip, answer.votes[-1]) and answer.label is None and answer.logits is None
            assert list(answer.times) == sorted(answer.times)


def test_no_flow_is_computed_for_a_method_without_votes():
    def flow(prev, next):
        raise RuntimeError("nobody needs it")

    purifier, video = build_purifier(method="ddim_inversion", flow=flow), videos(1)[0]
    with StreamPurifier(purifier) as stream:
        assert torch.equal(stream.submit(video).result(SECONDS).clip, purifier(video))


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("fast", [True, False])
def test_clips_at_their_own_steps_share_evaluations(prompts, fast):
    """Inversion and denoising in one evaluation, and depths of their own."""
    purifier = build_purifier(dtype=torch.float64, prompts=prompts, fast=fast, temporal_weight=0.01)
    sent = videos(6)
    depths = [0, 2, 1, 1, 2, 0]
    sizes = (1, 2, 4)
    with StreamPurifier(purifier, return_votes=True, batch_sizes=sizes, queue_size=6) as stream:
        futures = [stream.submit(video, steps=steps) for video, steps in zip(sent, depths, strict=True)]
        for video, steps, future in zip(sent, depths, futures, strict=True):
            expected = purifier.with_config(inversion_steps=steps)(video, return_votes=True)
            torch.testing.assert_close(future.result(SECONDS).votes, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-5), (torch.float16, 1e-2)])
def test_answers_on_a_gpu(dtype, most):
    """Captured, in groups of up to four; in float16 a sign of the guidance may flip, and the mean is compared."""
    purifier = build_purifier(dtype=dtype, inversion_steps=3, temporal_weight=0.01).cuda()
    sent = videos(7)
    with StreamPurifier(purifier, Classifier().to("cuda", dtype), return_votes=True) as stream:
        stream.warmup(sent[0].shape)
        futures = [stream.submit(video, steps=i % 4) for i, video in enumerate(sent)]
        for i, (video, future) in enumerate(zip(sent, futures, strict=True)):
            expected = purifier.with_config(inversion_steps=i % 4)(video, return_votes=True)
            answer = future.result(SECONDS)
            error = (answer.votes - expected).abs()
            assert (error.mean() if dtype == torch.float16 else error.max()) <= most and answer.label is not None


def test_dtypes_and_sizes_are_the_clips_own(purifier):
    sent = [
        (255 * clips(3, 4, 17, 19)).to(torch.uint8),
        clips(3, 4, 17, 19, dtype=torch.float16),
        clips(3, 4, 17, 19, dtype=torch.float64),
    ]
    with StreamPurifier(purifier) as stream:
        for video in sent:
            answer = stream.submit(video).result(SECONDS)
            assert answer.clip.dtype == video.dtype and torch.equal(answer.clip, purifier(video))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_labels_are_a_defended_classifiers(early_stop, sizes):
    classifier = Classifier().eval()
    purifier = build_purifier(dtype=torch.float64, inversion_steps=3)
    defended = DefendedClassifier(classifier, purifier)
    sent = videos(4)
    with StreamPurifier(purifier, classifier, early_stop=early_stop, batch_sizes=sizes) as stream:
        futures = [stream.submit(video) for video in sent]
        for video, future in zip(sent, futures, strict=True):
            answer = future.result(SECONDS)
            assert answer.label == defended.predict(video) and answer.votes is None
            assert len(answer.logits) == 5 if not early_stop else 3 <= len(answer.logits) <= 5
            torch.testing.assert_close(answer.clip, purifier(video), rtol=0, atol=1e-4)


def test_clips_of_other_shapes_have_their_turn(purifier):
    """Also under an unending stream of the first shape."""
    shapes = [(3, 5, 16, 18), (3, 4, 16, 16), (3, 5, 16, 18), (3, 6, 18, 16)]
    sent = [clips(*shapes[i % 4], seed=i) for i in range(12)]
    with StreamPurifier(purifier, max_batch=2) as stream:
        futures = [stream.submit(video) for video in sent]
        for video, future in zip(sent, futures, strict=True):
            assert torch.equal(future.result(SECONDS).clip, purifier(video))
    stop, served = threading.Event(), []
    with StreamPurifier(purifier, max_batch=2, queue_size=4) as stream:

        def flood():
            while not stop.is_set():
                served.append(stream.submit(sent[0]))

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            assert torch.equal(stream.submit(sent[1]).result(SECONDS).clip, purifier(sent[1]))
        finally:
            stop.set()
            flooding.join()


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_what_is_not_finite_is_one_clips_own(sizes):
    purifier = build_purifier()
    sent, encode = videos(6), purifier._encode

    def poisoned(video):
        latents = encode(video)
        for one, clip in zip(latents, video, strict=True):
            if torch.equal(clip[..., :16, :18].float(), sent[2]):
                one.fill_(float("nan"))
        return latents

    purifier._encode = poisoned
    with StreamPurifier(purifier, Classifier(), batch_sizes=sizes) as stream:
        futures = [stream.submit(video) for video in sent]
        for i, future in enumerate(futures):
            if i == 2:
                with pytest.raises(FloatingPointError, match="the stage 'denoise'"):
                    future.result(SECONDS)
            else:
                assert isinstance(future.result(SECONDS), Answer)
    assert stream.counts.failed == 1 and stream.counts.answered == 5


def test_a_classifier_that_raises_fails_its_own_clip(purifier):
    sent = videos(4)

    class Refuses(nn.Module):
        def forward(self, x):
            wrong = purifier(sent[1])[None]
            if any(torch.allclose(one, wrong[0], atol=1e-3) for one in x):
                raise RuntimeError("not this one")
            return x.mean((2, 3, 4))

    with StreamPurifier(purifier, Refuses(), batch_sizes=(1, 2, 4)) as stream:
        futures = [stream.submit(video) for video in sent]
        wait(futures, SECONDS)
        assert [future.exception() is None for future in futures] == [True, False, True, True]
        assert "not this one" in str(futures[1].exception())


def test_changed_models_are_seen(purifier):
    purifier = build_purifier()
    video = videos(1)[0]
    with StreamPurifier(purifier) as stream:
        before = stream.submit(video).result(SECONDS).clip
        with torch.no_grad():
            purifier.unet.conv_out.weight.mul_(0.5)
        after = stream.submit(video).result(SECONDS).clip
        assert not torch.equal(before, after) and torch.equal(after, purifier(video))


def test_other_models_and_settings_are_for_clips_to_come(purifier):
    """Models that are assigned serve every depth; the settings stay those with which the stream began."""
    purifier, other, video = build_purifier(inversion_steps=2), build_purifier(inversion_steps=2), videos(1)[0]
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.5)
    with StreamPurifier(purifier, max_batch=2) as stream:
        stream.submit(video, steps=1).result(SECONDS)
        purifier.unet = other.unet
        futures = [stream.submit(video, steps=steps) for steps in (1, 1, 2)]
        purifier.config = replace(purifier.config, inversion_steps=0, spatial_weight=0.0)
        for steps, future in zip((1, 1, 2), futures, strict=True):
            expected = other.with_config(inversion_steps=steps)(video)
            assert torch.equal(future.result(SECONDS).clip, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_models_that_move_let_clips_in_flight_begin_again(monkeypatch, fails):
    purifier, video, decode, moved = build_purifier(), videos(1)[0], Batch._decode, []

    def move(batch, group):
        if not moved:
            moved.append(purifier.double())
            if fails:
                raise RuntimeError("tensors of two dtypes")
        decode(batch, group)

    monkeypatch.setattr(Batch, "_decode", move)
    with StreamPurifier(purifier, Classifier(), early_stop=False) as stream:
        answer = stream.submit(video).result(SECONDS)
        assert torch.equal(answer.clip, purifier(video)) and len(answer.logits) == len(
            purifier(video, return_votes=True)
        )


def test_a_change_that_is_seen_late_doubles_no_clip(purifier, monkeypatch):
    """On a GPU a clip knows at its end that its models had changed, while others end as well."""
    purifier, (deep, shallow) = build_purifier(inversion_steps=3), videos(2)
    held, encode, flagged = Held(monkeypatch), Batch._encode, []

    def doubtful(batch, group):
        encode(batch, group)
        if group[0].request.steps == 1 and not flagged:
            flagged.append(True)
            readback.flag_change(torch.tensor(True))

    monkeypatch.setattr(Batch, "_encode", doubtful)
    advance = Batch.advance

    def joined(batch):
        if batch.flights and len(batch.flights[0].steps) == 4 and not flagged and len(batch.flights) == 1:
            batch.admit([requests.pop()])
        return advance(batch)

    monkeypatch.setattr(Batch, "advance", joined)
    with StreamPurifier(purifier) as stream:
        requests = [stream._request(shallow, None, 1)]
        futures = [requests[0].future, stream.submit(deep)]
        held.go.set()
        clips = [future.result(SECONDS).clip for future in futures]
    assert flagged and stream._broken is None and stream.counts.answered == 2
    assert torch.equal(clips[0], purifier.with_config(inversion_steps=1)(shallow))
    assert torch.equal(clips[1], purifier(deep))


def test_what_fails_in_an_answer_is_one_clips_own(purifier):
    class Odd(nn.Module):
        labels = 2

        def forward(self, x):
            self.labels += 1
            return torch.zeros(len(x), self.labels)

    with StreamPurifier(purifier, Odd(), early_stop=False) as stream:
        with pytest.raises(RuntimeError, match="equal size"):
            stream.submit(videos(1)[0]).result(SECONDS)
        assert stream._broken is None


# Queue, deadlines, ends


class Held:
    """A batch whose clips stay in flight until they are let go."""

    def __init__(self, monkeypatch):
        self.go = threading.Event()
        advance = Batch.advance

        def held(batch):
            self.go.wait(SECONDS)
            return advance(batch)

        monkeypatch.setattr(Batch, "advance", held)


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_full_queue_obeys_its_policy(purifier, monkeypatch):
    held, video = Held(monkeypatch), videos(1)[0]

    def filled(policy):
        stream = StreamPurifier(purifier, max_batch=1, queue_size=2, policy=policy)
        first = stream.submit(video)
        until(lambda: stream.counts.in_flight == 1)
        return stream, [first, stream.submit(video), stream.submit(video)]

    stream, futures = filled("reject")
    with pytest.raises(QueueFull, match="2 clips wait already"):
        stream.submit(video)
    assert stream.counts.rejected == 1 and stream.counts.waiting == 2
    dropping, dropped = filled("drop-oldest")
    newest = [dropping.submit(video), dropping.submit(video)]
    for future in dropped[1:]:
        with pytest.raises(Dropped):
            future.result(SECONDS)
    blocking, blocked = filled("block")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(blocking.submit, video)
        time.sleep(0.05)
        assert not late.done()
        held.go.set()
        blocked.append(late.result(SECONDS))
    for each, sent in ((stream, futures), (dropping, [dropped[0], *newest]), (blocking, blocked)):
        each.close()
        assert all(isinstance(future.result(0), Answer) for future in sent)
        counts = each.counts
        assert counts.submitted == counts.answered + counts.dropped and not counts.waiting and not counts.in_flight
    assert dropping.counts.dropped == 2


def test_who_waits_for_room_waits_no_longer_than_its_deadline(purifier, monkeypatch):
    held, video = Held(monkeypatch), videos(1)[0]
    with StreamPurifier(purifier, max_batch=1, queue_size=1, policy="block") as stream:
        first = stream.submit(video)
        until(lambda: stream.counts.in_flight == 1)
        second = stream.submit(video)
        with pytest.raises(DeadlineMissed, match="queue was full"):
            stream.submit(video, deadline=0.02).result(0)
        with pytest.raises(DeadlineMissed, match="queue was full"):
            asyncio.run(stream.answer(video, deadline=0.02))
        held.go.set()
        assert all(isinstance(future.result(SECONDS), Answer) for future in (first, second))
    assert stream.counts.missed == 2 and stream.counts.submitted == 4


def test_the_earliest_deadline_comes_first(purifier, monkeypatch):
    held, video, ended = Held(monkeypatch), videos(1)[0], []
    with StreamPurifier(purifier, max_batch=1, order="edf") as stream:
        stream.submit(video)
        until(lambda: stream.counts.in_flight == 1)
        for name, deadline in (("none", None), ("late", 900), ("soon", 300), ("later", 1000)):
            stream.submit(video, deadline=deadline).add_done_callback(lambda _, name=name: ended.append(name))
        held.go.set()
    assert ended == ["soon", "late", "later", "none"]


def test_what_cannot_be_in_time_is_not_computed(purifier, monkeypatch):
    now = [0.0]
    video = videos(1)[0]
    encoded = []
    encode = Batch._encode
    monkeypatch.setattr(Batch, "_encode", lambda batch, group: (encoded.extend(group), encode(batch, group))[1])
    with StreamPurifier(purifier, max_batch=1, clock=lambda: now[0]) as stream:
        answer = stream.submit(video, deadline=1.0).result(SECONDS)
        assert answer.times.done == 0
        has_taken(stream, video, 2.0)
        with pytest.raises(DeadlineMissed, match="no longer"):
            stream.submit(video, deadline=1.5).result(SECONDS)
        assert len(encoded) == 1 and stream.counts.missed == 1
        assert isinstance(stream.submit(video, deadline=2.5).result(SECONDS), Answer)
        # It is not kept out for ever by what clips have taken once.
        has_taken(stream, video, 100.0)
        for _ in range(200):
            try:
                stream.submit(video, deadline=1.0).result(SECONDS)
                break
            except DeadlineMissed:
                pass
        else:
            raise AssertionError("no clip was let in any more")


def test_a_deadline_that_passes_in_flight_ends_the_clip(purifier, monkeypatch):
    now, held, video = [0.0], Held(monkeypatch), videos(1)[0]
    with StreamPurifier(purifier, clock=lambda: now[0]) as stream:
        future, other = stream.submit(video, deadline=1.0), stream.submit(video)
        until(lambda: stream.counts.in_flight >= 1)
        now[0] = 2.0
        held.go.set()
        with pytest.raises(DeadlineMissed):
            future.result(SECONDS)
        assert isinstance(other.result(SECONDS), Answer)


def test_clips_join_no_others_that_would_then_miss_their_deadlines(purifier, monkeypatch):
    """Two of four that come at once are in time; the time that all four share would be enough for none."""
    now, held, video = [0.0], Held(monkeypatch), videos(1)[0]
    advance = Batch.advance

    def timed(batch):
        ended = advance(batch)
        now[0] += 1.0 * (len(batch.flights) + len(ended))  # an evaluation each
        return ended

    monkeypatch.setattr(Batch, "advance", timed)
    with StreamPurifier(purifier, clock=lambda: now[0]) as stream:
        held.go.set()
        answer = stream.submit(video).result(SECONDS)
        alone = answer.times.done - answer.times.started + 1
        has_taken(stream, video, alone)
        held.go.clear()
        stream.submit(videos(1, 3, 4, 16, 16)[0])  # while it is in flight the others gather
        until(lambda: stream.counts.in_flight == 1)
        futures = [stream.submit(video, deadline=3.5 * alone) for _ in range(4)]
        held.go.set()
        wait(futures, SECONDS)
    assert [future.exception() is None for future in futures] == [True, True, False, False]


@pytest.mark.parametrize("max_batch", [1, 4])
def test_an_overload_leaves_clips_that_are_in_time(monkeypatch, max_batch):
    """At 20 times the load one clip after another is in time, and not each begun and given up."""
    purifier, video, now, futures = build_purifier(inversion_steps=1), videos(1)[0], [0.0], []
    advance = Batch.advance

    def timed(batch):
        flying = len(batch.flights)
        ended = advance(batch)
        now[0] += flying  # a second for each of the four evaluations
        if futures and len(futures) < 400:
            futures.extend(stream.submit(video, deadline=8.0) for _ in range(5))
        return ended

    monkeypatch.setattr(Batch, "advance", timed)
    options = {"max_batch": max_batch, "queue_size": 64, "policy": "drop-oldest"}
    with StreamPurifier(purifier, clock=lambda: now[0], **options) as stream:
        stream.submit(video).result(SECONDS)
        futures.append(stream.submit(video, deadline=8.0))
        until(lambda: len(futures) >= 400 and futures[-1].done())
    assert stream.counts.answered >= 15


def test_canceled_clips_free_their_places(purifier, monkeypatch):
    held, video = Held(monkeypatch), videos(1)[0]
    with StreamPurifier(purifier, max_batch=1, queue_size=1, policy="reject") as stream:
        flying = stream.submit(video)
        until(lambda: stream.counts.in_flight == 1)
        waiting = stream.submit(video)
        assert waiting.cancel() and flying.cancel()
        last = stream.submit(video)  # the queue has room again
        held.go.set()
        assert isinstance(last.result(SECONDS), Answer)
    counts = stream.counts
    assert (counts.submitted, counts.answered, counts.canceled) == (3, 1, 2)


@pytest.mark.parametrize("cancel", [True, False])
def test_close_finishes_or_cancels(purifier, monkeypatch, cancel):
    held = Held(monkeypatch)
    stream = StreamPurifier(purifier, max_batch=2)
    futures = [stream.submit(video) for video in videos(5)]
    until(lambda: stream.counts.in_flight >= 1)
    closing = threading.Thread(target=stream.close, kwargs={"cancel": cancel})
    closing.start()
    until(lambda: stream._closing is not None)
    with pytest.raises(Closed):
        stream.submit(videos(1)[0])
    held.go.set()
    closing.join(SECONDS)
    assert not stream._worker.is_alive()
    for future in futures:
        if cancel:
            assert isinstance(future.exception(0), Closed) or isinstance(future.result(0), Answer)
        else:
            assert isinstance(future.result(0), Answer)
    assert not cancel or stream.counts.canceled
    stream.close()


def test_an_error_in_its_block_cancels(purifier):
    with pytest.raises(KeyError), StreamPurifier(purifier) as stream:
        futures = [stream.submit(video) for video in videos(8)]
        raise KeyError
    assert all(future.done() for future in futures) and any(future.exception(0) for future in futures)


def test_a_fault_of_the_worker_ends_all(purifier, monkeypatch):
    monkeypatch.setattr(Batch, "admit", lambda *_: 1 / 0)
    stream = StreamPurifier(purifier)
    future = stream.submit(videos(1)[0])
    with pytest.raises((ZeroDivisionError, Closed)):
        future.result(SECONDS)
    stream._worker.join(SECONDS)
    with pytest.raises(Closed, match="division by zero"):
        stream.submit(videos(1)[0])


def test_a_fault_of_the_worker_leaves_nobody_who_was_late(purifier, monkeypatch):
    monkeypatch.setattr(Batch, "admit", lambda *_: 1 / 0)
    now, video = [0.0], videos(1)[0]
    stream = StreamPurifier(purifier, clock=lambda: now[0])
    with stream._changed:  # the worker sees both at once
        late, other = stream.submit(video, deadline=1.0), stream.submit(video)
        now[0] = 2.0
    with pytest.raises(DeadlineMissed):
        late.result(SECONDS)
    with pytest.raises(ZeroDivisionError):
        other.result(SECONDS)


def test_a_canceled_clip_says_nothing_of_what_clips_take(purifier, monkeypatch):
    held, video = Held(monkeypatch), videos(1)[0]
    with StreamPurifier(purifier) as stream:
        gone = stream.submit(video)
        until(lambda: stream.counts.in_flight == 1)
        gone.cancel()
        held.go.set()
        until(lambda: stream.counts.canceled == 1)
        assert not stream._batch.estimates._seconds
        stream.submit(video).result(SECONDS)
        assert list(stream._batch.estimates._seconds.values()) == [None]  # the first that was computed


def test_callbacks_may_raise_and_submit(purifier):
    video, later = videos(1)[0], Future()
    with StreamPurifier(purifier) as stream:
        first = stream.submit(video)
        first.add_done_callback(lambda _: 1 / 0)
        first.add_done_callback(lambda _: later.set_result(stream.submit(video)))
        assert isinstance(later.result(SECONDS).result(SECONDS), Answer)


def test_a_callback_that_exits_ends_no_stream(purifier):
    def leave(_):
        raise SystemExit(3)

    video = videos(1)[0]
    with StreamPurifier(purifier) as stream:
        future = stream.submit(video)
        future.add_done_callback(leave)
        assert isinstance(future.result(SECONDS), Answer)
        assert isinstance(stream.submit(video).result(SECONDS), Answer)


@pytest.mark.parametrize("early_stop", [False, True])
def test_progress_is_told_step_by_step(purifier, early_stop):
    classifier, seen = Classifier(), []
    with StreamPurifier(purifier, classifier, early_stop=early_stop) as stream:
        answer = stream.submit(videos(1)[0], progress=seen.append).result(SECONDS)
    votes = purifier.evaluations // 2 + 1  # of every state of denoising
    evaluations = [Progress("evaluate", i + 1, purifier.evaluations, None) for i in range(purifier.evaluations)]
    labels = answer.logits.argmax(1).tolist()[::-1]  # the last vote is decoded first
    decodes = [Progress("decode", i + 1, votes, label) for i, label in enumerate(labels)]
    assert seen == [Progress("encode", 1, 1, None), *evaluations, *decodes]
    assert early_stop or len(decodes) == votes


def test_progress_of_a_purified_clip_alone_and_of_all_its_votes(purifier):
    for return_votes, votes in ((False, 1), (True, purifier.evaluations // 2 + 1)):
        seen = []
        with StreamPurifier(purifier, return_votes=return_votes) as stream:
            stream.submit(videos(1)[0], progress=seen.append).result(SECONDS)
        assert [one for one in seen if one.stage == "decode"] == [
            Progress("decode", i + 1, votes, None) for i in range(votes)
        ]


@pytest.mark.parametrize(("stage", "error"), [("encode", KeyError), ("evaluate", SystemExit), ("decode", KeyError)])
def test_progress_that_raises_ends_its_own_clip(stage, error):
    purifier = build_purifier(dtype=torch.float64, temporal_weight=0.01)

    def leave(progress):
        if progress.stage == stage:
            raise error("enough")

    sent = videos(3)
    with StreamPurifier(purifier, batch_sizes=(1, 2)) as stream:
        futures = [stream.submit(sent[0]), stream.submit(sent[1], progress=leave), stream.submit(sent[2])]
        with pytest.raises(error, match="enough"):
            futures[1].result(SECONDS)
        for i in (0, 2):
            torch.testing.assert_close(futures[i].result(SECONDS).clip, purifier(sent[i]), rtol=0, atol=1e-5)
        with pytest.raises(TypeError, match="progress must be a function of a Progress, got str"):
            stream.submit(sent[0], progress="bar")


def test_callbacks_cannot_wait_for_a_warmup(purifier):
    refused = Future()

    def warm(_):
        try:
            stream.warmup((3, 5, 16, 18))
        except RuntimeError as error:
            refused.set_result(str(error))

    with StreamPurifier(purifier) as stream:
        stream.submit(videos(1)[0]).add_done_callback(warm)
        assert "callback" in refused.result(SECONDS)


def test_asyncio(purifier):
    sent = videos(3)

    async def run():
        async with StreamPurifier(purifier, queue_size=1, max_batch=1) as stream:
            threads = threading.active_count()
            waiting = asyncio.gather(*(stream.answer(video) for video in sent))
            await asyncio.sleep(0)
            assert threading.active_count() == threads  # those that wait for room in the queue take none
            answers = await waiting
            task = asyncio.create_task(stream.answer(sent[0]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return answers

    for video, answer in zip(sent, asyncio.run(run()), strict=True):
        assert torch.equal(answer.clip, purifier(video))


def test_a_warmup_makes_what_clips_need(monkeypatch):
    purifier, ahead = build_purifier(), []
    compile_ahead = Purifier._compile_ahead
    monkeypatch.setattr(
        Purifier,
        "_compile_ahead",
        lambda own, shape, **options: (ahead.append(tuple(shape)), compile_ahead(own, shape, **options))[1],
    )
    with StreamPurifier(purifier) as stream:
        stream.warmup((3, 5, 16, 18))
        assert ahead == [(1, 3, 5, 16, 18)]
        assert stream.counts.in_flight == 0 and stream._batch.estimates.least(((3, 5, 16, 18), 1)) > 0
        made = list(stream._batch._captures.made.values())
        assert len(made) == 2 and all(made)  # a step of inversion and one of denoising
        assert torch.equal(stream.submit(videos(1)[0]).result(SECONDS).clip, purifier(videos(1)[0]))
        assert list(stream._batch._captures.made.values()) == made
        with pytest.raises(ValueError, match="sides"):
            stream.warmup((3, 5, 4, 4))
        assert stream.counts.submitted == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch"),
        ({"queue_size": True}, TypeError, "queue_size"),
        ({"policy": "hope"}, ValueError, "block, reject, drop-oldest"),
        ({"order": "lifo"}, ValueError, "fifo, edf"),
        ({"return_votes": 1}, TypeError, "return_votes"),
        ({"batch_sizes": (2, 4)}, ValueError, "ascending from 1"),
        ({"batch_sizes": (1, 8)}, ValueError, "batch_sizes"),
        ({"batch_sizes": 4}, TypeError, "sequence"),
        ({"classifier": max}, TypeError, "torch.nn.Module"),
        ({"clock": 0.0}, TypeError, "clock"),
    ],
)
def test_bad_settings(purifier, arguments, error, message):
    with pytest.raises(error, match=message):
        StreamPurifier(purifier, **arguments)


def test_bad_purifiers_and_clips(purifier):
    with pytest.raises(TypeError, match="must be a Purifier"):
        StreamPurifier(Classifier())
    for config in ({"method": "ddpm"}, {"feedback": True}):
        with pytest.raises(ValueError, match="accepted: 'videopure' or 'ddim_inversion'"):
            StreamPurifier(build_purifier(**config))
    with StreamPurifier(purifier) as stream:
        with pytest.raises(ValueError, match="sides of 16 or more"):
            stream.submit(clips(3, 9, 16, 16))
        for clip, error in (
            (clips(1, 3, 5, 16, 16), ValueError),
            (clips(3, 9, 16, 16), ValueError),
            (clips(3, 5, 8, 16), ValueError),
            (clips(3, 5, 16, 16) * float("nan"), ValueError),
            ("clip", TypeError),
        ):
            with pytest.raises(error):
                stream.submit(clip)
        for deadline in (-1.0, float("nan"), "soon"):
            with pytest.raises((ValueError, TypeError), match="deadline"):
                stream.submit(clips(3, 5, 16, 16), deadline=deadline)
        with pytest.raises((ValueError, TypeError), match="inversion_steps"):
            stream.submit(clips(3, 5, 16, 16), steps=-1)
        assert stream.counts.submitted == 0


def test_a_stream_is_not_copied(purifier):
    with StreamPurifier(purifier) as stream:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="make one of a Purifier"):
                duplicate(stream)


UNCLOSED = """
import os
from videopure_fast import Purifier, tiny
from videopure_fast.realtime.serving import Closed
from videopure_fast.realtime.stream import StreamPurifier

clips, _ = tiny.sample_clips(4)
stream = StreamPurifier(Purifier.from_pretrained("tiny", inversion_steps=1))
child = os.fork()
if not child:
    try:
        stream.submit(clips[0])
    except Closed:
        stream.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
futures = [stream.submit(clip) for clip in clips]
futures[0].add_done_callback(lambda _: print("ended", flush=True))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_program_that_forks_and_never_closes_ends():
    ended = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=SECONDS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")


# Thousands of clips


class StubBatch:
    """In a Batch's place: takes three iterations a clip, and answers with the clip itself."""

    sizes, warming = (1,), False

    def __init__(self, *_, **__):
        self.flights, self.estimates = [], Estimates()

    @property
    def shape(self):
        return tuple(self.flights[0].request.clip.shape) if self.flights else None

    def keeps_deadlines(self, joining):
        return True

    def admit(self, requests):
        from types import SimpleNamespace

        self.flights += [SimpleNamespace(request=request, left=3) for request in requests]

    def leave(self, flight, *, late):
        self.flights.remove(flight)

    def advance(self):
        for flight in self.flights:
            flight.left -= 1
        ended = [flight for flight in self.flights if not flight.left]
        self.flights = [flight for flight in self.flights if flight.left]
        return [(one.request, Answer(one.request.clip, None, None, None, Times(*[0.0] * 6))) for one in ended]


def storm(stream, count, make, seed):
    """Eight threads submit clips and cancel some; returns what was sent and became of it."""
    kept = []

    def sender(number):
        draw = random.Random(1000 * seed + number)
        for i in range(count // 8):
            clip = make(number * count + i, draw)
            try:
                future = stream.submit(clip, deadline=draw.choice([None, None, 50.0, 0.0]))
            except QueueFull:
                continue
            kept.append((clip, future))
            if draw.random() < 0.2:
                future.cancel()
            if draw.random() < 0.05:
                time.sleep(0.001)

    threads = [threading.Thread(target=sender, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return kept


@pytest.mark.parametrize("policy", ["block", "reject", "drop-oldest"])
def test_nothing_is_lost_doubled_or_mixed_up(purifier, monkeypatch, policy):
    from videopure_fast.realtime import stream as module

    monkeypatch.setattr(module, "Batch", StubBatch)
    shapes = [(3, 2, 16, 16), (3, 3, 16, 16)]

    def make(number, draw):
        clip = torch.zeros(draw.choice(shapes))
        clip.view(-1)[:3] = torch.tensor([number // 65536 / 256, number // 256 % 256 / 256, number % 256 / 256])
        return clip

    with StreamPurifier(purifier, policy=policy, order="edf" if policy == "block" else "fifo") as stream:
        kept = storm(stream, 2400, make, 1)
    outcomes = {"answered": 0, "canceled": 0, "dropped": 0, "missed": 0}
    for clip, future in kept:
        assert future.done()
        if future.cancelled():
            outcomes["canceled"] += 1
        elif (error := future.exception()) is None:
            outcomes["answered"] += 1
            assert future.result().clip.data_ptr() == clip.data_ptr()
        else:
            outcomes[{Dropped: "dropped", DeadlineMissed: "missed"}[type(error)]] += 1
    counts = stream.counts._asdict()
    assert {name: counts[name] for name in outcomes} == outcomes
    assert counts["submitted"] == len(kept) == sum(outcomes.values()) and outcomes["answered"]
    assert (counts["rejected"] > 0) == (policy == "reject") and len(kept) + counts["rejected"] == 2400


@pytest.mark.slow
def test_hundreds_of_real_clips(purifier):
    sent = videos(16)
    expected = [purifier(video) for video in sent]
    with StreamPurifier(purifier, queue_size=32) as stream:
        kept = storm(stream, 320, lambda number, draw: draw.choice(sent), 2)
    answered = 0
    for clip, future in kept:
        if not future.cancelled() and future.exception() is None:
            answered += 1
            index = next(i for i, video in enumerate(sent) if video is clip)
            assert torch.equal(future.result().clip, expected[index])
    assert answered > 100 and answered == stream.counts.answered
