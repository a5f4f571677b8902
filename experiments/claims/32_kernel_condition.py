"""Claim 32: the tangent kernel's condition number orders choices of layers by their final loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.deltas import DeltaModel, LoRA
    from deltacontrol.experiments.measures.margins import MarginData

# LoRA on some layers: one choice a row of LAYER_SETS. The kernel of a choice is the sum of those of
# its layers at the start. The final loss is that of the rows that were trained on, as the kernel's.
MODEL, TASKS = "minilm-l6", ("movie", "rt", "sms", "amazon", "nyt")
LAYER_SETS = (
    (0,), (1,), (2,), (3,), (4,), (5,), (0, 1), (2, 3), (4, 5), (0, 1, 2), (3, 4, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip
RANK, SITES = 4, ("attention.query", "attention.value")
ROWS, TOKENS, HEAD_ROWS = 24, 12, 256
STEPS, RATE = 20, 2e-3  # of AdamW on all rows at once
SEED = 0  # of LoRA's start
# Kernels that are known, for the case in which the control passes: spectra from 1 down to these.
WIDEST, KNOWN_STEPS = 1e4, 50
# Fixed before the measurement.
ORDERED = 0.6  # of the mean rank correlation's magnitude


@dataclass(frozen=True)
class _Choices:
    """Of each choice of layers: the condition number, the final loss, the number of parameters."""

    conditions: tuple[float, ...]
    losses: tuple[float, ...]
    counts: tuple[int, ...]


def _lora() -> LoRA:
    """LoRA in all layers that some choice has; B = 0 wherever it is not trained, no change."""
    from deltacontrol.deltas import LoRA

    layers = sorted({layer for chosen in LAYER_SETS for layer in chosen})
    return LoRA(rank=RANK, sites=SITES, layers=tuple(layers))


@cache
def _data(task: str, pretrained: bool) -> MarginData:
    from deltacontrol.experiments.measures.margins import MarginData
    from deltacontrol.experiments.setting import Setting

    setting = Setting(
        MODEL, task, train_rows=ROWS, test_rows=0, order="shuffled", strict_rows=True,
        max_length=TOKENS, head="ridge", head_rows=HEAD_ROWS, pretrained=pretrained,
    )  # fmt: skip
    return MarginData.of(setting)


def _condition(K: Tensor) -> float:
    """The largest eigenvalue over the least; the least is taken for rounding's if it is below."""
    import torch

    values = torch.linalg.eigvalsh(K.double())
    return float(values[-1] / values[0].clamp_min(1e-9 * values[-1]))


def _chosen(controlled: DeltaModel, layers: Sequence[int]) -> list[str]:
    """The names of the controls in these layers."""
    host = controlled.host
    return [
        name
        for name in controlled.trainable()
        if host.sites.layer_of(host.state_path[name]) in layers
    ]


@cache
def _conditions(task: str, pretrained: bool) -> tuple[float, ...]:
    """The condition number of each choice's kernel, at the start that all choices share."""
    from deltacontrol.deltas import attach
    from deltacontrol.experiments.measures.kernel_regime import kernel_of

    data = _data(task, pretrained)
    controlled = attach(data.model, _lora(), seed=SEED)
    try:
        kernel = kernel_of(data, controlled)
        return tuple(_condition(kernel.total(_chosen(controlled, s))) for s in LAYER_SETS)
    finally:
        controlled.detach()


def _trained(data: MarginData, layers: Sequence[int]) -> tuple[float, int]:
    """The loss after training LoRA in these layers alone, and its number of parameters."""
    import torch

    from deltacontrol.deltas import attach
    from deltacontrol.experiments.measures.margins import logistic_loss

    controlled = attach(data.model, _lora(), seed=SEED).eval()
    try:
        trainable = controlled.trainable()
        parameters = [trainable[name] for name in _chosen(controlled, layers)]
        optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        batch = data.batch(data.examples)

        def loss() -> Tensor:
            logits = controlled(**batch).logits
            return logistic_loss(data.margins(logits, batch["attention_mask"]), data.signs)

        for _ in range(STEPS):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
        with torch.no_grad():
            return float(loss()), sum(p.numel() for p in parameters)
    finally:
        controlled.detach()


@cache
def _ends(task: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Losses and numbers of parameters of the pre-trained model's trainings."""
    ends = [_trained(_data(task, True), layers) for layers in LAYER_SETS]
    return tuple(loss for loss, _ in ends), tuple(count for _, count in ends)


def _with_kernels(task: str, pretrained: bool) -> _Choices:
    """The trainings of the pre-trained model beside kernels of it or of random weights."""
    return _Choices(_conditions(task, pretrained), *_ends(task))


@cache
def _known(number: int) -> _Choices:
    """Linear models of known kernels: the condition numbers of others with the same spectra.

    Gradient descent on the squared loss, at the rate of the largest eigenvalue, leaves
    ``Σ_i (1 - λ_i)^{2T} c_i² / 2``, the targets having coordinates ``c_i`` of equal size. The
    number of parameters is drawn.
    """
    import torch

    random = torch.Generator().manual_seed(number)
    conditions, losses = [], []
    for share in torch.linspace(0.2, 1.0, len(LAYER_SETS), dtype=torch.float64):
        values = WIDEST ** (-share * torch.linspace(0, 1, ROWS, dtype=torch.float64))
        other = torch.randn(ROWS, ROWS, generator=random, dtype=torch.float64)
        basis = torch.linalg.qr(other).Q
        conditions.append(_condition((basis * values) @ basis.mT))
        losses.append(float((1 - values).pow(2 * KNOWN_STEPS).mean() / 2))
    counts = torch.randperm(len(LAYER_SETS), generator=random)
    return _Choices(tuple(conditions), tuple(losses), tuple(counts.tolist()))


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _ordered(choices: Sequence[_Choices]) -> Evidence:
    """The magnitude of the mean rank correlation of condition number and final loss."""
    found = [_rank_correlation(c.conditions, c.losses) for c in choices]
    return Evidence.resampled(
        lambda rhos: abs(float(rhos.mean())), [found], "task", **_told(choices, found)
    )


def _above(choices: Sequence[_Choices]) -> Evidence:
    """By how much the condition number orders better than the number of parameters."""
    gains, found = [], []
    for c in choices:
        found.append(_rank_correlation(c.conditions, c.losses))
        gains.append(abs(found[-1]) - abs(_rank_correlation(c.counts, c.losses)))
    return Evidence.mean(gains, "task", **_told(choices, found))


def _told(choices: Sequence[_Choices], found: Sequence[float]) -> dict[str, Any]:
    return {
        "details": {
            "rank correlations of the condition number": list(found),
            "of the number of parameters": [_rank_correlation(c.counts, c.losses) for c in choices],
            "condition numbers": [list(c.conditions) for c in choices],
            "final losses": [list(c.losses) for c in choices],
        },
        "assumptions": {
            "final losses differ": all(max(c.losses) > 1.05 * min(c.losses) for c in choices),
        },
        "note": f"{len(LAYER_SETS)} choices of layers, {ROWS} rows a task, LoRA of rank {RANK}, "
        f"{STEPS} steps of AdamW",
    }


def _real(pretrained: bool) -> list[_Choices]:
    return [_with_kernels(task, pretrained) for task in TASKS]


def _designed() -> list[_Choices]:
    return [_known(number) for number in range(len(TASKS))]


# Fewer cases, for `claims run --preset quick`.
QUICK = {"STEPS": 5, "ROWS": 12}

CLAIM = Claim(
    id=32,
    name="kernel-condition",
    title="The tangent kernel's condition number orders layers by final loss",
    statement=(
        "of choices of the layers that LoRA acts in, the condition number of the tangent kernel at "
        "the start orders the training loss at the end, with a rank correlation of at least 0.6 in "
        "magnitude (a), and better than the number of parameters does (b)"
    ),
    source=(
        "Afzal, Esmaeilbeig, Soltanalian & Ohannessian, NeurIPS 2025, arXiv 2602.08239, abstract "
        "(the eigenvalues of the kernel correlate with performance)"
    ),
    notebook="32_kernel_condition",
    predict=lambda: {},
    parts=(
        Part(
            name="a",
            title="Condition numbers order final losses",
            threshold=Threshold(">=", ORDERED, "magnitude of the mean rank correlation"),
            measure=lambda prediction: _ordered(_real(pretrained=True)),
            # The kernels are those of another model, of random weights.
            negative_control=lambda prediction: _ordered(_real(pretrained=False)),
            # Another model's kernels do where their spectra are those of the model's own.
            passing_control=lambda prediction: _ordered(_designed()),
            on="real fine-tuning",
        ),
        Part(
            name="b",
            title="They do so better than the number of parameters",
            threshold=Threshold(">", 0.0, "|correlation| less that of the number of parameters"),
            measure=lambda prediction: _above(_real(pretrained=True)),
            negative_control=lambda prediction: _above(_real(pretrained=False)),
            passing_control=lambda prediction: _above(_designed()),
            on="real fine-tuning",
        ),
    ),
)
