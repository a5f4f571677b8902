"""Claim 7: the damped Gauss-Newton step solves the layerwise linear-quadratic problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

DAMPINGS = (0.01, 0.1, 1.0)


def _predict() -> dict[str, Any]:
    """The steps coincide: their distance is zero up to rounding."""
    return {"relative_difference": 0.0, "dampings": list(DAMPINGS)}


def _problems() -> Iterator[tuple[str, Any, Any]]:
    """Problems whose batch fits one dense state, and controls away from their start."""
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
        cost = SquaredErrorCost(normal(6, width), weight_decay=1e-2)
        problem = ControlProblem(dynamics, cost, normal(6, width))
        yield name, problem, tuple(0.5 * normal(m) for m in dynamics.control_sizes)
    problem = _small_bert()
    yield "2-layer BERT with LoRA", problem, perturbed(problem.dynamics.controls(), 0.3)


def _small_bert() -> Any:
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
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 2, 1, 1])}
    return control_problem(controlled, batch, weight_decay=1e-2)


def _differences(layerwise: Callable[..., Any]) -> dict[str, float]:
    """Relative distance of the two steps, for each problem and damping."""
    import torch

    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature
    from deltacontrol.theory.solvers.gauss_newton import damped_step

    found = {}
    for name, problem, u in _problems():
        curvature = GaussNewtonCurvature(problem, u)
        for damping in DAMPINGS:
            step = damped_step(curvature, damping, rtol=1e-13).step
            other = torch.cat(layerwise(problem, u, damping))
            found[f"{name}, damping {damping:g}"] = float((step - other).norm() / step.norm())
    return found


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Conjugate gradients by products against Riccati on the stacked batch."""
    from deltacontrol.theory.solvers.layerwise import layerwise_step

    found = _differences(layerwise_step)
    return Evidence(
        value=max(found.values()) - prediction["relative_difference"],
        details=found,
        note="worst of three networks and three dampings; controls shared by the batch, float64",
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The layerwise problem with half the damping: another quadratic model."""
    from deltacontrol.theory.solvers.layerwise import layerwise_step

    found = _differences(lambda problem, u, damping: layerwise_step(problem, u, damping / 2))
    return Evidence(
        value=min(found.values()) - prediction["relative_difference"],
        details=found,
        note="Riccati with half the damping; best of the networks and dampings",
    )


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
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
