"""The documentation and the page of `fastops bench` in a real browser: headless Chromium, at a desk and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import run_python

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra dev has it")

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
WIDTHS = {"desk": 1280, "phone": 390}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew."""
    target = tmp_path_factory.mktemp("site")
    run_python(["-m", "sphinx", "--fail-on-warning", "--quiet", ROOT / "docs", target]).check_returncode()
    return target


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that `fastops bench` writes: of one operation, and nothing to compile."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    words = ["bench", "--op", "cross_entropy", "--quick", "--contestant", "fastops", "--pairs", "5", "--html", page]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run_python(["-m", "fastops", *words], env=environment).check_returncode()
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=WIDTHS)
def tab(browser: playwright.Browser, request: pytest.FixtureRequest) -> Iterator[playwright.Page]:
    """An empty tab without a network. What went wrong in it fails the test."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 800}, offline=True)
    page, troubles = context.new_page(), []
    page.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(request.url))
    yield page
    context.close()
    assert not troubles


def opened(tab: playwright.Page, page: Path) -> None:
    tab.goto(page.as_uri())
    tab.wait_for_load_state("networkidle")
    assert tab.title()
    wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"the page is {wide} pixels wider than the window"
    lost = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
    tab.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    assert tab.evaluate(lost) == []


def test_start_page(tab: playwright.Page, site: Path) -> None:
    opened(tab, site / "index.html")
    assert "swap" in tab.inner_text("main, article")


def test_page_of_a_kernel(tab: playwright.Page, site: Path) -> None:
    """Its formulas are set and its picture is drawn."""
    opened(tab, site / "kernels" / "cross_entropy.html")
    tab.wait_for_selector("mjx-container", timeout=20_000)
    assert tab.locator("mjx-merror").count() == 0
    assert tab.locator("article img").count() >= 1


def test_page_of_a_benchmark(tab: playwright.Page, report: Path) -> None:
    """Its answer is on the first screen, its plots are drawn, and a click sorts its tables."""
    opened(tab, report)
    assert tab.locator("h1").first.bounding_box()["y"] < 800
    assert tab.locator("svg").count() >= 1
    heading = tab.locator("table th", has_text="ms").first
    column = "[...document.querySelector('table').querySelectorAll('tr:has(td)')].map(row => row.cells[4].innerText)"
    orders = []
    for _ in range(2):
        heading.click()
        orders.append([float(cell) for cell in tab.evaluate(column)])
    assert orders[0] == sorted(orders[0]) == orders[1][::-1] and len(orders[0]) > 1
