"""Reports: what they print, note and write."""

from __future__ import annotations

import pytest
import torch
from conftest import build_purifier, clips
from rich.console import Console

from videopure_fast.defense import Defense, build_defenses
from videopure_fast.evaluation import checks
from videopure_fast.evaluation.checks import sanity_checks
from videopure_fast.evaluation.plan import Plan, Threat
from videopure_fast.evaluation.record import Record
from videopure_fast.evaluation.report import Report, weaknesses
from videopure_fast.evaluation.runner import EvalContext


def test_only_attacks_on_the_defense_itself_need_eot():
    steps = {"steps": 10, "step_size": 0.1}
    threats = Threat("transfer", "pgd", steps), Threat("bpda", "pgd", steps | {"eot": 2})
    (note,) = weaknesses(Plan("test", threats, ("ddim",)), ["ddim"])
    assert note.startswith("no attack used a defense's own gradients")
    (note,) = weaknesses(Plan("test", (Threat("exact", "pgd", steps),), ("ddim",)), ["ddim"])
    assert note.startswith("ddim: random at each call")


def test_sanity_checks_are_of_the_last_defense(monkeypatch):
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 3 * 16 * 16, 4))

    def draw(seed, start, count):
        return clips(count, 3, 3, 16, 16) * 0.6 + 0.2, torch.zeros(count, dtype=torch.int64)

    def made(name, draw=draw, classifier=classifier):
        plan = Plan("test", (Threat("none", clips=2),), ("none", name))
        return sanity_checks(plan, EvalContext(classifier, build_defenses(build_purifier()), draw))

    assert [check.name for check in made("mean of 3 frames")] == [
        "mean of 3 frames: the loss rises with the attack's steps, more than by noise",
        "mean of 3 frames: accuracy goes to zero as eps grows, sooner than by noise",
        "mean of 3 frames: BPDA's gradient points uphill",
    ]
    monkeypatch.setattr(checks, "_REACH_EPS", (8 / 255,))
    monkeypatch.setattr(checks, "_REACH_STEPS", 2)
    *_, gradient = made("videopure")
    assert gradient.name == "videopure: the exact gradient agrees with finite differences" and gradient.passed
    (unread,) = made("videopure", lambda *_: (torch.empty(0, 3, 3, 16, 16), torch.empty(0, dtype=torch.int64)))
    assert not unread.passed and "none of the first clips could be read" in unread.seen
    broken = made("mean of 3 frames", classifier=lambda x: x.no_such_thing() if x.requires_grad else classifier(x))
    assert all("not made" in check.seen and not check.passed for check in broken)


@pytest.fixture
def report(tmp_path):
    """The record of a plan of which nothing is done."""
    plan = Plan("test", (Threat("gray-box", "pgd", {"steps": 1, "step_size": 0.1}, 2),), ("none",), seeds=(0,))
    context = EvalContext(torch.nn.Identity(), {"none": Defense(None, None)}, None)
    return Report(Record(tmp_path / "record.json", plan), context)


def test_brackets_in_names_are_no_markup(report, tmp_path):
    report.notes = ["skipped [red]clips[/red]/a.avi"]
    assert "[red]clips[/red]/a.avi" in str(report)
    markup = Console(markup=True, width=120)
    with markup.capture() as printed:
        markup.print(report)
    assert "[red]clips[/red]/a.avi" in printed.get()


def test_nothing_done_has_no_pictures(report, tmp_path):
    for draw in (report.plot, report.strip, report.video):
        with pytest.raises(ValueError, match="no accuracy under attack|no attack on none was done in full"):
            draw(tmp_path / "picture.png")
    report.save(tmp_path / "folder")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["report.json", "table.csv"]
    assert repr(report) == "<Report: 0 rows, 0 of 0 checks passed>"


def test_without_matplotlib_the_rest_is_saved(tmp_path, report, monkeypatch):
    report.rows = [*report.rows]

    def missing(path):
        raise ImportError("drawing needs matplotlib")

    monkeypatch.setattr(report, "plot", missing)
    monkeypatch.setattr(report, "_attacked", lambda: True)
    with pytest.warns(UserWarning, match="accuracy.svg is not drawn: drawing needs matplotlib"):
        report.save(tmp_path / "folder")
    assert (tmp_path / "folder" / "report.json").exists()
