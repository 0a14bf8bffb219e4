"""The files of the page as they are: complete, of one origin, and readable, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import videopure_fast

WEB = Path(videopure_fast.__file__).parent / "web"
FILES = ("index.html", "page.js", "player.js", "style.css")
AA_TEXT, AA_GRAPHICS = 4.5, 3.0  # contrast that WCAG 2.2 asks for, 1.4.3 and 1.4.11


class Page(HTMLParser):
    """The elements of index.html as (tag, attributes), and the text of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed((WEB / "index.html").read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.inline += data.strip()

    def all_of(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(attribute))]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_loaded_from_elsewhere(name):
    text = (WEB / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)


def test_every_file_that_is_named_is_there(page):
    named = [*page.all_of("src"), *(link for link in page.all_of("href") if not link.startswith("data:"))]
    imported = re.findall(r'from "\./(.+?)"', (WEB / "page.js").read_text())
    assert {"index.html", *named, *imported} == set(FILES)


def test_a_strict_policy_of_content_allows_the_page(page):
    assert page.inline == "" and page.all_of("style") == []
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    scripts = "".join((WEB / name).read_text() for name in FILES if name.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|\"style\"", scripts)


def test_ids_are_there_once(page):
    ids = page.all_of("id")
    assert len(ids) == len(set(ids))
    scripts = "".join((WEB / name).read_text() for name in FILES if name.endswith(".js"))
    used = set(re.findall(r'\$\("([\w-]+)"\)', scripts))
    stages = re.search(r"STAGES = (\[.+\])", scripts)
    listed = re.findall(r'\[((?:"\w+",? ?)+)\]\.map\(\$\)', scripts)
    assert stages and listed
    names = re.findall(r'"(\w+)"', " ".join([stages[1], *listed]))
    assert used | set(names) | {f"{name}-count" for name in re.findall(r'"(\w+)"', stages[1])} <= set(ids)
    referred = [*page.all_of("for"), *page.all_of("aria-labelledby"), *page.all_of("aria-describedby")]
    assert set(referred) <= set(ids)


def test_only_sentences_are_announced(page):
    """Not every number: an <output> is a live region too."""
    live = [at.get("id") for tag, at in page.elements if tag == "output" or at.get("role") in ("status", "alert")]
    assert live == ["status", "error"] and page.all_of("aria-live") == []


def test_classes_have_a_style(page):
    style = (WEB / "style.css").read_text()
    for name in {name for value in page.all_of("class") for name in value.split()}:
        assert f".{name}" in style, name


def luminance(color: str) -> float:
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_are_told_apart(theme):
    light, dark = re.findall(r":root \{(.+?)\}", (WEB / "style.css").read_text(), re.DOTALL)
    color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    if theme == "dark":
        changed = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark))
        assert set(changed) == set(color)
        color = changed
    for ground in ("bg", "panel"):
        for name in ("ink", "muted", "accent", "good", "bad", "warn"):
            assert contrast(color[name], color[ground]) >= AA_TEXT, f"{name} on {ground}"
        for name in ("edge", *(f"series-{i}" for i in range(1, 7))):
            assert contrast(color[name], color[ground]) >= AA_GRAPHICS, f"{name} on {ground}"
    assert contrast(color["on-accent"], color["accent"]) >= AA_TEXT
