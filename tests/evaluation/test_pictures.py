"""Pictures of an evaluation: their sizes, what they show, and what they refuse."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import clips
from PIL import Image

from videopure_fast.data.video import probe, read_frames
from videopure_fast.evaluation.figures import draw_accuracy, write_side_by_side, write_strip
from videopure_fast.evaluation.runner import Examples
from videopure_fast.evaluation.tables import Accuracy
from videopure_fast.measure.plot import COLORS

CLASSES = ("left", "right")


def found() -> Examples:
    clean = clips(2, 3, 10, 32, 32)
    attacked = (clean + 4 / 255 * torch.ones_like(clean)).clamp(0, 1)
    return Examples(clean, attacked, clean * 0, *(torch.tensor(labels) for labels in ([0, 1], [1, 1], [0, 0])))


def row(threat: str, eps: float, defense: str, accuracy: float, seconds: float) -> Accuracy:
    threat_model = threat.split()[0]
    return Accuracy(threat_model, threat, eps, defense, 10, accuracy, accuracy - 0.1, accuracy + 0.1, 0, seconds, None)


ROWS = [
    row("clean", 0.0, "none", 1.0, 0.001)._replace(threat_model="none"),
    *(row("bpda pgd", eps, name, 0.9 - eps, s) for eps in (0.1, 0.2) for name, s in (("none", 1e-6), ("both <&>", 2))),
    row("exact pgd", 0.1, "none", 0.5, 0.0),
]


def test_a_strip_has_four_rows_of_eight_frames(tmp_path):
    path = tmp_path / "strip.png"
    write_strip(found(), CLASSES, path, threat="pgd, 4/255", defense="videopure")
    with Image.open(path) as strip:
        assert strip.size == (8 * 128, 4 * (128 + 20))
        # The purified clip is black, the difference brighter than gray.
        assert strip.getpixel((64, 3 * 148 - 64)) == (0, 0, 0)
        assert min(strip.getpixel((64, 4 * 148 - 64))) >= 128
    assert [file.name for file in tmp_path.iterdir()] == ["strip.png"]


def test_large_clips_keep_their_size(tmp_path):
    large = Examples(*(clips(1, 3, 2, 160, 200) for _ in range(3)), *(torch.tensor([0]) for _ in range(3)))
    write_strip(large, CLASSES, tmp_path / "strip.png", threat="pgd", defense="none")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (2 * 200, 4 * (160 + 20))


def test_a_video_shows_three_sides_of_every_clip(tmp_path):
    write_side_by_side(found(), CLASSES, tmp_path / "all.mp4")
    video = probe(tmp_path / "all.mp4")
    assert (video.frames, video.height, video.width) == (20, 192 + 20, 3 * 192)
    frame = next(iter(read_frames(video, 212)))
    assert frame[:, 40:, 2 * 192 + 8 :].float().mean() < 8 < frame[:, 40:, :192].float().mean()


def markers(path: Path) -> Counter[tuple[str, str]]:
    """How often an SVG file shows each pair of a color and a shape that a series has."""
    tree, svg = ET.parse(path), "{http://www.w3.org/2000/svg}"
    shapes = {f"#{shape.get('id')}": " ".join(shape.get("d").split()) for shape in tree.iter(f"{svg}path")}
    found = Counter()
    for use in tree.iter(f"{svg}use"):
        filled = re.search("fill: (#[0-9a-f]{6})", use.get("style"))
        color = filled[1].upper() if filled else "#000000"  # SVG's own default
        if color in COLORS:
            found[color, shapes[use.get("{http://www.w3.org/1999/xlink}href")]] += 1
    return found


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_accuracy_is_drawn_against_eps_and_latency(tmp_path, suffix):
    path = tmp_path / f"accuracy{suffix}"
    draw_accuracy(ROWS, path, eps=0.2, note="a note")
    if suffix == ".svg":
        text = path.read_text()
        assert text.count(">seconds a clip<") == 2 and text.count(">eps, 1/255<") == 1
        assert "bpda pgd, eps 51/255<" in text and "exact pgd, eps 25.5/255<" in text  # the exact attack has no other
        assert ">bpda pgd<" in text and "clean" not in text and "both &lt;&amp;&gt;" in text and "a note" in text
        assert text.count(">accuracy<") == 1  # at the left of a row
        # The first is drawn twice against eps, once against seconds in both panels and once in the legend.
        assert list(markers(path).values()) == [2 + 2 + 1, 2 + 1 + 1]
    else:
        with Image.open(path) as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(100_000)) > 3


def test_many_defenses_are_told_apart_and_their_panels_share_an_axis(tmp_path):
    rows = [row("bpda pgd", eps, f"defense {i}", 0.3, 1) for i in range(17) for eps in (0.1, 0.2)]
    rows += [row(f"exact pgd {i}", 0.1, "defense 0", 0.2, 1) for i in range(2)]
    draw_accuracy(rows, tmp_path / "accuracy.svg")
    text = (tmp_path / "accuracy.svg").read_text()
    # Each has a pair of color and shape of its own: two markers against eps, one against seconds, one in the legend.
    # The last two panels have one marker each.
    assert sorted(markers(tmp_path / "accuracy.svg").values()) == [2 + 1 + 1] * 16 + [2 + 1 + 1 + 2]
    assert text.count(">1.0</text>") == 2 and text.count(">0.0</text>") == 2  # one axis for each row
    assert text.count(">1</text>") == 3  # one second
    width, height = re.search(r'<svg [^>]*width="([0-9.]+)pt" height="([0-9.]+)pt"', text).groups()
    assert float(width) == pytest.approx(3 * 3.4 * 72) and float(height) > 2 * 2.6 * 72  # three panels in a row


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_drawing_is_reproducible(tmp_path, suffix, monkeypatch):
    import matplotlib

    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    draw_accuracy(ROWS, first)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)  # a user's own settings
    draw_accuracy(ROWS, second)
    assert first.read_bytes() == second.read_bytes()
    assert matplotlib.rcParams["lines.linewidth"] == 9 and "matplotlib.pyplot" not in sys.modules


def test_a_rounded_interval_can_be_drawn(tmp_path):
    rows = [row("bpda pgd", 0.1, "none", 1.0, 1)._replace(low=0.9, high=1 - 1e-16 * 2)]
    draw_accuracy(rows, tmp_path / "accuracy.svg")


def test_drawing_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'videopure-fast\[plot\]'"):
        draw_accuracy(ROWS, tmp_path / "accuracy.svg")
    assert not list(tmp_path.iterdir())


def test_nothing_attacked_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="no accuracy under attack"):
        draw_accuracy(ROWS[:1], tmp_path / "accuracy.svg")
    with pytest.raises(ValueError, match="accepted extensions are .svg, .png"):
        draw_accuracy(ROWS, tmp_path / "accuracy.pdf")
