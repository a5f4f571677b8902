"""The certificate of a recorded solve: what other controls nearby could still gain.

J is the solve's, over its rows and in float64. The ball is around the controls that it reached, and
its radius is by default the way that it went, ‖u − u₀‖: what could another solve gain that goes as
far again? A head alone is linear in its controls, so that J is convex and the bound is proved; of
any other delta it is proved of the linearised model, and an estimated remainder stands beside it
(`deltacontrol.theory.certificates`).
"""

from __future__ import annotations

import torch
from torch import nn

from deltacontrol.deltas import DeltaModel
from deltacontrol.experiments.heads import head_controls
from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.runs.record import Record
from deltacontrol.theory.certificates import Certificate, gap_bound
from deltacontrol.theory.errors import InputError

__all__ = ["certificate_of", "is_affine"]


def certificate_of(record: Record, radius: float | None = None) -> Certificate:
    """The certificate of the controls of a recorded solve.

    Args:
        record: of a solve.
        radius: in the Euclidean norm of all controls; by default the distance from the start, or 1
            where the solve did not move.

    Raises:
        InputError: the record is of another kind, or as `gap_bound` and `Record.control_problem`.
    """
    if record.kind != Solve.kind:
        raise InputError(
            f"run {record.id} is of the kind {record.kind!r}; a certificate is for a solve"
        )
    decay = float(record.config["weight_decay"])
    problem = record.control_problem(weight_decay=decay)
    reached = problem.initial_controls()
    if radius is None:
        setting = Solve.setting_of(record.config, record.result)
        start = setting.control_problem(weight_decay=decay).initial_controls()
        moved = [a - b for a, b in zip(reached, start, strict=True)]
        radius = float(torch.cat(moved).norm()) or 1.0
    model: DeltaModel = problem.dynamics.delta_model  # type: ignore[attr-defined]
    return gap_bound(problem, reached, radius, affine=is_affine(model))


def is_affine(model: DeltaModel) -> bool:
    """Whether all controls are those of a head that is one linear map: its logits are affine."""
    paths = model.host.sites.head_paths()
    linear = len(paths) == 1 and isinstance(model.model.get_submodule(paths[0]), nn.Linear)
    return linear and set(head_controls(model)) == set(model.trainable())
