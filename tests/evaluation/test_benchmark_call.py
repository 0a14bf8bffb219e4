"""benchmark(): an evaluation in one call, from whatever clips one has."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from dataclasses import replace

import pytest
import torch
from conftest import Classifier, build_purifier, clips
from PIL import Image
from torch import Tensor, nn

from videopure_fast.attacks import ATTACKS, pgd, register_attack
from videopure_fast.defense import build_defenses, filter_defense
from videopure_fast.evaluation import Report, Threat, benchmark, checks, runner, standard_threat
from videopure_fast.evaluation.benchmark import make_plan

NAMES = ("none", "mean of 3 frames", "videopure")


CLASSIFIER, SURROGATE = (Classifier(seed).eval().requires_grad_(False) for seed in (1, 2))
CLIPS = clips(4, 3, 4, 16, 16)
LABELS = CLASSIFIER(CLIPS).argmax(-1)
QUICK = {"threats": [standard_threat("gray-box", 9, steps=2)], "eps": 8 / 255, "checks": False, "progress": False}
QUICK |= {"defenses": NAMES}


@pytest.fixture(scope="module")
def purifier():
    return build_purifier()


@pytest.fixture(scope="module")
def evaluated(purifier):
    """The report of an evaluation, and the progress that it showed."""
    options = QUICK | {"threats": ["gray-box", "bpda"], "checks": True, "progress": True}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as shown:
        patch.setattr(checks, "_LONG", 0)
        patch.setattr(checks, "_REACH_EPS", (8 / 255,))
        patch.setattr(checks, "_REACH_STEPS", 2)
        report = benchmark(CLASSIFIER, purifier, (CLIPS, LABELS), **options)
    return report, shown.getvalue()


@pytest.fixture(scope="module")
def report(evaluated):
    return evaluated[0]


def drawn(text: str) -> list[str]:
    """The states of progress bars in what was printed."""
    return [line for line in text.replace("\r", "\n").splitlines() if "%|" in line]


def test_the_bar_fits_and_has_a_part_for_the_checks(evaluated):
    states = drawn(evaluated[1])
    assert all(len(state) <= 80 for state in states)
    percent = [(state.startswith("check "), int(state.rpartition("%")[0][-3:])) for state in states]
    assert max(done for checking, done in percent if not checking) < 100 and percent[-1] == (True, 100)
    assert evaluated[1].count("The checks of videopure may take up to 0") == 1  # seconds, which count as long here


def test_the_bar_counts_purified_clips(purifier):
    threats = [standard_threat(name, 4, steps=3) for name in ("gray-box", "bpda", "exact")]
    plan = make_plan(threats, 4, eps=(4 / 255, 8 / 255), defenses=NAMES, seeds=(0,), batch=3, repeats=2)
    context = runner.EvalContext(CLASSIFIER, build_defenses(purifier, NAMES), None)
    purified = 4 + 2 * 4 * (1 + (1 + 3) + (1 + 3 * runner.EXACT_GRADIENT))  # clean; for each eps the three threats
    assert runner.work(plan, context) == pytest.approx(purified * (1 + 2 * runner._FILTER))
    assert checks.checks_work(plan, context) > 2 * 44  # gradients of two clips, in one of the checks
    assert checks.checks_work(replace(plan, defenses=NAMES[:2]), context) == 0


def test_what_was_done_before_is_done_in_the_bar(purifier, tmp_path, capsys):
    options = QUICK | {"record": tmp_path / "record.json", "progress": True}
    for _ in range(2):
        benchmark(CLASSIFIER, purifier, CLIPS, LABELS, **options)
        assert drawn(capsys.readouterr().err)[-1].rpartition("%")[0].endswith("100")


def test_the_bars_clock_goes_on(capsys):
    with runner.evaluation_bar(8, enabled=True) as bar:
        bar.set_description_str("evaluate gray-box, ddim_inversion, T=20")
        bar.update(2)
        time.sleep(2.3)  # a long batch
        bar.update(6)
    states = drawn(capsys.readouterr().err)
    assert {" 25%", "100%"} <= {state.rpartition("|")[0].rpartition("|")[0][-4:] for state in states}
    assert {"00:01", "00:02"} <= {state.rpartition("| ")[2].partition("<")[0] for state in states}


def outcomes(report: Report) -> dict[str, list[int] | None]:
    return {name: entry["right"] for name, entry in report.record.entries.items()}


def test_clips_and_labels_are_enough(report):
    found = [(row.threat_model, row.defense, row.n) for row in report.rows]
    assert found == [(what, name, 4) for what in ("none", "gray-box", "bpda", "adaptive") for name in NAMES]
    assert report.rows[0].accuracy == 1
    threat = report.record.plan.threats[1]
    assert threat.title == "gray-box pgd, steps=10, step_size=2/255"
    (batch,) = [batch for batch in report.record.plan.batches() if batch.threat == threat]
    generator = batch.generator("attack ")
    attacked = pgd(CLASSIFIER, CLIPS, LABELS, eps=8 / 255, generator=generator, **threat.settings)
    expected = (CLASSIFIER(attacked).argmax(-1) == LABELS).long().tolist()
    assert outcomes(report)[batch.name("none")] == expected


def test_a_report_prints(report):
    text = str(report)
    assert "gray-box pgd, steps=10, step_size=2/255, eps 8/255" in text and "mean of 3 frames" in text
    assert "minimum over all of these attacks, eps 8/255" in text
    assert "Note: no attack used a defense's own gradients" in text
    assert "videopure: the exact gradient agrees" in text and "pass" in text
    assert repr(report).startswith("<Report: 12 rows, ")


def test_a_report_plots(report, tmp_path):
    report.plot(tmp_path / "accuracy.svg")
    assert "gray-box pgd" in (tmp_path / "accuracy.svg").read_text()
    report.strip(tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (4 * 128, 4 * (128 + 20))
    report.video(tmp_path / "all.mp4", clips=2)
    assert (tmp_path / "all.mp4").stat().st_size


def test_a_report_exports(report, tmp_path):
    report.save(tmp_path / "out")
    names = ["accuracy.svg", "report.json", "strip.png", "table.csv"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["rows"] == [row._asdict() for row in report.rows]
    assert saved["checks"] == [check._asdict() for check in report.checks] and saved["checks"]
    assert saved["hash"] == report.record.plan.hash and saved["skipped"] == {}
    with (tmp_path / "out" / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["accuracy"]) for row in rows] == [row.accuracy for row in report.rows]


def test_an_interrupted_call_continues_from_its_record(purifier, tmp_path, monkeypatch):
    path, scored, score = tmp_path / "record.json", [], runner._score

    def cut(*arguments):
        scored.append(arguments)
        if len(scored) > 4:
            raise KeyboardInterrupt
        return score(*arguments)

    options = QUICK | {"record": path, "batch": 2}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runner, "_score", cut)
        benchmark(CLASSIFIER, purifier, CLIPS, LABELS, **options)
    done = json.loads(path.read_text())["entries"]
    assert len(done) == 4
    resumed = benchmark(CLASSIFIER, purifier, CLIPS, LABELS, **options)
    assert done.items() <= resumed.record.entries.items()
    assert outcomes(resumed) == outcomes(benchmark(CLASSIFIER, purifier, CLIPS, LABELS, **QUICK, batch=2))
    for other in ((SURROGATE, purifier, CLIPS, LABELS), (CLASSIFIER, purifier, CLIPS.flip(0), LABELS.flip(0))):
        with pytest.raises(ValueError, match="is the record of another plan, which differs in source"):
            benchmark(*other, **options)


def test_seeds_share_out_the_clips(purifier):
    report = benchmark(CLASSIFIER, purifier, CLIPS, LABELS, **QUICK, seeds=2)
    assert {(batch.seed, batch.clips) for batch in report.record.plan.batches()} == {(0, 2), (1, 2)}
    assert torch.equal(report.context.draw(1, 0, 2)[0], CLIPS[2:])


def test_a_function_may_draw(purifier, monkeypatch):
    def draw(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        return CLIPS[start : start + count], LABELS[start : start + count]

    monkeypatch.setattr(purifier, "commit_hash", "0123456789" * 4)
    drawn = benchmark(CLASSIFIER, purifier, draw, **QUICK, count=4, source={"clips": "of this test"})
    assert outcomes(drawn) == outcomes(benchmark(CLASSIFIER, purifier, CLIPS, LABELS, **QUICK))
    source = json.loads(drawn.record.plan.source)
    assert source["clips"] == "of this test" and source["draw"].endswith("draw")
    assert source["commit"] == "0123456789" * 4 and len(source["digests"]) == 3
    assert source["config"]["inversion_steps"] == 1 and source["dtype"] == "torch.float32"


def test_threats_may_be_objects_and_defenses_too(purifier):
    threats = ["transfer", Threat("query", "square", {"queries": 2}, clips=3)]
    options = QUICK | {"threats": threats, "defenses": {"mine": filter_defense(lambda x: 1 - x)}}
    report = benchmark(CLASSIFIER, purifier, CLIPS, LABELS, surrogate=SURROGATE, **options)
    assert [(row.threat_model, row.n) for row in report.rows] == [
        *[("none", 4), ("transfer", 4), ("query", 3), ("adaptive", 3)]
    ]
    assert {row.defense for row in report.rows} == {"mine"}


def test_a_data_set_names_its_classes(purifier, tmp_path):
    from videopure_fast.data.datasets import ClipSampling, VideoDataset
    from videopure_fast.data.video_writer import VideoWriter

    for i in range(2):
        with VideoWriter(tmp_path / f"{i}.avi", height=32, width=32, rate=10) as writer:
            for frame in (clips(9, 3, 32, 32, seed=i) * 255).to(torch.uint8):
                writer.write(frame)
    sampling = ClipSampling(frames=4, stride=2, resize=32, crop=16)
    dataset = VideoDataset([(tmp_path / f"{i}.avi", i) for i in range(2)], ("a", "b", "c"), sampling=sampling)
    report = benchmark(CLASSIFIER, purifier, dataset, **QUICK, count=2)
    assert report.classes == ("a", "b", "c") and {row.n for row in report.rows} == {2}
    source = json.loads(report.record.plan.source)
    assert source["sampling"]["crop"] == 16 and source["commit"] is None
    with pytest.raises(ValueError, match="1 x 3 clips are needed, and there are 2"):
        benchmark(CLASSIFIER, purifier, dataset, **QUICK, count=3)


def test_standard_threats():
    assert standard_threat("none", 3) == Threat("none", clips=3)
    assert standard_threat("query", 3, eot=2).settings == {"queries": 500, "eot": 2}
    transfer = standard_threat("transfer", 3, attack="apgd", loss="dlr", eot=2)
    assert transfer == Threat("transfer", "temporal_translation", {"steps": 10, "step_size": 2 / 255}, 3)
    exact = standard_threat("exact", 3, attack="apgd", steps=4, loss="margin", restarts=2)
    assert exact.title == "exact apgd, steps=4, loss=margin, restarts=2"


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such layout")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"classifier": len}, TypeError, "classifier must be of type Module, got builtin"),
        ({"purifier": None}, TypeError, "purifier must be of type Purifier, got NoneType"),
        ({"surrogate": len}, TypeError, "surrogate must be of type Module or None, got builtin"),
        ({"clips": CLIPS}, ValueError, "clips need labels"),
        ({"clips": "clips"}, TypeError, r"clips are a str; accepted: a tensor with labels, \(clips, labels\)"),
        ({"clips": print, "labels": LABELS}, ValueError, "labels go with a tensor of clips, got clips of type builtin"),
        ({"clips": (CLIPS * 2, LABELS)}, ValueError, "clips have values from"),
        ({"seeds": 5}, ValueError, "count must be 1 or more, got 0"),
        ({"seeds": ()}, ValueError, "seeds must not be empty"),
        ({"seeds": 0}, ValueError, "seeds must be 1 or more"),
        ({"count": 5}, ValueError, "1 x 5 clips are needed, and there are 4"),
        ({"threats": ["white-box"]}, ValueError, "unknown threat_model 'white-box'; accepted: none, transfer"),
        ({"threats": ["transfer"]}, ValueError, "'transfer' needs a surrogate"),
        ({"defenses": ["prayer"]}, ValueError, "unknown defense 'prayer'; accepted: none, mean of 3 frames"),
        ({"defenses": {"mine": len}}, TypeError, "the defense 'mine' is a builtin_function_or_method; accepted: a def"),
        ({"eps": 8}, ValueError, "every eps must be more than 0 and at most 1, in the clips' units"),
        (
            {"classifier": Fails().eval()},
            ValueError,
            r"the classifier \(Fails\) fails on clips \(2, 3, 4, 16, 16\): Runtime",
        ),
        (
            {"classifier": nn.Flatten(0).eval()},
            ValueError,
            r"\(Flatten\) returns \(6144,\) for 2 clips; accepted: logits \(2, K",
        ),
        ({"classes": ("a", "b")}, ValueError, r"returns \(2, 3\) for 2 clips; accepted: logits \(2, 2\) of 2 classes"),
        ({"surrogate": nn.Flatten(0).eval()}, ValueError, r"the surrogate \(Flatten\) returns \(6144,\)"),
        (
            {"classifier": Classifier().to("meta").eval()},
            ValueError,
            "the classifier is on meta and the purifier on cpu",
        ),
        ({"classifier": Classifier()}, ValueError, "the classifier, or a part of it, is in training mode"),
    ],
)
def test_bad_arguments_are_refused(changed, error, message, purifier):
    given = QUICK | {"classifier": CLASSIFIER, "purifier": purifier, "clips": (CLIPS, LABELS)} | changed
    with pytest.raises(error, match=message):
        benchmark(**given)


def test_a_plan_needs_no_models():
    options = {"eps": [4 / 255], "seeds": (0,), "batch": 2, "repeats": 1}
    plan = make_plan("bpda", 3, defenses="videopure, T=2", **options)
    assert [(threat.threat_model, threat.clips) for threat in plan.threats] == [("none", 3), ("bpda", 3)]
    assert make_plan([Threat("none", clips=2)], 3, defenses=["none"], **options).threats == (Threat("none", clips=2),)
    with pytest.raises(ValueError, match="the depth T must be 0 to 49, got 50"):
        make_plan(["bpda"], 3, defenses=["videopure, T=50"], **options)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda clips: clips + 1, ValueError, "must return values in"),
        (lambda clips: clips[:1], ValueError, "must return a tensor of shape"),
        (lambda clips: clips * float("nan"), ValueError, "must return values in"),
        (lambda clips: 1 - clips, ValueError, "moved a clip by .*; accepted: eps"),
        (lambda clips: None, TypeError, "the attack 'returns' must return a tensor, got NoneType"),
    ],
)
def test_an_attack_that_returns_anything_else_is_refused(returned, error, message):
    @register_attack
    def returns(model, clips, labels, *, eps, generator=None):
        """Whatever the test wants."""
        model(clips)
        return returned(clips)

    try:
        with pytest.raises(error, match=message):
            threat = Threat("gray-box", "returns", clips=4)
            benchmark(CLASSIFIER, build_purifier(), CLIPS, LABELS, threats=threat, defenses="none", checks=False)
    finally:
        del ATTACKS["returns"]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda clips: clips[:1], ValueError, "the defense 'mine' must return a tensor of shape"),
        (lambda clips: 2 * clips, ValueError, "must return values in"),
        (lambda clips: clips[:, :1], ValueError, "must return a tensor of shape"),
    ],
)
def test_a_defense_that_returns_anything_else_is_refused(returned, error, message):
    with pytest.raises(error, match=message):
        benchmark(
            CLASSIFIER, build_purifier(), CLIPS, LABELS, defenses={"mine": filter_defense(returned)}, checks=False
        )
