"""Look through a built site: every internal link leads somewhere, and nothing is loaded from afar.

``python -m docs.check build/docs/html`` prints what is wrong and ends with 1, or says what it saw.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself when it shows a page, unlike a link that a reader may follow.
LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "image": ("href", "xlink:href"),
}
# Relations of `link` that name a page and load nothing.
NAMED = {"author", "canonical", "index", "search", "next", "prev", "license", "alternate"}
IN_STYLE = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
# A path of the machine that built the site, in its text.
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|work|Users|tmp|opt)/[\w.-]+")


@dataclass
class Page(HTMLParser):
    """What one page links to, loads, and can be linked at."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin to read."""
        super().__init__()
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self._style = tag == "style"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and set(values.get("rel", "").split()) & NAMED:
            self.links.append(values.get("href", ""))
        else:
            for name in LOADED.get(tag, ()):
                if name in values:
                    parts = values[name].split(",") if name == "srcset" else [values[name]]
                    self.loads += [part.split()[0] for part in parts if part.strip()]
        self.loads += _in_style(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Note the text, and what a style sheet within the page loads."""
        if self._style:
            self.loads += _in_style(data)
        self.text.append(data)


def _in_style(text: str) -> list[str]:
    return [a or b for a, b in IN_STYLE.findall(text)]


@cache
def read(path: Path) -> Page:
    """A page of the site."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def problems(site: Path) -> Iterator[str]:
    """What is wrong with a site, a line each."""
    for path in sorted(site.rglob("*.html")):
        page, name = read(path), path.relative_to(site).as_posix()
        for address in page.loads:
            if _is_far(address):
                yield f"{name} loads {address}"
            elif not address.startswith("data:"):
                yield from _missing(site, path, address, name)
        for address in page.links:
            if not _is_far(address) and not address.startswith(("mailto:", "javascript:")):
                yield from _missing(site, path, address, name)
        for found in set(MACHINE.findall("".join(page.text))):
            yield f"{name} has a path of a machine: {found}"
    for path in sorted(site.rglob("*.css")):
        for address in _in_style(path.read_text(encoding="utf-8")):
            if _is_far(address):
                yield f"{path.relative_to(site).as_posix()} loads {address}"


def _is_far(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https", "ftp")


def _missing(site: Path, page: Path, address: str, name: str) -> Iterator[str]:
    parts = urlsplit(address)
    target = page.parent / unquote(parts.path) if parts.path else page
    target = target.resolve()
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file() or not target.is_relative_to(site.resolve()):
        yield f"{name} links to {address}, which is not there"
    elif parts.fragment and target.suffix == ".html":
        # MathJax and the theme's own scripts make no anchors, so all are in the page's text.
        if unquote(parts.fragment) not in read(target).anchors:
            yield f"{name} links to {address}, and that page has no such place"


def main() -> None:
    """The command."""
    site = Path(sys.argv[1])
    found = list(problems(site))
    for line in found[:50]:
        print(line)
    count = sum(1 for _ in site.rglob("*.html"))
    if found or not count:
        sys.exit(f"{len(found)} problems in {count} pages")
    print(f"{count} pages: every internal link is there, and nothing is loaded from elsewhere")


if __name__ == "__main__":
    main()
