"""Delta tuning of Transformers as discrete optimal control.

    import deltacontrol as dc

    model, tokenizer = dc.load_model("minilm-l6", kind="classification", num_labels=2)
    tuned = dc.attach(model, dc.LoRA(rank=8))          # the base stays frozen and untouched
    problem = dc.control_problem(tuned, batch)         # layer = step, delta = control
    solution = dc.solve(problem, NewtonCG())           # of deltacontrol.theory.solvers

    record = dc.finetune(task="movie", deltas="lora")  # trained, evaluated, recorded in runs/
    dc.runs()                                          # all records, as a table
    dc.claims()                                        # the scoreboard, as a table
    dc.figure("performance")                           # a matplotlib Figure, from committed records

Names are imported when they are first used; `import deltacontrol` loads neither torch nor
transformers. Behind it stand four packages: `theory` (the mathematics; tensors only), `deltas`
(delta methods as controls on a Transformer), `experiments` (models, tasks, training, records,
claims) and `paper_figures` (records → table → figure).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltacontrol import deltas, experiments, paper_figures, theory
    from deltacontrol.deltas import (
        IA3,
        BitFit,
        DeltaModel,
        FullFineTuning,
        HoulsbyAdapter,
        LoRA,
        PrefixTuning,
        PromptTuning,
        attach,
        load,
        serve,
    )
    from deltacontrol.deltas.dynamics.transformer import control_problem
    from deltacontrol.experiments.interactive import claims, estimate_dimension, finetune
    from deltacontrol.experiments.models import load as load_model
    from deltacontrol.experiments.runs.citing import cite
    from deltacontrol.experiments.runs.table import runs
    from deltacontrol.experiments.sharing import save
    from deltacontrol.experiments.tasks import load as load_task
    from deltacontrol.paper_figures.drawing import figure
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.plugins import load as load_plugin
    from deltacontrol.theory.solvers.solving import solve

    __version__: str

_PACKAGES = ("theory", "deltas", "experiments", "paper_figures")
_PLACES = {
    "BitFit": "deltas",
    "ControlProblem": "theory.control.problem",
    "DeltaModel": "deltas",
    "FullFineTuning": "deltas",
    "HoulsbyAdapter": "deltas",
    "IA3": "deltas",
    "LoRA": "deltas",
    "PrefixTuning": "deltas",
    "PromptTuning": "deltas",
    "attach": "deltas",
    "cite": "experiments.runs.citing",
    "claims": "experiments.interactive",
    "control_problem": "deltas.dynamics.transformer",
    "estimate_dimension": "experiments.interactive",
    "figure": "paper_figures.drawing",
    "finetune": "experiments.interactive",
    "load": "deltas",
    "load_model": "experiments.models:load",
    "load_plugin": "theory.plugins:load",
    "load_task": "experiments.tasks:load",
    "runs": "experiments.runs.table",
    "save": "experiments.sharing",
    "serve": "deltas",
    "solve": "theory.solvers",
}
__all__ = [
    "BitFit",
    "ControlProblem",
    "DeltaModel",
    "FullFineTuning",
    "HoulsbyAdapter",
    "IA3",
    "LoRA",
    "PrefixTuning",
    "PromptTuning",
    "__version__",
    "attach",
    "cite",
    "claims",
    "control_problem",
    "deltas",
    "estimate_dimension",
    "experiments",
    "figure",
    "finetune",
    "load",
    "load_model",
    "load_plugin",
    "load_task",
    "paper_figures",
    "runs",
    "save",
    "serve",
    "solve",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("deltacontrol")
    elif name in _PACKAGES:
        value = import_module(f"{__name__}.{name}")
    elif name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
