"""The examples run, as a function of their arguments and as `python -m`."""

import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from videopure_fast import Purifier, tiny
from videopure_fast.attacks import ATTACKS
from videopure_fast.data.video import probe
from videopure_fast.data.video_writer import VideoWriter

EXAMPLES = Path(__file__).parents[2] / "videopure_fast" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "__init__")


@pytest.fixture
def example():
    """Import an example by name; afterwards, attacks that it registered are forgotten."""
    known = dict(ATTACKS)
    yield lambda name: import_module(f"videopure_fast.examples.{name}")
    ATTACKS.clear()
    ATTACKS.update(known)
    sys.modules.pop("videopure_fast.examples.defend_and_attack", None)


def test_purify_file(example, tmp_path):
    source, output = tmp_path / "in.mp4", tmp_path / "out.gif"
    clip = (tiny.sample_clips(1)[0][0] * 255).round().to(torch.uint8)
    with VideoWriter(source, height=32, width=32, rate=10) as writer:
        for frame in torch.cat([clip, clip[:, :4]], 1).unbind(1):
            writer.write(frame)
    example("purify_file").main([str(source), str(output), "--size", "16", "--steps", "0"])
    found = probe(output)
    assert (found.frames, found.height, found.width) == (20, 16, 16)


def test_defend_and_attack(example, capsys):
    example("defend_and_attack").main(["--clips", "2", "--fit", "32", "--steps", "1"])
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("attacked", "random_signs", "bpda pgd", "mean of 5 frames", "videopure"))


def test_the_classifier_of_the_example_learns(example):
    classifier = example("defend_and_attack").MotionClassifier(*tiny.sample_clips(256, seed=1))
    clips, labels = tiny.sample_clips(64, seed=0)
    assert (classifier(clips).argmax(1) == labels).float().mean() > 0.5  # chance is 1 / 8


def test_own_prior(example, tmp_path, capsys):
    example("own_prior").main([str(tmp_path / "prior")])
    assert "videopure, T=2, (2, 3, 8, 32, 32)" in capsys.readouterr().out
    assert Purifier.from_pretrained(tmp_path / "prior", device="cpu").max_frames == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("example")
def test_they_run_as_modules(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"videopure_fast.examples.{name}", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"videopure_fast.examples.{name}", run_name="__main__", alter_sys=True)
    assert f"usage: {name}.py" in capsys.readouterr().out
