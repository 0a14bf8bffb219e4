"""The page of the service in a real browser, before a stand-in for the service."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest
from chromium import chromium
from page_server import CELLO, FRAMES, RATE, VOTES, WINDOWS, StandIn, mp4, running

pytestmark = pytest.mark.page

WATCH_SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => list.getEntries().forEach((entry) => (window.shifts += entry.value)))
  .observe({ type: "layout-shift", buffered: true });
"""
DROP = """([name, data]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(data)], name, { type: "video/mp4" }));
  document.getElementById("limits").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
}"""
STAGES = ["Queue", "Encode", "Sample", "Decode", "Other"]
TIMES_OF_BOTH = '["before", "after"].map((id) => document.getElementById(id).currentTime)'


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    """Opens the page of a stand-in; at the end, no page may have raised an error or broken its policy of content."""
    with contextlib.ExitStack() as stack:
        problems = []

        def open_page(service: StandIn, **options):
            address = stack.enter_context(running(service.app))
            context = stack.enter_context(contextlib.closing(browser.new_context(**options)))
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if "policy" in message.text.lower() else 0)
            page.add_init_script(WATCH_SHIFTS)
            page.goto(address)
            return page

        yield open_page
        assert problems == []


def choose(page, name="clip.mp4", data=None):
    file = {"name": name, "mimeType": "video/mp4", "buffer": mp4(0.3) if data is None else data}
    page.locator("#file").set_input_files(file)


def expect_text(page, selector, text, seconds=5.0):
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=1000 * seconds)


def purify(page, name="clip.mp4"):
    choose(page, name)
    expect_text(page, "#status", "Purified in 2.31 s.")
    page.locator("#play:enabled").wait_for()


def wait_until(condition, seconds=2.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_a_video_is_purified(visit):
    service = StandIn()
    page = visit(service)
    expect_text(page, "#server", "tiny, 16 frames of 32 px a window")
    expect_text(page, "#limits", "Up to 977 KiB, 30 s, 600 frames of 0.31 megapixels")
    page.locator("#steps").fill("3")
    purify(page)
    assert service.seen == [("clip.mp4", "3")]
    assert page.locator("progress").evaluate_all("all => all.map((each) => each.value)") == [1] * 5
    counts = page.locator("#stages .number").all_inner_texts()
    assert counts == ["100 %", "0 ahead", "3 of 3", "24 of 24", "30 of 30"]
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "clip-purified.mp4"
    assert download.value.path().read_bytes() == mp4(0.0)
    assert page.evaluate("shifts") < 0.005


def test_votes_are_shown(visit):
    page = visit(StandIn())
    choose(page, "held.mp4")
    expect_text(page, "#verdict", "playing cello leads")  # 4 of 5, of 30
    wait_until(lambda: page.locator("#votes li").all_inner_texts() == ["playing cello\n4", "archery\n1"])
    page.locator("#cancel").click()
    purify(page)
    expect_text(page, "#verdict", "playing cello, settled")
    names = ["playing cello", "archery", "surfing water", "bowling", "golf"]
    assert [text.split("\n")[0] for text in page.locator("#votes li").all_inner_texts()] == names
    assert page.locator("#votes [aria-current]").inner_text() == "playing cello\n15"
    assert page.locator("#track i").count() == WINDOWS * VOTES
    width = page.locator("#votes .bar").first.evaluate("bar => bar.firstChild.offsetWidth / bar.offsetWidth")
    assert width == pytest.approx(15 / 30, abs=0.02)


def test_many_labels_and_names_are_text(visit):
    service = StandIn(votes=["<img src=x onerror=alert(1)>", *"abcdefg", "x" * 300, "a"])
    page = visit(service, viewport={"width": 375, "height": 700})
    purify(page, "<b>.mp4")
    rows = page.locator("#votes li").all_inner_texts()
    assert rows[0] == "a\n6" and "<img src=x onerror=alert(1)>\n3" in rows
    assert rows[-1] == "5 other labels\n15" and len(rows) == 5
    assert page.locator("#votes img, #chosen b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_tie_is_said(visit):
    page = visit(StandIn(votes=["archery", "bowling"] * 5))
    purify(page)
    expect_text(page, "#verdict", "archery, of equals")
    expect_text(page, "#status", "The label is archery.")


def test_without_a_classifier_nobody_votes(visit):
    page = visit(StandIn(votes=None))
    purify(page)
    expect_text(page, "#verdict", "no classifier")
    assert page.locator("#votes li").count() == 0


def test_times_are_shown(visit):
    page = visit(StandIn())
    assert page.locator("#times").inner_text().split() == sum(([n, "–", "–"] for n in STAGES), [])
    purify(page)
    rows = [row.split() for row in page.locator("#times").inner_text().splitlines()]
    assert rows[0] == ["Queue", "0.02", "1", "%"] and rows[2] == ["Sample", "1.43", "62", "%"]
    assert rows[4] == ["Other", "0.11", "5", "%"]
    expect_text(page, "#total", "2.31 s")
    widths = page.locator("#parts i").evaluate_all("all => all.map((each) => each.offsetWidth)")
    assert widths[2] / sum(widths) == pytest.approx(1.43 / 2.31, abs=0.02)


def test_both_videos_play_in_step(visit):
    page = visit(StandIn())
    purify(page)
    for _ in range(4):
        page.wait_for_timeout(250)
        before, after = page.evaluate(TIMES_OF_BOTH)
        assert 0 < before and abs(before - after) < 1 / RATE
    page.wait_for_timeout(2000)  # around the end, where the loop begins anew
    before, after = page.evaluate(TIMES_OF_BOTH)
    assert page.locator("#play").inner_text() == "Pause" and abs(before - after) < 1 / RATE
    page.locator("#loop").uncheck()
    expect_text(page, "#play", "Play")
    assert page.locator("#seek").input_value() == str(FRAMES - 1)
    page.locator("#play").click()
    wait_until(lambda: page.evaluate(TIMES_OF_BOTH)[0] < 1)


def test_frames_are_stepped_and_sought(visit):
    page = visit(StandIn(), reduced_motion="reduce")
    purify(page)
    assert page.locator("#play").inner_text() == "Play"  # nothing moves by itself
    page.locator("#seek").fill("30")
    expect_text(page, "#time", "31 / 50, 1.20 s")
    for key, frame in {"ArrowRight": 32, "ArrowLeft": 31, "Home": 1, "End": FRAMES}.items():
        page.locator("#seek").press(key)
        expect_text(page, "#time", f"{frame} / 50,")
        wait_until(lambda: page.evaluate("!document.querySelector('#before').seeking"))
        before, after = page.evaluate(TIMES_OF_BOTH)
        assert before == after == pytest.approx((frame - 0.5) / RATE, abs=0.1 / RATE)


def test_the_difference_is_amplified(visit):
    page = visit(StandIn(), reduced_motion="reduce")
    purify(page)
    wait_until(lambda: brightness(page) > 0)
    assert 5 < brightness(page) < 60  # of the noise, half of 0.3 * 255 at most
    picture = page.locator("#difference")
    assert picture.evaluate("canvas => getComputedStyle(canvas).filter") == "brightness(4)"
    page.locator("#gain").select_option("16")
    assert picture.evaluate("canvas => getComputedStyle(canvas).filter") == "brightness(16)"


def brightness(page) -> float:
    """Mean of a difference's colors, 0 to 255."""
    return page.evaluate("""() => {
      const canvas = document.getElementById("difference");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return data.filter((_, i) => i % 4 < 3).reduce((sum, value) => sum + value, 0) / (data.length * 0.75);
    }""")


@pytest.mark.parametrize(
    ("name", "sentence"),
    {
        "notes.txt": "The video is damaged; accepted: mp4.",
        "busy.mp4": "The service is busy: 8 videos wait already; try again later. It expects room in 7 s.",
        "bare.mp4": "The service behind this address does not answer.",
        "late.mp4": "The deadline was missed by 0.2 s.",
        "broken.mp4": "The answer broke off before the result was there.",
    }.items(),
)
def test_errors_are_sentences(visit, name, sentence):
    page = visit(StandIn())
    choose(page, name)
    expect_text(page, "#error", sentence)
    assert page.locator("#error").get_attribute("role") == "alert"
    assert page.locator("#again").is_enabled() and page.locator("#cancel").is_disabled()
    purify(page)
    assert page.locator("#error").is_hidden()


def test_a_large_video_is_not_sent(visit):
    service = StandIn()
    page = visit(service)
    expect_text(page, "#limits", "977 KiB")
    choose(page, data=bytes(1_200_000))
    expect_text(page, "#error", "The video has 1.14 MiB; this server accepts 977 KiB at most.")
    assert service.seen == []


def test_a_server_that_is_gone_is_named(visit):
    page = visit(StandIn())
    expect_text(page, "#server", "tiny")
    page.route("**/v1/purify", lambda route: route.abort("connectionrefused"))
    choose(page)
    expect_text(page, "#error", "The server was not reached")


def test_cancel_frees_the_server(visit):
    service = StandIn()
    page = visit(service)
    choose(page, "held.mp4")
    expect_text(page, "#verdict", "leads")
    assert page.locator("#again").is_disabled()
    page.locator("#cancel").click()
    expect_text(page, "#status", "Canceled.")
    wait_until(lambda: service.left == 1, seconds=1)
    assert page.locator("#again").is_enabled()


def test_a_page_that_is_closed_frees_the_server(visit):
    service = StandIn()
    page = visit(service)
    choose(page, "held.mp4")
    expect_text(page, "#verdict", "leads")
    page.close()
    wait_until(lambda: service.left == 1, seconds=1)


def test_a_second_video_replaces_the_first(visit):
    service = StandIn()
    page = visit(service)
    choose(page, "held.mp4")
    expect_text(page, "#verdict", "leads")
    page.evaluate(DROP, ["dropped.mp4", list(mp4(0.0))])
    expect_text(page, "#status", "Purified in")
    wait_until(lambda: service.left == 1, seconds=1)
    assert [name for name, _ in service.seen] == ["held.mp4", "dropped.mp4"]


def test_a_token_is_asked_for_and_kept_by_the_tab(visit):
    page = visit(StandIn(token="s3cret"))
    expect_text(page, "#error", "This server asks for its token.")
    for token in ("wrong", "s3cret"):
        page.locator("#token:focus").wait_for()
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        if token == "wrong":
            expect_text(page, "#error", "This is not the server's token.")
    expect_text(page, "#server", "tiny")
    assert page.locator("#login").is_hidden()
    purify(page)
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.reload()
    expect_text(page, "#server", "tiny")


@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits(visit, width, theme):
    page = visit(StandIn(), viewport={"width": width, "height": 800}, color_scheme=theme)
    purify(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(".frame").nth(i).bounding_box() for i in range(3)]
    across, down = len({box["x"] for box in boxes}), len({box["y"] for box in boxes})
    assert (across, down) == ((1, 3) if width == 375 else (3, 1))
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(244, 246, 245)", "dark": "rgb(14, 20, 19)"}[theme]
    targets = page.locator("button:visible, a.button, select, #file").evaluate_all(
        "all => all.map((each) => (each.closest('label') ?? each).getBoundingClientRect().height)"
    )
    assert min(targets) >= 24  # pixels: WCAG 2.2, 2.5.8


def test_the_keyboard_is_enough(visit):
    service = StandIn()
    page = visit(service, reduced_motion="reduce")
    focused = "document.activeElement.id"
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    expect_text(page, "#server", "tiny")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "file"
    assert page.locator("#drop").evaluate("drop => getComputedStyle(drop).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    wait_until(lambda: page.wait_for_timeout(20) or choosers)
    choosers[0].set_files({"name": "held.mp4", "mimeType": "video/mp4", "buffer": mp4(0.3)})
    expect_text(page, "#verdict", "leads")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "cancel"
    page.keyboard.press("Space")
    expect_text(page, "#status", "Canceled.")
    assert page.evaluate(focused) == "again"
    purify(page)
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
    assert reached == ["steps", "download", "gain", "play", "seek", "loop"]
    page.keyboard.press("ArrowRight")
    expect_text(page, "#time", "2 / 50,")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    expect_text(page, "#play", "Pause")
    page.keyboard.press("Space")
    expect_text(page, "#play", "Play")


def test_what_happens_is_announced(visit):
    page = visit(StandIn())
    page.evaluate("""() => {
      window.said = [];
      const status = document.getElementById("status");
      const note = (changes) => said.push(...changes.map((change) => change.addedNodes[0].textContent));
      new MutationObserver(note).observe(status, { childList: true });
    }""")
    purify(page)
    said = page.evaluate("said")
    assert said[:3] == [
        "Sending clip.mp4",
        "One video is ahead of yours.",
        "Purifying 50 frames of 160 × 120 pixels in 3 windows.",
    ]
    assert said[-1] == f"Purified in 2.31 s. The label is {CELLO}."
    assert len(said) < 12  # not every step of every stage
    assert page.locator("#status").get_attribute("role") == "status"


def test_a_live_source_is_watched(visit):
    page = visit(StandIn())
    page.locator("#sources button").click()
    picture = page.locator("#sources canvas")
    picture.wait_for()
    color = "canvas => [canvas.width, ...canvas.getContext('2d').getImageData(9, 9, 1, 1).data]"
    assert picture.evaluate(color) == pytest.approx([64, 0, 128, 128, 255], abs=3)  # teal
    assert page.locator("#sources button").inner_text() == "Stop"
    page.locator("#sources button").click()
    picture.wait_for(state="hidden")
    assert page.locator("#error").is_hidden()


def test_a_live_source_that_cannot_be_drawn_is_left(visit):
    service = StandIn()
    service.picture = b"this is no JPEG"
    page = visit(service)
    page.locator("#sources button").click()
    expect_text(page, "#error", "The live source porch broke off.")
    wait_until(lambda: service.left == 1)
    assert page.locator("#sources button").inner_text() == "Watch"


def test_the_service_is_behind_the_page(visit):
    from videopure_fast import Purifier, tiny
    from videopure_fast.service.app import create_app

    token = "a token of 16 letters".replace(" ", "-")
    app = create_app(Purifier.from_pretrained("tiny"), tiny.load_classifier(), size=32, token=token)
    page = visit(SimpleNamespace(app=app))
    expect_text(page, "#error", "This server asks for its token.")
    page.locator("#token").fill(token)
    page.keyboard.press("Enter")
    expect_text(page, "#server", "tiny, 16 frames of 32 px a window")
    wait_until(lambda: page.request.get(page.url + "readyz").ok, seconds=60)
    choose(page, "notes.txt", b"not a video")
    expect_text(page, "#error", "not a video")

    choose(page)
    expect_text(page, "#status", "Purified in", seconds=60)
    expect_text(page, "#verdict", "settled")
    page.locator("#play:enabled").wait_for()
    assert page.locator("#time").inner_text().endswith(" s")
    sizes = page.evaluate('["before", "after"].map((id) => document.getElementById(id).videoHeight)')
    assert sizes == [32, 32]
    wait_until(lambda: brightness(page) > 0)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.path().stat().st_size > 1000
