"""The report as a file: its numbers are those of the results, it needs nothing else, and bad results are named."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from report_folders import COMMITTED, LOADS, Parsed, folder_of_results
from typer.testing import CliRunner

from videopure_fast import cli, tiny
from videopure_fast.purifier import Purifier
from videopure_fast.web import report, report_charts, report_clips
from videopure_fast.web.report import PAPER, write_report

SECTIONS = ("speed", "stages", "accuracy", "tradeoff", "latency")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\0\ud800\u202e"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return folder_of_results(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="module")
def page(results):
    """The report of the results, without a demo."""
    path = results.parent / "report.html"
    assert write_report(results, path, demo=False) == path.stat().st_size < 2**20
    return Parsed(path.read_text(encoding="utf-8"))


@pytest.fixture
def copied(results, tmp_path):
    """A copy of the results that a test may change."""
    return shutil.copytree(results, tmp_path / "results")


def some(results, folder, *names):
    """A folder with some of the results."""
    (folder / "results").mkdir()
    for name in names:
        shutil.copy(results / name, folder / "results")
    return folder / "results"


def numbers(value):
    """All numbers in what JSON holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [] if isinstance(value, bool) or not isinstance(value, (int, float)) else [float(value)]


def spellings(pool, *, ratios=()):
    """Every way in which the report may write one of these numbers, and a ratio of two of the others."""
    found = set()
    for value in set(pool):
        for scale in (1, 100, 1000, 2**-20, 2**-30, 255):
            found |= {f"{value * scale:{form}}" for form in (".0f", ".1f", ".2f", ".3f", ".2g", ".3g", ".1e", "g")}
    for one in ratios:
        for other in ratios:
            found |= {f"{one / other:.1f}", f"{one / other:.2f}", f"{abs(100 * (one / other - 1)):.0f}"}
    return found


def pools(results):
    """What each section may write."""
    cpu, gpu, prediction, robustness, latency = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("cpu", "nvidia-h200", "nvidia-h200-prediction", "robustness-tiny", "latency-cpu")
    )
    gpu_rows = [row for name, row in gpu["rows"].items() if name.startswith("purification")]
    cpu_rows = [row for row in cpu["benchmarks"] if "path" in row]
    speed = [numbers([row[key] for key in ("median", "iqr", "clips")]) for row in (*cpu_rows, *gpu_rows)]
    speed += [
        numbers([row.get(key) for key in ("peak_memory", "launches", "mean_error")]) for row in cpu_rows + gpu_rows
    ]
    speed = [value for part in speed for value in part]
    staged = gpu["rows"]["stages: ours, 1x32x224x224"]["stages"]
    sums = [sum(row[key] for row in prediction["stages"].values()) for key in ("profile", "predicted")]
    sums += [sum(staged[name]["median"] for name in prediction["stages"])]
    kernels = [row["kinds"] for row in gpu["rows"]["kernels: ours, 1x32x224x224"]["stages"].values()]
    stages = [*numbers([prediction["stages"], staged, kernels]), *sums]
    rows = [
        {name: row[name] for name in ("accuracy", "low", "high", "n", "eps", "seconds_per_clip")}
        for row in robustness["rows"]
    ]
    summaries = [row["summary"] for row in latency["rows"]]
    waits = [row["load"] for row in latency["rows"]] + numbers(summaries)
    waits += [sum(one["stages"].values()) for one in summaries] + [float(one["offered"]) for one in summaries]
    medians = [row["median"] for row in (*cpu_rows, *gpu_rows)]
    known = {
        "speed": spellings(speed, ratios=medians),
        "stages": spellings(stages),
        "accuracy": spellings(numbers(rows)),
        "tradeoff": spellings(numbers(rows)),
        "latency": spellings(waits),
    }
    return known | {"": set().union(*known.values())}


def test_every_number_is_of_the_results(page, results):
    known = pools(results)
    looked = dict.fromkeys(known, 0)
    for section, around, text in page.texts:
        if {"number", "value", "inside", "big", "tile"} & set(around) and "th" not in around and "code" not in around:
            for number in NUMBER.findall(re.sub(r"\d+/255|95 %|with 95", "", text)):
                assert number.replace(",", "") in known[section], f"{section}: {number} of {text!r}"
                looked[section] += 1
    assert min(looked.values()) > 5, looked


def test_it_shows_what_the_tables_show(page):
    assert "0.459 ± 0.014 s" in page.shown("speed") and "5.55×" in page.shown("speed")
    assert "0.900 (0.88 to 0.92)" in page.shown("accuracy") and "0.062 (0.02 to 0.20; 32)" in page.shown("accuracy")
    assert page.shown("speed").lower().count("not measured") == 1 + 3
    assert "† Measured with other sources." in page.shown("speed")
    assert "2.546 s, now 0.459 s for a clip" in page.shown("")
    assert "67 of 70 checks of attacks and gradients passed" in page.shown("accuracy")
    for load in LOADS:
        assert f"{100 * load:.0f} % load" in page.shown("latency")
    assert "make gpu" in page.shown("speed") and "driver 580.159.04" in page.shown("speed")


def test_a_changed_result_is_a_changed_page(copied, tmp_path):
    text = (copied / "cpu.json").read_text()
    median = next(row["median"] for row in json.loads(text)["benchmarks"] if row.get("path") == "ours")
    (copied / "cpu.json").write_text(text.replace(repr(median), "0.1234"))
    write_report(copied, tmp_path / "report.html", demo=False)
    changed = Parsed((tmp_path / "report.html").read_text())
    assert "0.12 ± 0.02 s" in changed.shown("speed") and "2.19 s, now 0.12 s for a clip" in changed.shown("")
    assert "0.59" not in changed.shown("speed")


def test_it_needs_nothing_else(page, results):
    text = (results.parent / "report.html").read_text()
    assert "@import" not in text and "url(" not in text
    assert any((found.get("content") or "").startswith("default-src 'none';") for _, found in page.tags)
    links = [found[key] for _, found in page.tags for key in ("href", "src", "data", "action") if key in found]
    assert links.count(PAPER) == 1 and all(link == PAPER or link.startswith("#") for link in links)
    targets = [found.get("id") for tag, found in page.tags if tag == "section"]
    assert targets == list(SECTIONS) and [link[1:] for link in links if link != PAPER] == targets


def test_what_was_not_measured_is_said(tmp_path):
    (tmp_path / "results").mkdir()
    write_report(tmp_path / "results", tmp_path / "report.html", demo=False)
    page = Parsed((tmp_path / "report.html").read_text())
    for section, commands in zip(SECTIONS, ("bench gpu", "gpu", "study", "study", "latency"), strict=True):
        assert page.shown(section).count("Not measured yet:") == len(commands.split())
        assert all(f"make {command}" in page.shown(section) for command in commands.split())
    figures = [text for _, around, text in page.texts if "big" in around]
    assert len(figures) >= 4 and set(figures) == {"not measured"}


@pytest.mark.parametrize(
    "absent",
    ["cpu.json", "nvidia-h200.json", "nvidia-h200-prediction.json", "robustness-tiny.json", "latency-cpu.json"],
)
def test_each_file_may_be_absent(copied, tmp_path, absent):
    (copied / absent).unlink()
    write_report(copied, tmp_path / "report.html", demo=False)
    assert "Not measured yet:" in Parsed((tmp_path / "report.html").read_text()).shown()


def poisoned(value):
    """The same with every text replaced by a hostile one, but those that decide what a row is."""
    if isinstance(value, dict):
        kept = ("kind", "path", "flow", "part", "threat_model", "policy", "order", "time", "model")
        return {key: one if key in kept else poisoned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_texts_are_shown_and_do_nothing(copied, tmp_path):
    for file in copied.glob("*.json"):
        found = json.loads(file.read_text())
        if "prediction" in file.name:
            found["stages"] = {HOSTILE + name: row for name, row in found["stages"].items()}
        file.write_text(json.dumps(poisoned(found)))
    write_report(copied, tmp_path / "report.html", demo=False)
    page = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))  # which knows no script
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    for section in SECTIONS:
        assert "<script>alert(1)</script>" in page.shown(section)
    assert not {"\0", "\ud800", "\u202e"} & set(page.shown())


@pytest.mark.parametrize(
    "name", ["cpu.json", "nvidia-h200-prediction.json", "robustness-tiny.json", "latency-cpu.json"]
)
@pytest.mark.parametrize("content", ["cut", "", "[" * 100_000, "[]", "{}", '"text"'])
def test_a_broken_file_is_named(results, tmp_path, name, content):
    copied = some(results, tmp_path, name, "nvidia-h200.json")
    file, report_file = copied / name, tmp_path / "report.html"
    report_file.write_text("as it was")
    file.write_text(file.read_text()[:-100] if content == "cut" else content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        write_report(copied, report_file)
    assert report_file.read_text() == "as it was"
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("cpu.json", "median", "fast", ".median is 'fast'; accepted: a number of 0 or more"),
        ("cpu.json", "median", float("nan"), "median is nan; accepted: a number"),
        ("cpu.json", "median", 10**400, "accepted: a number"),
        ("cpu.json", "clips", 1.5, "clips is 1.5; accepted: a whole number"),
        ("cpu.json", "shape", {}, "shape is {}; accepted: an array"),
        ("cpu.json", "shape", [1, 3, 16, 32], "shape is [1, 3, 16, 32]; accepted: 5 whole numbers"),
        ("cpu.json", "iqr", None, "] has no 'iqr'"),
        ("nvidia-h200.json", "time", 3, "accepted: a text"),
        ("robustness-tiny.json", "accuracy", 1.5, "has the accuracy 1.5 between"),
        ("robustness-tiny.json", "defense", [1], "defense is [1]; accepted: a text"),
        ("latency-cpu.json", "setting", {"speed": 9}, "is no run of a study of latency"),
        ("latency-cpu.json", "simulated", "no", "simulated is 'no'; accepted: true or false"),
    ],
)
def test_a_wrong_value_is_named(results, tmp_path, name, key, value, said):
    copied = some(results, tmp_path, name)
    file = copied / name
    found = json.loads(file.read_text())
    rows = next(found[part] for part in ("benchmarks", "rows") if part in found)
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    ours = [row for row in rows if row.get("path") == "ours" and "median" in row]
    row = (ours or rows)[-1]
    row[key] = value
    file.write_text(json.dumps(found))
    announced = []
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        write_report(copied, tmp_path / "report.html", announce=lambda: announced.append(True))
    assert file.name in str(refused.value) and not announced


@pytest.mark.parametrize("value", ["absent", "soon", 10**400])
@pytest.mark.parametrize(
    ("part", "name"),
    [("latency", "p50"), ("latency", "p99"), ("queue_age", "p95"), ("", "utilization")],
)
def test_a_figure_of_latency_that_is_none_is_named(results, tmp_path, part, name, value):
    copied = some(results, tmp_path, "latency-cpu.json")
    found = json.loads((copied / "latency-cpu.json").read_text())
    summary = found["rows"][2]["summary"]
    figures = summary[part] if part else summary
    figures[name] = value
    if value == "absent":
        del figures[name]
    (copied / "latency-cpu.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"latency-cpu\.json: rows\[2\].*{name}"):
        write_report(copied, tmp_path / "report.html", demo=False)


def test_latencies_of_zero_are_drawn(results, tmp_path):
    copied = some(results, tmp_path, "latency-cpu.json")
    found = json.loads((copied / "latency-cpu.json").read_text())
    for row in found["rows"]:
        for part in ("latency", "stages"):
            row["summary"][part] = dict.fromkeys(row["summary"][part], 0)
    (copied / "latency-cpu.json").write_text(json.dumps(found))
    write_report(copied, tmp_path / "report.html", demo=False)
    assert "0 s" in Parsed((tmp_path / "report.html").read_text()).shown("latency")


def test_a_command_makes_it(results, tmp_path, monkeypatch):
    done = CliRunner().invoke(
        cli.app, ["report", "--results", str(results), "-o", str(tmp_path / "r.html"), "--no-demo"]
    )
    assert done.exit_code == 0, done.output
    assert f"Wrote {tmp_path / 'r.html'}, 0." in done.output and "MiB" in done.output
    assert Parsed((tmp_path / "r.html").read_text()).shown("speed")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    CliRunner().invoke(
        cli.app, ["report", "--results", str(results), "-o", str(tmp_path / "r.html"), "--no-demo", "--open"]
    )
    assert opened == [(tmp_path / "r.html").as_uri()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--results", "nowhere"], "there is no folder nowhere; accepted: one of results, such as bench/results"),
        (["-o", "results.json"], "cannot write results.json: accepted is a name that ends in .html"),
        (["-o", "nowhere/report.html"], "cannot write nowhere/report.html: there is no folder nowhere"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["videopure-fast", "report", "--no-demo", *arguments])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert said in capsys.readouterr().err


def test_clips_are_shown_as_they_are(results, tmp_path, monkeypatch):
    shallow = Purifier.from_pretrained("tiny", inversion_steps=0)
    monkeypatch.setattr(Purifier, "from_pretrained", lambda *_, **__: shallow)
    monkeypatch.setattr(report_clips, "CLIPS", 2)
    write_report(results, tmp_path / "report.html")
    page = Parsed((tmp_path / "report.html").read_text())
    pictures = [found for tag, found in page.tags if tag == "img"]
    assert len(pictures) == 2 * 4 and all(found["src"].startswith("data:image/png;base64,") for found in pictures)
    frames = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2])))) for found in pictures
    ]
    assert {one.shape for one in frames} == {(32, 16 * 32, 3)}
    clean = tiny.sample_clips(2)[0][0].permute(2, 1, 3, 0).flatten(1, 2)  # [H, F * W, 3]
    np.testing.assert_allclose(frames[0], 255 * clean, atol=0.51)
    assert 0 < np.abs(frames[1].astype(int) - frames[0]).max() <= 5  # 4, and the rounding of both
    assert abs(int(frames[3].max()) - 127.5 - 4 * 16) < 1
    assert "truly" in page.shown("clips") and "of 2 votes" in page.shown("clips")
    assert "--frames: 16" in next(found["style"] for _, found in page.tags if found.get("class") == "reel")


@pytest.mark.parametrize("top", [1e-4, 0.37, 1.0, 2.6, 7.0, 95.0, 125_974])
def test_axes_have_a_few_round_labels(top):
    found = report_charts.ticks(top)
    assert found[0] == 0 and found[-1] <= top < 2 * found[-1] + 1e-9 and 2 <= len(found) <= 7
    assert len({f"{value:g}" for value in found}) == len(found)


def test_the_committed_results_make_a_report(tmp_path):
    assert 0 < report.write_report(COMMITTED, tmp_path / "report.html", demo=False) < 2**20
