import copy
import json
import math
import xml.dom.minidom

import pytest
import torch
from conftest import TINY_DECODER, build_purifier
from diffusers import AutoencoderTiny
from PIL import Image
from typer.testing import CliRunner

from videopure_fast import cli
from videopure_fast.measure import benchmark
from videopure_fast.measure import profile as profiling
from videopure_fast.measure.benchmark import Limits, Setting, compare, load, measure, plot, save, sweep
from videopure_fast.measure.plot import COLORS, _decades
from videopure_fast.models.prior import load_decoder
from videopure_fast.purifier import Purifier

USUAL = {"backends": ["reference"], "dtypes": ["float32"], "sizes": [(16, 16)], "frames": [2], "batches": [1]}


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """A small random purifier in place of the packaged one; returns what was asked for, load by load."""
    asked = []

    def from_pretrained(name, *, device=None, dtype=None, flow=None, decoder=None, **overrides):
        asked.append({"name": name, "device": device, "dtype": dtype, "flow": flow, **overrides})
        purifier = build_purifier(dtype=dtype, **{"inversion_steps": 0} | overrides)
        purifier.decoder = None if decoder is None else load_decoder(decoder, dtype=dtype)
        return purifier

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Purifier, "from_pretrained", from_pretrained)
        patch.setattr(profiling, "_ROOFLINE_SECONDS", 0.01)
        patch.setattr(profiling, "_MOST_ROUNDS", 1)
        yield asked


def run_bench(settings, **options):
    rows = measure("tiny", settings, **options)
    return {**next(rows), "rows": list(rows)}


@pytest.fixture(scope="module")
def run():
    settings = sweep(**USUAL | {"backends": ["reference", "cuda"], "batches": [1, 2]})
    return run_bench(settings, limits=Limits(4, 0), device="cpu")


@pytest.fixture
def saved(run, tmp_path):
    path = tmp_path / "run.json"
    save(run, path)
    return path


def test_rows(run):
    one, two, *absent = run["rows"]
    assert [(row["backend"], row["batch"]) for row in run["rows"]] == [
        ("reference", 1),
        ("reference", 2),
        ("cuda", 1),
        ("cuda", 2),
    ]
    for row in (one, two):
        assert row["calls"] == 3  # the least, when no second is given
        assert row["first_call_seconds"] > 0 and row["mean_difference_from_reference"] < 1e-5
        calls, clips = row["call_seconds"], row["seconds_per_clip"]
        assert 0 < calls["min"] <= calls["p50"] <= calls["p95"] <= calls["p99"] <= calls["max"]
        assert clips["p95"] == pytest.approx(calls["p95"] / row["batch"])
        assert row["clips_per_second"] == pytest.approx(row["batch"] / calls["mean"])
        assert row["profile"]["shape"] == [row["batch"], 3, 2, 16, 16] and row["profile"]["votes"] == 2
    for row in absent:
        assert "cuda" in row["not_measured"] and "calls" not in row


def test_a_run_says_where_and_what(run):
    assert run["kind"] == benchmark.KIND and run["limits"] == {"repeats": 4, "seconds": 0}
    assert run["machine"]["threads"] == torch.get_num_threads() and run["machine"]["device"].startswith("cpu (")
    assert run["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert run["settings"] == {
        "model": "tiny",
        "method": "videopure",
        "inversion_steps": 0,
        "decode_chunk": 0,
        "max_frames": 8,
        "flow": "shift_flow",
        "votes": "all",
    }


def test_backends_and_dtypes_take_their_own_models(small_model):
    small_model.clear()
    settings = sweep(**USUAL | {"dtypes": ["float32", "bfloat16"]})
    found = run_bench(settings, limits=Limits(3, 0), stages=False, return_votes=False, device="cpu", method="ddim")
    assert [asked["dtype"] for asked in small_model] == [torch.float32, torch.bfloat16]
    assert all(asked["method"] == "ddim" and asked["device"] == "cpu" for asked in small_model)
    assert [row["profile"] for row in found["rows"]] == [None, None]
    assert found["settings"]["votes"] == "last"


@pytest.mark.parametrize("difference", [1.0, float("nan")])
def test_no_figures_without_equality(monkeypatch, difference):
    monkeypatch.setattr(benchmark, "_difference", lambda *_: difference)
    (row,) = run_bench(sweep(**USUAL), limits=Limits(3, 0))["rows"]
    assert "differs from the reference" in row["not_measured"] and "calls" not in row


@pytest.mark.parametrize("seconds", [0, 2.5])
def test_a_slow_reference_is_left(monkeypatch, seconds):
    """Its steps see the time that has passed; a call of ours takes a second here, and a step of the reference ten."""
    clock, steps = [0.0], []
    call = Purifier.forward

    def forward(self, video, *, callback=None, **options):
        def step(*given):
            clock[0] += 10
            steps.append(given[0])
            callback(*given)

        clock[0] += 1
        return call(self, video, callback=None if callback is None else step, **options)

    monkeypatch.setattr(Purifier, "forward", forward)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    settings = sweep(**USUAL)
    (row,) = run_bench(settings, limits=Limits(3, seconds), stages=False, inversion_steps=3)["rows"]
    assert row["not_measured"].startswith("the reference's clip took more than 5 s") and "calls" not in row
    assert len(steps) == 1  # of eight
    (row,) = run_bench(settings, limits=Limits(3, 1000), stages=False, inversion_steps=3)["rows"]
    assert row["calls"] == 3 and len(steps) == 1 + 8


def test_the_difference_is_that_of_the_first_clip():
    purifier = build_purifier(inversion_steps=0, dtype=torch.float64)  # every backend is the reference
    video = torch.rand(2, 3, 2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        purified = purifier(video, return_votes=True)
        assert benchmark._difference(purifier, video[:1], purified[:1], True) < 1e-6
        assert benchmark._difference(purifier, video[:1], purified[:1] + 0.25, True) == pytest.approx(0.25, abs=1e-6)


def test_a_lossy_decoders_row_has_its_error(tmp_path):
    AutoencoderTiny(**TINY_DECODER).save_pretrained(tmp_path / "decoder")
    settings = sweep(**USUAL | {"decoders": ["full", str(tmp_path / "decoder")]})
    full, lossy = run_bench(settings, limits=Limits(3, 0), stages=False, device="cpu")["rows"]
    assert full["mean_difference_from_full_decoder"] is None
    assert lossy["mean_difference_from_full_decoder"] > 0.01 > lossy["mean_difference_from_reference"]
    with pytest.raises(ValueError, match="cannot be read"):
        run_bench(sweep(**USUAL | {"decoders": ["full", str(tmp_path)]}))
    done = bench(*SMALL, "--batch", 1, "--decoder", tmp_path / "decoder", "--no-stages")
    assert done.exit_code == 0 and "decoder's error" in done.output


def test_quantiles():
    found = benchmark._quantiles([float(i) for i in range(101)][::-1])
    assert found == {"mean": 50, "min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


def test_sweep_is_every_combination_once():
    settings = sweep(
        backends=["auto", "cuda,triton"],
        dtypes=["float16"],
        sizes=[(16, 24)],
        frames=[2, 3],
        batches=[4, 1, 4],
    )
    assert len(settings) == 8 and settings[0] == Setting("auto", "float16", "full", 16, 24, 2, 1)
    assert str(settings[-1]) == "cuda,triton float16 full 4x3x16x24"


@pytest.mark.parametrize(
    "axis, message",
    [
        ({"backends": ["fast"]}, "unknown backend 'fast'; accepted: auto"),
        ({"dtypes": ["int8"]}, "unknown dtype int8; accepted: float16"),
        ({"batches": [0]}, "batch must be 1 or more, got 0"),
        ({"frames": [1]}, "frames must be 2 or more, got 1"),
        ({"sizes": [(32, 15)]}, "size must be 16 or more, got 15"),
    ],
)
def test_sweep_refuses(axis, message):
    with pytest.raises(ValueError, match=message):
        sweep(**USUAL | axis)


def test_saved_runs_come_back(run, saved):
    assert load(saved) == json.loads(json.dumps(run)) and list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("content, message", [(None, "no file"), ("{", "not JSON"), ("[]", "no run"), ("{}", "no run")])
def test_load_refuses(tmp_path, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_compare_pairs_what_both_measured(run):
    other = copy.deepcopy(run)
    other["versions"]["torch"] = "9.9"
    del other["rows"][0]
    ((name, a, b),) = compare(run, other)
    assert name == "reference float32 full 2x2x16x16" and a == b == run["rows"][1]


@pytest.mark.parametrize("part, name", [("machine", "threads"), ("machine", "device"), ("settings", "votes")])
def test_compare_refuses_other_machines_and_settings(run, part, name):
    other = copy.deepcopy(run)
    other[part][name] = "another"
    with pytest.raises(ValueError, match=rf"differ in {name} \(.* and another\); --anyway"):
        compare(run, other)
    assert len(compare(run, other, anyway=True)) == 2


def test_compare_across_an_axis(run):
    other = copy.deepcopy(run)
    for row in other["rows"]:
        row["backend"] = "cpu"
    with pytest.raises(ValueError, match=r"differ in backend \(reference and cpu\)"):
        compare(run, other)
    assert [pair.name for pair in compare(run, other, anyway=True)] == [
        "* float32 full 1x2x16x16",
        "* float32 full 2x2x16x16",
    ]
    other["rows"] = other["rows"][2:]
    with pytest.raises(ValueError, match="no setting in common"):
        compare(run, other)


def test_plots(run, tmp_path):
    svg, png = tmp_path / "run.svg", tmp_path / "run.png"
    plot(run, svg)
    drawn = xml.dom.minidom.parse(str(svg))
    styles = [path.getAttribute("style") for path in drawn.getElementsByTagName("path")]
    lines = [style for style in styles if f"stroke: {COLORS[0].lower()}" in style and "fill: none" in style]
    assert len(lines) == 3 + 1 + 1  # percentiles, throughput, legend
    assert sum("stroke-dasharray" in style for style in lines) == 2  # p95 and p99
    assert "reference, float32, full, 2x16x16" in svg.read_text()
    plot(run, png)
    with Image.open(png) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(100_000)) > 3


@pytest.mark.parametrize(
    "values, powers", [([1], (0, 0)), ([0.3], (-1, 0)), ([0.01, 0.3, 7], (-2, 1)), ([1e-4, 10], (-4, 1))]
)
def test_a_logarithmic_axis_reaches_the_powers_of_ten_around_its_values(values, powers):
    low, high = (math.log10(limit) for limit in _decades(values))
    assert (low, high) == pytest.approx((powers[0] - 0.2, powers[1] + 0.2))


def bench(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


SMALL = (
    "--batch",
    "1,2",
    "--frames",
    2,
    "--size",
    "16x20",
    "--seconds",
    0,
    "--device",
    "cpu",
    "--backend",
    "reference",
)


def test_command(tmp_path, small_model):
    small_model.clear()
    numbers, picture = tmp_path / "run.json", tmp_path / "run.svg"
    arguments = ("--dtype", "float32", "--steps", 0, "--flow", "none", "--json", numbers, "--plot", picture)
    done = bench(*SMALL, *arguments)
    assert done.exit_code == 0, done.output
    (asked,) = small_model
    assert asked == {
        **{"name": "tiny", "device": "cpu", "dtype": torch.float32, "flow": "none"},
        **{"method": "videopure", "inversion_steps": 0},
    }
    assert [row["batch"] for row in load(numbers)["rows"]] == [1, 2] and picture.is_file()
    for word in ("warm-up s", "clips/s", "p99 s/clip", "peak MiB", "2x16x20", "guidance", "Numbers:", "Picture:"):
        assert word in done.output
    compared = bench("--compare", numbers, numbers)
    assert compared.exit_code == 0 and "reference float32 full 2x2x16x20" in compared.output
    assert "ratio" in compared.output and len(small_model) == 1


def test_a_plot_without_matplotlib_is_refused_before_any_work(monkeypatch, small_model, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    small_model.clear()
    done = bench("--plot", tmp_path / "run.svg")
    assert done.exit_code == 1 and isinstance(done.exception, ImportError) and not small_model
    assert "pip install 'videopure-fast[plot]'" in str(done.exception)


def test_command_tells_why_nothing_was_measured():
    done = bench(*SMALL[:-1], "cuda", "--batch", 1)
    assert (
        done.exit_code == 1 and isinstance(done.exception, ValueError) and "nothing was measured" in str(done.exception)
    )
    assert "not measured" in done.output and "backend 'cuda' cannot serve" in done.output


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--batch", "one"), "--batch must be whole numbers"),
        (("--frames", "2,x"), "--frames must be whole numbers"),
        (("--size", "224"), "--size must be HEIGHTxWIDTH"),
        (("--steps", 50), "--steps must be 0 to 49"),
        (("--dtype", "int8"), "unknown dtype int8"),
        (("--backend", "gpu"), "unknown backend 'gpu'"),
        (("--plot", "run.pdf"), "accepted extensions are .svg, .png"),
        (("--json", "nowhere/run.json"), "there is no folder nowhere"),
        (("--compare", "a.json", "b.json"), "there is no file a.json"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model.clear()
    done = bench(*arguments)
    assert done.exit_code == 1 and isinstance(done.exception, ValueError)
    assert sentence in str(done.exception) and "\n" not in str(done.exception) and not small_model
