"""The gallery: a page for each figure with its table and caption, and one for each study."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from docs.generators import markdown
from docs.generators.markdown import ROOT, Pages, escape, inline, toctree

GALLERY = "paper_figures/gallery"


def pages() -> Pages:
    """A page for each figure and each study, the gallery, and the list of studies."""
    from deltacontrol.experiments import studies
    from deltacontrol.paper_figures import base

    found: Pages = {
        "figures/index.md": _gallery,
        "figures/source.md": _source,
        "figures/studies/index.md": _studies,
    }
    for name in base.names():
        found[f"figures/{name}.md"] = lambda name=name: _figure(name)
    for name in studies.available():
        found[f"figures/studies/{name}.md"] = lambda name=name: _study(name)
    return found


def pictures() -> dict[str, Path]:
    """The gallery's files by the name that pages use."""
    return {f"figures/{p.name}": p for p in sorted((ROOT / GALLERY).glob("*.png"))}


def _gallery() -> str:
    from deltacontrol.paper_figures import base

    out = [
        "# Figures",
        "Every figure is drawn from committed records, byte for byte: "
        "`deltacontrol figures --preset paper`. A picture opens its page, with the table, the "
        "caption and the command. What was run is in the [studies](studies/index.md), and beside "
        "what the source found it stands in [the source's results beside ours](source.md).",
        "::::{grid} 1 2 2 2\n:gutter: 3",
    ]
    for name in base.names():
        title = escape(base.load(name).TITLE)
        out.append(
            f":::{{grid-item-card}} {title}\n:link: {name}\n:link-type: doc\n:img-top: {name}.png\n"
            f"`{name}`\n:::"
        )
    out += ["::::", toctree([*base.names(), "source", "studies/index"], hidden=True), ""]
    return "\n\n".join(out)


def _source() -> str:
    from deltacontrol.paper_figures import source

    return "\n\n".join([
        "# The source's results beside ours",
        "The empirical half of Ding et al., Nature Machine Intelligence 5, 2023, at the size of a "
        "laptop. A range decides, as "
        "[paper_figures.agreement](../api/deltacontrol.paper_figures.md) says.",
        source.markdown(),
        "",
    ])  # fmt: skip


@cache
def loaded(name: str) -> tuple[int, Any]:
    """How many committed records a figure has, and its table."""
    from deltacontrol.paper_figures import base, collect

    module = base.load(name)
    records = collect.committed(module.STUDY)
    return len(records), module.table(records)


def _figure(name: str) -> str:
    from deltacontrol.paper_figures import base, collect

    module, page = base.load(name), f"figures/{name}.md"
    count, table = loaded(name)
    summary = module.summary(table)
    rows = ([escape(str(cell)) for cell in row] for row in summary.itertuples(index=False))
    told = {
        "Drawn from": _drawn_from(module.STUDY, count, page),
        "Code": markdown.code_link(page, Path(module.__file__).resolve()),
    }
    command = f"deltacontrol figures --only {name} --preset paper"
    command += "    # from the records\n"
    if collect.is_fixed(module.STUDY):
        command += f"{collect.how_to_measure(module.STUDY)}    # measure anew"
    else:
        command += f"deltacontrol figures --only {name}    # a small grid, here"
    return "\n\n".join([
        f"# {escape(module.TITLE)}",
        f"[![{name}]({name}.png)]({name}.png)",
        escape(module.caption(table)),
        markdown.facts(told),
        "## Table",
        markdown.table([escape(str(c)) for c in summary.columns], rows),
        "## Commands",
        markdown.fenced(command, "shell"),
        "In Python, for a notebook:",
        markdown.fenced(f'import deltacontrol as dc\n\ndc.figure("{name}")', "python"),
        "",
    ])  # fmt: skip


def _drawn_from(study: str, records: int, page: str) -> str:
    from deltacontrol.paper_figures import collect

    if study == collect.SCOREBOARD:
        return "the committed results of all [claims](../claims/index.md)"
    if collect.is_fixed(study):
        name = study.removeprefix(collect.BENCHMARKS)
        record = markdown.code_link(page, f"experiments/records/benchmarks/{name}.json")
        return f"the benchmark {record}"
    return f"{records} committed runs of the study [{study}](studies/{study}.md)"


def _studies() -> str:
    from deltacontrol.experiments import studies

    rows = [
        (f"[`{name}`]({name}.md)", inline(_question(name)), ", ".join(
            f"[`{figure}`](../{figure}.md)" for figure in _figures_of(name)))
        for name in studies.available()
    ]  # fmt: skip
    return "\n\n".join([
        "# Studies",
        "A study is one question and a grid of runs. `quick` takes minutes on two cores; `paper` "
        "is what the committed records hold.",
        markdown.table(("study", "question", "figures"), rows),
        toctree(studies.available(), hidden=True),
        "",
    ])  # fmt: skip


def _question(name: str) -> str:
    package = importlib.import_module(f"deltacontrol.experiments.studies.{name}")
    return markdown.first_line(package.__doc__)


def _figures_of(study: str) -> list[str]:
    from deltacontrol.paper_figures import base

    return [name for name in base.names() if base.load(name).STUDY == study]


def _study(name: str) -> str:
    from docs.generators import api

    page, package = f"figures/studies/{name}.md", f"deltacontrol.experiments.studies.{name}"
    folder = ROOT / "experiments/studies" / name
    figures = _figures_of(name)
    told = {
        "Figures": ", ".join(f"[`{figure}`](../{figure}.md)" for figure in figures),
        "Committed runs": str(_committed(name)),
        "Claims": _claims(package),
    }
    out = [f"# Study: {name}", inline(_question(name)), markdown.facts(told)]
    for info in sorted(pkgutil.iter_modules([str(folder)]), key=lambda i: i.name != "grid"):
        module = importlib.import_module(f"{package}.{info.name}")
        link = markdown.code_link(page, f"experiments/studies/{name}/{info.name}.py")
        out += [
            f"## {info.name}",
            markdown.docstring(module.__doc__, api.resolver(module.__name__)),
            f"Code: {link}",
        ]
    commands = [f"deltacontrol figures --only {figure}" for figure in figures]
    if not commands:
        commands = [f"python -m {package}.grid"]
    out += ["## Commands", markdown.fenced("\n".join(commands), "shell")]
    return "\n\n".join([*out, ""])


def _committed(study: str) -> int:
    folder = "rates/runs" if study == "learning_rates" else f"figures/{study}"
    return sum(p.is_dir() for p in (ROOT / "experiments/records" / folder).glob("*"))


def _claims(package: str) -> str:
    """The claims whose code imports the study."""
    from deltacontrol.experiments.claims import scoreboard
    from docs.generators import claims

    found: list[Any] = [
        claim
        for claim in scoreboard.available().values()
        if package in scoreboard.source(claim).read_text(encoding="utf-8")
    ]
    return ", ".join(f"[{c.id}](../../claims/{claims.stem(c)}.md)" for c in found)
