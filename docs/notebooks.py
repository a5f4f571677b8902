"""Write the notebooks with what they print and draw, as .ipynb and as HTML.

``python -m docs.notebooks build/notebooks`` executes each in a process of its own, and goes on
where one fails; those that failed are named at the end, and the status is then 1. A notebook whose
text is what it was when it was executed is left alone; ``--anew`` executes all of them. The pages
need no network: pictures are in them, and MathJax lies beside them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from docs import generate
from docs.generators import notebooks

Outputs = dict[int, tuple[str, list[bytes]]]  # of each code cell what it prints, and its pictures
FORM = 1  # of the files; a new one has all of them written again


def document(path: Path, outputs: Outputs) -> dict[str, Any]:
    """The notebook as Jupyter keeps it (nbformat 4.5)."""
    cells, number = [], 0
    for place, (kind, source) in enumerate(notebooks.cells(path)):
        cell = {"cell_type": kind, "id": f"cell-{place}", "metadata": {}, "source": source}
        if kind == "code":
            text, pictures = outputs.get(number, ("", []))
            number += 1
            found: list[dict[str, Any]] = []
            if text:
                found.append({"output_type": "stream", "name": "stdout", "text": text})
            found += [
                {
                    "output_type": "display_data",
                    "metadata": {},
                    "data": {"image/png": base64.b64encode(data).decode()},
                }
                for data in pictures
            ]
            cell |= {"execution_count": number, "outputs": found}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "deltacontrol": {"source": digest(path)}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def digest(path: Path) -> str:
    """Of the notebook's text and of the form of the files."""
    return hashlib.sha256(f"{FORM}\n".encode() + path.read_bytes()).hexdigest()


def is_up_to_date(path: Path, out: Path) -> bool:
    """Whether both files are there, and are of this text."""
    written = out / f"{path.stem}.ipynb"
    if not (written.is_file() and written.with_suffix(".html").is_file()):
        return False
    try:
        metadata = json.loads(written.read_text(encoding="utf-8"))["metadata"]
        return metadata["deltacontrol"]["source"] == digest(path)
    except (ValueError, KeyError, TypeError):  # another program wrote it anew
        return False


def page(path: Path, outputs: Outputs) -> str:
    """The notebook as one HTML page; formulas are left to MathJax."""
    render, colour, style = _renderers()
    parts, number = [], 0
    for kind, source in notebooks.cells(path):
        if kind == "markdown":
            parts.append(render(source))
            continue
        parts.append(colour(source))
        text, pictures = outputs.get(number, ("", []))
        number += 1
        if text.strip():
            parts.append(f'<pre class="output">{escape(text.rstrip())}</pre>')
        parts += [
            f'<img alt="what the cell draws" src="data:image/png;base64,'
            f'{base64.b64encode(data).decode()}">'
            for data in pictures
        ]
    return _html(notebooks.title(path), "\n".join(parts), style)


def _renderers() -> tuple[Callable[[str], str], Callable[[str], str], str]:
    """Markdown and Python to HTML, and the style sheet of the colours."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    def formula(text: str, options: dict[str, Any]) -> str:
        return rf"\[{escape(text)}\]" if options["display_mode"] else rf"\({escape(text)}\)"

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.use(dollarmath_plugin, renderer=formula, double_inline=True, allow_digits=True)
    formatter = HtmlFormatter(style="tango")
    colour = lambda text: highlight(text, PythonLexer(), formatter)  # noqa: E731
    return markdown.render, colour, formatter.get_style_defs(".highlight")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; }}
pre {{ overflow-x: auto; padding: 0.6rem; background: #f6f6f6; font-size: 0.85rem; }}
pre.output {{ background: none; border-left: 3px solid #bbb; }}
img, table {{ max-width: 100%; }}
mjx-container {{ overflow-x: auto; overflow-y: hidden; max-width: 100%; }}
{style}
</style>
<script>MathJax = {{ options: {{ enableMenu: false }} }};</script>
<script defer src="mathjax/{mathjax}"></script>
</head>
<body>
{body}
</body>
</html>
"""


def _html(title: str, body: str, style: str = "") -> str:
    return PAGE.format(title=escape(title), body=body, style=style, mathjax=generate.MATHJAX)


def index(paths: Sequence[Path]) -> str:
    """A page that links to those that are there."""
    items = "\n".join(
        f'<li><a href="{path.stem}.html">{escape(notebooks.title(path))}</a> '
        f'(<a href="{path.stem}.ipynb">ipynb</a>)</li>'
        for path in paths
    )
    return _html("Notebooks", f"<h1>Notebooks</h1>\n<ul>\n{items}\n</ul>")


def write_one(path: Path, out: Path) -> None:
    """Execute one, and write both of its files.

    Raises:
        RuntimeError: as `docs.generators.notebooks.executed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder)
        outputs = {
            number: (text, [(drawn / name).read_bytes() for name in names])
            for number, (text, names) in notebooks.executed(path, drawn).items()
        }
    text = json.dumps(document(path, outputs), indent=1, ensure_ascii=False) + "\n"
    (out / f"{path.stem}.html").write_text(page(path, outputs), encoding="utf-8")
    (out / f"{path.stem}.ipynb").write_text(text, encoding="utf-8")


def write(
    paths: Sequence[Path], out: Path, *, anew: bool = False, workers: int = 1
) -> dict[str, str]:
    """Write what is not up to date; gives why a notebook failed by its name, or an empty text.

    Args:
        paths: the notebooks.
        out: the folder.
        anew: also those that are up to date.
        workers: executed at once.
    """
    out.mkdir(parents=True, exist_ok=True)
    library = out / "mathjax" / generate.MATHJAX
    library.parent.mkdir(exist_ok=True)
    library.write_bytes(generate.mathjax())
    started = time.monotonic()

    def one(path: Path) -> str:
        if not anew and is_up_to_date(path, out):
            print(f"{path.stem}: as before", flush=True)
            return ""
        begun = time.monotonic()
        try:
            write_one(path, out)
        except RuntimeError as error:
            print(f"{path.stem}: {error}", flush=True)
            return str(error)
        now = time.monotonic()
        print(f"{path.stem}: {now - begun:.0f} s ({now - started:.0f} s in all)", flush=True)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        done = dict(zip((path.stem for path in paths), pool.map(one, paths), strict=True))
    there = [path for path in paths if (out / f"{path.stem}.html").is_file()]
    (out / "index.html").write_text(index(there), encoding="utf-8")
    return done


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the files")
    parser.add_argument("--anew", action="store_true", help="also those that are up to date")
    parser.add_argument("--workers", type=int, default=1, help="executed at once")
    options = parser.parse_args()
    paths = notebooks.files()
    done = write(paths, options.out, anew=options.anew, workers=options.workers)
    failed = [name for name, error in done.items() if error]
    if failed:
        sys.exit(f"{len(failed)} of {len(done)} notebooks fail: {', '.join(failed)}")
    print(f"{len(done)} notebooks in {options.out}; open {options.out}/index.html")


if __name__ == "__main__":
    main()
