"""Claim 23: what a delta loses to full fine-tuning is bounded by its distance from the optimum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.deltas import DeltaModel

# The sizes are chosen by cost alone.
MODEL = "minilm-l3"
DELTAS = ("lora:rank=8,sites=attention.query+mlp.up", "bitfit", "last-layers")
TASKS = ("movie", "trec6")
SEEDS = range(5, 8)  # rows, heads and starts that no earlier check has seen
NUM_EXAMPLES, LENGTH = 8, 12
STEPS, FULL_RATE, DELTA_RATE = 40, 2e-4, 3e-3
FULL_STEPS = 1000  # at most; it ends when the gradient is small and no gap negative
LARGEST_GRADIENT = 0.01  # share of the start's gradient below which θ⁺ counts as a minimiser
POINTS = 9

Parameters = dict[str, "Tensor"]


@dataclass(frozen=True, eq=False)
class _Segment:
    """F on a segment that leaves θ⁺.

    Attributes:
        distance: its length.
        slopes: size of F's derivative along it, at equal steps from θ⁺.
        losses: F there.
    """

    distance: float
    slopes: list[float]
    losses: list[float]

    def bound(self, every: int = 1, first: int = POINTS) -> float:
        """Largest slope times distance; of some points only, or of the first part alone."""
        share = (min(first, POINTS) - 1) / (POINTS - 1)
        return max(self.slopes[:first:every]) * self.distance * share


@dataclass(frozen=True, eq=False)
class _Training:
    """Full fine-tuning beside some deltas, on one task's rows.

    Attributes:
        untrained: F at the start.
        optimum: F at θ⁺.
        gradient: norm of F's gradient at θ⁺ over that at the start.
        steps: that full fine-tuning took.
        gaps: F after the last step of each delta, minus F(θ⁺).
        segments: from θ⁺ to the point of each delta's Im ψ that is next to it.
        back: the segment from θ⁺ to the start.
    """

    untrained: float
    optimum: float
    gradient: float
    steps: int
    gaps: dict[str, float]
    segments: dict[str, _Segment]
    back: _Segment


@cache
def _trainings() -> dict[str, _Training]:
    return dict(_all_trainings())


def _all_trainings() -> Iterator[tuple[str, _Training]]:
    from deltacontrol.deltas import FullFineTuning, HeadTuning, attach, parse
    from deltacontrol.experiments.setting import Setting

    for task in TASKS:
        for seed in SEEDS:
            setting = Setting(
                MODEL,
                task,
                train_rows=NUM_EXAMPLES,
                order="sampled",
                max_length=LENGTH,
                seed=seed,
            )
            base, batch = setting.base, setting.batch()
            start = {n: p.detach().clone() for n, p in base.named_parameters()}
            losses = {}
            for text in DELTAS:
                controlled = attach(base, parse(text), HeadTuning(), seed=seed)
                losses[text] = _trained(controlled, batch)
                controlled.detach()
            controlled = attach(base, FullFineTuning(), seed=seed)
            untrained, optimum, gradient, steps = _minimised(
                controlled, batch, min(losses.values())
            )
            best = {n: p.detach().clone() for n, p in base.named_parameters()}
            controlled.detach()
            segments = {}
            for text in DELTAS:
                controlled = attach(base, parse(text), HeadTuning(), seed=seed)
                nearest = _nearest(controlled, start, best)
                controlled.detach()
                segments[text] = _segment(base, batch, best, nearest)
            gaps = {text: loss - optimum for text, loss in losses.items()}
            back = _segment(base, batch, best, start)
            yield (
                f"{task}, seed {seed}",
                _Training(untrained, optimum, gradient, steps, gaps, segments, back),
            )


def _trained(controlled: DeltaModel, batch: Mapping[str, Tensor]) -> float:
    """A delta's loss after the last of `STEPS` steps of AdamW on all rows at once."""
    import torch

    optimiser = torch.optim.AdamW(controlled.trainable().values(), lr=DELTA_RATE, weight_decay=0.0)
    for _ in range(STEPS):
        optimiser.zero_grad()
        controlled(**batch).loss.backward()
        optimiser.step()
    with torch.no_grad():
        return float(controlled(**batch).loss)


def _minimised(
    controlled: DeltaModel, batch: Mapping[str, Tensor], below: float
) -> tuple[float, float, float, int]:
    """Loss before and after full fine-tuning, the share of its gradient that is left, the steps.

    AdamW on all rows at once, until that share is small and the loss no larger than ``below``.
    """
    import torch

    leaves = list(controlled.trainable().values())
    optimiser = torch.optim.AdamW(leaves, lr=FULL_RATE, weight_decay=0.0)
    losses, norms = [], []
    for step in range(FULL_STEPS + 1):
        optimiser.zero_grad()
        now = controlled(**batch).loss
        now.backward()
        losses.append(float(now.detach()))
        squares = [float(p.grad.square().sum()) for p in leaves if p.grad is not None]
        norms.append(sum(squares) ** 0.5)
        found = norms[-1] <= LARGEST_GRADIENT * norms[0] and losses[-1] <= below
        if found or step == FULL_STEPS:
            break
        optimiser.step()
    return losses[0], losses[-1], norms[-1] / norms[0], len(losses) - 1


def _nearest(controlled: DeltaModel, start: Parameters, best: Parameters) -> Parameters:
    """The point of Im ψ next to θ⁺: base parameters that the delta trains, and low-rank parts."""
    import torch

    from deltacontrol.deltas import LoRA

    nearest = dict(start)
    for attachment in controlled.attachments:
        if isinstance(attachment.delta, LoRA):
            delta = attachment.delta
            for site in controlled.host.find(delta.sites, delta.layers):
                name = f"{site.path}.weight"
                left, sizes, right = torch.linalg.svd((best[name] - start[name]).double(), False)
                r = delta.rank
                kept = (left[:, :r] * sizes[:r]) @ right[:r]
                nearest[name] = start[name] + kept.to(start[name].dtype)
        else:
            prefix = f"{attachment.namespace}."
            names = (n.removeprefix(prefix) for n in controlled.trainable() if n.startswith(prefix))
            nearest.update({name: best[name] for name in names})
    return nearest


def _along(
    model: Any, batch: Mapping[str, Tensor], best: Parameters, nearest: Parameters
) -> tuple[list[float], list[float]]:
    """F and |∇F·e|, e the unit vector from θ⁺ to the nearest point, at equal steps between them."""
    import torch
    from torch.func import functional_call

    losses, slopes = [], []
    away = {name: nearest[name] - best[name] for name in best}
    length = _distance(best, nearest)
    for step in range(POINTS):
        share = step / (POINTS - 1)
        here = {n: torch.lerp(best[n], nearest[n], share).requires_grad_() for n in best}
        loss = functional_call(model, here, (), dict(batch)).loss
        found = torch.autograd.grad(loss, list(here.values()), allow_unused=True)
        losses.append(float(loss.detach()))
        pairs = zip(found, away.values(), strict=True)
        slope = sum(float((g * a).sum()) for g, a in pairs if g is not None)
        slopes.append(abs(slope) / length)
    return losses, slopes


def _distance(a: Parameters, b: Parameters) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def _segment(
    model: Any, batch: Mapping[str, Tensor], best: Parameters, other: Parameters
) -> _Segment:
    losses, slopes = _along(model, batch, best, other)
    return _Segment(_distance(best, other), slopes, losses)


def _predict() -> dict[str, Any]:
    """The gap is at most the bound."""
    return {"largest_ratio": 1.0}


def _met() -> dict[str, bool]:
    gradient = max(t.gradient for t in _trainings().values())
    gap = min(gap for t in _trainings().values() for gap in t.gaps.values())
    return {
        f"θ⁺ is a minimiser: gradient at most {LARGEST_GRADIENT:g} of the start's": (
            gradient <= LARGEST_GRADIENT
        ),
        "θ⁺ is a minimiser: no gap is negative": gap >= 0,
    }


def _gaps(every: int, first: int, note: str, prediction: Mapping[str, Any]) -> Evidence:
    """Gap over constant times distance; the constant from all points of the segment or some."""
    ratios, words = {}, {}
    for name, training in _trainings().items():
        words[name] = (
            f"F {training.untrained:.3g} at the start, {training.optimum:.3g} at θ⁺ after "
            f"{training.steps} steps, gradient {training.gradient:.2g} of the start's"
        )
        for text, segment in training.segments.items():
            constant = max(segment.slopes[:first:every])
            ratios[f"{text}, {name}"] = training.gaps[text] / (constant * segment.distance)
            words[f"{text}, {name}: numbers"] = (
                f"gap {training.gaps[text]:.3g}, distance {segment.distance:.3g}, bound "
                f"{constant * segment.distance:.3g}, F at the nearest point "
                f"{segment.losses[-1]:.3g}"
            )
    value = {name: ratio / prediction["largest_ratio"] for name, ratio in ratios.items()}
    return Evidence.worst(value, details=words, note=note, assumptions=_met())


def _says(i: int, prediction: Mapping[str, Any]) -> Evidence:
    """A delta's bound over the loss of the untrained model, a value a training."""
    values = {
        name: training.segments[DELTAS[i]].bound() / training.untrained
        for name, training in _trainings().items()
    }
    return Evidence.mean(
        list(values.values()),
        "training",
        details=values,
        assumptions=_met(),
        note="two tasks, three seeds each of rows, head and start",
    )


def _says_of_nothing(first: int, note: str, prediction: Mapping[str, Any]) -> Evidence:
    """The same for a delta that reaches only points between θ⁺ and the start, or the start."""
    values = {name: t.back.bound(first=first) / t.untrained for name, t in _trainings().items()}
    return Evidence.mean(list(values.values()), "training", details=values, note=note)


def _says_part(i: int, letter: str, title: str) -> Part:
    return Part(
        letter,
        f"the bound says something, {title}",
        Threshold("<=", 1.0, "mean bound over the loss of the untrained model"),
        partial(_says, i),
        partial(_says_of_nothing, POINTS, "a delta that reaches nothing but the start"),
        partial(_says_of_nothing, 2, "one that reaches a point an eighth of the way from θ⁺ to it"),
        "real fine-tuning",
    )


# Fewer cases, for `claims run --preset quick`.
QUICK = {"TASKS": ("movie",), "SEEDS": range(5, 7)}

CLAIM = Claim(
    id=23,
    name="solution-space-gap",
    title="The gap to full fine-tuning is at most Lipschitz times distance",
    statement=(
        "min F∘ψ - min F ≤ Lip(F)·dist(θ⁺, Im ψ), θ⁺ a minimiser of F, Im ψ the parameters that "
        "the delta reaches, Lip(F) on the segment between θ⁺ and the nearest of them (a); and this "
        "bound is below the loss of the untrained model (b to d)"
    ),
    source="Ding et al., Nature Machine Intelligence 2023, optimisation perspective",
    notebook="23_solution_space_gap",
    predict=_predict,
    revised=(
        "θ⁺ was taken after 40 steps and was no minimiser, as negative gaps showed; it is now "
        "minimised and this is checked, and whether the bound says anything has parts of its own; "
        "a first trial of 16 rows and 200 steps left a gap of -6e-5, so that rows became fewer and "
        "steps more before any other seed was seen"
    ),
    parts=(
        Part(
            "a",
            "the gap is below the bound",
            Threshold("<=", 1.0, "largest ratio of measured gap and bound"),
            partial(_gaps, 1, POINTS, "constant = largest slope at 9 points of the segment"),
            partial(_gaps, 1, 1, "the slope at θ⁺ in place of the largest one of the segment"),
            partial(_gaps, 2, POINTS, "the largest slope at every second point of the segment"),
            "real fine-tuning",
        ),
        _says_part(0, "b", "LoRA"),
        _says_part(1, "c", "BitFit"),
        _says_part(2, "d", "the last layers"),
    ),
)
