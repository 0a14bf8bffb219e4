"""Every file that README.md and CONTRIBUTING.md name exists, and CONTRIBUTING.md lists the rooms in import order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_packaging import ROOMS

ROOT = Path(__file__).resolve().parents[1]
MADE_BY_MAKE = {".venv/", "demo/", "dist/", "build/"}
A_FILE = re.compile(r"[\w./-]*\w\.(py|md|toml|txt|h|cpp|cu|cuh|yaml|cff)")


def found(path: str) -> bool:
    return (ROOT / path).exists() or (ROOT / "videopure_fast" / path).exists()


def paths_in_backticks(text: str) -> set[str]:
    """Inline code that looks like a file, or like a path below a folder of the repository or of the package."""
    words = re.findall(r"`([\w./-]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    below = {word for word in words if "/" in word.strip("/") and found(word.split("/")[0])}
    return {word for word in words if word.endswith("/") or A_FILE.fullmatch(word)} | below


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_files_named_in_backticks_exist(name):
    paths = paths_in_backticks((ROOT / name).read_text())
    assert paths
    missing = sorted(path for path in paths - MADE_BY_MAKE if not found(path))
    assert not missing, f"{name} names what does not exist: {missing}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing, f"{name} links to what does not exist: {missing}"


def test_contributing_lists_the_rooms_in_import_order():
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text().partition("| room | what it holds |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    rooms = [row.split("`")[1].rstrip("/").removesuffix(".py") for row in rows]
    assert rooms == list(ROOMS)
