"""Terms of the problems that tests of MSA make."""

from __future__ import annotations

import torch

from deltacontrol.theory.control.problem import ControlProblem, Controls

F64 = torch.float64


def ones(problem: ControlProblem, scale: float = 1.0) -> Controls:
    return tuple(torch.full_like(u, scale) for u in problem.zero_controls(dtype=F64))
