"""Look through a built site: every internal link leads somewhere, and nothing is loaded from afar.

``python -m docs.check build/docs/html`` prints what is wrong and ends with 1, or says what it saw.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html import unescape
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


TAG = re.compile(r"<([a-zA-Z][\w:-]*)((?:[^>\"']|\"[^\"]*\"|'[^']*')*)>")
ATTRIBUTE = re.compile(r"""([\w:-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
STYLE = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL)
NO_TEXT = re.compile(r"<(script|style)[^>]*>.*?</\1>|<[^>]*>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """What one page links to, loads, and can be linked at; and its text."""

    anchors: set[str]
    links: list[str]
    loads: list[str]
    text: str


@cache
def read(path: Path) -> Page:
    """A page of the site."""
    source = path.read_text(encoding="utf-8")
    page = Page(set(), [], [], NO_TEXT.sub(" ", source))
    page.loads.extend(a for style in STYLE.findall(source) for a in _in_style(style))
    for tag, rest in TAG.findall(source):
        if not rest:
            continue
        values = {name: unescape(a or b) for name, a, b in ATTRIBUTE.findall(rest)}
        page.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            page.links.append(values["href"])
        elif tag == "link" and set(values.get("rel", "").split()) & NAMED:
            page.links.append(values.get("href", ""))
        elif tag in LOADED:
            for name in LOADED[tag]:
                if name in values:
                    parts = values[name].split(",") if name == "srcset" else [values[name]]
                    page.loads.extend(part.split()[0] for part in parts if part.strip())
        if "style" in values:
            page.loads.extend(_in_style(values["style"]))
    return page


def _in_style(text: str) -> list[str]:
    return [a or b for a, b in IN_STYLE.findall(text)]


def pages(site: Path) -> list[Path]:
    """The pages of a site; what lies among the theme's files are templates."""
    return [p for p in sorted(site.rglob("*.html")) if p.relative_to(site).parts[0] != "_static"]


def problems(site: Path) -> Iterator[str]:
    """What is wrong with a site, a line each."""
    for path in pages(site):
        page, name = read(path), path.relative_to(site).as_posix()
        for address in page.loads:
            if _is_far(address):
                yield f"{name} loads {address}"
            elif not address.startswith("data:"):
                yield from _missing(site, path, address, name)
        for address in page.links:
            if not _is_far(address) and not address.startswith(("mailto:", "javascript:")):
                yield from _missing(site, path, address, name)
        for found in set(MACHINE.findall(page.text)):
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
        if unquote(parts.fragment) not in read(target).anchors:
            yield f"{name} links to {address}, and that page has no such place"


def main() -> None:
    """The command."""
    site = Path(sys.argv[1])
    found = list(problems(site))
    for line in found[:50]:
        print(line)
    count = len(pages(site))
    if found or not count:
        sys.exit(f"{len(found)} problems in {count} pages")
    print(f"{count} pages: every internal link is there, and nothing is loaded from elsewhere")


if __name__ == "__main__":
    main()
