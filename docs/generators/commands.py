"""A page for each command, from what its ``--help`` prints."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from docs.generators import markdown
from docs.generators.markdown import Pages, code, escape, inline, table, toctree

_RULE = re.compile(r" -{9,}$")  # below the title of a part
_DEFAULT = re.compile(r"\s*\((default|repeatable|required|optional)(?:: (.*))?\)$")


def pages() -> Pages:
    """A page for each command, and an index."""
    from deltacontrol.experiments.cli import main

    found: Pages = {"commands/index.md": _index}
    for name, kind in main.available().items():
        found[f"commands/{name}.md"] = lambda name=name, kind=kind: _page(name, kind)
    return found


def _index() -> str:
    from deltacontrol.experiments.cli import main

    rows = [
        (f"[`{name}`]({name}.md)", inline(markdown.first_line(kind.__doc__)))
        for name, kind in main.available().items()
    ]
    return "\n\n".join([
        "# Commands",
        "`deltacontrol COMMAND --help` prints what stands on these pages. `python -m deltacontrol` "
        "is the same. Exit codes: 0 done, 1 a check did not hold, 2 wrong input (one message, no "
        "traceback), 130 interrupted. `deltacontrol --load FILE.py COMMAND` takes in your own "
        "[deltas, solvers, claims, tasks, models, figures and commands](../howto/index.md).",
        table(("command", "does"), rows),
        toctree(main.available(), hidden=True),
        "",
    ])  # fmt: skip


def _page(name: str, kind: Any) -> str:
    from docs.generators import api

    page, resolve = f"commands/{name}.md", api.resolver(kind.__module__)
    file = inspect.getfile(inspect.unwrap(kind))
    text = markdown.without_sections(kind.__doc__, "Attributes")
    out = [f"# deltacontrol {name}", markdown.docstring(text, resolve)]
    for title, rows in _boxes(name, kind):
        cells = [(code(option), inline(meaning), code(default) if default else "")
                 for option, meaning, default in rows]  # fmt: skip
        out += [f"## {escape(title).capitalize()}", table(("option", "meaning", "default"), cells)]
    raises = re.search(r"Raises:\n(.*)", inspect.cleandoc(kind.run.__doc__ or ""), re.DOTALL)
    if raises:
        out += ["## Refused", markdown.docstring(raises[0], resolve)]
    return "\n\n".join([*out, f"Code: {markdown.code_link(page, os.path.realpath(file))}", ""])


def _boxes(name: str, kind: Any) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each frame of the help: its title, and (option, meaning, default) of its rows."""
    lines = [line.rstrip() for line in help_of(name, kind).splitlines()]
    for place, line in enumerate(lines):
        if not _RULE.match(line):
            continue
        rows: list[list[str]] = []
        for text in lines[place + 1 :]:
            if not text.strip():
                break
            if text.startswith("   ") and rows:
                rows[-1][1] += f" {text.strip()}"
            else:
                option, _, meaning = text.strip().partition("  ")
                rows.append([option, meaning.strip()])
        yield lines[place - 1].strip(), [_split(*row) for row in rows]


def _split(option: str, text: str) -> tuple[str, str, str]:
    match = _DEFAULT.search(text)
    if match is None:
        return option, text, ""
    default = match[2] if match[1] == "default" else match[1]
    return option, text[: match.start()], (default or "").strip()


def help_of(name: str, kind: Any) -> str:
    """What ``deltacontrol NAME --help`` prints, 120 columns wide and without colours."""
    import tyro

    shown = io.StringIO()
    plain = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(shown):
        with contextlib.suppress(SystemExit):
            tyro.cli(
                kind,
                prog=f"deltacontrol {name}",
                args=["--help"],
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
