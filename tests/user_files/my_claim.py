"""A claim of one's own: the harmonic numbers grow as the logarithm, and not as its square root."""

import math

from deltacontrol.theory.claims import Claim, Evidence, Threshold

SIZES = (10**3, 10**5)


def harmonic(n):
    return sum(1 / k for k in range(1, n + 1))


def growth(scale):
    low, high = (harmonic(n) / scale(math.log(n)) for n in SIZES)
    return Evidence(abs(high / low - 1), note=f"H_n over it at n = {SIZES[0]} and {SIZES[1]}")


CLAIM = Claim(
    id=901,
    name="harmonic-numbers",
    title="H_n grows as log n",
    statement="H_n / log n tends to 1, so it hardly changes between two large n",
    source="Euler, 1734",
    threshold=Threshold("<=", 0.05, "relative change of H_n / log n"),
    predict=lambda: {"change": 0.0},
    measure=lambda prediction: growth(lambda log: log),
    negative_control=lambda prediction: growth(math.sqrt),
    passing_control=lambda prediction: growth(lambda log: log + math.sqrt(log) / 100),
    on="exact problem",
)
