"""The report in a headless Chromium: no error in its console, hover, toggles, keys, two widths."""

import pytest
from devtools import Browser, chromium
from reports import served, small

from planner.report import serving_page, training

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, checked = tmp_path_factory.mktemp("pages"), small()
    made = {
        "one": training.page([checked], ask=False),
        "two": training.page([checked, small(hardware="h200x8")], ask=False),
        "asked": training.page([checked], effort=5),  # what else there is, in words
        "serving": serving_page.page([served()]),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(chromium(), tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one", "two", "serving"])
def test_it_renders_without_an_error_and_nothing_is_wider_than_the_window(
    browser, pages, name, width
):
    for theme in ("light", "dark"):
        browser.open(pages / f"{name}.html", width, 900, theme)
        wide = browser.run("document.documentElement.scrollWidth")
        assert wide <= width
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(251, 250, 248)", "dark": "rgb(20, 22, 26)"}[theme]
        marks = browser.run("[...document.querySelectorAll('.chart rect')].filter("
                            "r => r.getBoundingClientRect().width > 0).length")
        assert marks > 10
    assert browser.errors == []


@pytest.mark.parametrize("width", [1280, 390])
def test_what_is_named_first_is_seen_without_scrolling_sideways(browser, pages, width):
    """The links to all sections, and the table of decisions that changed, with what each means."""
    browser.open(pages / "two.html", width, 900)
    for name in ("nav", "#changes > .scroll"):  # not behind a chart
        assert browser.run(
            f"[...document.querySelectorAll('{name}')]"
            ".every(e => e.scrollWidth <= e.clientWidth)"
        ), name
    last = browser.run("(l => l[l.length - 1].getBoundingClientRect().right)"
                       "(document.querySelectorAll('nav a'))")  # fmt: skip
    assert last <= width
    lines = browser.run("new Set([...document.querySelectorAll('nav a')].map("
                        "a => a.getBoundingClientRect().top)).size")  # fmt: skip
    assert lines == 1 or width == 390


def tip(browser):
    return browser.run("(t => t.hidden ? '' : t.textContent)(document.getElementById('tip'))")


def test_hover_says_what_a_mark_is(browser, pages):
    browser.open(pages / "one.html", 1280, 900)
    at = browser.box("#time .whole rect[data-tip]")  # the largest part
    browser.point(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    assert tip(browser).endswith("of the step")
    at = browser.box("#timeline svg.ops")
    browser.point(at["x"] + 1, at["y"] + at["height"] / 2)
    assert tip(browser).startswith("rank 0: forward of micro-batch 0, ")
    browser.point(at["x"] + at["width"] - 1, at["y"] + at["height"] / 2)
    assert tip(browser).startswith("rank 0: host and jitter")
    browser.point(2, 2)
    assert tip(browser) == ""
    assert browser.errors == []


def test_toggles(browser, pages):
    browser.open(pages / "one.html", 1280, 900)
    shown = "[...document.querySelectorAll('.waterfall')].filter(w => !w.hidden).map(w => w.id)"
    pressed = "document.querySelector('button.choose[aria-pressed=true]').textContent"
    before = browser.run(shown)
    browser.run("document.querySelector('button.choose[aria-pressed=false]').click()")
    after = browser.run(shown)
    assert len(before) == len(after) == 1 and before != after
    assert browser.run(pressed) == f"rank {after[0][-1]}"
    themes = []
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        themes.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert themes == ["rgb(251, 250, 248)", "rgb(20, 22, 26)", "rgb(251, 250, 248)"]
    assert browser.errors == []


def test_the_keyboard_goes_from_mark_to_mark(browser, pages):
    browser.open(pages / "one.html", 1280, 900)
    browser.box("#time .chart")
    browser.run("document.querySelector('#time .chart').focus({preventScroll: true})")
    browser.press("ArrowRight")
    first = tip(browser)
    assert "of the step" in first
    browser.press("ArrowRight")
    assert tip(browser) not in ("", first)
    browser.press("Escape")
    assert tip(browser) == ""
    assert browser.errors == []


def test_print_opens_every_table(browser, pages):
    browser.open(pages / "one.html", 1280, 900)
    count = "document.querySelectorAll('figure > details[open]').length"
    assert browser.run(count) == 0
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(count) == browser.run("document.querySelectorAll('figure').length")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(count) == 0


@pytest.mark.parametrize("width", [718, 739])  # of A4 and of Letter within Chromium's margins
@pytest.mark.parametrize("name", ["one", "two", "asked", "serving"])
def test_paper_has_all_of_every_table(browser, pages, name, width):
    """Nobody can scroll it: no table is wider than its place, no cell than its column."""
    browser.open(pages / f"{name}.html", width, 900)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelectorAll('tbody tr').length") > 10
    cut = browser.run(
        "[...document.querySelectorAll('table, th, td, .row, .amount')].filter(e => e.offsetWidth"
        " && (e.getBoundingClientRect().right > innerWidth || e.scrollWidth > e.clientWidth + 1"
        " || e.matches('table') && e.offsetWidth > e.parentElement.clientWidth))"
        ".map(e => e.textContent.slice(0, 60))"
    )
    browser.ask("Emulation.setEmulatedMedia", media="")
    assert cut == []


def test_paper_is_white_whatever_the_theme(browser, pages):
    browser.open(pages / "one.html", 1280, 900, "dark")
    for _ in range(2):
        browser.ask("Emulation.setEmulatedMedia", media="print",
                    features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        browser.run("document.documentElement.dataset.theme = 'dark'")
    browser.ask("Emulation.setEmulatedMedia", media="")


def test_a_script_of_the_plan_would_not_run(browser, pages):
    text = (pages / "one.html").read_text()
    broken = pages / "broken.html"
    broken.write_text(text.replace("<footer>", "<script>window.ran = 1</script><footer>"))
    browser.open(broken, 1280, 900)
    assert browser.run("window.ran === undefined")
    assert any("Content Security Policy" in e for e in browser.errors)
    browser.errors.clear()


def test_a_table_that_goes_on_beyond_the_edge_has_a_shade_there(browser, pages):
    """Over the ground that the table lies on, so that the cover at its end is not seen."""
    for theme in ("light", "dark"):
        browser.open(pages / "two.html", 390, 900, theme)
        told = browser.run(
            "[...document.querySelectorAll('.scroll')].map(e => [getComputedStyle(e).background,"
            " getComputedStyle(e.closest('figure') || document.body).backgroundColor])"
        )
        assert told and all(shade.count("local") == 2 and ground in shade for shade, ground in told)
    assert browser.errors == []
