"""Claim 7: the damped Gauss-Newton step solves the layerwise linear-quadratic problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

DAMPINGS = (0.01, 0.1, 1.0)


def _problems() -> Iterator[tuple[str, Callable[[slice], Any], Any]]:
    """Problems whose batch fits one dense state, and controls away from their start.

    A problem is given as a function of the rows of its batch.
    """
    import torch

    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.systems import LowRankDynamics, ResidualNetwork

    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    network = ResidualNetwork.random(12, width=8, hidden=16, control_size=8, seed=7)
    lora = LowRankDynamics([normal(6, 6) / 2 for _ in range(6)], rank=2)
    toys: tuple[tuple[str, Any, int], ...] = (
        ("12-layer residual network", network, 8),
        ("6 linear layers with LoRA", lora, 6),
    )
    for name, dynamics, width in toys:
        target, x0 = normal(6, width), normal(6, width)

        def of(rows: slice, dynamics: Any = dynamics, y: Any = target, x: Any = x0) -> Any:
            return ControlProblem(dynamics, SquaredErrorCost(y[rows], weight_decay=1e-2), x[rows])

        yield name, of, tuple(0.5 * normal(m) for m in dynamics.control_sizes)
    controls = _small_bert(slice(None)).dynamics.controls()
    yield "2-layer BERT with LoRA", _small_bert, perturbed(controls, 0.3)


def _small_bert(rows: slice) -> Any:
    """The real architecture at width 8: attention, layer norms, a head; random weights."""
    import torch
    import transformers as hf

    from deltacontrol.deltas import HeadTuning, LoRA, attach
    from deltacontrol.deltas.dynamics.transformer import control_problem

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "vocab_size": 40, "max_position_embeddings": 16}
    sizes |= {"num_labels": 3}
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(7)
    model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, **off))
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start is so small that layers are linear
            parameter.add_(0.2 * torch.randn_like(parameter))
    controlled = attach(model.double().eval(), LoRA(rank=2), HeadTuning(), seed=7)
    tokens = torch.arange(20).reshape(4, 5) * 7 % 37 + 3
    batch = {"input_ids": tokens[rows], "labels": torch.tensor([0, 2, 1, 1])[rows]}
    return control_problem(controlled, batch, weight_decay=1e-2)


def _stacked(of: Callable[[slice], Any], rows: slice, u: Any, damping: float) -> Any:
    """The layerwise problem whose state is the whole batch."""
    from deltacontrol.theory.solvers.layerwise import layerwise_step

    return layerwise_step(of(rows), u, damping)


def _averaged(of: Callable[[slice], Any], rows: slice, u: Any, damping: float) -> Any:
    """The layerwise problem of each example by itself; the mean of their solutions."""
    from deltacontrol.theory.solvers.layerwise import layerwise_step

    batch = range(*rows.indices(len(of(slice(None)).x0)))
    steps = [layerwise_step(of(slice(i, i + 1)), u, damping) for i in batch]
    return tuple(sum(parts) / len(steps) for parts in zip(*steps, strict=True))


def _differences(layerwise: Callable[..., Any], rows: slice = slice(None)) -> dict[str, float]:
    """Relative distance of the two steps on these rows, for each problem and damping."""
    import torch

    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature
    from deltacontrol.theory.solvers.gauss_newton import damped_step

    found = {}
    for name, of, u in _problems():
        curvature = GaussNewtonCurvature(of(rows), u)
        for damping in DAMPINGS:
            step = damped_step(curvature, damping, rtol=1e-13).step
            other = torch.cat(layerwise(of, rows, u, damping))
            found[f"{name}, damping {damping:g}"] = float((step - other).norm() / step.norm())
    return found


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Conjugate gradients by products against Riccati on the stacked batch."""
    note = "three networks and three dampings; controls shared by a batch of 4 or 6, float64"
    return Evidence.worst(_differences(_stacked), note=note)


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The batch is not stacked: every example solves its own problem."""
    note = "the mean of the solutions of single examples; the case that comes closest"
    return Evidence.worst(_differences(_averaged), least=True, note=note)


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same mean over a batch of one example, whose own problem is the stacked one."""
    note = "the mean over a batch of one example"
    return Evidence.worst(_differences(_averaged, slice(0, 1)), note=note)


CLAIM = Claim(
    id=7,
    name="gauss-newton-layerwise",
    title="Gauss-Newton is layerwise LQR",
    statement=(
        "the step (G + μI)d = -∇J on controls that a batch shares is the optimum of the "
        "linear-quadratic problem along the linearised layers, with μ/2 ‖d_t‖² added to its cost "
        "and the batch stacked as one state"
    ),
    source="arXiv 2605.04230; Dunn & Bertsekas, JOTA 63(1), 1989",
    notebook="07_gauss_newton_layerwise",
    threshold=Threshold(
        "<=", 1e-9, "relative difference of the steps by products and by Riccati, float64"
    ),
    revised=(
        "the control with half the damping could not pass; now it leaves out that the batch is one "
        "state, which is harmless for a batch of one"
    ),
    predict=dict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="random network",
)
