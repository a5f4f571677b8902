"""The files of the checkout as pages; they are not in the search."""

from __future__ import annotations

import hashlib
import html
import sys
from pathlib import Path

from docs.generators.markdown import ROOT

PATTERNS = (
    "theory/**/*.py",
    "deltas/**/*.py",
    "experiments/**/*.py",
    "experiments/claims/statements/*.toml",
    "paper_figures/**/*.py",
    "proofs_notebooks/*.py",
    "src/deltacontrol/*.py",
    "tests/user_files/*.py",
    "experiments/records/claims/*.json",
    "experiments/records/benchmarks/*.json",
    "experiments/records/rates/learning_rates.json",
)


def files() -> list[Path]:
    """What is shown."""
    return sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file()})


def write(out: Path) -> int:
    """Write a page for each file below `out`; those whose file is as before stay."""
    kept = set()
    for path in files():
        place = path.relative_to(ROOT)
        target = out / f"{place.as_posix()}.html"
        kept.add(target)
        text = path.read_text(encoding="utf-8")
        digest = hashlib.sha256((text + _PAGE).encode()).hexdigest()
        mark = f"<!-- {digest} -->"
        if target.exists() and target.read_text(encoding="utf-8").endswith(mark):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(place.parts))
        page = _PAGE.format(title=html.escape(place.as_posix()), up=up, body=_coloured(place, text))
        target.write_text(page + mark, encoding="utf-8")
    for old in out.rglob("*.html"):
        if old not in kept:
            old.unlink()
    return len(kept)


def _coloured(place: Path, text: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import JsonLexer, PythonLexer, TOMLLexer

    lexer = {".json": JsonLexer, ".toml": TOMLLexer}.get(place.suffix, PythonLexer)
    return highlight(text, lexer(), HtmlFormatter())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="{up}_static/pygments.css">
<link rel="stylesheet" href="{up}_static/code.css">
<script src="{up}_static/theme.js"></script>
</head><body><p><a href="{up}index.html">deltacontrol</a> / <code>{title}</code></p>
{body}</body></html>
"""


if __name__ == "__main__":
    write(Path(sys.argv[1]))
