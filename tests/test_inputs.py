"""Layouts and ranges of videos: what is refused says what mends it, and "BTCHW" is accepted where it is said."""

import re

import pytest
import torch
from conftest import clips

from videopure_fast import Purifier, purify
from videopure_fast.inputs import check_video

BCTHW, BTCHW = "accepted: (B, 3, F, H, W) or (3, F, H, W)", "accepted: (B, F, 3, H, W) or (F, 3, H, W)"


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["float32", "uint8", "float16"])
def test_purify_takes_and_returns_the_layout_of_hugging_face(batched, kind):
    video = clips(2, 3, 4, 16, 16) if batched else clips(3, 4, 16, 16)
    video = (video * 255).byte() if kind == "uint8" else video.to(getattr(torch, kind))
    options = {"device": "cpu", "inversion_steps": 0}
    expected, votes = (purify(video, return_votes=every, **options) for every in (False, True))
    found = purify(video.transpose(-4, -3), layout="BTCHW", **options)
    assert torch.equal(found, expected.transpose(-4, -3)) and found.dtype == video.dtype and found.is_contiguous()
    found = purify(video.transpose(-4, -3), layout="BTCHW", return_votes=True, **options)
    assert torch.equal(found, votes.transpose(-4, -3)) and votes.shape[-5] == 2
    purifier = Purifier.from_pretrained("tiny", device="cpu", inversion_steps=0)
    assert torch.equal(votes, purifier(video, return_votes=True)) and torch.equal(expected, purifier(video))


@pytest.mark.parametrize(
    "shape, layout, accepted, advice",
    [
        (
            (1, 8, 3, 16, 16),
            "BCTHW",
            BCTHW,
            "looks like (B, F, 3, H, W): pass layout='BTCHW' to purify, or video.trans",
        ),
        ((8, 3, 16, 16), "BCTHW", BCTHW, "looks like (B, F, 3, H, W): pass layout='BTCHW' to purify"),
        ((1, 8, 16, 16, 3), "BCTHW", BCTHW, "looks like (B, F, H, W, 3): pass it with .movedim(-1, -4)"),
        ((8, 16, 16, 3), "BCTHW", BCTHW, "looks like (B, F, H, W, 3)"),
        ((3, 8, 16, 3), "BCTHW", BCTHW, ""),
        ((1, 3, 8, 16, 16), "BTCHW", BTCHW, "looks like (B, 3, F, H, W), layout='BCTHW'"),
        ((3, 8, 16, 16), "BTCHW", BTCHW, "looks like (B, 3, F, H, W), layout='BCTHW'"),
        ((8, 4, 16, 16), "BTCHW", BTCHW, ""),
        ((1, 1, 3, 16, 16), "BTCHW", BTCHW, ""),
    ],
)
def test_other_layouts_are_named(shape, layout, accepted, advice):
    with pytest.raises(ValueError, match=re.escape(f"video has shape {shape}; {accepted}") + ".*" + re.escape(advice)):
        purify(torch.rand(shape), layout=layout)


@pytest.mark.parametrize(
    "change, advice",
    [
        (
            lambda x: x * 255,
            "floats in [0, 1], or uint8; these look like 0..255: divide by 255, or pass uint8",
        ),
        (lambda x: (x * 255).half(), "these look like 0..255"),
        (lambda x: 2 * x - 1, "these look normalized: pass them as they were before"),
        (lambda x: (x - 0.45) / 0.225, "these look normalized"),
        (lambda x: x * 1.1 - 0.05, ".clamp(0, 1) removes what resizing adds"),
        (lambda x: x * 1000, "accepted: floats in [0, 1], or uint8"),
    ],
)
def test_other_ranges_are_named(change, advice):
    video = clips(3, 4, 16, 16)
    video[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=re.escape(advice)):
        check_video(change(video))


@pytest.mark.parametrize("layout", ["BHWC", "btchw", None, 3])
def test_unknown_layouts_are_refused(layout):
    with pytest.raises(ValueError, match=f"layout is {layout!r}; accepted: BCTHW, BTCHW"):
        purify(clips(3, 4, 16, 16), layout=layout)
    with pytest.raises(TypeError, match="return_votes must be a bool, got 1"):
        purify(clips(3, 4, 16, 16), return_votes=1)
