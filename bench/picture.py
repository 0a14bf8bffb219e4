"""Draw bench/results/report.png, the README's picture of the report: `python bench/picture.py`.

It is the top of `videopure-fast report` in a browser of 1280 pixels: the summary, and the techniques from the authors'
algorithm to ours. It needs playwright, and chromium on the PATH; `make picture` installs the first.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from videopure_fast.files import atomic_write
from videopure_fast.web.report import write_report

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH, SCALE = 1280, 1.5
MARGIN = 16  # pixels below the techniques
COLORS = 128  # of the picture, which has few
MOST_BYTES = 300_000


def draw(report: Path, chromium: str) -> Image.Image:
    """The top of the report."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        size = {"width": WIDTH, "height": 900}
        page = browser.new_page(viewport=size, device_scale_factor=SCALE, color_scheme="light")
        page.goto(report.as_uri())
        box = page.locator("#speed").bounding_box()
        area = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + MARGIN}
        picture = Image.open(io.BytesIO(page.screenshot(clip=area, full_page=True)))
        browser.close()
    return picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium on the PATH; Debian's is installed by `apt install chromium`")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.html")
        write_report(RESULTS, report, demo=False)
        picture = draw(report, chromium)
    with atomic_write(RESULTS / "report.png") as file:
        picture.save(file, optimize=True)
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ValueError(f"the picture has {size} bytes; accepted: {MOST_BYTES} or less")
    print(f"{RESULTS / 'report.png'}: {picture.width}x{picture.height}, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
