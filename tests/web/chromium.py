"""A headless Chromium for tests, which fail with a sentence where it is missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is missing; `make test-page` installs it", pytrace=False)
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("there is no chromium on the PATH; Debian's is installed by `apt install chromium`", pytrace=False)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()
