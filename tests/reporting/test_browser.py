"""The page in a real headless Chromium. Without one the tests are skipped; REQUIRE_BROWSER=1 makes that a failure."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.conftest import SEEDS, STRATEGIES
from tests.reporting.test_report import report

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"width": 390, "height": 844}
pytestmark = pytest.mark.xdist_group("browser")


def missing(what: str) -> None:
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER=1, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed (it is in the extra dev)")
    executable = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if executable is None:
        missing("no Chromium was found (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def address(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("browser") / "report"
    report(made, target)
    return (target / "report.html").as_uri()


class Visit:
    """A page as a visitor sees it, with what the console and the network heard of it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")

    def column(self, table: int, column: int) -> list[str]:
        script = "([t, c]) => [...document.querySelectorAll('table')[t].tBodies[0].rows].map(r => r.cells[c].innerText)"
        texts: list[str] = self.page.evaluate(script, [table, column])
        return [text.split()[0] for text in texts]


@pytest.fixture(scope="module")
def visit(browser: Any, address: str) -> Iterator[Visit]:
    visited = Visit(browser, address)
    yield visited
    visited.page.context.close()


def test_every_figure_is_drawn_without_an_error_and_without_any_network(visit: Visit, address: str) -> None:
    script = """() => [...document.querySelectorAll('.plot')].map(
        p => [p.id, !!p.querySelector('.main-svg'), p.data.length, figures[p.id].data.length, p.clientHeight])"""
    drawn = visit.page.evaluate(script)
    assert len(drawn) >= 10
    for name, has_picture, num_traces, num_wanted, height in drawn:
        assert has_picture, name
        assert num_traces == num_wanted > 0, name
        assert height > 100, name
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("data:", "blob:"))] == [address]


def test_a_click_on_a_header_sorts_the_table_and_a_second_one_turns_it_round(visit: Visit) -> None:
    header = visit.page.locator("#results table").first.locator("thead th").nth(3).locator("button")
    header.click()
    down = [float(text) for text in visit.column(0, 3)]
    assert down == sorted(down, reverse=True)
    header.click()
    assert [float(text) for text in visit.column(0, 3)] == down[::-1] != down
    visit.page.locator("#results table").first.locator("thead th").first.locator("button").click()
    names = visit.page.locator("#results table").first.locator("tbody th").all_inner_texts()
    assert [name.split()[1] for name in names] == sorted(STRATEGIES)


def test_a_point_tells_its_values_when_the_mouse_is_over_it(visit: Visit) -> None:
    point = visit.page.locator("#accuracy .scatterlayer .point").last
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = visit.page.locator("#accuracy .hoverlayer .hovertext")
    told.first.wait_for()
    assert "puma" in told.first.text_content()
    assert "robust 67.50%" in told.first.text_content()  # the mean of 0.70 and 0.65


def test_the_chips_hide_a_strategy_in_every_figure(visit: Visit) -> None:
    shown = "document.querySelectorAll('#training-loss .scatterlayer .trace').length"
    assert visit.page.evaluate(shown) == len(STRATEGIES) * len(SEEDS)
    visit.page.locator(".key button[data-name=puma]").click()
    assert visit.page.evaluate(shown) == (len(STRATEGIES) - 1) * len(SEEDS)
    visit.page.locator(".key button[data-name=puma]").click()
    assert visit.page.evaluate(shown) == len(STRATEGIES) * len(SEEDS)


def test_the_page_and_its_figures_follow_the_dark_scheme(visit: Visit) -> None:
    colours = """() => [getComputedStyle(document.body).backgroundColor,
        document.getElementById('accuracy').layout.font.color]"""
    visit.page.emulate_media(color_scheme="light")
    light = visit.page.evaluate(colours)
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_function("before => document.getElementById('accuracy').layout.font.color !== before", arg=light[1])
    dark = visit.page.evaluate(colours)
    visit.page.emulate_media(color_scheme="light")
    assert brightness(light[0]) > 200 > 60 > brightness(dark[0])
    assert visit.complaints == []


def brightness(colour: str) -> float:
    """Mean of the parts of "rgb(r, g, b)"."""
    parts = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(parts) / 3


def test_nothing_but_tables_scrolls_sideways_on_a_phone(browser: Any, address: str) -> None:
    visited = Visit(browser, address, viewport=PHONE, is_mobile=True, has_touch=True)
    width = visited.page.evaluate("document.documentElement.scrollWidth")
    widest = visited.page.evaluate("Math.max(...[...document.querySelectorAll('.plot')].map(p => p.clientWidth))")
    visited.page.context.close()
    assert widest <= width == PHONE["width"]
    assert visited.complaints == []
