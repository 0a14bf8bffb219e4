"""The compiled CPU forms: any number of threads, vector arithmetic, sizes around a vector's width, strides."""

from __future__ import annotations

import pytest
import torch
from op_cases import INTERPRETED, LAYOUTS, check, laid_out, normal
from torch import Tensor

from videopure_fast.ops import native
from videopure_fast.ops.feed_forward import feed_forward_native
from videopure_fast.ops.geglu import geglu_native
from videopure_fast.ops.group_norm_silu import group_norm_silu_native
from videopure_fast.ops.linear_geglu import linear_geglu_native
from videopure_fast.ops.linear_residual import linear_residual_native
from videopure_fast.ops.norm_temporal_attention import norm_temporal_attention_native
from videopure_fast.ops.temporal_attention import temporal_attention_native
from videopure_fast.ops.temporal_conv import temporal_conv_native

pytestmark = pytest.mark.skipif(INTERPRETED, reason="checks the cpu backend")
EPSILON = torch.finfo(torch.float32).eps


def same_bits(op, *arguments) -> Tensor:
    """The op's result, which is the same for 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(op(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    return results[0]


# These are large enough for three threads.
def test_threads_do_not_change_a_bit_of_temporal_attention():
    same_bits(temporal_attention_native, normal(2, 7, 11, 9, 3 * 40), 5)


def test_threads_do_not_change_a_bit_of_geglu():
    same_bits(geglu_native, normal(531, 2 * 101))


@pytest.mark.parametrize("clips", [1, 5])
@pytest.mark.parametrize("over_frames", [False, True])
def test_threads_do_not_change_a_bit_of_group_norm_silu(clips, over_frames):
    frames = 2 if clips == 1 else 3
    x = normal(clips, frames, 23, 29, 40, mean=3.0)
    same_bits(group_norm_silu_native, x, normal(40), normal(40, seed=1), None, None, 8, 1e-5, over_frames, True)


def check_group_norm(*tensors: Tensor | None, **settings) -> None:
    check(
        "cpu", "cpu", "group_norm_silu", *tensors, None, **{"eps": 1e-5, "over_frames": False, "silu": True, **settings}
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error, in units of float32's epsilon."""
    return ((actual.double() - expected).abs() / expected.abs()).max().item() / EPSILON


@pytest.mark.parametrize("limit", [1e-30, 1e-3, 0.1, 1.0, 12.0])
def test_gelu_is_right_to_its_last_digits(limit):
    """Also in the negative tail, where 1 + erf would cancel."""
    gate = torch.linspace(-limit, limit, 200_000)
    x = gate.double()
    expected = x * torch.erfc(-x / 2**0.5) / 2
    assert relative_error(geglu_native(torch.cat([torch.ones_like(gate), gate])), expected) < 4
    column = geglu_native(torch.stack([torch.ones_like(gate), gate], -1))[:, 0]
    assert relative_error(column, expected) < 4, "one value a row"


def test_gelu_beyond_float32():
    gate = torch.tensor([0.0, -0.0, -13.0, -14.0, -1e4, -3e38, -torch.inf, 14.0, 1e4, 3e38, torch.inf, torch.nan])
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 0, 14, 1e4, 3e38, torch.inf, torch.nan])
    actual = geglu_native(torch.cat([torch.ones_like(gate), gate]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-36, equal_nan=True)


def test_silu_is_right_to_its_last_digits():
    """With zero weight the op is SiLU of the bias, one channel per value."""
    x = torch.linspace(-86, 86, 100_001)
    zeros = torch.zeros_like(x)
    actual = group_norm_silu_native(zeros.view(1, 1, 1, 1, -1), zeros, x, None, None, 1, 1e-5, False, True).flatten()
    expected = x.double() * torch.sigmoid(x.double())
    nonzero = x != 0
    assert relative_error(actual[nonzero], expected[nonzero]) < 4
    assert (actual[~nonzero] == 0).all()


def test_silu_beyond_float32():
    x = torch.tensor([-88.0, -1e4, -3e38, 88.0, 1e4, 3e38, torch.inf, torch.nan])
    zeros = torch.zeros_like(x)
    actual = group_norm_silu_native(zeros.view(1, 1, 1, 1, -1), zeros, x, None, None, 1, 1e-5, False, True).flatten()
    expected = torch.tensor([0, 0, 0, 88, 1e4, 3e38, torch.inf, torch.nan])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-35, equal_nan=True)


def test_softmax_is_right_to_its_last_digits():
    """Two frames with keys 0 and x and values 0 and 1: the result is the second weight, exp(x) / (1 + exp(x))."""
    x = torch.linspace(-86, 86, 20_001)
    qkv = torch.zeros(1, 2, 1, len(x), 3)
    qkv[..., 0] = 1
    qkv[:, 1, :, :, 1] = x
    qkv[:, 1, :, :, 2] = 1
    weight = temporal_attention_native(qkv, 1).flatten(0, -2)
    for frame in weight.view(2, -1):
        assert relative_error(frame, torch.sigmoid(x.double())) < 4


@pytest.mark.parametrize("frames", [2, 16, 33])
def test_softmax_of_huge_scores(frames):
    """Scores of 1e4, 0 and -1e4: each query averages the frames with the largest score."""
    sign = torch.tensor([-1.0, 0.0, 1.0]).repeat(frames)[:frames]
    qkv = torch.zeros(1, frames, 1, 1, 3)
    qkv[0, :, 0, 0, 0] = 100
    qkv[0, :, 0, 0, 1] = 100 * sign
    qkv[0, :, 0, 0, 2] = torch.arange(frames)
    largest = sign == sign.max()
    expected = torch.arange(frames)[largest].float().mean()
    actual = temporal_attention_native(qkv, 1)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=1e-6, atol=0)
    check("cpu", "cpu", "temporal_attention", qkv, heads=1, scale=frames)


@pytest.mark.parametrize("score", [0.0, 1e4, -1e4, 3e37])
def test_equal_scores_average(score):
    qkv = normal(1, 21, 2, 3, 3 * 4)
    qkv[..., 0:4], qkv[..., 4:8] = 1, score / 4
    expected = qkv[..., 8:].mean(1, keepdim=True).expand(1, 21, 2, 3, 4)
    torch.testing.assert_close(temporal_attention_native(qkv, 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [0, 4, 8])
def test_nan_of_one_frame_reaches_what_attends_to_it(part):
    """But no other pixel: unused lanes and padding of one pixel must not leak into the next."""
    qkv = normal(1, 5, 1, 3, 3 * 4)
    clean = temporal_attention_native(qkv, 2)
    qkv[0, 2, 0, 1, part] = torch.nan
    actual = temporal_attention_native(qkv, 2)
    reached = torch.zeros_like(actual, dtype=torch.bool)
    heads = reached.view(1, 5, 1, 3, 2, 2)
    if part == 0:
        heads[0, 2, 0, 1, 0] = True
    elif part == 4:
        heads[0, :, 0, 1, 0] = True
    else:
        heads[0, :, 0, 1, 0, 0] = True
    assert torch.equal(actual.isnan(), reached)
    assert torch.equal(actual[~reached], clean[~reached])


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 65, 200, 1024])
def test_any_number_of_frames(frames):
    check("cpu", "cpu", "temporal_attention", normal(1, frames, 1, 3, 3 * 16), heads=2)


@pytest.mark.parametrize("size", [1, 3, 5, 8, 9, 16, 31, 40, 64, 200])
@pytest.mark.parametrize("heads", [1, 3])
def test_any_head_size(size, heads):
    check("cpu", "cpu", "temporal_attention", normal(2, 7, 2, 3, 3 * heads * size, seed=size), heads=heads)


def test_more_heads_than_are_copied_at_once():
    check("cpu", "cpu", "temporal_attention", normal(1, 65, 1, 2, 3 * 7 * 64), heads=7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = laid_out(normal(2, 5, 3, 4, 48), layout)
    weight, bias = (laid_out(normal(48, seed=seed), layout) for seed in (1, 2))
    embedding = laid_out(normal(2, 48, seed=3), layout)
    check("cpu", "cpu", "temporal_attention", x, heads=4)
    check("cpu", "cpu", "geglu", x)
    for over_frames in (False, True):
        check_group_norm(x, weight, bias, embedding, groups=6, over_frames=over_frames)


@pytest.mark.parametrize("dimensions", [(0, 1), (1, 2), (0, 3), (2, 3), (3, 4)])
def test_swapped_dimensions(dimensions):
    """Strides by which height and width can be merged into one dimension, and others."""
    x = normal(6, 6, 6, 6, 6).transpose(*dimensions)
    check("cpu", "cpu", "temporal_attention", x, heads=2)
    check("cpu", "cpu", "geglu", x)
    check_group_norm(x, normal(6), normal(6, seed=1), None, groups=2)


@pytest.mark.parametrize("channels", [2, 6, 32, 34, 254, 258])
def test_any_number_of_channels_of_a_gate(channels):
    check("cpu", "cpu", "geglu", normal(7, channels))
    check("cpu", "cpu", "geglu", normal(channels))


# Sizes around a chunk's 64 pixels and around the 8 and 32 channels that are summed together.
@pytest.mark.parametrize("pixels", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (5, 5), (6, 2), (8, 8), (40, 4), (75, 5)])
@pytest.mark.parametrize("over_frames", [False, True])
def test_any_size_of_a_group(pixels, channels, groups, over_frames):
    x = normal(2, 3, 1, pixels, channels, seed=pixels)
    weight, bias, embedding = normal(channels), normal(channels, seed=1), normal(2, channels, seed=2)
    check_group_norm(x, weight, bias, embedding, groups=groups, over_frames=over_frames)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize("mean", [100.0, -1e4])
def test_statistics_survive_a_large_mean(mean, over_frames, silu):
    x = normal(2, 3, 13, 17, 40, mean=mean)
    weight, bias = normal(40, mean=1.0), normal(40, seed=1)
    check_group_norm(x, weight, bias, None, groups=8, over_frames=over_frames, silu=silu)


def test_statistics_survive_means_that_the_embedding_moves():
    """Channel means of a group that are far apart before the embedding is added, and equal after it."""
    means = 1000 * normal(2, 40)
    x = normal(2, 3, 13, 17, 40) - means[:, None, None, None]
    check_group_norm(x, normal(40), normal(40, seed=1), means, groups=8)


def test_statistics_survive_an_outlier_at_the_start():
    """The first pixel of a chunk is subtracted from the others before they are summed."""
    x = normal(1, 2, 20, 20, 16)
    x[0, 0, 0, 0] = 1000
    check_group_norm(x, normal(16), normal(16, seed=1), None, groups=4, over_frames=True, scale=20)


def test_constant_channels_have_no_deviation():
    x = torch.full((1, 2, 9, 9, 8), 0.1)
    check_group_norm(x, normal(8), normal(8, seed=1), None, groups=2)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_composites_of_few_frames(frames):
    x, residual = normal(2, frames, 3, 4, 8), normal(2, frames, 3, 4, 6, seed=1)
    scale, shift, taps, bias = normal(8), normal(8, seed=2), normal(3, 6, 8, seed=3, scale=0.3), normal(6, seed=4)
    check("cpu", "cpu", "temporal_conv", x, taps, bias, residual)
    check("cpu", "cpu", "temporal_conv", x, taps, bias, None)
    position, weight = normal(frames, 8, seed=5), normal(24, 8, seed=6, scale=0.3)
    check("cpu", "cpu", "norm_temporal_attention", x, scale, shift, weight, position, heads=2, eps=1e-5)


def test_composites_leave_their_inputs_alone():
    x, residual = normal(1, 3, 2, 2, 8), normal(1, 3, 2, 2, 8, seed=1)
    weight, taps, bias, position = normal(8, 8), normal(3, 8, 8), normal(8), normal(3, 8)
    tensors = (x, residual, weight, taps, bias, position)
    before = [tensor.clone() for tensor in tensors]
    linear_residual_native(x, weight, bias, residual, None)
    linear_residual_native(x, torch.cat([weight, weight], 1), None, x, residual)
    linear_geglu_native(x, weight, bias)
    temporal_conv_native(x, taps, bias, x)
    norm_temporal_attention_native(x, bias, bias, weight[:6], position, 1, 1e-5)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


# Vector widths of other processors, up to this one's.
@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("size", [1, 7, 16, 33, 80])
def test_products_by_vectors_of_other_processors(monkeypatch, width, size):
    if width > native.vector_width():
        pytest.skip("this processor's vectors are shorter")
    monkeypatch.setattr(native, "vector_width", lambda: width)
    # More rows than a block, and partial last tiles of each kind.
    x, frames = normal(151, 24), normal(1, 3, 5, 31, 24)
    weight, bias = normal(size, 24, seed=1, scale=0.2), normal(size, seed=2)
    check("cpu", "cpu", "linear_residual", x, weight, bias, normal(151, size, seed=3), None)
    check("cpu", "cpu", "linear_geglu", x, normal(2 * size, 24, scale=0.2), normal(2 * size))
    norm = normal(24, seed=4), normal(24, seed=5)
    taps, residual = normal(3, size, 24, seed=6, scale=0.1), normal(1, 3, 5, 31, size, seed=7)
    check("cpu", "cpu", "temporal_conv", frames, taps, bias, residual)
    weight = normal(3 * size, 24, scale=0.2)
    check("cpu", "cpu", "norm_temporal_attention", frames, *norm, weight, None, heads=1, eps=1e-5)
    layers = normal(2 * size, 24, scale=0.2), normal(2 * size), normal(24, size, scale=size**-0.5), normal(24)
    check("cpu", "cpu", "feed_forward", x, *norm, *layers, scale=4, eps=1e-5)


def test_threads_do_not_change_a_bit_of_products():
    rows, frames, vector = normal(700, 40), normal(2, 3, 9, 21, 40), normal(40)
    same_bits(linear_residual_native, rows, normal(56, 40), normal(56), normal(700, 56), None)
    same_bits(linear_geglu_native, rows, normal(112, 40), normal(112))
    layers = normal(112, 40), normal(112), normal(40, 56), vector
    same_bits(feed_forward_native, rows, vector, vector, *layers, 1e-5)
    same_bits(temporal_conv_native, frames, normal(3, 40, 40), vector, frames)
    same_bits(norm_temporal_attention_native, frames, vector, vector, normal(120, 40), None, 5, 1e-5)


def test_products_survive_a_large_mean():
    frames, weight, vector = normal(1, 4, 3, 5, 48, mean=100.0), normal(144, 48, scale=0.1), normal(48, seed=1)
    check("cpu", "cpu", "norm_temporal_attention", frames, vector, vector, weight, None, heads=4, eps=1e-5)


def test_autocast_changes_nothing():
    """The extension reads float32: a half-precision product would be misread."""
    x, weight, bias = normal(1, 3, 2, 2, 8), normal(24, 8, seed=1), normal(24, seed=2)
    taps, scale = normal(3, 8, 8, seed=3), normal(8, seed=4)

    def results() -> list[Tensor]:
        return [
            linear_geglu_native(x, weight, bias),
            linear_residual_native(x, weight[:8], bias[:8], x, None),
            norm_temporal_attention_native(x, scale, scale, weight, normal(3, 8), 2, 1e-5),
            temporal_conv_native(x, taps, scale, x),
        ]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
