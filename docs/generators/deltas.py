"""A page for each delta method, from the registry, its docstring and what is recorded about it."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from docs.generators import api, figures, markdown
from docs.generators.markdown import ROOT, Pages, code, escape, inline, table, toctree

CATEGORIES = {
    "addition": "Addition: new modules or tokens beside the frozen ones",
    "specification": "Specification: some of the model's own parameters are trained",
    "reparametrisation": "Reparametrisation: the change of the weights is written with few numbers",
    "combined": "Combined: several at once",
}


def pages() -> Pages:
    """A page for each registered method, an index by category, and the matrix of architectures."""
    from deltacontrol.deltas import registry

    found: Pages = {"deltas/index.md": _index, "deltas/support.md": _support}
    for name, kind in registry.available().items():
        found[f"deltas/{name}.md"] = lambda name=name, kind=kind: _page(name, kind)
    return found


def _index() -> str:
    from deltacontrol.deltas import registry

    methods = registry.available()
    out = [
        "# Delta methods",
        f"{len(methods)} methods, each one file. A method is a control law: it says how numbers "
        "that are trained act on the states of a model that stays frozen. The categories are those "
        "of Ding *et al.* (2023). Which method works on which architecture is in the "
        "[matrix of architectures](support.md).",
    ]
    for category, title in CATEGORIES.items():
        rows = [
            (f"[`{name}`]({name}.md)", code(kind.law), inline(kind.num_parameters_formula))
            for name, kind in methods.items()
            if kind.category == category
        ]
        out += [f"## {title}", table(("method", "control law", "parameters"), rows)]
    return "\n\n".join([*out, toctree([*methods, "support"], hidden=True), ""])


def _page(name: str, kind: Any) -> str:
    page, file = f"deltas/{name}.md", Path(inspect.getfile(kind))
    resolve = api.resolver(kind.__module__)
    works, of, refused = _support_of(name)
    formats = [form for form, writes in _peft().items() if kind in writes]
    told = {
        "Category": kind.category,
        "Control law": code(kind.law),
        "Number of parameters": inline(kind.num_parameters_formula, resolve),
        "Source": escape(kind.reference),
        "At the start": "the model's output is unchanged" if kind.identity_at_start
        else "the model's output is perturbed",
        "Merging": escape(f"not possible: {kind.unmergeable}") if kind.unmergeable
        else "the controls can become part of the base weights where nothing else changes",
        "Copies in one pass": escape(f"not possible: {kind.unstackable}")
        if kind.unstackable else "",
        "Head": "this method controls the head itself" if kind.trains_head else "",
        "Acts on": _acts_on(kind),
        "peft": ", ".join(map(code, formats)) + ": goes in and out" if formats
        else "no type of adapter holds this method",
        "Architectures": f"{works} of {of} families ([matrix](support.md))" if of else "",
        "Code": markdown.code_link(page, file),
    }  # fmt: skip
    text = markdown.without_sections(
        markdown.after_first(kind.__doc__), "Attributes", "Class attributes"
    )
    parts = [
        f"# {name}",
        f"`{kind.__name__}`: {inline(markdown.first_line(kind.__doc__), resolve)}",
        markdown.facts(told),
        "## How it acts" if text.strip() else "",
        markdown.docstring(text, resolve),
        "## Use",
        markdown.fenced(
            f"import deltacontrol as dc\nfrom deltacontrol.deltas import {kind.__name__}\n\n"
            'model, _ = dc.load_model("minilm-l6", kind="classification", num_labels=2)\n'
            f"tuned = dc.attach(model, {kind.__name__}())\nprint(tuned.summary())",
            "python",
        )
        if _exported(kind)
        else "",
        markdown.fenced(
            f"deltacontrol inspect --delta {name}\n"
            f"deltacontrol finetune --task movie --delta {name}",
            "shell",
        ),
        "## Fields",
        _fields(name, kind, resolve),
        "## Learning rate",
        _rates(name, kind),
        "## What is recorded",
        _recorded(name, kind),
    ]
    if refused:
        parts += ["## Refused architectures", "\n".join(f"- {line}" for line in refused)]
    if kind.bibtex:
        parts += ["## BibTeX", markdown.fenced(inspect.cleandoc(kind.bibtex), "bibtex")]
    parts += ["## Class", api.class_directive(kind, with_text=False)]
    return "\n\n".join(filter(None, [*parts, ""]))


def _exported(kind: Any) -> bool:
    from deltacontrol import deltas

    return kind.__name__ in deltas.__all__


def _acts_on(kind: Any) -> str:
    from deltacontrol.theory import parsing

    default = parsing.fields_of(kind).get("sites", (None, None))[1]
    if isinstance(default, tuple) and default:
        return "by default the sites " + ", ".join(map(code, default))
    return escape(kind.acts_on)


def _fields(name: str, kind: Any, resolve: markdown.Resolve) -> str:
    from deltacontrol.deltas import registry

    meaning, hints = markdown.attributes(kind), _hints(kind)
    rows = [
        (code(field), code(_shown(hints.get(field, ""))), code(repr(default)),
         inline(meaning.get(field, ""), resolve))
        for field, (_, default) in registry.fields(name).items()
    ]  # fmt: skip
    if not rows:
        return "It has no fields."
    return table(("field", "type", "default", "meaning"), rows)


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _shown(hint: Any) -> str:
    text = inspect.formatannotation(hint) if hint else ""
    return text.replace("typing.", "").replace("Literal", "one of")


def _rates(name: str, kind: Any) -> str:
    whose = "of the method" if kind.default_rate is not None else "of its category"
    searched = ", ".join(f"{rate:g}" for rate in kind.rates_to_search())
    lines = [
        f"Without a recorded search the rate is **{kind.rate():g}**, the default {whose}. "
        f"`deltacontrol tune --delta {name}` tries {searched}.",
    ]
    found = [
        (code(model), code(task + (f" ({rest[0]} dimensions)" if rest else "")), f"{rate:g}")
        for (model, task, found_name, *rest), rate in _recorded_rates()
        if found_name == name
    ]
    if found:
        lines += ["Rates that the recorded search chose on validation rows:",
                  table(("model", "task", "rate"), found)]  # fmt: skip
    return "\n\n".join(lines)


@cache
def _recorded_rates() -> list[tuple[list[str], float]]:
    from deltacontrol.experiments.training.rates import recorded_rates

    return [(key.split("/"), rate) for key, rate in recorded_rates().items()]


def _recorded(name: str, kind: Any) -> str:
    rows = [
        (f"[`{figure}`](../figures/{figure}.md)", code(str(model)), code(str(task)),
         f"{100 * values['accuracy'].mean():.1f}", str(len(values)),
         f"{int(values['num_trainable'].iloc[0]):,}", f"{values['learning_rate'].iloc[0]:g}")
        for figure in ("taxonomy", "performance")
        for (model, task), values in _runs(figure).get(name, ())
    ]  # fmt: skip
    if not rows:
        return "No committed run of a figure used this method alone."
    head = ("figure", "model", "task", "test accuracy (%)", "seeds", "parameters", "rate")
    note = "Test accuracy, mean over seeds, from committed records; parameters with the head's."
    return f"{note}\n\n{table(head, rows)}"


@cache
def _runs(figure: str) -> dict[str, list[tuple[tuple[str, str], Any]]]:
    """The rows of a figure's table by method, then by model and task."""
    rows = figures.loaded(figure)[1]
    return {
        str(method): [(key, group) for key, group in mine.groupby(["model", "task"], sort=False)]
        for method, mine in rows.groupby("method", sort=False)
    }  # type: ignore[misc]


@cache
def _peft() -> dict[str, tuple[type, ...]]:
    from deltacontrol.deltas.interop import peft

    return {name: form.writes for name, form in peft.available().items()}


@cache
def _matrix() -> tuple[list[list[str]], dict[str, list[str]], str]:
    """Families of each column, the cells of each method, and the sentence with the reasons."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- support:begin -->\n")[1].split("<!-- support:end -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    head, body = lines[0], lines[2:]
    families = [cell.strip().split("<br>") for cell in head.strip("| ").split(" | ")[1:]]
    cells = {}
    for line in body:
        first, *rest = [cell.strip() for cell in line.strip().strip("|").split("|")]
        cells[first.strip("`")] = rest
    return families, cells, block.splitlines()[-1]


def _support_of(name: str) -> tuple[int, int, list[str]]:
    families, cells, legend = _matrix()
    row = cells.get(name)
    if row is None:
        return 0, 0, []
    reasons = dict(re.findall(r"\((\w)\) (.+?)(?=; \(\w\)|\.$)", legend))
    works = sum(len(f) for f, cell in zip(families, row, strict=True) if cell == "✓")
    refused = [
        f"{', '.join(f)}: {escape(reasons.get(cell.strip('()'), cell))}"
        for f, cell in zip(families, row, strict=True)
        if cell != "✓"
    ]
    return works, sum(map(len, families)), refused


def _support() -> str:
    families, cells, legend = _matrix()
    rows = [(f"[`{name}`]({name}.md)", *row) for name, row in cells.items()]
    head = ("method", *("<br>".join(group) for group in families))
    return "\n\n".join([
        "# Methods and architectures",
        "Generated from the test suite, which holds each cell to one contract: as many parameters "
        "as the formula says, the base model at the start, gradients for the controls alone, and "
        "the base again, bit for bit, after `detach`.",
        table(head, rows),
        escape(legend),
        "",
    ])  # fmt: skip
