"""Pictures as they are meant to be shown: orientation and color."""

import av
import numpy as np
import pytest
import torch
from media_files import MS, encode

from videopure_fast.data import video as video_module
from videopure_fast.data.video import probe, read_frames
from videopure_fast.data.video_writer import VideoWriter

ONE, LAST = 1 << 16, 1 << 30
# What QuickTime's matrix (a, b, c, d) moves: the point (x, y) to (ax + cy, bx + dy); y grows downward.
TURNS = {
    "as it is": ((1, 0, 0, 1), lambda x: x),
    "90 degrees clockwise": ((0, 1, -1, 0), lambda x: x.rot90(-1, (1, 2))),
    "180 degrees": ((-1, 0, 0, -1), lambda x: x.rot90(2, (1, 2))),
    "90 degrees counterclockwise": ((0, -1, 1, 0), lambda x: x.rot90(1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda x: x.flip(2)),
    "upside down": ((1, 0, 0, -1), lambda x: x.flip(1)),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 2)),
    "transposed by the other diagonal": ((0, -1, -1, 0), lambda x: x.transpose(1, 2).flip(1, 2)),
}
COLORS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (200, 30, 200), (255, 0, 0), (0, 0, 255), (255, 255, 0)]
COLOR_ERROR = 4  # levels, after encoding and decoding


def set_matrix(path, matrix, last_column=(0, 0, LAST), place=(0, 0)):
    """Give an mp4 the display matrix (a, b, c, d), in 65536ths."""
    a, b, c, d = matrix
    u, v, w = last_column
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    values = (a, b, u, c, d, v, *place, w)
    content[start : start + 36] = b"".join(int(value).to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", TURNS)
def test_display_matrices_are_applied(tmp_path, name):
    matrix, turned = TURNS[name]
    path = encode(tmp_path / "clip.mp4", times=[0, 40, 80])
    upright = list(read_frames(probe(path), 48))
    found = probe(set_matrix(path, [value * ONE for value in matrix], place=(-48 * ONE, 64 * ONE)))
    assert found.orientation == matrix
    assert (found.height, found.width) == ((48, 64) if matrix[0] else (64, 48))
    for frame, expected in zip(read_frames(found, 48), map(turned, upright), strict=True):
        assert torch.equal(frame, expected)


def test_a_mirrored_picture_has_its_right_on_the_left(tmp_path):
    path = encode(tmp_path / "front.mp4", times=[0, 40], picture=[[(220, 30, 30), (30, 220, 30)], [(30, 30, 220)] * 2])
    frame = next(read_frames(probe(set_matrix(path, (-ONE, 0, 0, ONE))), 48))
    assert (frame[:, 12, 16] - torch.tensor([30, 220, 30])).abs().max() <= COLOR_ERROR
    assert (frame[:, 12, 48].int() - torch.tensor([220, 30, 30])).abs().max() <= COLOR_ERROR


@pytest.mark.parametrize(
    "matrix, last",
    [
        ([46341, 46341, -46341, 46341], (0, 0, LAST)),  # 45 degrees
        ([2 * ONE, 0, 0, ONE], (0, 0, LAST)),
        ([ONE, 0, 0, ONE // 2], (0, 0, LAST)),
        ([0, 2 * ONE, -ONE, 0], (0, 0, LAST)),
        ([ONE, ONE, 0, ONE], (0, 0, LAST)),  # sheared
        ([0, 0, 0, 0], (0, 0, LAST)),
        ([ONE - 1, 0, 0, ONE], (0, 0, LAST)),
        ([-ONE, 0, 0, ONE], (1, 0, LAST)),  # perspective
        ([-ONE, 0, 0, ONE], (0, 0, LAST // 2)),
        ([-(1 << 31), 0, 0, -(1 << 31)], (0, 0, LAST)),
    ],
)
def test_matrices_that_do_more_are_refused(tmp_path, matrix, last):
    path = set_matrix(encode(tmp_path / "odd.mp4", times=[0, 40]), matrix, last)
    with pytest.raises(ValueError, match="display matrix .*; accepted: turns by 90 degrees and mirrors") as raised:
        probe(path)
    assert str(path) in str(raised.value)


def test_the_pixel_aspect_turns_with_the_picture(tmp_path):
    path = tmp_path / "anamorphic.mp4"
    source = probe(encode(tmp_path / "clip.mp4", times=[0, 40]))
    with VideoWriter(
        path, height=48, width=64, rate=25, source=source.__class__(**{**vars(source), "pixel_aspect": 2})
    ) as w:
        for frame in read_frames(source, 48):
            w.write(frame)
    assert probe(path).pixel_aspect == 2
    assert probe(set_matrix(path, TURNS["transposed"][0] * np.array(ONE))).pixel_aspect == pytest.approx(0.5)


def test_torchcodec_is_left_out_where_it_may_differ(tmp_path, monkeypatch):
    def refuse():
        raise AssertionError("torchcodec was asked")

    turned = probe(set_matrix(encode(tmp_path / "clip.mp4", times=[0, 40]), (-ONE, 0, 0, ONE)))
    large = probe(write_color(tmp_path / "large.avi", COLORS[0], 720))
    monkeypatch.setattr(video_module, "torchcodec_decoder", lambda: lambda *_args, **_options: refuse())
    assert turned.orientation != (1, 0, 0, 1) and large.assumed_bt709
    for found in (turned, large):
        assert len(list(read_frames(found, 48))) == 2


def write_color(path, color, height, rate=10):
    frame = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, height, 64)
    with VideoWriter(path, height=height, width=64, rate=rate) as writer:
        for _ in range(2):
            writer.write(frame)
    return path


def first_pixel(path):
    found = probe(path)
    return next(read_frames(found, min(found.height, found.width)))[:, 20, 20].tolist()


@pytest.mark.parametrize("height, tags", [(718, (6, 6, 6)), (720, (1, 1, 1)), (48, (6, 6, 6))])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_colors_are_tagged_and_come_back(tmp_path, suffix, height, tags):
    for color in COLORS[:: 3 if height > 48 else 1]:
        path = write_color(tmp_path / f"color{suffix}", color, height)
        assert first_pixel(path) == pytest.approx(color, abs=COLOR_ERROR)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        frame = next(container.decode(video=0))
    if suffix == ".avi":  # it has no tags: its readers go by size, as ours does
        assert codec.colorspace == 2
    else:
        assert (codec.color_primaries, codec.color_trc, codec.colorspace) == tags
        assert codec.color_range == frame.color_range == 1 and frame.colorspace == tags[2]


@pytest.mark.parametrize("height", [48, 720])
@pytest.mark.parametrize(
    "tag, full, matrix",
    [
        (1, False, "ITU709"),
        (5, False, "ITU601"),
        (6, False, "ITU601"),
        (7, False, "SMPTE240M"),
        (9, False, "BT2020"),
        (1, True, "ITU709"),
        (6, True, "ITU601"),
        (2, False, None),  # untagged: by size
    ],
)
def test_tags_of_the_input_are_honored(tmp_path, height, tag, full, matrix):
    matrix = matrix or ("ITU709" if height >= 720 else "ITU601")
    for color in COLORS[::2]:
        path = tmp_path / "tagged.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
            stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = tag, 2 if full else 1
            rgb = av.VideoFrame.from_ndarray(np.full((height, 64, 3), color, np.uint8), format="rgb24")
            for time in (0, 40):
                options = {"dst_color_range": "JPEG" if full else "MPEG"}
                picture = rgb.reformat(format="yuv420p", dst_colorspace=matrix, **options)
                picture.pts, picture.time_base = time, MS
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        assert probe(path).assumed_bt709 == (tag == 2 and height == 720)
        assert first_pixel(path) == pytest.approx(color, abs=COLOR_ERROR)


@pytest.mark.parametrize("height", [48, 720])
def test_colors_of_a_gif_are_exact(tmp_path, height):
    path = write_color(tmp_path / "color.gif", COLORS[0], height)
    assert first_pixel(path) == list(COLORS[0]) and not probe(path).assumed_bt709
