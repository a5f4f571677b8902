"""How controls are trained: the optimiser's and the loop's options, the same wherever they occur.

A `FineTuning` has them as its own fields, and the training loop takes them with what only it needs
to know.
"""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from deltacontrol.theory.solvers import Solver

__all__ = [
    "ADAMW",
    "METRICS",
    "SCHEDULES",
    "Options",
    "Settings",
    "check_count",
    "check_number",
    "learning_rate",
    "on_batches",
]

ADAMW = "adamw"
SCHEDULES = ("linear", "cosine", "constant")
METRICS = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "regression": ("pearson", "mse"),
    "causal-lm": ("loss", "perplexity"),
}
"""Of a task's kind, as results name them; the first tells the kind."""


@dataclass(frozen=True)
class Options:
    """How to train."""

    seed: int = 0
    """Seed of the head, the controls, the batches and the dropout."""
    optimiser: str = ADAMW
    """adamw, another optimiser of torch on small batches (sgd:momentum=0.9), or a solver of the
    full-batch control problem, such as lbfgs, newton-cg, gauss-newton or ddp."""
    learning_rate: float | None = None
    """Peak learning rate; by default the recorded search's, else a default of the delta."""
    steps: int = 300
    """Number of updates."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises."""
    schedule: str = "linear"
    """What the learning rate does after that: linear, cosine (both down to zero) or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay on the controls; of a solver, their running cost λ/2 ‖u‖²."""
    max_grad_norm: float | None = 1.0
    """The gradient is scaled down to this norm; none leaves it."""
    grad_accumulation: int = 1
    """Slices in which a batch is processed: less memory, the same update."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    cache_frozen: bool | None = None
    """Keep the hidden states below the lowest control after the first epoch: less time. None: where
    the examples come often enough and the states take at most 2 GiB."""
    precision: str = "auto"
    """auto (bf16 where the hardware computes in it; float64 for a solver), fp32 or bf16."""
    device: str = "auto"
    """auto, cpu or cuda."""
    compile: str = "auto"
    """Machine code of the model's pass by torch.compile: always, never, or (auto) in trainings so
    long that it saves time."""
    dropout: bool = False
    """Whether the base model's own dropout acts during training."""
    eval_every: int | None = None
    """Evaluate on validation rows after every so many steps."""
    patience: int | None = None
    """Stop after so many evaluations without a better one, and keep the best controls."""

    def check(self) -> None:
        """Check every option, and bring the numbers and the optimiser into one form.

        Raises:
            InputError: an option has a value that it cannot have.
        """
        for name in ("learning_rate", "max_grad_norm"):
            check_number(self, name, above=0.0)
        for name in ("warmup", "weight_decay"):
            check_number(self, name, least=0.0)
        if self.warmup > 1:
            raise InputError(f"warmup is {self.warmup}; expected a fraction of the steps, 0 to 1")
        for name in ("steps", "grad_accumulation", "eval_every", "patience"):
            check_count(self, name, least=1)
        check_count(self, "seed", least=0)
        for name, value, options in (
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, ("auto", "fp32", "bf16")),
            ("device", self.device, ("auto", "cpu", "cuda")),
            ("compile", self.compile, ("auto", "always", "never")),
        ):
            if value not in options:
                raise unknown(name, str(value), options)
        if self.patience is not None and self.eval_every is None:
            raise InputError("patience counts evaluations: set eval_every too, for example to 50")
        if self.optimiser != ADAMW:
            object.__setattr__(self, "optimiser", _written(self.optimiser))

    def solver(self) -> Solver | None:
        """The solver of the full-batch problem; None for an optimiser on small batches."""
        if self.optimiser == ADAMW:
            return None
        from deltacontrol.theory.solvers import registry

        found = registry.parse(self.optimiser)
        return None if on_batches(found) else found


@dataclass(frozen=True)
class Settings(Options):
    """What the training loop takes: the options, and what depends on the task.

    Attributes:
        kind: "classification", "regression", "causal-lm" or "masked-lm".
        monitor, larger_is_better: the metric that decides when the patience is at its end.
        checkpoint_seconds: time between checkpoints.

    Raises:
        InputError: as `Options.check`, or there is no learning rate.
    """

    kind: str = "classification"
    monitor: str = "accuracy"
    larger_is_better: bool = True
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Check the options."""
        self.check()
        if self.learning_rate is None:
            raise InputError("a training needs a learning_rate, such as 1e-3")

    @classmethod
    def of(cls, options: Options, **more: Any) -> Self:
        """Those of a fine-tuning, say, with what depends on the task."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(Options)}, **more)

    @property
    def peak_rate(self) -> float:
        """The learning rate, which a training always has."""
        assert self.learning_rate is not None
        return self.learning_rate

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimiser of torch on groups of parameters.

        Raises:
            InputError: it refuses the parameters, or knows no weight decay where there is one.
        """
        import torch

        from deltacontrol.theory.solvers import registry

        rate, decay = self.peak_rate, self.weight_decay
        if self.optimiser == ADAMW:
            # One pass over the memory: a sixth of the time of whole-tensor operations at 17 million
            # parameters, a quarter at 74 thousand (one thread of a CPU, fp32).
            if all(p.is_floating_point() for group in groups for p in group["params"]):
                return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
            return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, foreach=True)
        solver: Any = registry.parse(self.optimiser)
        if not on_batches(solver):
            raise InputError(
                f"{self.optimiser} solves a full-batch problem and takes no small batches; "
                "FineTuning(optimiser=…) and `deltacontrol solve` run it"
            )
        name, options = solver.optimiser.__name__, dict(solver.options)
        if "weight_decay" in options:
            options["weight_decay"] = decay
        elif decay:
            raise InputError(
                f"{name} knows no weight decay; leave weight_decay at 0, or take adamw"
            )
        try:
            return solver.optimiser(groups, lr=rate, **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} does not take these controls: {error}; take adamw") from error


def on_batches(solver: Solver) -> bool:
    """Whether it is an optimiser of torch of one gradient a step, which small batches serve."""
    import torch

    from deltacontrol.theory.solvers import TorchOptimiser

    return isinstance(solver, TorchOptimiser) and solver.optimiser is not torch.optim.LBFGS


def _written(optimiser: Any) -> str:
    """The optimiser with all of its options; plain AdamW by its name."""
    from deltacontrol.theory import plugins
    from deltacontrol.theory.solvers import Solver, registry

    if isinstance(optimiser, Solver):
        plugins.adopt(type(optimiser))
        solver = optimiser
    elif isinstance(optimiser, str):
        solver = registry.parse(optimiser)
    else:
        raise InputError(
            f"optimiser is {optimiser!r}; expected a text such as sgd:momentum=0.9 or newton-cg"
        )
    text = registry.text_of(solver)
    if not on_batches(solver):
        return text
    name, _, rest = text.partition(":")
    options = dict(solver.options)  # type: ignore[attr-defined]
    if "lr" in options or options.get("weight_decay"):
        raise InputError(
            f"the rate and the decay of {name} are the options learning_rate and weight_decay of a "
            "training; give them there"
        )
    own = ",".join(o for o in rest.split(",") if o and not o.startswith("weight_decay="))
    return f"{name}:{own}" if own else name


def check_number(
    owner: object, name: str, above: float | None = None, least: float | None = None
) -> None:
    """Make a field a float, which must be finite and within its bound.

    None is let pass where the annotation says so.

    Raises:
        InputError: it is not.
    """
    value: Any = getattr(owner, name)
    if value is None and "None" in _annotation(type(owner), name):
        return
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not (value > above if above is not None else value >= (least or 0.0))
        or value > sys.float_info.max  # also a whole number that no float can be
    ):
        bound = f"> {above:g}" if above is not None else f">= {least:g}"
        raise InputError(f"{name} is {value!r}; expected a finite number {bound}")
    object.__setattr__(owner, name, float(value))


def _annotation(kind: type, name: str) -> str:
    """A field's annotation as it is written."""
    own = (inspect.get_annotations(base) for base in kind.__mro__)
    return str(next((found[name] for found in own if name in found), None))


def check_count(owner: object, name: str, least: int) -> None:
    """Check a field that is a whole number, or None where its annotation says so.

    Raises:
        InputError: it is not, or too small.
    """
    value = getattr(owner, name)
    if value is None and "None" in _annotation(type(owner), name):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}; expected a whole number >= {least}")


def learning_rate(step: int, *, peak: float, steps: int, warmup: float, schedule: str) -> float:
    """The rate of update `step` = 0..steps-1.

    With w = round(warmup·steps), the rate rises linearly to `peak` over the first w updates. After
    that, with s = (step - w)/(steps - w), it is

        linear:   peak·(1 - s)
        cosine:   peak·(1 + cos πs)/2
        constant: peak

    Raises:
        InputError: Unknown schedule.

    Example:
        >>> [learning_rate(t, peak=1.0, steps=4, warmup=0.5, schedule="linear") for t in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    warm = round(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    s = (step - warm) / max(steps - warm, 1)
    if schedule == "linear":
        return peak * (1 - s)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * s)) / 2
    if schedule == "constant":
        return peak
    raise unknown("schedule", schedule, SCHEDULES)
