"""Write the sources of the site: pages by hand, and those that follow from the code.

``python -m docs.generate build/docs/source`` writes them; ``make docs`` builds the site from them
and looks through its links. With ``--execute`` the proof notebooks run, and their pages show what
they print and draw; that takes an hour.

A file whose text is as before is not written again, so that a second build is quick.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from docs import pictures
from docs.generators import (
    api,
    claims,
    commands,
    deltas,
    figures,
    markdown,
    notebooks,
    solvers,
)
from docs.generators.markdown import ROOT, Pages

HERE = Path(__file__).parent
HAND = HERE / "pages"
MATHJAX = "tex-svg-full.js"  # one file with all of TeX, which draws letters and needs no fonts
VERDICTS = {
    "holds": "parts hold",
    "fails": "fail",
    "inconclusive": "are inconclusive",
    "assumption not met": "have an assumption that is not met",
}
# Files of the checkout that are pages as they are.
WHOLE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "guide.md": "docs/guide.md",
}


def pages(executed: Path | None = None) -> Pages:
    """Every page by its path, drawn when it is asked for.

    Args:
        executed: a folder for pictures; with it the notebooks run.
    """
    found: Pages = {}
    for part in (deltas, solvers, claims, figures, commands, api):
        found |= part.pages()
    found |= notebooks.pages(executed)
    found |= {page: (lambda file=file: _whole(file)) for page, file in WHOLE.items()}
    found |= {
        path.relative_to(HAND).as_posix(): (lambda path=path: _by_hand(path))
        for path in sorted(HAND.rglob("*.md"))
    }
    return found


def _whole(file: str) -> str:
    """A file of the checkout, with its links turned into text."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


def _by_hand(path: Path) -> str:
    """A page by hand; ``{{ NAME }}`` stands for what `_values` computes."""
    text = path.read_text(encoding="utf-8")
    # The mark of blocks that no test runs is for the test alone.
    text = re.sub(r"^```(\w+) no-run$", r"```\1", text, flags=re.MULTILINE)
    names = set(re.findall(r"\{\{ (\w+) \}\}", text))
    if names:
        values = _values()
        for name in names:
            text = text.replace(f"{{{{ {name} }}}}", values[name])
    return text


@cache
def _values() -> Mapping[str, str]:
    from deltacontrol.deltas import registry
    from deltacontrol.experiments.claims import board

    verdicts = claims.parts_by_verdict()
    return {
        "num_deltas": str(len(registry.available())),
        "num_solvers": str(len(solvers.own())),
        "verdicts": ", ".join(
            f"{verdicts.get(verdict, 0)} {words}" for verdict, words in VERDICTS.items()
        ),
        "chance": markdown.escape(board.chance()),
        "my_delta": _user_file("my_delta.py"),
        "my_solver": _user_file("my_solver.py"),
        "my_claim": _user_file("my_claim.py"),
        "my_figure": _user_file("my_figure.py"),
    }


def _user_file(name: str) -> str:
    text = (ROOT / "tests/user_files" / name).read_text(encoding="utf-8")
    return markdown.fenced(text, "python")


def write(out: Path, *, execute: bool = False) -> int:
    """Write all sources below `out`; gives the number of pages.

    Raises:
        SystemExit: a library of the extra `docs` is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    executed = out / "notebooks" if execute else None
    # On the second core, meanwhile.
    code = [sys.executable, "-m", "docs.generators.code_pages", str(out.resolve() / "_extra/code")]
    colouring = subprocess.Popen(code, cwd=ROOT)
    files: dict[str, bytes] = {page: draw().encode() for page, draw in pages(executed).items()} | {
        "conf.py": (HERE / "conf.py").read_bytes()
    }
    files |= {name: path.read_bytes() for name, path in figures.pictures().items()}
    files |= {f"concepts/{name}": data for name, data in pictures.drawn().items()}
    files |= {f"_static/{p.name}": p.read_bytes() for p in sorted((HERE / "static").iterdir())}
    files[f"_static/mathjax/{MATHJAX}"] = mathjax()
    for name, data in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    if colouring.wait():
        raise SystemExit("the pages of code could not be written")
    _clean(out, set(files), executed)
    return sum(name.endswith(".md") for name in files)


def _clean(out: Path, known: set[str], executed: Path | None) -> None:
    """Take away what an earlier call wrote and this one did not."""
    for path in out.rglob("*"):
        name = path.relative_to(out)
        drawn = executed is not None and path.parent == executed and path.suffix == ".png"
        if path.is_file() and name.parts[0] != "_extra" and name.as_posix() not in known:
            if not drawn:
                path.unlink()


def mathjax() -> bytes:
    """MathJax, from the package that brings its files along."""
    spec = find_spec("mathjax")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "static" / "mathjax" / "es5" / MATHJAX
        if path.exists():
            return path.read_bytes()
    raise SystemExit("the site needs its libraries: pip install -c constraints.txt -e '.[docs]'")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of the sources")
    parser.add_argument("--execute", action="store_true", help="run the proof notebooks")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries that are only looked at
    count = write(options.out, execute=options.execute)
    print(f"{count} pages in {options.out}")


if __name__ == "__main__":
    main()
