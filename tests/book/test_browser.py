"""In a real browser: the pages have no barriers and fit a phone, and chapter 5 turns K in JupyterLab."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PAGES = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


# --- The book ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(html: Path) -> Iterator[str]:
    """The address of the book."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_have_no_barriers_and_no_script_errors(browser: Browser, site: str, scheme: str) -> None:
    """Axe takes minutes for the contrasts of the API's page, whose colours the other pages have too."""
    page = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme).new_page()
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    for name in PAGES:
        page.goto(f"{site}{name}.html")
        page.add_style_tag(content="* { transition: none !important; }")  # contrasts between two schemes are not meant
        rules = {"color-contrast": {"enabled": name != "book/api"}}
        violations = Axe().run(page, options={"runOnly": RULES, "rules": rules}).response["violations"]
        found += [
            f"{name}: {violation['id']}: {node['html']}" for violation in violations for node in violation["nodes"]
        ]
    assert [error for error in found if "THEBE_JS_URL" not in error] == []  # the theme declares it twice


@pytest.mark.parametrize("width", [390, 768, 1400])
def test_no_page_is_wider_than_its_window(browser: Browser, site: str, html: Path, width: int) -> None:
    """Pictures of the first page and of chapter 5 stay beside the book."""
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    wide = []
    for name in [*PAGES, "genindex", "_modules/cddlib/matching/loss"]:
        page.goto(f"{site}{name}.html")
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            wide.append(name)
        if name in (PAGES[0], "notebooks/05_concurrent_matching"):
            page.screenshot(path=html.parent / "screenshots" / f"{Path(name).stem}-{width}.png", full_page=True)
    assert wide == []


def test_no_code_is_cut_off(browser: Browser, site: str) -> None:
    page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
    cut = []
    for name in PAGES:
        page.goto(f"{site}{name}.html")
        inside = "article div.highlight-ipython3 pre, article div.highlight-bash pre, article div.highlight-python pre"
        widths = "all => all.filter(pre => pre.innerText).map(pre => pre.scrollWidth - pre.clientWidth)"
        cut += [(name, width) for width in page.locator(inside).evaluate_all(widths) if width > 0]
    assert cut == []


def test_the_page_turns_k_by_itself(browser: Browser, site: str) -> None:
    page = browser.new_page()
    page.goto(f"{site}notebooks/05_concurrent_matching.html")
    for name in ("turn-k", "turn-k-cifar10"):
        shown = page.locator(f"#{name} figcaption:visible")
        first = shown.inner_text()
        page.locator(f"#{name} input").press("ArrowRight")
        expect(shown).not_to_have_text(first)
        expect(shown).to_have_count(1)


# --- JupyterLab -------------------------------------------------------------------------------------------------


@pytest.fixture
def chapter(tmp_path: Path, browser: Browser) -> Iterator[Page]:
    """Chapter 5 in JupyterLab as `make lab` starts it, in profile ci; its last cell, run again, makes runs endless."""
    book = nbformat.read(ROOT / "notebooks" / "05_concurrent_matching.ipynb", as_version=4)
    control = next(number for number, cell in enumerate(book.cells) if "live_slider" in cell.source)
    endless = "{**work.distill, **paced, **followed, 'iterations': 10**6}"
    last = f"again = 'again' in globals()\nif again: base = study.study_recipe('contra', data, ipc, **{endless})"
    book.cells = [*book.cells[: control + 1], nbformat.v4.new_code_cell(last)]
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = parameters.source.replace('profile = "quick"', 'profile = "ci"')
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "chapter.ipynb")
    log = tmp_path / "log"
    options = ["--no-browser", "--allow-root", "--ServerApp.port=0", "--IdentityProvider.token=k"]
    command = [Path(sys.executable).with_name("jupyter"), "lab", *options, "notebooks"]
    settings = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    with open(log, "w") as out:
        settings["HOME"] = str(tmp_path)
        server = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, env=settings)
    try:
        end = time.monotonic() + 60
        while not (address := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address[0]}lab/tree/chapter.ipynb?token=k")
        yield page
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.filterwarnings("default")
def test_chapter_5_turns_k_and_a_run_can_be_stopped(chapter: Page) -> None:
    chapter.get_by_text("Python 3 (ipykernel)").first.wait_for(timeout=60_000)
    chapter.get_by_role("menuitem", name="Run", exact=True).click()
    chapter.get_by_text("Run All Cells", exact=True).click()
    caption, image = chapter.locator(".widget-html figcaption"), chapter.locator(".widget-html img")
    status, slider = chapter.locator(".widget-html p[role=status]"), chapter.locator(".noUi-handle")
    expect(caption).to_contain_text("K = 4", timeout=180_000)
    before = image.get_attribute("src")
    slider.press("Home")
    expect(caption).to_contain_text("K = 1", timeout=60_000)
    expect(caption).to_contain_text("validation accuracy")
    assert image.get_attribute("src") != before
    chapter.locator(".jp-CodeCell .cm-content").last.press("Shift+Enter")
    slider.press("End")
    expect(status).to_contain_text(re.compile(r"K = \d+: at work\."), timeout=60_000)
    bar = chapter.get_by_text(re.compile(r"[1-9]\d*/\d{6,}"))
    expect(bar).to_have_count(1, timeout=60_000)
    chapter.locator('[data-jp-item-name="interrupt"] jp-button').first.click()
    expect(status).to_contain_text(re.compile(r"K = \d+: stopped after iteration \d+, which is saved"), timeout=60_000)
