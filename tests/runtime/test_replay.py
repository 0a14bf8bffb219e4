"""A recorded call computes what the call itself does, in the recording's memory, whatever that held before."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import build_purifier, clips, run_in_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from videopure_fast import Purifier, ops, use_backend
from videopure_fast.runtime.replay import Recording, is_observed

WEIGHT, BIAS, STEP = clips(12, 12) - 0.5, clips(12, seed=1) - 0.5, clips(1, 2)

# Steps of a program on (3, 5, 12) tensors: views, torch's operators with and without an out= form, our ops.
STEPS = {
    "add": lambda a, b: a + b,
    "view": lambda a, b: a.transpose(0, 1).contiguous().view(5, 3, 12).transpose(0, 1),
    "slice": lambda a, b: torch.cat([a[:1], b[1:]]),
    "linear": lambda a, b: F.linear(a, WEIGHT, BIAS),
    "silu": lambda a, b: F.silu(a),
    "convolution": lambda a, b: F.conv2d(a[None], WEIGHT[:3, :9].reshape(3, 1, 3, 3), padding=1, groups=3)[0],
    "split": lambda a, b: sum(a.split([2, 10], -1)[1].split(5, -1)).repeat(1, 1, 3)[..., :12],
    "in place": lambda a, b: a.clone().mul_(0.5).add_(b),
    "linear_residual": lambda a, b: ops.linear_residual(a, WEIGHT, BIAS, b),
    "geglu": lambda a, b: ops.geglu(torch.cat([a, b], -1)),
    "group_norm_silu": lambda a, b: ops.group_norm_silu(a[None, :, None], BIAS, BIAS, groups=4)[0, :, 0],
    "ddim_step_": lambda a, b: ops.ddim_step_(a.clone()[None, :, :, None], b[None, :, :, None], STEP)[0, :, :, 0],
    "norm": lambda a, b: F.layer_norm(a, (12,), BIAS, BIAS),
    "sum": lambda a, b: a - b.sum(1, keepdim=True),
    "clamp": lambda a, b: a.clamp(torch.zeros_like(b), b.abs().round(decimals=1)),
    "index": lambda a, b: a[:, torch.arange(4, -1, -1)],
    "empty": lambda a, b: torch.cat([a, b[:0] + 1]),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    program=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)), max_size=12),
    backend=st.sampled_from(["cpu", "reference"]),
)
def test_any_program(program, backend):
    """Each step takes two of the last four results, so that memory is reused in many orders."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        made = [x, 2 * x, x - 1, x.flip(0)]
        for name, a, b in program:
            made = [*made[-3:], STEPS[name](made[a], made[b]).clamp(-9, 9)]
        return tuple(made)

    first, second = clips(3, 5, 12), clips(3, 5, 12, seed=1)
    with torch.no_grad(), use_backend(backend):
        recording = Recording(run, first)
        for x in (second, first, second):
            for actual, expected in zip(recording(x), run(x), strict=True):
                assert torch.equal(actual, expected)


def test_an_op_is_recorded_as_its_calls_of_the_extension():
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        normed = ops.group_norm_silu(x[None, :, None], BIAS, BIAS, groups=4)[0, :, 0]
        return ops.geglu(normed), ops.linear_residual(normed, WEIGHT, BIAS, x)

    x = clips(3, 5, 12)
    with torch.no_grad(), use_backend("cpu"):
        recording = Recording(run, x)
        for actual, expected in zip(recording(x), run(x), strict=True):
            assert torch.equal(actual, expected)
    names = [call.func.__name__ for call in recording._calls]
    assert names == ["group_norm_silu_cpu", "geglu_cpu", "linear_residual_cpu"]


def test_memory_is_reused():
    def run(x: Tensor) -> tuple[Tensor]:
        for _ in range(1000):
            x = F.silu(x + 1)
        return (x,)

    x = torch.zeros(2**20)  # all results together have 8 GB
    with torch.no_grad():
        torch.testing.assert_close(Recording(run, x)(x), run(x), rtol=0, atol=0)


def test_results_are_the_callers():
    recording = Recording(lambda x: (x + 1, x), torch.zeros(4))
    x = torch.ones(4)
    first = recording(x)
    second = recording(3 * x)
    assert torch.equal(first[0], 2 * x) and torch.equal(second[0], 4 * x)
    assert not first[0].is_inference() and torch.equal(first[1], x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x * x.sum().item(),), "(item|scalar).* reads a value on the host"),
        (lambda x: (x if torch.equal(x, x) else -x,), "equal.* reads a value on the host"),
        (lambda x: (x.new_empty(2**27),), "needs more than 256 MiB at once"),
    ],
)
def test_what_cannot_be_recorded(function, message):
    with pytest.raises(RuntimeError, match=message):
        Recording(function, torch.ones(3))
    assert torch.equal(ops.geglu(torch.ones(2)), torch.ones(1) * F.gelu(torch.ones(1))), "and nothing stays switched on"


# In a purifier


def captured(purifier) -> list[Recording | None]:
    return list(purifier._captures.made.values())


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        *(({}, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        ({"prompts": 2, "cfg_denoise": 2.0, "cfg_inversion": 1.5}, torch.float32),
    ],
)
def test_a_purifier_replays_from_the_second_call_on(settings, dtype):
    purifier = build_purifier(dtype=dtype, **settings)
    video, other = clips(2, 3, 5, 18, 16, dtype=dtype), clips(2, 3, 5, 18, 16, seed=1, dtype=dtype)
    eager = [purifier(v, return_votes=True, capture=False) for v in (video, other)]
    assert torch.equal(purifier(video, return_votes=True), eager[0])
    assert not captured(purifier)
    for _ in range(2):
        assert torch.equal(purifier(other, return_votes=True), eager[1])
        assert torch.equal(purifier(video, return_votes=True), eager[0])
        assert len(captured(purifier)) == 1 and isinstance(captured(purifier)[0], Recording)


def test_changed_weights_are_recorded_anew(purifier):
    video = clips(3, 4, 16, 16)
    for _ in range(3):
        before = purifier(video)
    with torch.no_grad():
        purifier.unet.conv_out.weight.mul_(0.5)
    after = [purifier(video) for _ in range(3)]
    assert not torch.equal(before, after[0])
    assert torch.equal(after[0], after[1]) and torch.equal(after[1], after[2])


def test_replaced_weights_are_seen(purifier):
    video = clips(3, 4, 16, 16)
    for _ in range(3):
        before = purifier(video)
    layer = purifier.unet.transformer_in.proj_in
    layer.weight = torch.nn.Parameter(2 * layer.weight, requires_grad=False)
    after = purifier(video)
    assert not torch.equal(before, after)
    assert torch.equal(after, purifier(video, capture=False))


def test_a_sweep_of_settings_makes_nothing_in_a_recordings_memory(purifier):
    """More sampler tables than are kept: those of a setting are dropped before its second call."""
    video = clips(3, 4, 16, 16)
    expected = {}
    for _ in range(3):
        for steps in range(1, 10):
            result = purifier.with_config(inversion_steps=steps)(video)
            assert torch.equal(result, expected.setdefault(steps, result))


def test_shapes_in_turn_are_not_recorded_over_and_over(purifier, monkeypatch):
    made = []

    class Counted(Recording):
        def __init__(self, function, x):
            made.append(tuple(x.shape))
            super().__init__(function, x)

    monkeypatch.setattr("videopure_fast.runtime.captures.Recording", Counted)
    for _ in range(5):
        for frames in range(2, 8):  # more shapes than are kept
            purifier(clips(3, frames, 16, 16))
    assert len(made) == len(set(made)) == 6


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device_changes_nothing(purifier, device):
    video = clips(3, 4, 16, 16)
    expected = [purifier(video) for _ in range(3)][-1]
    twin = build_purifier()
    with torch.device(device):
        for _ in range(3):
            assert torch.equal(twin(video), expected)


def test_a_flop_counter_sees_the_operators(purifier):
    video = clips(3, 4, 16, 16)
    counts = []
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            purifier(video)
        counts.append(counter.get_total_flops())
        purifier(video)
    # The first call also makes its sampler's tables.
    assert captured(purifier) and counts[0] > counts[1] == counts[2] > 0


def test_gradients_do_not_pass_through_a_replay(purifier):
    video = clips(3, 4, 16, 16)
    for _ in range(3):
        purifier(video)
    assert captured(purifier)
    video.requires_grad_()
    purifier(video).sum().backward()
    assert video.grad.abs().sum() > 0


def test_other_forms_and_large_clips_run_as_they_are(purifier, monkeypatch):
    embeds, flow, config = purifier.prompt_embeds, purifier.flow, purifier.config
    plain = Purifier(purifier.unet, purifier.vae, embeds, flow=flow, config=config, fast=False)
    for _ in range(3):
        plain(clips(3, 4, 16, 16))
    assert not captured(plain)
    monkeypatch.setattr("videopure_fast.runtime.captures._MOST_REPLAYED", 4 * 8 * 8 * 8 - 1)
    for _ in range(3):
        purifier(clips(3, 4, 16, 16))
    assert not captured(purifier)


def test_threads_share_a_recording(purifier):
    videos = [clips(3, 4, 16, 16, seed=seed) for seed in range(2)]
    expected = [purifier(video, capture=False) for video in videos]
    for _ in range(2):
        purifier(videos[0])
    wrong = []

    def run(i: int) -> None:
        for _ in range(5):
            if not torch.equal(purifier(videos[i]), expected[i]):
                wrong.append(i)

    run_in_threads(2, run)
    assert not wrong


def test_modes_of_other_threads_are_not_ours():
    """Threads that record at once leave torch's flag of a mode set, which belongs to no thread."""
    first, second = FlopCounterMode(display=False), FlopCounterMode(display=False)
    entered, left = threading.Event(), threading.Event()

    def other():
        with second:
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        assert entered.wait(60) and is_observed()
    assert not is_observed()
    left.set()
    thread.join()
    assert not is_observed()
