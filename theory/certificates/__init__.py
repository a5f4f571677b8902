"""Upper bounds of what controls can still gain within a radius, valid whatever a solver did."""

from deltacontrol.theory.certificates.certificate import Certificate, Kind, Remainder, Tightness
from deltacontrol.theory.certificates.gap import gap_bound, quadratic_gap
from deltacontrol.theory.certificates.tangent import Ball, Least, least_on_ball

__all__ = [
    "Ball",
    "Certificate",
    "Kind",
    "Least",
    "Remainder",
    "Tightness",
    "gap_bound",
    "least_on_ball",
    "quadratic_gap",
]
