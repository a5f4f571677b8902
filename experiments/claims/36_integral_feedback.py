"""Claim 36: a proportional law leaves a steady error, and the integral of the error removes it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.experiments.measures.concept_errors import Concept

# Exact: random systems under a constant disturbance, one a seed. They are near the identity, as
# residual layers are: eigenvalues between these two, with which the loop is stable.
SEEDS, WIDTH, STEPS = range(12), 4, 600
EIGENVALUES, PROPORTIONAL, INTEGRAL = (0.5, 0.9), 0.4, 0.1
# Real: layers as time, and texts of one class steered towards the other.
MODEL, TASK, TOKENS = "smollm2-135m", "movie", 16
CALIBRATION, STEERED = 96, 48  # rows from which the directions follow, and rows after them
REAL_PROPORTIONAL, REAL_INTEGRAL = 0.3, 0.1
LATE = 3  # the error is judged on the last third of the sites


def _predict() -> dict[str, Any]:
    """The integral law's error vanishes; that of the proportional law is known beforehand."""
    return {"integral": 0.0}


def _system(seed: int) -> tuple[Tensor, Tensor]:
    """A, symmetric with the eigenvalues above, and the constant disturbance d."""
    import torch

    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64)).Q
    low, high = EIGENVALUES
    values = low + (high - low) * torch.rand(WIDTH, generator=random, dtype=torch.float64)
    return (basis * values) @ basis.mT, torch.randn(WIDTH, generator=random, dtype=torch.float64)


def _radius(A: Tensor, proportional: float, integral: float) -> float:
    """The spectral radius of the loop in the state and the sum of the states before it."""
    import torch

    one = torch.eye(len(A), dtype=A.dtype)
    state = torch.cat([(1 - proportional - integral) * A, -integral * A], 1)
    loop = torch.cat([state, torch.cat([one, one], 1)]) if integral else (1 - proportional) * A
    return float(torch.linalg.eigvals(loop).abs().max())


def _end(A: Tensor, d: Tensor, proportional: float, integral: float) -> Tensor:
    """The state after many steps of ``x ↦ A (x - k_p x - k_i Σ x) + d``, the reference being 0."""
    import torch

    x, total = torch.zeros_like(d), torch.zeros_like(d)
    for _ in range(STEPS):
        total = total + x
        x = A @ (x - proportional * x - integral * total) + d
    return x


def _removed(integral: float, disturbance: float = 1.0) -> Evidence:
    """The end's error over the disturbance, the largest of all systems."""
    errors, radii = {}, []
    for seed in SEEDS:
        A, d = _system(seed)
        end = _end(A, disturbance * d, PROPORTIONAL, integral)
        errors[f"seed {seed}"] = float(end.norm() / d.norm())
        radii.append(_radius(A, PROPORTIONAL, integral))
    return Evidence.worst(
        errors,
        least=not integral and bool(disturbance),
        details={"largest spectral radius of the loop": max(radii)},
        assumptions={"the loop is stable": max(radii) < 1},
    )


def _left(known: float, proportional: float = PROPORTIONAL) -> Evidence:
    """The proportional law's error against ``(I - (1 - k_p) known A)⁻¹ d``."""
    import torch

    errors = {}
    for seed in SEEDS:
        A, d = _system(seed)
        found, one = _end(A, d, proportional, 0.0), torch.eye(WIDTH, dtype=torch.float64)
        predicted = torch.linalg.solve(one - (1 - proportional) * known * A, d)
        errors[f"seed {seed}"] = float((found - predicted).norm() / predicted.norm())
    return Evidence.worst(errors)


@cache
def _concept() -> Concept:
    from deltacontrol.experiments.measures.concept_errors import Concept
    from deltacontrol.experiments.setting import Setting

    setting = Setting(
        MODEL, TASK, train_rows=CALIBRATION + STEERED, order="shuffled", strict_rows=True,
        max_length=TOKENS,
    )  # fmt: skip
    return Concept.of(setting, slice(CALIBRATION))


@cache
def _late(proportional: float, integral: float, exchange: str = "own") -> list[float]:
    """The mean |error| of each steered text over the last sites.

    ``exchange``: each text is given its own sum of errors; "other", that of the next text; "alike",
    that of the next text, where all texts are the same one.
    """
    import torch

    from deltacontrol.experiments.measures.concept_errors import chosen

    concept = _concept()
    batch = chosen(concept.setting.batch(), slice(CALIBRATION, None))
    batch = chosen(batch, batch["labels"] == 0)
    if exchange == "alike":
        batch = chosen(batch, torch.zeros(len(batch["labels"]), dtype=torch.long))
    sums = (lambda z: z) if exchange == "own" else (lambda z: z.roll(1))
    errors = concept.errors(batch, proportional, integral, sums=sums)
    return errors[-(len(errors) // LATE) :].abs().mean(0).tolist()


def _real(exchange: str) -> Evidence:
    """The mean late error with the integral over that without it, texts drawn again."""
    import numpy as np

    first = _late(REAL_PROPORTIONAL, 0.0, "alike" if exchange == "alike" else "own")
    second = _late(REAL_PROPORTIONAL, REAL_INTEGRAL, exchange)
    if exchange == "alike":  # one text, as often as there are texts: nothing is to be drawn
        return Evidence(float(np.mean(second) / np.mean(first)))
    without = _late(0.0, 0.0)
    return Evidence.resampled(
        lambda a, b: float(np.mean(b) / np.mean(a)),
        [first, second],
        "text",
        details={
            "mean late error without a law": float(np.mean(without)),
            "with the proportional law": float(np.mean(first)),
            "with the integral too": float(np.mean(second)),
        },
        note=f"{MODEL}, last token of snippets of {TASK}, gains {REAL_PROPORTIONAL} and "
        f"{REAL_INTEGRAL}, errors in gaps between the classes, last third of the layers",
    )


CLAIM = Claim(
    id=36,
    name="integral-feedback",
    title="Proportional steering leaves an error, its integral removes it",
    statement=(
        "under x ↦ A (x - k_p x - k_i Σ x) + d, d constant and the loop stable, the error of the "
        "proportional law tends to (I - (1 - k_p) A)⁻¹ d and that of the law with an integral to "
        "zero; with layers as time, the integral at least halves the error that proportional "
        "steering of a language model leaves in the late layers"
    ),
    source="PID steering, arXiv 2510.04309; the linear case is textbook control (Åström & Murray)",
    notebook="36_integral_feedback",
    predict=_predict,
    parts=(
        Part(
            name="a",
            title="An integral removes a steady error exactly",
            threshold=Threshold("<=", 1e-9, "error at the end over the disturbance"),
            measure=lambda prediction: _removed(INTEGRAL),
            negative_control=lambda prediction: _removed(0.0),
            passing_control=lambda prediction: _removed(0.0, disturbance=0.0),
            on="exact problem",
        ),
        Part(
            name="b",
            title="A proportional law leaves the predicted error",
            threshold=Threshold("<=", 1e-9, "relative difference of the error to its formula"),
            measure=lambda prediction: _left(1.0),
            # The system taken for one without memory: d alone would be left.
            negative_control=lambda prediction: _left(0.0),
            # At k_p = 1 a step forgets the state, so that A does not matter.
            passing_control=lambda prediction: _left(0.0, proportional=1.0),
            on="exact problem",
        ),
        Part(
            name="c",
            title="The integral halves what is left in a language model",
            threshold=Threshold("<=", 0.5, "late error with the integral over that without it"),
            measure=lambda prediction: _real("own"),
            # Each text is given the sum of errors of another one.
            negative_control=lambda prediction: _real("other"),
            passing_control=lambda prediction: _real("alike"),
            on="real model, untrained",
        ),
    ),
)
