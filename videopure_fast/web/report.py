"""The report of results: one HTML file that needs nothing else, from a folder of results and a demo run."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from ..files import atomic_write, check_writable
from ..machine import installed
from .report_clips import EPS, STEPS, Demo, Shown, View, attack_and_purify
from .report_data import Results, read_results
from .report_files import printable
from .report_latency import latency
from .report_markup import Markup, element
from .report_sections import Section, accuracy, paragraph, section, speed, stages, tradeoff
from .report_summary import summary

PAPER = "https://arxiv.org/abs/2501.14999"
TITLE = "videopure_fast: results"
_SUFFIX = ".html"
# Nothing may be loaded, not even by mistake, and nothing may run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_FRAME_SECONDS = 0.125


def write_report(
    results: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    demo: bool = True,
    announce: Callable[[], object] = lambda: None,
) -> int:
    """Write the report of the results in a folder, and return its size in bytes.

    demo: also attack packaged clips, purify and show them, which takes some seconds; `announce` is called before. Where
    something was not measured, the report says so. ValueError, before the demo, for a path that cannot be written or is
    no HTML file's, where there is no such folder, and for a file in it that is not as it should be.
    """
    if Path(path).suffix.lower() != _SUFFIX:
        raise ValueError(f"cannot write {path}: accepted is a name that ends in {_SUFFIX}")
    check_writable(path)
    found = read_results(Path(results))
    sections = [speed(found), stages(found), accuracy(found), tradeoff(found), latency(found)]
    if demo:
        announce()
        sections = [clips(attack_and_purify()), *sections]
    text = page(found, sections)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return len(text.encode())


def page(results: Results, sections: list[Section]) -> str:
    """The whole file."""
    folder = files(__package__)
    style = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "report.css"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", TITLE),
        element("style", Markup(style)),
    )
    links = [element("li", element("a", title, href=f"#{name}")) for name, title, _ in sections]
    contents = element("nav", element("ul", *links), aria_label="Contents", class_="contents")
    cards = [element("section", element("h2", title), part, id=name, class_="card") for name, title, part in sections]
    parts = (_header(), summary(results), contents, element("main", *cards), _footer(results))
    body = element("body", element("div", *parts, class_="page"))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header() -> Markup:
    said = (
        "Video classifiers can be fooled by perturbations that nobody sees. videopure_fast purifies clips with a "
        "text-to-video diffusion model before they are classified: VideoPure ("
    )
    lead = element("p", said, element("a", "arXiv 2501.14999", href=PAPER), "), made fast.", class_="lead")
    return element("header", element("h1", TITLE), lead)


def _footer(results: Results) -> Markup:
    version = installed("videopure-fast") or "from its source"
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    said = f" of videopure_fast {version} made this page from the results in {printable(str(results.folder))}, {made}."
    return element("footer", element("p", element("code", "videopure-fast report"), said, class_="muted"))


# Clips that play


def clips(demo: Demo) -> Section:
    """Clips side by side: clean, attacked, purified, and the perturbation."""
    said = (
        f"The first {len(demo.clips)} packaged clips of a seed, whatever becomes of them, attacked by PGD-{STEPS} on "
        f"the bare classifier with at most {255 * EPS:g}/255, and purified. Their class is the motion of the drawn "
        "sprite. Below each is what the classifier takes it for; last is what the attack has changed, around gray."
    )
    play = element("input", type="checkbox", id="play", checked="")
    length = f"--frames: {demo.frames}; --length: {demo.frames * _FRAME_SECONDS:g}s"
    rows = element("div", *map(_clip, demo.clips), class_="reel", style=length)
    return section("clips", "See it work", paragraph(said), element("label", play, " play", class_="play"), rows)


def _clip(shown: Shown) -> Markup:
    views = element("div", *(_view(view, shown.truth) for view in shown.views), class_="four")
    return element("div", element("h3", f"truly {shown.truth}"), views)


def _view(view: View, truth: str) -> Markup:
    picture = element("img", src=view.frames, alt=f"{view.name}: a clip that is truly {truth}")
    seen = None
    if view.seen is not None:
        mark, tone = ("✓", "good") if view.right else ("✗", "bad")
        seen = element("span", f"{mark} {view.seen}", class_=f"badge {tone}")
    votes = None if view.votes is None else element("span", f"{view.votes[0]} of {view.votes[1]} votes", class_="form")
    caption = element("figcaption", element("span", view.name, class_="form"), seen, votes)
    return element("figure", element("div", picture, class_="frame sprite pixels"), caption)
