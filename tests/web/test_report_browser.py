"""The report in a real browser: three widths, light and dark, clips that play, charts whose words do not meet."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from chromium import chromium
from report_folders import folder_of_results

from videopure_fast.web.report import write_report

pytestmark = pytest.mark.page

WIDTHS = (375, 768, 1280)
SHOTS = os.environ.get("REPORT_SHOTS")  # a folder for screenshots of what the tests see
# Pairs of words within a chart that cover each other by more than a pixel.
MEETING = """() => [...document.querySelectorAll("svg.chart")].flatMap((chart) => {
  const words = [...chart.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  return words.flatMap(([one, a], i) => words.slice(i + 1)
    .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
    .map(([other]) => `${chart.getAttribute("aria-label")}: ${one} | ${other}`));
})"""
OUTSIDE = """() => [...document.querySelectorAll("svg.chart text")].filter((text) => {
  const [word, chart] = [text.getBoundingClientRect(), text.closest("svg.chart").getBoundingClientRect()];
  return word.left < chart.left - 4 || word.right > chart.right + 4 || word.bottom > chart.bottom + 1;
}).map((text) => text.textContent)"""
# By how many frames each picture is moved.
PLACES = """() => [...document.querySelectorAll(".sprite img")].map((picture) =>
  Math.round(-16 * new DOMMatrix(getComputedStyle(picture).transform).m41 / picture.getBoundingClientRect().width))"""
# The contrast of words with what is behind them, at least, by WCAG's formula; for words on the page's own panels.
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((v) => v * (color.startsWith("rgb") ? 1 : 255));
  const light = (color) => {
    const [r, g, b] = channels(color).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const panel = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
  const ratios = [...document.querySelectorAll("svg.chart text:not(.inside)")].map((text) => {
    const word = light(getComputedStyle(text).fill);
    return (Math.max(word, panel) + 0.05) / (Math.min(word, panel) + 0.05);
  });
  return Math.min(...ratios);
}"""


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder_of_results(folder / "results"), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, report_file):
    """Opens the report; at the end, nothing may have gone wrong in it, and nothing been asked of a network."""
    with contextlib.ExitStack() as stack:
        problems = []

        def open_page(**options):
            context = stack.enter_context(contextlib.closing(browser.new_context(**options)))
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text))
            page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else 0)
            page.goto(report_file.as_uri())
            return page

        yield open_page
        assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_every_width(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(MEETING) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(CONTRAST) > 4.5
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width  # tables scroll in themselves
    assert page.locator("td").first.is_visible()
    if SHOTS:
        for summary in page.locator("summary").all():
            summary.click()
        page.screenshot(path=Path(SHOTS, f"{width}-{scheme}.png"), full_page=True)


def test_clips_play_in_step(visit):
    page = visit()
    seen = set()
    for _ in range(40):
        places = page.evaluate(PLACES)
        assert len(places) == 6 * 4 and len(set(places)) == 1
        seen.add(places[0])
        page.wait_for_timeout(60)
    assert seen == set(range(16))
    page.locator("#play").uncheck()
    page.wait_for_timeout(100)
    stopped = page.evaluate(PLACES)
    page.wait_for_timeout(400)
    assert page.evaluate(PLACES) == stopped
    assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth === 16 * 32)")


def test_clips_stand_still_for_those_who_ask_for_it(visit):
    page = visit(reduced_motion="reduce")
    stopped = page.evaluate(PLACES)
    page.wait_for_timeout(400)
    assert page.evaluate(PLACES) == stopped and not page.locator("#play").is_visible()


def test_it_is_whole_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("svg.chart").count() > 10 and page.locator("section").count() == 6
    page.get_by_role("link", name="How long clips wait").click()
    assert page.url.endswith("#latency") and page.locator("#latency").is_visible()
