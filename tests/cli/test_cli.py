import csv
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_purifier, clips, run_main
from typer.testing import CliRunner

from videopure_fast import cli, purifier
from videopure_fast.cli import purify as cli_purify
from videopure_fast.cli.console import format_seconds
from videopure_fast.data.video import probe, read_frames
from videopure_fast.data.video_writer import VideoWriter
from videopure_fast.runtime.spans import EvaluationCounter, listening

CLIP = Path(__file__).parents[1] / "data" / "part_0.mp4"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


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
        ((), ["demo", "evaluate", "purify", "warmup", "bench", "latency", "info"]),
        (("demo",), ["--clips", "--eps", "--json", "videopure-fast demo"]),
        (("evaluate",), ["--classifier", "--dataset", "--threat", "--defense", "--checks", "videopure-fast evaluate"]),
        (("purify",), ["--output", "--size", "--method", "--steps", "--flow", "videopure-fast purify clip.mp4 -o"]),
        (
            ("bench",),
            ["--batch", "--frames", "--size", "--backend", "--compare", "--plot", "videopure-fast bench --batch"],
        ),
        (
            ("warmup",),
            ["--model", "--batch", "--frames", "--height", "--width", "videopure-fast warmup --model"],
        ),
        (
            ("latency",),
            ["--load", "--sweep", "--cameras", "--policy", "singlestream", "multistream", "server ", "offline"],
        ),
        (("info",), ["videopure-fast info"]),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, words, flag, monkeypatch):
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
    # The time is announced before the first evaluation, and again, better, before the result.
    assert result.output.index("By its FLOPs this may take about 0:0") < result.output.index("This will take about 0:0")
    estimate = result.output.index("This will take about 0:0")
    assert "2 windows of 8 frames, 6 UNet evaluations each" in result.output[estimate:]
    assert result.output.index("drawn sprites") < estimate < result.output.index(f"Wrote {output}")


@pytest.mark.parametrize(
    ("seconds", "said", "warned"),
    [(3600, "about 1:00:00;", False), (3700, "about 1:01:40;", True), (None, "known after two evaluations", False)],
)
def test_more_than_an_hour_is_warned_of_before_it_begins(
    tmp_path, small_model, short_clip, monkeypatch, seconds, said, warned
):
    def stop(*_given, **_options):
        raise ValueError("evaluated")

    asked = []
    monkeypatch.setattr(
        "videopure_fast.measure.estimate.estimate_seconds", lambda *given: asked.append(given) or seconds
    )
    monkeypatch.setattr("videopure_fast.streaming.purify_stream", stop)
    result = run("purify", short_clip, "-o", tmp_path / "out.mp4", "--size", 16)
    assert str(result.exception) == "evaluated" and asked[0][1:] == (11, 16, 24)
    assert said in result.output and ("Warning: this is more than an hour" in result.output) is warned


@pytest.mark.slow  # and alone: what it times, another process may slow down
def test_the_estimate_is_near():
    """Within a factor of three, as promised, for one window and for several."""
    from videopure_fast.measure.estimate import estimate_seconds

    model = purifier.Purifier.from_pretrained("tiny", device="cpu")
    for frames in (16, 20):
        estimated, taken = estimate_seconds(model, frames, 32, 32), []
        for _ in range(2):
            started = time.perf_counter()
            model(clips(3, frames, 32, 32))
            taken.append(time.perf_counter() - started)
        assert 1 / 3 < estimated / min(taken) < 3


def test_a_model_of_unknown_cost_has_no_estimate(monkeypatch):
    from videopure_fast.measure.estimate import estimate_seconds

    model = purifier.Purifier.from_pretrained("tiny", device="cpu")
    monkeypatch.setattr(type(model.unet), "forward", lambda *_, **__: {}["no such key"])
    assert estimate_seconds(model, 16, 32, 32) is None


def test_the_output_is_proved_before_a_model_is_loaded(tmp_path, small_model, short_clip):
    for name in ("a" * 252 + ".mp4", "nowhere/a.mp4", "a.txt"):
        result = run("purify", short_clip, "-o", f"{tmp_path}/{name}")
        assert result.exit_code == 1 and "cannot write" in str(result.exception)
    assert not small_model and list(tmp_path.iterdir()) == [short_clip]


def test_the_partial_file_is_there_before_the_first_evaluation(tmp_path, small_model, short_clip, monkeypatch):
    """Where the output links to; the link stays."""
    link, seen = tmp_path / "link.mp4", []
    (tmp_path / "there").mkdir()
    link.symlink_to("there/file.mp4")
    advance = cli_purify._Pace.advance
    watched = lambda *given: seen.append(sorted((tmp_path / "there").iterdir())) or advance(*given)  # noqa: E731
    monkeypatch.setattr(cli_purify._Pace, "advance", watched)
    (tmp_path / "there" / ".file-00c0ffee.partial.mp4").write_text("of a killed run")
    result = run("purify", short_clip, "-o", link, "--size", 16)
    assert result.exit_code == 0, result.output
    assert all(len(names) == 1 and ".partial" in names[0].name for names in seen) and "c0ffee" not in str(seen)
    assert link.is_symlink() and [path.name for path in (tmp_path / "there").iterdir()] == ["file.mp4"]
    assert probe(link).frames == 11


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

    monkeypatch.setattr("videopure_fast.data.video.working_size", working_size)
    run("purify", short_clip, "-o", tmp_path / "out.mp4")
    run("purify", short_clip, "-o", tmp_path / "out.mp4", "--model", "some/model")
    assert sizes == [64, 224]


def test_warmup_says_what_it_did(small_model, monkeypatch):
    warmed = []

    def warmup(self, shape, **options):
        warmed.append((shape, options))
        return purifier.WarmUp(40, 1, 5.25)

    monkeypatch.setattr(purifier.Purifier, "warmup", warmup)
    result = run("warmup", "--batch", 2, "--frames", 5, "--height", 16, "--votes", "last", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "Compiled 40 GPU kernels and ran 1 call on clips of 2x3x5x16x32 on cpu, in 5.2 s." in result.output
    assert "No CUDA GPU was used: nothing is kept" in result.output
    assert small_model["dtype"] is torch.bfloat16 and small_model["method"] == "videopure"
    run("warmup", "--model", "some/model", "--steps", 2)
    assert small_model["name"] == "some/model" and small_model["inversion_steps"] == 2
    assert warmed == [
        ((2, 3, 5, 16, 32), {"return_votes": False, "progress": True}),
        ((1, 3, 32, 224, 224), {"return_votes": True, "progress": True}),
    ]


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
    for _ in range(2):  # also where the windows are replayed
        pace = cli_purify._Pace(model, 12)
        with pace, listening(EvaluationCounter(pace.advance)):
            model(clips(3, 12, 16, 16))
        task = pace._bar.tasks[0]
        assert task.completed == task.total == 2 * expected


def test_captured_windows_are_estimated_by_the_third(capsys):
    pace = cli_purify._Pace(build_purifier(), 40)  # of 4 evaluations a window
    pace._by_window = True
    with pace:
        pace.advance(4)
        pace.advance(4)
        assert "about" not in capsys.readouterr().out
        pace._times[8] -= 60
        pace.advance(4)
    assert "This will take about 7:00: 7 windows of 8 frames" in " ".join(capsys.readouterr().out.split())


def test_purify_replays_from_the_second_window_on(tmp_path, short_clip, monkeypatch):
    """And the result is that of eager steps, byte for byte."""
    made = []

    def load(*_, capture=True, **settings):
        made.append(build_purifier(**settings))
        made[-1].capture = capture
        return made[-1]

    outputs = [tmp_path / "captured.mp4", tmp_path / "eager.mp4"]
    for output, capture in zip(outputs, (True, False), strict=True):
        loaded = partial(load, capture=capture)
        monkeypatch.setattr(
            purifier.Purifier, "from_pretrained", lambda *_, device, dtype, flow, loaded=loaded, **rest: loaded(**rest)
        )
        assert run("purify", short_clip, "-o", output, "--size", 16, "--steps", 1).exit_code == 0
    captured, eager = ([*one._captures.made.values()] for one in made)
    assert len(captured) == 1 and captured[0] is not None and not eager
    assert torch.equal(*(torch.stack(list(read_frames(probe(output), 16))) for output in outputs))


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


@pytest.mark.parametrize(
    "arguments",
    [
        ("purify",),
        ("purify", "a.mp4"),
        ("nonsense",),
        ("demo", "--clips", "0"),
        ("purify", "a.mp4", "-o", "a\0.mp4"),
        ("demo", "--clips", "9" * 30),
        ("evaluate", "--clips", "9" * 12),
        ("evaluate", "--seeds", "9" * 12),
    ],
)
def test_bad_usage(monkeypatch, capsys, arguments):
    assert run_main(monkeypatch, capsys, *arguments)[0] == 2


@pytest.mark.parametrize("error, status", [(ValueError("broken"), 1), (KeyboardInterrupt(), None)])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, capsys, small_model, short_clip, error, status):
    def stop(*_arguments):
        raise error

    monkeypatch.setattr(cli_purify._Pace, "advance", stop)
    code, _, _ = run_main(monkeypatch, capsys, "purify", short_clip, "-o", tmp_path / "out.mp4", "--size", 16)
    assert code == status or (status is None and code != 0)
    assert list(tmp_path.iterdir()) == [short_clip]


def test_running_out_of_memory_names_the_size(tmp_path, monkeypatch, capsys, small_model, short_clip):
    def stop(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cli_purify._Pace, "advance", stop)
    code, _, stderr = run_main(monkeypatch, capsys, "purify", short_clip, "-o", tmp_path / "out.mp4", "--size", 16)
    assert code == 1 and "try a smaller --size" in stderr and stderr.count("\n") == 1


def test_demo(tmp_path, small_model):
    folder, numbers = tmp_path / "demo", tmp_path / "demo.json"
    result = run("demo", "--clips", 3, "--eps", 8, "--steps", 1, "--out", folder, "--json", numbers)
    assert result.exit_code == 0, result.output
    assert "gray-box pgd, steps=1, step_size=4/255, eps 8/255" in result.output and "interval" in result.output
    report = json.loads(numbers.read_text())
    assert [(row["threat_model"], row["defense"]) for row in report["rows"]] == [
        (threat_model, name)
        for threat_model in ("none", "gray-box")
        for name in ("none", "VAE round trip", "mean of 5 frames", "videopure")
    ]
    assert report["plan"]["eps"] == [8 / 255] and all(row["n"] == 3 for row in report["rows"])
    (machine,) = report["machines"]
    assert set(machine) == {"device", "threads", "videopure-fast", "torch", "diffusers"}
    assert "cpu" in machine["device"] and machine["threads"] == torch.get_num_threads()
    assert probe(folder / "demo.mp4").frames == 3 * 16
    assert sorted(file.name for file in folder.iterdir()) == ["demo.mp4", "strip.png"]


EVALUATE = ("evaluate", "--clips", 3, "--batch", 2, "--steps", 1, "--eps", "4,8", "--repeats", 2)


def test_evaluate(tmp_path, small_model):
    names = ("none", "mean of 5 frames", "videopure, T=0")
    given = [part for name in names for part in ("--defense", name)] + ["--depth", 0]
    given += [
        "--threat",
        "gray-box",
        "--threat",
        "query",
        "--threat",
        "bpda",
        "--queries",
        2,
        "--eot",
        2,
        "--no-checks",
    ]
    result = run(*EVALUATE, *given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "gray-box pgd, steps=1, step_size=2/255, eot=2, eps 4/255" in result.output
    assert "query square, queries=2, eot=2, eps 4/255" in result.output
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["accuracy.svg", "record.json", "report.json", "strip.png", "table.csv"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["rows"]) == len(names) * (1 + 3 * 2 + 2) and report["skipped"] == {}
    assert "mean of 5 frames, 4/255: bpda is at least as strong as query" in [c["name"] for c in report["checks"]]
    assert report["hash"] == json.loads((tmp_path / "out" / "record.json").read_text())["hash"]
    assert json.loads(report["plan"]["source"])["config"]["inversion_steps"] == 1
    with (tmp_path / "out" / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in report["rows"]]
    assert {row["defense"] for row in rows} == set(names)


def test_evaluate_is_one_call_of_benchmark(tmp_path, small_model, monkeypatch):
    calls = []

    class Report:
        def save(self, folder):
            calls.append(folder)

    def benchmark(*models_and_clips, **options):
        calls.append((models_and_clips, options))
        return Report()

    monkeypatch.setattr("videopure_fast.evaluation.benchmark", benchmark)
    given = ("--threat", "exact", "--threat", "transfer", "--surrogate-classifier", "tiny", "--attack", "apgd")
    given += ("--defense", "none", "--defense", "ddim, T=2", "--seeds", 2, "--dtype", "float32", "--no-checks")
    result = run(*EVALUATE, *given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    ((classifier, purifier, draw), options), folder = calls
    assert folder == tmp_path / "out" and options["record"] == folder / "record.json"
    assert small_model["dtype"] is torch.float32 and options["surrogate"] is not classifier
    assert draw(3, 1, 2)[0].shape == (2, 3, 16, 32, 32)
    titles = [threat.title for threat in options["threats"]]
    assert titles == ["exact apgd, steps=1", "transfer temporal_translation, steps=1, step_size=2/255"]
    assert options["defenses"] == ("none", "ddim, T=2") and options["eps"] == [4 / 255, 8 / 255]
    assert (options["count"], list(options["seeds"]), options["batch"], options["repeats"]) == (3, [0, 1], 2, 2)
    assert options["checks"] is False and options["source"]["surrogate_classifier"] == "tiny"


def test_evaluate_takes_a_defense_of_ones_own(tmp_path, small_model, monkeypatch):
    (tmp_path / "my_defense.py").write_text(
        "from videopure_fast.defense import filter_defense\n"
        "def negative(purifier):\n"
        "    return filter_defense(lambda clips: 1 - clips)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ("--defense", "none", "--defense", "my_defense:negative", "--threat", "exact", "--no-checks")
    result = run(*EVALUATE, *given, "--out", "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert {row["defense"] for row in rows} == {"none", "my_defense:negative"}


def test_evaluate_says_what_its_attacks_lack(tmp_path, small_model):
    names = ("JPEG 75", "ddim")
    given = [part for name in names for part in ("--defense", name)] + ["--threat", "bpda", "--threat", "exact"]
    result = run(*EVALUATE, *given, "--no-checks", "--out", tmp_path / "out")
    text = " ".join(result.output.split())
    assert "No exact attack on JPEG 75: no gradient." in text
    assert "Note: ddim: random at each call; a larger eot averages" in text
    assert "Note: steps times step size is 2/255, less than twice the largest eps" in text
    assert text.count("minimum over all of these attacks, eps 4/255") == 1


def test_evaluate_reads_a_data_set_and_a_classifier_of_ones_own(tmp_path, small_model, monkeypatch):
    videos, splits = tmp_path / "videos", tmp_path / "splits"
    for name in ("a", "b", "c"):
        (videos / name).mkdir(parents=True)
        with VideoWriter(videos / name / "v.avi", height=32, width=32, rate=10) as writer:
            for frame in (clips(9, 3, 32, 32, seed=ord(name)) * 255).to(torch.uint8):
                writer.write(frame)
    (videos / "c" / "v.avi").write_bytes(b"no video")
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 a\n2 b\n3 c\n")
    (splits / "testlist01.txt").write_text("a/v.avi\nb/v.avi\nc/v.avi\n")
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "class Mean(torch.nn.Module):\n"
        "    def forward(self, clips):\n"
        "        return clips.mean((2, 3, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = ("--dataset", "ucf101", "--videos", videos, "--annotations", splits)
    shape = ("--frames", 4, "--stride", 2, "--resize", 32, "--crop", 24, "--no-checks", "--defense", "none")
    given = (*EVALUATE, *source, *shape, "--classifier", "my_models:Mean", "--out", tmp_path / "out")
    with pytest.warns(UserWarning, match="skipped"):
        result = run(*given)
    assert result.exit_code == 0, result.output
    assert "1 videos could not be read" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["skipped"]) == [str(videos / "c" / "v.avi")] and {row["n"] for row in report["rows"]} == {2}
    again = run(*given)  # nothing is left to do
    assert again.exit_code == 0 and "1 videos could not be read" in again.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == report["skipped"]
    (videos / "a" / "v.avi").write_bytes((videos / "b" / "v.avi").read_bytes() + b"other")
    other = run(*given)
    assert other.exit_code == 1 and "is the record of another plan" in str(other.exception)
    assert json.loads(report["plan"]["source"])["sampling"] == {"frames": 4, "stride": 2, "resize": 32, "crop": 24}


def test_evaluate_takes_a_folder_of_class_folders(tmp_path, small_model, monkeypatch):
    for name, level in (("Blue", (10, 20, 200)), ("green", (10, 200, 20)), ("RED", (200, 10, 20))):
        (tmp_path / "videos" / name).mkdir(parents=True)
        with VideoWriter(tmp_path / "videos" / name / "v.MP4", height=32, width=48, rate=10) as writer:
            for _ in range(20):
                writer.write(torch.tensor(level, dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 48))
    (tmp_path / "my_colors.py").write_text(
        "import torch, types\n"
        "class Mean(torch.nn.Module):\n"
        "    config = types.SimpleNamespace(id2label={'0': 'red', '1': 'green', '2': 'blue', '3': 'gray'})\n"
        "    def forward(self, clips):\n"
        "        return torch.nn.functional.pad(clips.mean((2, 3, 4)), (0, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    common = ("--no-checks", "--defense", "none", "--threat", "gray-box", "--steps", 1)
    shape = ("--frames", 4, "--resize", 32, "--crop", 16)
    given = ("evaluate", "--videos", "videos", "--classifier", "my_colors:Mean", *common, *shape)
    result = run(*given, "--out", "named")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "named" / "report.json").read_text())
    assert report["rows"][0]["accuracy"] == 1 and {row["n"] for row in report["rows"]} == {3}
    assert json.loads(report["plan"]["source"])["dataset"] == "folder"
    refused = run("evaluate", "--videos", "videos", *common, "--out", "tiny")  # the packaged classifier of motions
    assert refused.exit_code == 1 and "label 0 of the data set, 'Blue', is none of" in str(refused.exception)
    for name, motion in (("Blue", "Turn_Left"), ("green", "up"), ("RED", "zoom-in")):
        (tmp_path / "videos" / name).rename(tmp_path / "videos" / motion)
    result = run("evaluate", "--videos", "videos", *common, "--out", "tiny")
    assert result.exit_code == 0, result.output
    sampling = json.loads(json.loads((tmp_path / "tiny" / "report.json").read_text())["plan"]["source"])["sampling"]
    assert sampling == {"frames": 16, "stride": 1, "resize": 32, "crop": 32}


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_table(tmp_path):
    names = ("none", "median of 3 frames", "mean of 3 frames", "VAE round trip")
    options = ["--clips", 4, "--batch", 1, "--steps", 3, "--no-checks", "--threat", "bpda"]
    options += [part for name in names for part in ("--defense", name)]

    def command(out):
        return [sys.executable, "-m", "videopure_fast", "evaluate", *map(str, options), "--out", str(out)]

    def table(out):
        with (out / "table.csv").open(newline="") as stream:
            return [{**row, "seconds_per_clip": 0, "peak_bytes": 0} for row in csv.DictReader(stream)]

    record = tmp_path / "killed" / "record.json"
    killed = subprocess.Popen(command(record.parent), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (record.exists() and len(json.loads(record.read_text())["entries"]) >= 7):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    done = json.loads(record.read_text())["entries"]
    assert 7 <= len(done) < len(names) * 4 * 3 and not (tmp_path / "killed" / "table.csv").exists()
    for out in (record.parent, tmp_path / "whole"):
        subprocess.run(command(out), check=True, capture_output=True)
    assert table(record.parent) == table(tmp_path / "whole")
    assert done.items() <= json.loads(record.read_text())["entries"].items()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--eps", "4,x"), "--eps must be numbers, such as 4,8; got '4,x'"),
        (("--eps", "0"), "--eps must be more than 0 and at most 255, in 1/255, got 0"),
        (("--eps", "4,4"), "eps must not be empty or repeat a value"),
        (("--eps", "400", "--model", "not/there"), "at most 255, in 1/255, got 400"),
        (
            ("--defense", "none", "--defense", "none", "--model", "not/there"),
            "defenses must not be empty or repeat a value",
        ),
        (
            ("--threat", "white-box", "--model", "not/there"),
            "unknown threat_model 'white-box'; accepted: none, transfer",
        ),
        (("--threat", "transfer"), "--threat transfer and --surrogate-classifier"),
        (("--surrogate-classifier", "tiny"), "--threat transfer and --surrogate-classifier"),
        (("--dataset", "kinetics400"), "--dataset kinetics400 needs --videos and --annotations"),
        (("--dataset", "something-something-v2", "--videos", ".", "--annotations", "."), "needs --labels"),
        (("--classifier", "no_such_module:make"), "classifier 'no_such_module:make' cannot be made"),
        (
            ("--classifier", "torch.nn:Identity"),
            "the classifier (Identity) returns (2, 3, 16, 32, 32) for 2 clips; accepted: logits (2, ",
        ),
        (("--classifier", "some/model"), "--mean and --std are of Hugging Face models, which need both"),
        (("--mean", "0.5"), "--mean and --std are of Hugging Face models, which need both"),
        (("--dataset", "tiny", "--videos", ".", "--crop", "112"), "--dataset tiny takes no --crop or --videos"),
        (("--videos", "."), "has no folder; accepted: a folder for each class"),
        (("--videos", "nowhere"), "there is no folder nowhere"),
        (("--videos", ".", "--annotations", "."), "--dataset folder takes no --annotations"),
        (("--dataset", "folder"), "--dataset folder needs --videos"),
        (
            ("--dataset", "ucf101", "--videos", ".", "--annotations", ".", "--labels", "."),
            "--dataset ucf101 takes no --labels",
        ),
        (("--defense", "all", "--defense", "prayer"), "unknown defense 'prayer'"),
        (("--depth", "99", "--model", "not/there"), "--depth must be 0 to 49, got 99"),
        (("--depth", "2", "--defense", "none"), "--depth 2 is of no defense asked for; say --defense 'videopure, T=2'"),
        (("--step-size", "nan"), "--step-size must be more than 0, in 1/255, got nan"),
        (("--defense", "prayer", "--model", "not/there"), "unknown defense 'prayer'; accepted: none, mean of 3 frames"),
        (("--crop", "300", "--dataset", "ucf101", "--videos", ".", "--annotations", "."), "crop 300 is more than"),
    ],
)
def test_evaluate_refuses(arguments, message, tmp_path, small_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, stderr = run_main(monkeypatch, capsys, "evaluate", *arguments)
    assert status == 1 and message in stderr and stderr.startswith("error: ")
    assert not (tmp_path / "evaluation" / "record.json").exists()


def test_a_stopped_evaluation_says_how_to_go_on(tmp_path, small_model, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("videopure_fast.evaluation.runner.evaluate", stop)
    status, stdout, _ = run_main(monkeypatch, capsys, "evaluate", "--out", tmp_path)
    assert status not in (None, 0)
    assert f"stays in {tmp_path / 'record.json'}: the same command goes on" in stdout


def test_running_out_of_memory_names_the_batch(tmp_path, small_model, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("videopure_fast.evaluation.runner.evaluate", stop)
    for batch, advice in ((8, "a smaller --batch, with another --out"), (1, "fewer --frames or a smaller --crop")):
        status, _, stderr = run_main(monkeypatch, capsys, "evaluate", "--out", tmp_path, "--batch", batch)
        _bar, sentence = stderr.splitlines()[-2:]
        assert status == 1 and sentence.startswith("error: ") and sentence.endswith(f"try {advice}")


def test_info(monkeypatch):
    monkeypatch.setattr("videopure_fast.machine.installed", lambda name: None if name == "xformers" else "9.9.9")
    monkeypatch.setattr("videopure_fast.data.video.torchcodec_decoder", lambda: None)
    monkeypatch.setattr("videopure_fast.ops.backend.backends", lambda: {"cpu": "available", "cuda": "no GPU; get one"})
    result = run("info")
    assert result.exit_code == 0, result.output
    assert "pip install xformers" in result.output
    assert "9.9.9, but its libraries do not load here; PyAV decodes instead" in result.output
    assert "no GPU; get one" in result.output


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (75, "1:15"), (3599.6, "1:00:00"), (7325, "2:02:05")])
def test_seconds_are_written_as_a_clock(seconds, text):
    assert format_seconds(seconds) == text
