"""Gradient descent with Barzilai and Borwein's step, <s, s> / <s, y> of the last two iterates."""

from dataclasses import dataclass

import torch

from deltacontrol.theory.solvers.solving import Solver


@dataclass(frozen=True)
class BarzilaiBorwein(Solver):
    first: float = 1e-2  # the first step

    default_steps = 1000
    descends = False

    def run(self, problem, u0, report, memory):
        u, step, last = u0, self.first, None
        while True:
            now = problem.evaluate(u)
            if report(u, now):
                return
            point = torch.cat([c.flatten() for c in u])
            slope = torch.cat([g.flatten() for g in now.gradient])
            if last is not None:
                s, y = point - last[0], slope - last[1]
                step = float(s @ s / (s @ y)) if s @ y > 0 else self.first
            last = point, slope
            u = tuple(c - step * g for c, g in zip(u, now.gradient, strict=True))
