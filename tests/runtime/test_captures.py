"""Which calls are captured, that nothing but the setting and what needs eager steps keeps them from it, and threads."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from conftest import build_purifier, clips, run_in_threads

from videopure_fast.runtime.captures import Captures, Recent
from videopure_fast.runtime.replay import Recording
from videopure_fast.runtime.spans import EvaluationCounter, Span, listening
from videopure_fast.streaming import purify_stream


def recordings(purifier) -> list[Recording | None]:
    return list(purifier._captures.made.values())


def test_progress_replays_from_the_second_call_on(purifier, capfd):
    video = clips(2, 3, 5, 16, 16)
    eager = purifier(video, return_votes=True, capture=False)
    assert not recordings(purifier)
    for calls in range(3):
        assert torch.equal(purifier(video, return_votes=True, progress=True), eager)
        assert len(recordings(purifier)) == (1 if calls else 0)
    assert "4/4" in capfd.readouterr().err.rpartition("\r")[2]


def test_windows_of_one_shape_replay_from_the_second_on(purifier):
    video = clips(3, 20, 16, 16)  # three windows of 8 frames
    eager = purifier(video, capture=False)
    assert not recordings(purifier)
    assert torch.equal(purifier(video), eager)
    assert len(recordings(purifier)) == 1 and isinstance(recordings(purifier)[0], Recording)


def test_a_stream_replays_from_the_second_window_on(purifier):
    frames = (clips(20, 3, 16, 16) * 255).to(torch.uint8)
    eager = build_purifier()
    eager.capture = False
    for ours, expected in zip(purify_stream(purifier, frames, 20), purify_stream(eager, frames, 20), strict=True):
        assert torch.equal(ours, expected)
    assert len(recordings(purifier)) == 1 and not recordings(eager)


def test_a_call_that_comes_again_makes_no_tensor_of_host_values(purifier, monkeypatch):
    """On a GPU that is a copy which waits for all work before it."""
    video = clips(3, 5, 16, 16)
    expected = purifier(video, return_votes=True)
    made = []
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: made.append("tensor"))
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *_, **__: made.append("new_tensor"))
    assert torch.equal(purifier(video, return_votes=True), expected) and not made


@pytest.mark.parametrize("shape", [(2, 3, 5, 16, 18), (3, 5, 16, 18), (3, 20, 16, 16)])
def test_after_a_warmup_the_first_call_replays(purifier, shape, capfd):
    done = purifier.warmup(shape)
    assert done.kernels == 0 and done.seconds > 0
    assert done.calls == (1 if shape[1] == 20 else 2)  # windows of one call are of one shape: the second is recorded
    assert len(recordings(purifier)) == 1
    (recording,) = recordings(purifier)
    runs, replay = [], recording._calls[0]
    recording._calls[0] = lambda: runs.append(1) or replay()
    video = clips(*shape)
    assert torch.equal(purifier(video), build_purifier()(video)) and runs
    assert not capfd.readouterr().err


def test_a_warmup_without_captures_is_one_call(purifier):
    assert purifier.warmup((3, 5, 16, 16), capture=False).calls == 1
    assert build_purifier(method="ddim").warmup((3, 5, 16, 16), return_votes=False).calls == 1
    assert not recordings(purifier)


@pytest.mark.parametrize("shape", [None, 5, "abc", (3, 5, 16.0, 16), (3, True, 16, 16)])
def test_a_warmup_wants_integers(purifier, shape):
    with pytest.raises(TypeError, match="shape must be integers, got .*; accepted: the video's"):
        purifier.warmup(shape)


@pytest.mark.parametrize("shape", [(), (1, 3, -1, 32, 32), (10**8, 3, 16, 10**4, 10**4)])
def test_a_warmup_wants_a_size_that_can_be(purifier, shape):
    with pytest.raises(ValueError, match="shape is .*; accepted: the video's"):
        purifier.warmup(shape)


@pytest.mark.parametrize("shape", [(2, 5, 16, 16), (3, 1, 16, 16), (4, 3, 5, 8, 16)])
def test_a_warmup_wants_the_shape_of_a_video(purifier, shape):
    with pytest.raises(ValueError, match=r"video has shape .*; accepted: \(B, 3, F, H, W\)"):
        purifier.warmup(shape)


@pytest.mark.parametrize("method", ["videopure", "ddim_inversion"])
def test_deterministic_methods_are_captured(method):
    purifier, video = build_purifier(method=method), clips(3, 4, 16, 16)
    eager = purifier(video, return_votes=True, capture=False)
    assert all(torch.equal(purifier(video, return_votes=True), eager) for _ in range(3))
    assert len(recordings(purifier)) == 1


@pytest.mark.parametrize("settings", [{"method": "ddim"}, {"method": "ddpm"}, {"feedback": True}])
def test_what_draws_or_feeds_back_takes_eager_steps(settings):
    purifier = build_purifier(inversion_steps=0, **settings)
    for _ in range(3):
        purifier(clips(3, 4, 16, 16))
    assert not recordings(purifier)


def test_capture_is_a_setting_of_the_purifier_and_of_a_call(purifier):
    video = clips(3, 4, 16, 16)
    eager = build_purifier()
    eager.capture = False
    assert purifier.captured and not eager.captured
    for _ in range(3):
        assert torch.equal(eager(video), purifier(video, callback=lambda *_: None))
    assert not recordings(eager) and not recordings(purifier)
    for _ in range(2):
        eager(video, capture=True)
    assert recordings(eager)
    with pytest.raises(TypeError, match="capture must be a bool, got 'no'"):
        eager.capture = "no"
    for refuse in (lambda: purifier(video, capture="yes"), lambda: purifier.denoise(clips(1, 4, 3, 8, 8), capture=1)):
        with pytest.raises(TypeError, match="capture must be a bool"):
            refuse()


def test_settings_of_one_purifier_share_the_models_and_have_captures_of_their_own(purifier):
    video = clips(3, 4, 16, 16)
    deeper = purifier.with_config(inversion_steps=2)
    for _ in range(3):
        results = purifier(video), deeper(video)
    assert len(recordings(purifier)) == 2 and deeper._captures is purifier._captures
    assert not torch.equal(*results)
    assert torch.equal(results[1], deeper(video, capture=False))


def test_data_parallel_is_refused(purifier):
    """nn.DataParallel calls this method of every module that it copies to another GPU."""
    with pytest.raises(RuntimeError, match="nn.DataParallel.*one Purifier for each GPU"):
        purifier._replicate_for_data_parallel()


def test_a_capture_is_made_once_whatever_the_number_of_threads():
    captures, barrier = Captures(), threading.Barrier(4)

    def function(x):
        return (x + 1,)

    x, wrong = torch.arange(5.0), []
    captures(function, x, first_activation=1)  # the first call of a shape is not recorded

    def run(i):
        barrier.wait()
        for _ in range(20):
            (y,) = captures(function, x + i, first_activation=1)
            if not torch.equal(y, x + i + 1):
                wrong.append(i)

    run_in_threads(4, run)
    assert not wrong and len(captures.made) == 1


def test_recent_values_are_kept_and_copies_are_empty():
    recent = Recent(2)
    recent["a"], recent["b"] = 1, 2
    assert recent.get("a") == 1  # used last
    recent["c"] = 3
    assert recent.values() == [1, 3] and "b" not in recent and recent.get("b") is None
    assert recent.get_or_make("a", lambda: 9) == 1 and recent.get_or_make("d", lambda: 9) == 9
    twin = copy.deepcopy(recent)
    assert not len(twin) and twin is not recent
    twin["a"], twin["b"], twin["c"] = 1, 2, 3
    assert twin.values() == [2, 3] and recent.values() == [1, 9]


# Spans


class Heard:
    def __init__(self):
        self.names, self.open = [], []

    def started(self, span):
        self.names.append(span.name)
        self.open.append(span)

    def ended(self, span):
        assert self.open.pop() is span


def test_a_call_is_heard_stage_by_stage(purifier):
    heard = Heard()
    with listening(heard):
        purifier(clips(3, 4, 16, 16), capture=False)
        with pytest.raises(ValueError):
            purifier(clips(3, 1, 16, 16))
    purifier(clips(3, 4, 16, 16))
    stages = ["encode", "chain", "inversion", *["evaluation"] * 2, "denoising", *["evaluation"] * 2]
    assert heard.names == [*stages, "flow", "guidance", "decode"] and not heard.open


def test_spans_end_where_a_stage_raises():
    def broken(prev, next):
        raise RuntimeError("no flow today")

    heard = Heard()
    with pytest.raises(RuntimeError, match="no flow today"), listening(heard):
        build_purifier(flow=broken)(clips(3, 4, 16, 16))
    assert heard.names[-1] == "flow" and not heard.open


def test_evaluations_are_counted_once():
    done = []
    counter = EvaluationCounter(done.append)
    chain, evaluation = Span("chain", (), evaluations=3), Span("evaluation", ())

    def run(times):
        counter.started(chain)
        for _ in range(times):
            counter.started(evaluation)
            counter.ended(evaluation)
        counter.ended(chain)

    run(3)  # eager
    assert done == [1, 1, 1]
    run(0)  # a replay
    assert done[3:] == [3]
    run(6)  # a capture, which runs it twice
    assert done[4:] == [1, 1, 1]


@pytest.mark.gpu
def test_threads_share_a_graph_on_streams_of_their_own():
    purifier = build_purifier().cuda()
    videos = [clips(3, 4, 16, 16, seed=seed).cuda() for seed in range(2)]
    expected = [purifier(video) for video in videos]
    torch.cuda.synchronize()
    wrong = []

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(purifier(videos[i]), expected[i]):
                    wrong.append(i)

    run_in_threads(2, run)
    assert not wrong and len(recordings(purifier)) == 1


@pytest.mark.gpu
def test_graphs_of_one_thread_share_their_memory():
    x = torch.zeros(2**24, device="cuda")  # 64 MiB, as each of the two tensors that a graph has at once

    def chained(x):
        for _ in range(3):
            x = x + 1
        return (x[:1].clone(),)

    def reserved(one_thread):
        captures = Captures(one_thread=one_thread)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(4):
            assert captures(partial(chained), x, first_activation=None)[0].item() == 3
        torch.cuda.empty_cache()
        assert all(captures.made.values())
        return torch.cuda.memory_reserved() - before

    assert reserved(True) <= reserved(False) - 3 * 2 * x.nbytes
