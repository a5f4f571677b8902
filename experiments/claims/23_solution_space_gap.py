"""Claim 23: what a delta loses to full fine-tuning is bounded by its distance from the optimum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.deltas import DeltaModel

MODEL = "minilm-l6"
DELTAS = ("lora:rank=1", "lora:rank=8,sites=attention.query+mlp.up", "bitfit", "last-layers")
TASKS = ("movie", "trec6")
SEEDS = (0, 1)
NUM_EXAMPLES, LENGTH = 32, 16
STEPS, FULL_RATE, DELTA_RATE = 40, 2e-4, 3e-3
POINTS = 9

Parameters = dict[str, "Tensor"]


@dataclass(frozen=True, eq=False)
class _Case:
    """A delta beside full fine-tuning, on one task's rows.

    Attributes:
        name: delta, task and seed.
        gap: F after the last step of the delta, minus F after that of full fine-tuning.
        distance: of θ⁺ from the nearest point of Im ψ.
        slopes: size of F's derivative along the segment, at equal steps from θ⁺ to that point.
        losses: F there.
    """

    name: str
    gap: float
    distance: float
    slopes: list[float]
    losses: list[float]


@cache
def _cases() -> tuple[_Case, ...]:
    return tuple(_all_cases())


def _all_cases() -> Iterator[_Case]:
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
            controlled = attach(base, FullFineTuning(), seed=seed)
            full = _trained(controlled, batch, FULL_RATE)
            best = {n: p.detach().clone() for n, p in base.named_parameters()}
            controlled.detach()
            for text in DELTAS:
                controlled = attach(base, parse(text), HeadTuning(), seed=seed)
                loss = _trained(controlled, batch, DELTA_RATE)
                nearest = _nearest(controlled, start, best)
                controlled.detach()
                distance = sum(float((best[n] - nearest[n]).square().sum()) for n in best) ** 0.5
                losses, slopes = _along(base, batch, best, nearest)
                name = f"{text}, {task}, seed {seed}"
                yield _Case(name, loss - full, distance, slopes, losses)


def _trained(controlled: DeltaModel, batch: Mapping[str, Tensor], rate: float) -> float:
    """The loss after the last of `STEPS` steps of AdamW on all rows at once."""
    import torch

    optimiser = torch.optim.AdamW(controlled.trainable().values(), lr=rate, weight_decay=0.0)
    for _ in range(STEPS):
        optimiser.zero_grad()
        now = controlled(**batch).loss
        now.backward()
        optimiser.step()
    with torch.no_grad():
        return float(controlled(**batch).loss)


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
    length = sum(float(a.square().sum()) for a in away.values()) ** 0.5
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


def _predict() -> dict[str, Any]:
    """The gap is at most the bound."""
    return {"largest_ratio": 1.0}


def _worst(constant: Callable[[list[float]], float]) -> tuple[float, dict[str, Any]]:
    ratios, details = {}, {}
    for case in _cases():
        bound = constant(case.slopes) * case.distance
        ratios[case.name] = case.gap / bound
        details[case.name] = (
            f"gap {case.gap:.3g}, distance {case.distance:.3g}, bound {bound:.3g}, "
            f"F at the nearest point {case.losses[-1]:.3g}, at the optimum {case.losses[0]:.3g}"
        )
    details["slack, bound over gap, least"] = 1 / max(ratios.values())
    return max(ratios.values()), details


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Four deltas, two tasks, two seeds; the Lipschitz constant along the segment."""
    worst, details = _worst(max)
    return Evidence(
        value=worst / prediction["largest_ratio"],
        details=details,
        note=(
            "MiniLM-L6, 32 rows of movie and of trec6, two seeds; θ⁺ from 40 steps of full "
            "fine-tuning, constant = largest slope at 9 points of the segment"
        ),
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The slope at θ⁺ alone, where it has almost vanished: no Lipschitz constant."""
    worst, details = _worst(lambda slopes: slopes[0])
    return Evidence(
        value=worst / prediction["largest_ratio"],
        details=details,
        note="the slope at θ⁺ in place of the largest one along the segment",
    )


CLAIM = Claim(
    id=23,
    name="solution-space-gap",
    title="The gap to full fine-tuning is at most Lipschitz times distance",
    statement=(
        "min F∘ψ - min F ≤ Lip(F)·dist(θ⁺, Im ψ), θ⁺ a minimiser of F, Im ψ the parameters that "
        "the delta reaches, Lip(F) on the segment between θ⁺ and the nearest of them"
    ),
    source="Ding et al., Nature Machine Intelligence 2023, optimisation perspective",
    notebook="23_solution_space_gap",
    threshold=Threshold("<=", 1.0, "largest ratio of measured gap and bound"),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
