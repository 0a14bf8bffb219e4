"""Results for the tests of the report: the committed ones with a made-up study of latency; and pages taken apart."""

from __future__ import annotations

import json
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

from videopure_fast.realtime import study
from videopure_fast.realtime.load import Record
from videopure_fast.realtime.serving import Times
from videopure_fast.realtime.study import Setting

COMMITTED = Path(__file__).resolve().parents[2] / "bench" / "results"
FILES = ("cpu.json", "nvidia-h200.json", "nvidia-h200-prediction.json", "robustness-tiny.json")
LOADS = (0.5, 0.8, 0.95)
CLIP_SECONDS, CLIPS = 0.6, 120  # of a run
VOID = {"meta", "img", "input"}
# SVG's elements end as others do.
KNOWN = {
    *("html head title style body div header main footer section nav ul li figure figcaption details summary").split(),
    *("table thead tbody tr th td h1 h2 h3 p a code strong span label i").split(),
    *("svg g rect line circle text polyline").split(),
    *VOID,
}


def folder_of_results(folder: Path) -> Path:
    """The committed results of speed and accuracy, and a study of latency."""
    folder.mkdir()
    for name in FILES:
        shutil.copy(COMMITTED / name, folder)
    (folder / "latency-cpu.json").write_text(json.dumps(latency_study()))
    return folder


def latency_study() -> dict:
    """A study of the shape that bench/latency.py writes; its times are made up."""
    rows = []
    for setting in (Setting(1), Setting(4)):
        for load in LOADS:
            rows += [row_of(setting, load, simulated, "load") for simulated in (False, True)]
        curve = (row_of(setting, number / 20, True, "curve") for number in range(1, 20))
        rows += [{**row, "records": []} for row in curve]
    machine = {"device": "cpu (made up)", "threads": 2, "torch": "2"}
    created = "2026-01-02T03:04:05+00:00"
    return {"kind": study.KIND, "created": created, "machine": machine, "settings": {}, "rows": rows}


def row_of(setting: Setting, load: float, simulated: bool, part: str) -> dict:
    """A run of one server, first come, first served."""
    drawn, records, due, free = random.Random(f"{setting} {simulated}"), [], 0.0, 0.0
    for _ in range(CLIPS):
        due += drawn.expovariate(load / CLIP_SECONDS)
        start = max(due, free)
        free = start + CLIP_SECONDS * drawn.uniform(0.9, 1.1)
        points = [start + share * (free - start) for share in (0.05, 0.8, 0.98, 1.0)]
        records.append(Record(0, due, due, None, "answered", Times(due, start, *points)))
    return study.row(setting, records, simulated=simulated, part=part, load=load)


class Parsed(HTMLParser):
    """A page taken apart. AssertionError where elements do not nest, or are none of the report's."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, tuple[str, ...], str]] = []  # section, classes and names around it, text
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in KNOWN, f"<{tag}> at {self.getpos()}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> at {self.getpos()} within {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        text = text.replace("\u00a0", " ")
        if text.strip() and self.open and self.open[-1][0] != "style":
            section = next((found["id"] for tag, found in self.open if tag == "section"), "")
            around = [word for tag, found in self.open for word in (tag, *(found.get("class") or "").split())]
            self.texts.append((section or "", tuple(around), text))

    def shown(self, section: str | None = None) -> str:
        """All text, or that of a section."""
        return " ".join(text for name, _, text in self.texts if section in (None, name))
