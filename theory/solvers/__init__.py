"""Solvers of control problems: one method, one file.

A solver improves the controls and reports each iterate; `solve` measures, records and decides.
"""

from theory.solvers.base import Ending, Iterate, Memory, Report, Solution, Solver, Status, solve
from theory.solvers.msa import MSA
from theory.solvers.shooting import Shooting

__all__ = [
    "MSA",
    "Ending",
    "Iterate",
    "Memory",
    "Report",
    "Shooting",
    "Solution",
    "Solver",
    "Status",
    "solve",
]
