"""The page as a browser shows and prints it."""

import base64
import re

import pytest

from moe_upgrpo.report import write_report
from tests import browser
from tests.report.synthetic import make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.find(), reason="no browser: Chromium, or MOE_UPGRPO_BROWSER"),
]
# A4 less margins of 12 mm, in CSS pixels.
WIDTH, HEIGHT = 703, 1032


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    file = write_report([make_run(folder / "run", steps=30)], folder / "report.html")
    with browser.opened() as opened:
        opened.open(file.as_uri())
        yield opened, file


def boxes(page, selector):
    script = (
        "[...document.querySelectorAll({!r})].map(e => {{const b = e.getBoundingClientRect(); "
        "return [b.left, b.top, b.width, b.height]}})"
    )
    return page.run(script.format(selector))


def test_the_answer_is_on_the_first_screen(page):
    shown, _ = page
    found = [boxes(shown, s) for s in (".answer", ".alarms", "#answer figure svg")]
    assert [len(x) for x in found] == [3, 1, 1]
    assert max(top + height for x in found for _, top, _, height in x) < 600


def test_the_keyboard_reaches_a_token_and_its_row_shows(page):
    shown, _ = page
    shown.run("document.querySelector('.token').focus()")
    first = shown.run("document.activeElement.getAttribute('aria-label')")
    script = "getComputedStyle(document.activeElement, '::after').content"
    assert first.startswith("position ") and first.split("\n")[0] in shown.run(script)
    shown.press("Tab")
    assert shown.run("document.activeElement.className").startswith("token")
    assert shown.run("document.activeElement.getAttribute('aria-label')") != first


def test_a_choice_changes_the_colours(page):
    shown, _ = page
    token = "[...document.querySelectorAll('.token')].find(e => e.style.cssText.includes('--adv'))"
    color = f"getComputedStyle({token}).backgroundColor"
    seen = set()
    for key in ("gap", "advantage"):
        shown.run(f"document.getElementById('by-{key}').click()")
        seen.add(shown.run(color))
    assert len(seen) == 2


def test_a_dark_page_is_dark_and_its_text_is_not(page):
    shown, file = page

    def light(expression):
        red, green, blue = map(float, re.findall(r"[\d.]+", shown.run(expression))[:3])
        return (0.3 * red + 0.6 * green + 0.1 * blue) / 255

    pair = ("getComputedStyle(document.body).backgroundColor",
            "getComputedStyle(document.querySelector('svg.plot text')).fill")  # fmt: skip
    shown.open(file.as_uri(), dark=True)
    ground, text = map(light, pair)
    assert ground < 0.15 and text > 0.6
    shown.open(file.as_uri())
    ground, text = map(light, pair)
    assert ground > 0.9 and text < 0.4


def test_no_chart_is_cut_in_print(page):
    """Each figure stays on one page, and is smaller than one."""
    shown, file = page
    shown.open(file.as_uri(), width=WIDTH, height=HEIGHT)
    shown.call("Emulation.setEmulatedMedia", media="print")
    found = boxes(shown, "figure")
    assert len(found) > 25
    assert all(left >= 0 and left + width <= WIDTH + 1 for left, _, width, _ in found)
    assert all(0 < height < HEIGHT / 2 for *_, height in found)
    kept = "[...document.querySelectorAll('figure')].map(e => getComputedStyle(e).breakInside)"
    assert set(shown.run(kept)) == {"avoid"}
    printed = shown.call("Page.printToPDF", preferCSSPageSize=True)["data"]
    pages = len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed)))
    assert 3 < pages < 40
    shown.call("Emulation.setEmulatedMedia", media="")
