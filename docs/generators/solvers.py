"""A page for each solver: what it is for, its options, which exact problems it solves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.generators import api, markdown
from docs.generators.markdown import Pages, code, inline, table, toctree

TORCH = "torch-optimisers"


def pages() -> Pages:
    """A page for each solver of this project, one for torch's optimisers, and an index."""
    found: Pages = {"solvers/index.md": _index, f"solvers/{TORCH}.md": _torch}
    for name, kind in own().items():
        found[f"solvers/{name}.md"] = lambda name=name, kind=kind: _page(name, kind)
    return found


def own() -> dict[str, Any]:
    """The solvers that this project writes, by name."""
    from deltacontrol.theory.solvers import registry
    from deltacontrol.theory.solvers.solving import Solver

    return {n: k for n, k in registry.available().items() if issubclass(k, Solver)}


def _optimisers() -> dict[str, Any]:
    from deltacontrol.theory.solvers import registry

    return {n: k for n, k in registry.available().items() if n not in own()}


def _index() -> str:
    from deltacontrol.theory import solvers

    rows = [
        (f"[`{name}`]({name}.md)", inline(markdown.first_line(kind.__doc__)))
        for name, kind in own().items()
    ]
    rows.append((f"[torch optimisers]({TORCH}.md)", "any optimiser of `torch.optim`, by its name"))
    return "\n\n".join([
        "# Solvers",
        "A solver improves the controls step by step. `solve(problem, solver)` measures each "
        "iterate, decides when to stop, and says with which status: a solver never says itself "
        "that it converged.",
        table(("solver", "what it does"), rows),
        "## Which one",
        markdown.docstring(solvers.__doc__, api.resolver(solvers.__name__)),
        "On the command line: `deltacontrol solve --solver newton-cg --delta ia3`, see "
        "[`solve`](../commands/solve.md).",
        toctree([*own(), TORCH], hidden=True),
        "",
    ])  # fmt: skip


def _page(name: str, kind: Any) -> str:
    page = f"solvers/{name}.md"
    resolve = api.resolver(kind.__module__)
    told = {
        "Class": resolve(kind.__name__) or code(kind.__name__),
        "Problems": "linear dynamics with a quadratic cost alone" if kind.linear_quadratic
        else "any that is differentiable",
        "Box on the controls": "kept" if kind.takes_box else "not taken",
        "Steps by default": f"{kind.default_steps:,}",
        "Descends": "no iterate may raise J" if kind.descends else "an iterate may raise J",
        "Solves exactly": ", ".join(map(code, _serves(kind))),
        "Code": markdown.code_link(page, Path(inspect.getfile(kind))),
    }  # fmt: skip
    text = markdown.without_sections(kind.__doc__, "Attributes")
    return "\n\n".join([
        f"# {name}",
        markdown.docstring(text, resolve),
        markdown.facts(told),
        "## Options",
        _options(name, markdown.attributes(kind), resolve),
        "## Use",
        markdown.fenced(f"deltacontrol solve --solver {name} --delta bitfit", "shell")
        if not kind.linear_quadratic else "",
        _example(kind),
        "",
    ])  # fmt: skip


def _serves(kind: Any) -> list[str]:
    """The exactly solved problems that the conformance suite gives the solver."""
    from deltacontrol.theory.control.solved_problems import exact_problems

    return [
        known.name
        for known in exact_problems()
        if known.linear_quadratic or not kind.linear_quadratic
    ]


def _example(kind: Any) -> str:
    return markdown.fenced(
        "import torch\n\n"
        "import deltacontrol as dc\n"
        "from deltacontrol.theory import ControlProblem, LinearDynamics, QuadraticCost\n"
        "from deltacontrol.theory.solvers import "
        f"{kind.__name__}\n\n"
        "F64 = torch.float64\n"
        "A = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64)  # a cart: place and speed\n"
        "B = torch.tensor([[0.0], [0.5]], dtype=F64)  # it is pushed\n"
        "cost = QuadraticCost(\n"
        "    Q=torch.zeros(8, 2, 2, dtype=F64),\n"
        "    R=0.1 * torch.ones(8, 1, 1, dtype=F64),\n"
        "    Qf=torch.eye(2, dtype=F64),\n"
        ")\n"
        "start = torch.tensor([1.0, 0.0], dtype=F64)\n"
        "problem = ControlProblem(LinearDynamics.constant(8, A, B), cost, start)\n"
        "u = problem.initial_controls()\n"
        f"solution = dc.solve(problem, {kind.__name__}.example(problem, u), u)\n"
        "print(solution.status, solution.objective)",
        "python",
    )


def _options(name: str, meaning: Mapping[str, str], resolve: markdown.Resolve) -> str:
    from deltacontrol.theory.solvers import registry

    rows = [
        (code(option), code(_shown(hint)), code(repr(default)),
         inline(meaning.get(option, ""), resolve))
        for option, (hint, default) in registry.fields(name).items()
    ]  # fmt: skip
    if not rows:
        return "It has no options."
    return table(("option", "type", "default", "meaning"), rows)


def _shown(hint: Any) -> str:
    return inspect.formatannotation(hint).replace("typing.", "")


def _torch() -> str:
    from deltacontrol.theory.solvers import registry

    parts = [
        "# Torch optimisers",
        "{py:obj}`TorchOptimiser "
        "<deltacontrol.theory.solvers.torch_optimiser.TorchOptimiser>` makes a solver of any of "
        "these. The name is that of the class in lower case: `adamw:lr=0.01`. Weight decay is 0 "
        "unless it is given, because a solver lowers `J` alone.",
    ]
    for name, kind in _optimisers().items():
        options = ", ".join(
            f"`{option}={default!r}`" for option, (_, default) in registry.fields(name).items()
        )
        parts += [f"## {name}", f"`torch.optim.{kind.__name__}`. Options: {options}."]
    return "\n\n".join([*parts, ""])
