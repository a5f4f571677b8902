"""The notebooks as pages: text, code and, where asked for, what the code prints and draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from docs.generators import claims, markdown
from docs.generators.markdown import ROOT, Pages, inline, toctree

FOLDER = ROOT / "proofs_notebooks"
Cell = tuple[Literal["markdown", "code"], str]
MINUTES = 20  # that one notebook may take


def pages(pictures: Path | None = None) -> Pages:
    """A page for each notebook, and an index.

    Args:
        pictures: a folder for what the notebooks draw; with it they are executed.
    """
    found: Pages = {"notebooks/index.md": _index}
    for path in files():
        found[f"notebooks/{path.stem}.md"] = lambda path=path: _page(path, pictures)
    return found


def files() -> list[Path]:
    """The notebooks, percent scripts, in order."""
    return sorted(FOLDER.glob("*.py"))


def cells(path: Path) -> list[Cell]:
    """The cells of a percent script: Markdown without its comment signs, and code."""
    found: list[Cell] = []
    blocks = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in blocks[1:]:
        head, _, body = block.partition("\n")
        if "[markdown]" in head:
            found.append(("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()))
        elif body.strip():
            found.append(("code", body.strip()))
    return found


def title(path: Path) -> str:
    """The notebook's first heading."""
    text = next(source for kind, source in cells(path) if kind == "markdown")
    return text.splitlines()[0].lstrip("# ")


def _index() -> str:
    rows = []
    for path in files():
        claim = claims.by_notebook().get(path.stem)
        link = f"[{claim.id}](../claims/{claims.stem(claim)}.md)" if claim else ""
        rows.append((f"[{inline(title(path))}]({path.stem}.md)", link))
    return "\n\n".join([
        "# Notebooks",
        "The quick start shows the whole product in ten cells. Each of the others is a proof: it "
        "derives a statement, checks it with numbers, and shows what breaks it. They are scripts "
        "that run: `python proofs_notebooks/09_prefix_bias.py`; jupytext opens them in Jupyter. "
        "`make notebooks` writes all of them with what they print and draw, as `.ipynb` and HTML.",
        markdown.table(("notebook", "claim"), rows),
        toctree([path.stem for path in files()], hidden=True),
        "",
    ])  # fmt: skip


def _page(path: Path, pictures: Path | None) -> str:
    page, claim = f"notebooks/{path.stem}.md", claims.by_notebook().get(path.stem)
    outputs = executed(path, pictures) if pictures else {}
    out: list[str] = []
    number = 0
    for kind, source in cells(path):
        if kind == "markdown":
            out.append(source)
            if len(out) == 1:
                links = [f"Code: {markdown.code_link(page, f'proofs_notebooks/{path.name}')}"]
                if claim:
                    links.append(f"[claim {claim.id}](../claims/{claims.stem(claim)}.md)")
                head, _, rest = source.partition("\n")
                out[0] = f"{head}\n\n{' · '.join(links)}\n{rest}"
            continue
        out.append(markdown.fenced(source, "python"))
        text, drawn = outputs.get(number, ("", []))
        number += 1
        if text.strip():
            out.append(markdown.fenced(text, "text", "output"))
        out += [f"![what the cell draws]({name})" for name in drawn]
    return "\n\n".join([*out, ""])


def executed(path: Path, pictures: Path) -> dict[int, tuple[str, list[str]]]:
    """What each code cell prints, and the files of what it draws, from a fresh process.

    Raises:
        RuntimeError: the notebook fails, or takes longer than `MINUTES`.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    sources = [source for kind, source in cells(path) if kind == "code"]
    mark = "\x1e"
    body = [_BEGIN.format(folder=str(pictures), stem=path.stem)]
    for number, source in enumerate(sources):
        body += [source, f"_after({number})"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / path.name
        script.write_text("\n".join(body), encoding="utf-8")
        environment = os.environ | {
            "MPLBACKEND": "Agg",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(script)], env=environment, text=True,
                capture_output=True, check=False, timeout=60 * MINUTES, cwd=folder,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{path.name} takes longer than {MINUTES} minutes") from error
    if done.returncode:
        told = done.stderr.splitlines() or [f"it ended by {done.returncode}"]
        raise RuntimeError(f"{path.name} fails: {told[-1]}")
    found = {}
    for number, text in enumerate(done.stdout.split(mark)[: len(sources)]):
        names = sorted(p.name for p in pictures.glob(f"{path.stem}-{number}-*.png"))
        found[number] = (text, names)
    return found


# After each cell: what it drew is saved, and a mark ends what it printed.
_BEGIN = """
def _after(number):
    import sys
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt
        for place, figure in enumerate(map(plt.figure, plt.get_fignums())):
            figure.savefig({folder!r} + "/{stem}-%d-%d.png" % (number, place), dpi=150)
        plt.close("all")
    print("\\x1e", end="", flush=True)
"""
