"""The built book, opened in a browser as a reader opens it."""

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from test_notebooks import toc_files

pytestmark = pytest.mark.slow  # a whole book, a browser
PAGES = toc_files()
CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Elements of the page's body that stick out of the window, where no box of their own scrolls them.
STICKING_OUT = """() => {
  const wide = document.documentElement.clientWidth + 1;
  const scrolls = e => e && e !== document.body &&
    (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('.bd-article *')]
    .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > wide)
    .filter(e => !scrolls(e) && !e.closest('mjx-assistive-mml'))
    .slice(0, 3).map(e => e.outerHTML.slice(0, 160));
}"""
BROKEN_IMAGES = """() => [...document.querySelectorAll('.bd-article img')]
    .filter(e => !(e.complete && e.naturalWidth > 0 && (e.alt || '').trim()))
    .map(e => e.src + ' alt=' + e.alt)"""
RAW_MATHS = """() => [...document.querySelectorAll('.math')]
    .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror'))
    .map(e => e.textContent)"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(smoke_book: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(smoke_book / "html"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def open_page(browser: Browser, url: str, width: int) -> tuple[Page, list[str]]:
    """Open a page; return it with all errors on the way."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    own = re.match(r"https?://[^/]+/", url).group()
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith((own, "data:", "blob:")) else faults.append(r.url),
    )
    page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status > 399 else None)
    page.goto(url, wait_until="networkidle")
    page.evaluate("window.MathJax?.startup?.promise")
    return page, faults


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_page_opens_complete(name: str, width: int, site: str, browser: Browser):
    page, faults = open_page(browser, f"{site}/{name}.html", width)
    try:
        # Lazy images load when they come into view.
        page.evaluate("document.querySelectorAll('img').forEach(e => e.loading = 'eager')")
        page.wait_for_load_state("networkidle")
        assert page.evaluate(BROKEN_IMAGES) == []
        assert page.evaluate(RAW_MATHS) == []
        assert page.evaluate(STICKING_OUT) == []
        assert faults == []
        if name.startswith("notebooks/"):
            assert page.locator(".bd-article figure img").count() > 0
            assert page.locator(".bd-article figure figcaption").count() > 0
    finally:
        page.close()


def test_first_page_names_profile_and_commit(site: str, browser: Browser):
    page, faults = open_page(browser, f"{site}/index.html", 1280)
    page.wait_for_url("**/book/index.html")
    facts = page.locator(".run-facts").inner_text()
    assert re.search(r"Profile:\s+smoke", facts)
    assert re.search(r"Commit:\s+\w{7,}", facts)
    assert page.locator(".bd-article figure img").count() > 0
    assert faults == []
    page.close()


def test_leading_page_has_an_icon_of_its_own(smoke_book: Path):
    """Without one a browser asks for /favicon.ico, which is not there."""
    page = (smoke_book / "html" / "index.html").read_text()
    icon = re.search(r'rel="icon" href="([^"]+)"', page).group(1)
    assert (smoke_book / "html" / icon).is_file()
    first = re.search(r"url=([^\"]+)", page).group(1)
    assert (smoke_book / "html" / first).is_file()


def test_a_word_is_found_by_the_search(site: str, browser: Browser):
    page, faults = open_page(browser, f"{site}/search.html?q=osteophytes", 1280)
    page.wait_for_selector("#search-results li a")
    assert faults == []
    page.close()


def test_dark_theme_keeps_figures_on_white(site: str, browser: Browser):
    page, _ = open_page(browser, f"{site}/notebooks/01_data.html", 1280)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    image = page.locator(".bd-article figure img").first
    colour = "e => getComputedStyle(e).backgroundColor"
    assert image.evaluate(colour) == "rgb(255, 255, 255)"
    assert page.locator("body").evaluate(colour) != "rgb(255, 255, 255)"
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_links_within_the_book_have_targets(name: str, smoke_book: Path):
    html = smoke_book / "html"
    page = html / f"{name}.html"
    text = page.read_text(encoding="utf-8")
    article = text[text.index("<article") : text.index("</article>")]
    links = [a for a in re.findall(r'href="([^"]+)"', article) if not a.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        if anchor and target.suffix == ".html":
            assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), link


def test_pages_say_that_data_are_virtual_or_simulated(smoke_book: Path):
    for name in PAGES:
        if name.startswith("notebooks/"):
            text = (smoke_book / "html" / f"{name}.html").read_text(encoding="utf-8")
            captions = re.findall(r"<figcaption>.*?</figcaption>", text, re.DOTALL)
            made = [re.search("virtual|simulated", caption.lower()) for caption in captions]
            assert any(made), name


def test_published_pages_carry_their_digest(smoke_book: Path):
    mark = json.loads((smoke_book / "html" / "digest.json").read_text())
    assert mark["profile"] == "smoke" and len(mark["digest"]) == 64
