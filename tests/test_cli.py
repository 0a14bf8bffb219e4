import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_purifier, clips
from typer.testing import CliRunner

from videopure_fast import cli, evaluation, purifier, tiny
from videopure_fast.evaluation import Comparison, Row
from videopure_fast.video import VideoWriter, probe

CLIP = Path(__file__).parent / "data" / "part_0.mp4"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_main(monkeypatch, capsys, *arguments):
    """The exit status and what the whole program prints: (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["videopure-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, *capsys.readouterr()


@pytest.fixture
def small_model(monkeypatch):
    """A small random purifier in place of the packaged one; returns what `from_pretrained` was asked for."""
    asked = {}

    def from_pretrained(name, *, device=None, dtype=None, flow=None, **overrides):
        asked.update(name=name, device=device, dtype=dtype, flow=flow, **overrides)
        return build_purifier(**overrides)

    monkeypatch.setattr(purifier.Purifier, "from_pretrained", from_pretrained)
    return asked


@pytest.fixture
def short_clip(tmp_path):
    path = tmp_path / "in.mp4"
    with VideoWriter(path, height=32, width=48, rate=10) as writer:
        for frame in (clips(11, 3, 32, 48) * 255).to(torch.uint8):
            writer.write(frame)
    return path


@pytest.mark.parametrize(
    "command, words",
    [
        ((), ["demo", "purify", "bench", "info"]),
        (("demo",), ["--clips", "--eps", "--json", "videopure-fast demo"]),
        (("purify",), ["--output", "--size", "--method", "--steps", "--flow", "videopure-fast purify clip.mp4 -o"]),
        (
            ("bench",),
            ["--batch", "--frames", "--size", "--backend", "--compare", "--plot", "videopure-fast bench --batch"],
        ),
        (("info",), ["videopure-fast info"]),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, words, flag, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    result = run(*command, flag)
    assert result.exit_code == 0
    assert all(word in result.output for word in words)


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "videopure_fast", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "purify" in result.stdout


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_purify(tmp_path, small_model, short_clip, suffix):
    output = tmp_path / f"out{suffix}"
    result = run("purify", short_clip, "-o", output, "--size", 16, "--steps", 2, "--method", "ddim_inversion")
    assert result.exit_code == 0, result.output
    assert small_model == {
        "name": "tiny",
        "device": None,
        "dtype": None,
        "flow": None,
        "method": "ddim_inversion",
        "inversion_steps": 2,
    }
    found = probe(output)
    assert (found.frames, found.height, found.width, found.rate) == (11, 16, 24, 10)
    assert "11 frames of 48x32 at 10 per second, no sound; purified at 24x16" in result.output
    assert "drawn sprites" in result.output
    # The time is announced before the result.
    estimate = result.output.index("This will take about 0:0")
    assert "2 windows of 8 frames, 6 UNet evaluations each" in result.output[estimate:]
    assert result.output.index("drawn sprites") < estimate < result.output.index(f"Wrote {output}")


def test_purify_passes_its_options_on(tmp_path, small_model, short_clip):
    run("purify", short_clip, "-o", tmp_path / "o.mp4", "--dtype", "bfloat16", "--flow", "none", "--device", "cpu")
    assert small_model["dtype"] is torch.bfloat16
    assert small_model["flow"] == "none" and small_model["device"] == "cpu" and small_model["method"] == "videopure"
    assert "inversion_steps" not in small_model  # the model's own depth


def test_default_size(tmp_path, small_model, short_clip, monkeypatch):
    sizes = []

    def working_size(height, width, size):
        sizes.append(size)
        raise ValueError("enough")

    monkeypatch.setattr("videopure_fast.video.working_size", working_size)
    run("purify", short_clip, "-o", tmp_path / "out.mp4")
    run("purify", short_clip, "-o", tmp_path / "out.mp4", "--model", "some/model")
    assert sizes == [64, 224]


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_the_seed_decides_a_random_baseline(tmp_path, small_model, short_clip, method):
    paths = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        result = run("purify", short_clip, "-o", path, "--size", 16, "--steps", 1, "--method", method, "--seed", seed)
        assert result.exit_code == 0, result.output
    same, again, other = (path.read_bytes() for path in paths)
    assert same == again != other


@pytest.mark.parametrize(
    "method, expected", [("videopure", 6), ("ddim_inversion", 6), ("ddim", 3), ("ddpm", 2 * 20 + 1)]
)
def test_the_bar_counts_every_evaluation(method, expected):
    model = build_purifier(method=method, inversion_steps=2)
    pace = cli._Pace(model, 12)
    with pace:
        model(clips(3, 12, 16, 16), callback=pace)
    task = pace._bar.tasks[0]
    assert task.completed == task.total == 2 * expected


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("purify", "{folder}/nowhere.mp4", "-o", "{folder}/out.mp4"), "there is no file"),
        (("purify", "{folder}/text.mp4", "-o", "{folder}/out.mp4"), "is damaged or not a video"),
        (("purify", "{folder}", "-o", "{folder}/out.mp4"), "is not a file"),
        (("purify", "{clip}", "-o", "{folder}/out.txt"), "accepted extensions are .mp4, .avi, .webm, .gif"),
        (("purify", "{clip}", "-o", "{folder}/nowhere/out.mp4"), "there is no folder"),
        (("purify", "{clip}", "-o", "{folder}/out.mp4", "--size", "15"), "size must be an even number"),
        (("purify", "{clip}", "-o", "{folder}/out.mp4", "--size", "0"), "size must be an even number"),
        (("purify", "{clip}", "-o", "{folder}/out.mp4", "--steps", "50"), "inversion_steps must satisfy"),
        (("demo", "--out", "{folder}/demo", "--json", "{folder}/nowhere/demo.json"), "there is no folder"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, capsys, small_model, arguments, sentence):
    (tmp_path / "text.mp4").write_text("not a video")
    before = set(tmp_path.iterdir())
    filled = [argument.format(folder=tmp_path, clip=CLIP) for argument in arguments]
    status, _, stderr = run_main(monkeypatch, capsys, *filled)
    assert status == 1
    assert stderr.startswith("error: ") and sentence in stderr and stderr.count("\n") == 1
    assert not {path for path in set(tmp_path.iterdir()) - before if path.is_file()}


@pytest.mark.parametrize("arguments", [("purify",), ("purify", "a.mp4"), ("demo", "--clips", "0"), ("nonsense",)])
def test_bad_usage(monkeypatch, capsys, arguments):
    assert run_main(monkeypatch, capsys, *arguments)[0] == 2


@pytest.mark.parametrize("error, status", [(ValueError("broken"), 1), (KeyboardInterrupt(), None)])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, capsys, small_model, short_clip, error, status):
    def stop(*_arguments):
        raise error

    monkeypatch.setattr(cli._Pace, "__call__", stop)
    code, _, _ = run_main(monkeypatch, capsys, "purify", short_clip, "-o", tmp_path / "out.mp4", "--size", 16)
    assert code == status or (status is None and code != 0)
    assert list(tmp_path.iterdir()) == [short_clip]


def test_running_out_of_memory_names_the_size(tmp_path, monkeypatch, capsys, small_model, short_clip):
    def stop(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cli._Pace, "__call__", stop)
    code, _, stderr = run_main(monkeypatch, capsys, "purify", short_clip, "-o", tmp_path / "out.mp4", "--size", 16)
    assert code == 1 and "try a smaller --size" in stderr and stderr.count("\n") == 1


def comparison(clean, labels):
    """As of an attack that fools the classifier on each clip, and a purifier that puts every second one right."""
    wrong = (labels + 1) % len(tiny.CLASSES)
    purified = torch.where(torch.arange(len(labels)) % 2 == 1, labels, wrong)
    attacked = (clean + 4 / 255 * torch.randn_like(clean).sign()).clamp(0, 1)
    rows = [Row("none", 1.0, 0.0, 0.01), Row("videopure", 1.0, 0.5, 2.5)]
    return Comparison(rows, clean, attacked, clean * 0.9, labels, wrong, purified)


def test_demo(tmp_path, monkeypatch, small_model):
    settings = {}

    def compare(drawn, labels, classifier, model, **given):
        settings.update(given)
        return comparison(drawn, labels)

    monkeypatch.setattr(evaluation, "compare", compare)
    monkeypatch.setattr(tiny, "load_classifier", lambda: None)
    monkeypatch.setenv("COLUMNS", "120")
    folder, numbers = tmp_path / "demo", tmp_path / "demo.json"
    result = run("demo", "--clips", 4, "--eps", 8, "--steps", 3, "--out", folder, "--json", numbers)
    assert result.exit_code == 0, result.output
    assert settings == {"eps": 8 / 255, "step_size": 4 / 255, "steps": 3, "progress": True}
    assert "Accuracy on 4 clips" in result.output and "0.50 (2/4)" in result.output
    report = json.loads(numbers.read_text())
    assert report["rows"][1] == {"defence": "videopure", "clean": 1.0, "attacked": 0.5, "seconds_per_clip": 2.5}
    assert report["settings"] == {"clips": 4, "seed": 0, "eps": 8 / 255, "step_size": 4 / 255, "steps": 3}
    assert set(report["versions"]) == {"videopure-fast", "torch", "diffusers"} and "cpu" in report["device"]
    found = probe(folder / "demo.mp4")
    assert (found.frames, found.width) == (4 * 16, 3 * 32 * cli._VIDEO_SCALE)
    from PIL import Image

    with Image.open(folder / "strip.png") as strip:
        assert strip.size == (8 * 32 * 4, 4 * (32 * 4 + cli._CAPTION))


def test_the_strip_shows_a_rescued_clip():
    drawn, labels = tiny.sample_clips(4, 0)
    found = comparison(drawn, labels)
    assert cli._rescued_first(found) == [1, 3, 0, 2]
    true = tiny.CLASSES[labels[1]]
    assert cli._captions(found, 1)[0] == f"clean: {true}" and cli._captions(found, 1)[2].endswith(f"seen as {true}")


def test_info(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "xformers" else "9.9.9")
    monkeypatch.setattr("videopure_fast.video.torchcodec_decoder", lambda: None)
    monkeypatch.setattr("videopure_fast.backend.backends", lambda: {"cpu": "available", "cuda": "no GPU; get one"})
    result = run("info")
    assert result.exit_code == 0, result.output
    assert "pip install xformers" in result.output
    assert "9.9.9, but its libraries do not load here; PyAV decodes instead" in result.output
    assert "no GPU; get one" in result.output


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (75, "1:15"), (3599.6, "1:00:00"), (7325, "2:02:05")])
def test_clock(seconds, text):
    assert cli._clock(seconds) == text
