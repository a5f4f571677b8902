"""Solvers of control problems: one method, one file.

A solver improves the controls and reports each iterate; `solve` measures, records and decides.

================  =====================================================  ==========================
solver            for                                                    convergence
================  =====================================================  ==========================
`Riccati`         linear dynamics, quadratic cost                        exact, in one sweep
`ILQR`            states of up to a few thousand entries, boxes          linear, fast near LQ
`DDP`             the same                                               quadratic
`GaussNewton`     any size, shared controls; products only               superlinear near LQ
`NewtonCG`        any size; products with the exact Hessian              superlinear
`Shooting`        any size, boxes; L-BFGS, the baseline                  superlinear in practice
`MSA`             any; gradient, exact or inner minimisation of ``H``    linear, may diverge
`ExtendedMSA`     any; augmented Hamiltonian, automatic penalty          every step descends
`TorchOptimiser`  any; AdamW and all others of `torch.optim`             theirs
================  =====================================================  ==========================

`differentiable_solve` gives the derivatives of an optimum in the parameters of its problem.
"""

from deltacontrol.theory.solvers.emsa import ExtendedMSA
from deltacontrol.theory.solvers.gauss_newton import GaussNewton, NewtonCG
from deltacontrol.theory.solvers.ilqr import DDP, ILQR
from deltacontrol.theory.solvers.implicit import differentiable_solve
from deltacontrol.theory.solvers.minimisers import ExactArgmin, GradientStep, InnerLBFGS
from deltacontrol.theory.solvers.msa import MSA
from deltacontrol.theory.solvers.riccati import Riccati
from deltacontrol.theory.solvers.shooting import Shooting
from deltacontrol.theory.solvers.solution import Iterate, Memory, Solution, Status
from deltacontrol.theory.solvers.solving import Ending, Report, Solver, solve
from deltacontrol.theory.solvers.torch_optimiser import TorchOptimiser

__all__ = [
    "DDP",
    "ILQR",
    "MSA",
    "Ending",
    "ExactArgmin",
    "ExtendedMSA",
    "GaussNewton",
    "GradientStep",
    "InnerLBFGS",
    "Iterate",
    "Memory",
    "NewtonCG",
    "Report",
    "Riccati",
    "Shooting",
    "Solution",
    "Solver",
    "Status",
    "TorchOptimiser",
    "differentiable_solve",
    "solve",
]
