import io
import statistics
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import build_purifier, clips
from PIL import Image

from videopure_fast.defense.filters import (
    FILTERS,
    h264,
    jpeg,
    reconstruct,
    temporal_mean,
    temporal_median,
    temporal_shuffle,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((2, 3, 5, 6, 8), (1, 3, 1, 1, 1), (3, 3, 4, 7, 5), (1, 3, 2, 33, 18))  # odd sides, single frames and pixels
# PyAV is a dependency, but a machine that only measures kernels may do without it.
with_av = pytest.mark.skipif(find_spec("av") is None, reason="needs PyAV")
NAMED = [
    pytest.param(function, id=name, marks=with_av if name.startswith("H.264") else ())
    for name, function in FILTERS.items()
]
SMOOTHING = {temporal_mean: statistics.fmean, temporal_median: statistics.median}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tags(frames, batch=1):
    """Clips whose frames say which they are: frame f of clip b has the value (b * frames + f) / (batch * frames)."""
    values = torch.arange(batch * frames) / (batch * frames)
    return values.view(batch, 1, frames, 1, 1).expand(batch, 3, frames, 4, 4).contiguous()


def gradient_video(frames=6, side=32):
    """(1, 3, F, side, side): a smooth picture that moves, which codecs are made for."""
    y, x = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 3, side), indexing="ij")
    return torch.stack([torch.sin(torch.stack((x + t / 9, y, x + y))) / 2 + 0.5 for t in range(frames)], 1)[None]


def through_bytes(video):
    """(1, 3, F, H, W) -> frames (H, W, 3) uint8."""
    return [frame.permute(1, 2, 0).mul(255).round().byte().numpy().copy() for frame in video[0].unbind(1)]


# All of them


@pytest.mark.parametrize("function", NAMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_and_range_stay(function, dtype, shape):
    video = clips(*shape, dtype=dtype)
    before = video.clone()
    found = function(video)
    assert found.shape == video.shape and found.dtype == dtype and found.is_contiguous()
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(video, before)


@pytest.mark.parametrize("function", NAMED)
def test_batches_equal_singles_and_runs_repeat(function):
    video = clips(3, 3, 6, 18, 21)
    together = function(video)
    assert torch.equal(together, torch.cat([function(clip) for clip in video.split(1)]))
    assert torch.equal(together, function(video))


@pytest.mark.parametrize("function", NAMED)
@pytest.mark.parametrize("level", [0, 26, 128, 255])
def test_gray_is_a_fixed_point(function, level):
    video = torch.full((1, 3, 4, 17, 20), level / 255)
    torch.testing.assert_close(function(video), video, rtol=0, atol=1e-7 if level in (0, 255) else 1.01 / 255)


@pytest.mark.parametrize("function", NAMED)
def test_layout_in_memory_does_not_matter(function):
    video = clips(2, 3, 4, 10, 12)
    strided = video.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    found = function(strided)
    assert torch.equal(found, function(video)) and found.is_contiguous()


@pytest.mark.parametrize("function", NAMED)
def test_device_does_not_matter(function, device):
    video = clips(2, 3, 5, 16, 18)
    found = function(video.to(device))
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), function(video), rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", [*NAMED, pytest.param(lambda x: reconstruct(build_purifier(), x), id="VAE")])
def test_wrong_clips_are_refused_with_what_was_seen(function):
    video = clips(1, 3, 4, 16, 16)
    for wrong, seen in (([1], "list"), ((video * 255).byte(), "uint8"), (video.to("meta"), "meta")):
        with pytest.raises(TypeError, match=rf"{seen}.*accepted: .*\(B, 3, F, H, W\)"):
            function(wrong)
    for wrong in (video[0], video.transpose(1, 2), video[:0], video[:, :, :0]):
        with pytest.raises(ValueError, match=r"shape \(.*accepted: .*\(B, 3, F, H, W\)"):
            function(wrong)
    holed = video.clone()
    holed[0, 1, 2, 3, 4] = float("nan")
    for wrong, seen in (
        (holed, "from nan"),
        (video * 255, "values from"),
        (video - 1, "values from -"),
        (video / 0, "inf"),
    ):
        with pytest.raises(ValueError, match=rf"{seen}.*accepted: "):
            function(wrong)


# Smoothing along time


@pytest.mark.parametrize("function", SMOOTHING)
@pytest.mark.parametrize("frames, width", [(6, 1), (6, 3), (7, 5), (2, 5), (1, 3), (3, 9)])
def test_smoothing_equals_a_slow_loop(function, frames, width):
    video = clips(2, 3, frames, 2, 3, dtype=torch.float64)
    found = function(video, width)
    for b, c, f, y, x in np.ndindex(tuple(video.shape)):
        around = [min(max(g, 0), frames - 1) for g in range(f - width // 2, f + width // 2 + 1)]
        expected = SMOOTHING[function](video[b, c, g, y, x].item() for g in around)
        assert found[b, c, f, y, x].item() == pytest.approx(expected, abs=1e-15)


def test_ends_are_repeated():
    ramp = (torch.arange(6.0) / 5).view(1, 1, 6, 1, 1).expand(1, 3, 6, 1, 1)
    mean, median = (function(ramp, 5)[0, 0].flatten().mul(5).tolist() for function in SMOOTHING)
    assert mean == pytest.approx([0.6, 1.2, 2.0, 3.0, 3.8, 4.4])
    assert median == pytest.approx([0, 1, 2, 3, 4, 5])


def test_median_drops_a_single_bright_frame():
    video = torch.zeros(1, 3, 5, 2, 2)
    video[:, :, 2] = 1
    assert temporal_median(video, 3).count_nonzero() == 0
    assert temporal_mean(video, 3).count_nonzero() > 0


@pytest.mark.parametrize("function", SMOOTHING)
def test_float16_is_the_rounded_truth(function):
    video = clips(1, 3, 8, 4, 4, dtype=torch.float16)
    assert torch.equal(function(video, 5), function(video.double(), 5).half())


@pytest.mark.parametrize("function", SMOOTHING)
def test_gradients_of_smoothing(function):
    video = clips(1, 3, 4, 2, 2, dtype=torch.float64).mul(0.9).add(0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, 3), video)


def test_median_gives_the_gradient_to_the_middle_one_of_equals():
    video = torch.full((1, 3, 3, 1, 1), 0.5, requires_grad=True)
    temporal_median(video, 3)[:, :, 1].sum().backward()
    assert video.grad[0, 0].flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize("function", SMOOTHING)
def test_wrong_widths(function):
    video = clips(1, 3, 4, 4, 4)
    for wrong in (2, 4, 0, -3):
        with pytest.raises(ValueError, match=rf"width must be .*, got {wrong}"):
            function(video, wrong)
    for wrong in (3.0, True, "3"):
        with pytest.raises(TypeError, match="width must be an int, got"):
            function(video, wrong)


# Shuffling


@pytest.mark.parametrize("block", [None, 1, 3, 4, 20])
def test_shuffling_permutes_frames_within_blocks(block):
    video = tags(frames=10, batch=3)
    shuffled = temporal_shuffle(video, generator=seeded(), block=block)
    assert torch.equal(shuffled, shuffled[:, :1, :, :1, :1].expand_as(shuffled))  # whole frames
    for part, given in zip(shuffled.split(block or 10, 2), video.split(block or 10, 2), strict=True):
        assert torch.equal(part.sort(2).values, given)
    assert torch.equal(shuffled, video) == (block == 1)


def test_every_clip_has_an_order_of_its_own():
    shuffled = temporal_shuffle(tags(frames=10).expand(3, 3, 10, 4, 4), generator=seeded())
    assert len({tuple(clip[0, :, 0, 0].tolist()) for clip in shuffled}) == 3


def test_orders_come_from_the_generator_alone():
    video = clips(3, 3, 8, 4, 4)
    torch.manual_seed(1)
    first, other = (temporal_shuffle(video, generator=seeded(seed)) for seed in (0, 1))
    torch.manual_seed(2)
    generator = seeded(0)
    assert torch.equal(first, torch.cat([temporal_shuffle(clip, generator=generator) for clip in video.split(1)]))
    assert not torch.equal(first, other)


def test_all_orders_are_as_likely():
    generator = seeded()
    drawn = [tuple(temporal_shuffle(tags(3), generator=generator)[0, 0, :, 0, 0].mul(3).tolist()) for _ in range(600)]
    assert len(set(drawn)) == 6
    assert all(60 < drawn.count(order) < 140 for order in set(drawn))  # 100 expected, deviation 9


def test_the_named_shuffling_moves_frames():
    for frames in (2, 3, 8, 16, 32):
        video = tags(frames)
        shuffled = FILTERS["temporal shuffling"](video)
        assert not torch.equal(shuffled, video) and torch.equal(shuffled.sort(2).values, video)


def test_gradients_of_shuffling():
    video = clips(2, 3, 4, 2, 2, dtype=torch.float64).mul(0.9).add(0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_shuffle(x, generator=seeded()), video)
    assert torch.autograd.gradcheck(FILTERS["temporal shuffling"], video)


def test_wrong_generators_and_blocks():
    video = clips(1, 3, 4, 4, 4)
    with pytest.raises(TypeError, match="generator must be a torch.Generator on the CPU, got int"):
        temporal_shuffle(video, generator=0)
    with pytest.raises(ValueError, match="block must be 1 or more, got 0"):
        temporal_shuffle(video, generator=seeded(), block=0)
    with pytest.raises(TypeError, match="block must be an int, got 2.0"):
        temporal_shuffle(video, generator=seeded(), block=2.0)


@pytest.mark.gpu
def test_generators_of_a_gpu_are_refused():
    with pytest.raises(ValueError, match="generator must be a torch.Generator on the CPU, got one on cuda"):
        temporal_shuffle(clips(1, 3, 4, 4, 4), generator=torch.Generator("cuda"))


# Codecs


def test_jpeg_equals_pillow_frame_by_frame():
    video = clips(1, 3, 3, 9, 14)
    for frame, found in zip(through_bytes(video), through_bytes(jpeg(video, 40)), strict=True):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, format="JPEG", quality=40)
        assert np.array_equal(np.asarray(Image.open(file)), found)


@pytest.mark.parametrize("frames", [1, 2, 7, 30])
def test_h264_equals_a_file_of_it(frames):
    av = pytest.importorskip("av")
    video = (gradient_video(frames) + clips(1, 3, frames, 32, 32) / 4).clamp(0, 1)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        options = {"crf": "30", "preset": "medium", "mbtree": "0", "threads": "1"}
        stream = container.add_stream("libx264", rate=25, options=options, width=32, height=32, pix_fmt="yuv420p")
        for frame in through_bytes(video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(expected, through_bytes(h264(video, 30)))


@pytest.mark.parametrize("sides", [(1, 1), (17, 32), (16, 31), (15, 33)], ids=str)
def test_h264_pads_odd_sides_by_replication(sides):
    video = clips(1, 3, 3, *sides)
    even = torch.cat([video, video[..., -1:, :]], 3) if sides[0] % 2 else video
    even = torch.cat([even, even[..., -1:]], 4) if sides[1] % 2 else even
    assert torch.equal(h264(video), h264(even)[..., : sides[0], : sides[1]])


def test_h264_keeps_the_frames_in_order():
    video = torch.linspace(0.1, 0.9, 40).view(1, 1, 40, 1, 1).expand(2, 3, 40, 16, 16).clone()
    video[1] = video[1].flip(1)
    torch.testing.assert_close(h264(video, 10), video, rtol=0, atol=0.02)


@pytest.mark.parametrize("codec, settings", [(jpeg, (95, 75, 40, 5)), (h264, (0, 18, 30, 51))], ids=["jpeg", "h264"])
def test_error_rises_as_quality_falls(codec, settings):
    video = (gradient_video() + clips(1, 3, 6, 32, 32) / 10).clamp(0, 1)
    errors = [(codec(video, setting) - video).square().mean().item() for setting in settings]
    assert errors == sorted(errors) and errors[-1] > 2 * errors[0] > 0


@pytest.mark.parametrize("codec", [jpeg, h264])
def test_codecs_lose_a_checkerboard_of_color_and_keep_a_smooth_clip(codec):
    """The board is 16/255 of red against green at equal luma: chroma of half the resolution cannot hold it."""
    smooth = gradient_video() * 0.8 + 0.1
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    color = torch.tensor([1, -0.299 / 0.587, 0]).view(3, 1, 1, 1) * 16 / 255
    board = torch.where((x + y) % 2 == 0, 1, -1) * color
    kept = codec(smooth + board) - codec(smooth)
    assert (kept * board).mean().abs() < 0.05 * (board * board).mean()
    assert (codec(smooth) - smooth).abs().mean() < 5 / 255


@pytest.mark.parametrize("codec", [jpeg, h264])
def test_codecs_change_a_checkerboard_of_gray(codec):
    """4/255, the size of an attack, on a smooth clip."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    board = torch.where((x + y) % 2 == 0, 1, -1) * 4 / 255
    smooth = gradient_video() * 0.8 + 0.1
    kept = codec(smooth + board) - codec(smooth)
    assert (kept - board).abs().mean() > 1 / 255


def test_h264_does_not_depend_on_what_memory_held_before():
    """x264's macroblock tree does, on frames as small as these."""
    video = (gradient_video(30) + clips(1, 3, 30, 32, 32) / 4).clamp(0, 1)
    expected = h264(video, 30)
    for fill in range(0, 240, 6):
        junk = [np.full(size, fill, np.uint8) for size in (3000, 40_000, 100_000)]
        del junk
        assert torch.equal(h264(video, 30), expected)


@pytest.mark.parametrize("codec", [jpeg, h264])
def test_codecs_refuse_to_lose_a_gradient(codec):
    video = clips(1, 3, 2, 16, 16).requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{codec.__name__} has no gradient.*attacks\.bpda"):
        codec(video)
    with torch.no_grad():
        found = codec(video)
    assert not found.requires_grad and torch.equal(found, codec(video.detach()))


def test_wrong_qualities():
    video = clips(1, 3, 2, 16, 16)
    for codec, name, wrong, accepted in (
        (jpeg, "quality", 0, "1 to 95"),
        (jpeg, "quality", 96, "1 to 95"),
        (h264, "crf", -1, "0 to 51"),
        (h264, "crf", 52, "0 to 51"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {accepted}, got {wrong}"):
            codec(video, wrong)
        with pytest.raises(TypeError, match=f"{name} must be an int, got 7.5"):
            codec(video, 7.5)


def test_h264_without_libx264_says_so(monkeypatch):
    av = pytest.importorskip("av")

    class Without:
        @staticmethod
        def create(name, mode):
            return av.Codec(f"no_{name}", mode)

    monkeypatch.setattr(av, "CodecContext", Without)
    with pytest.raises(RuntimeError, match="PyAV was built without"):
        h264(clips(1, 3, 2, 16, 16))


# The VAE round trip


def test_reconstruct_is_encode_and_decode(purifier):
    video = clips(2, 3, 4, 16, 18)
    assert torch.equal(reconstruct(purifier, video), purifier.decode(purifier.encode(video)))
    assert reconstruct(purifier, video.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="purifier must be a Purifier, got str"):
        reconstruct("tiny", video)


def test_reconstruct_pads_sides_and_crops_back(purifier):
    video = clips(1, 3, 2, 15, 17)
    even = torch.cat([video, video[..., -1:, :]], 3)
    even = torch.cat([even, even[..., -1:]], 4)
    assert torch.equal(reconstruct(purifier, video), reconstruct(purifier, even)[..., :15, :17])


def test_gradients_reach_through_the_vae(purifier):
    video = clips(1, 3, 2, 16, 16).requires_grad_()
    reconstruct(purifier, video).sum().backward()
    assert video.grad.abs().sum() > 0
