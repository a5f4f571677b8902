"""Open every page of a built site in a real browser, at the width of a desk and of a phone.

``python -m docs.browser build/docs/html`` prints what is wrong and ends with 1: errors on the
console, files that were not found, formulas that stayed text, pages that a phone has to scroll
sideways. It takes the Chromium that is installed, or that of Playwright.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from docs.check import pages

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
SETTLED = """() => {
    const promise = window.MathJax?.startup?.promise;
    return promise ? promise.then(() => true) : true;
}"""
FORMULAS = """() => ({
    plain: [...document.querySelectorAll('.math')]
        .filter(e => !e.querySelector('mjx-container')).length,
    wrong: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    shown: document.querySelectorAll('mjx-container').length,
    wide: document.documentElement.scrollWidth - window.innerWidth,
})"""


class Quiet(SimpleHTTPRequestHandler):
    """The site's files, without a line a request."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


def look(page: Page, address: str) -> Iterator[str]:
    """What is wrong with one page at the present width."""
    found: list[str] = []
    page.on("console", lambda said: said.type == "error" and found.append(f"console: {said.text}"))
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("response", lambda got: got.status >= 400 and found.append(f"{got.status}: {got.url}"))
    page.goto(address, wait_until="load")
    page.wait_for_function(SETTLED)
    seen = page.evaluate(FORMULAS)
    yield from found
    if seen["plain"] or seen["wrong"]:
        yield f"{seen['plain']} formulas stayed text, {seen['wrong']} are wrong"
    if seen["wide"] > 1:
        yield f"{seen['wide']} px wider than the screen"


def main() -> None:
    """The command."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("site", type=Path)
    asked.add_argument("--only", default="", help="pages whose path begins so")
    asked.add_argument("--skip", default=" ", help="no pages whose path begins so")
    options = asked.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("this needs pip install playwright, and Chromium or playwright install chromium")
    names = [path.relative_to(options.site).as_posix() for path in pages(options.site)]
    names = [n for n in names if n.startswith(options.only) and not n.startswith(options.skip)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(options.site)))
    Thread(target=server.serve_forever, daemon=True).start()
    own = shutil.which("chromium") or shutil.which("google-chrome")
    wrong = 0
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=own, args=["--no-sandbox"])
        for width, (across, down) in WIDTHS.items():
            context = browser.new_context(viewport={"width": across, "height": down})
            for name in names:
                page = context.new_page()
                for line in look(page, f"http://127.0.0.1:{server.server_port}/{name}"):
                    wrong += 1
                    print(f"{name} ({width}): {line}", flush=True)
                page.close()
        version = browser.version
        browser.close()
    if wrong or not names:
        sys.exit(f"{wrong} problems in {len(names)} pages")
    print(f"{len(names)} pages at {' and '.join(WIDTHS)} width in Chromium {version}: no error")


if __name__ == "__main__":
    main()
