"""A method's learning rate under AdamW, from the gradients and the curvature at its start.

With the slope ``|g|_1`` along the sign step ``s``, the Gauss-Newton matrix ``G``, and AdamW's
metric ``P`` of `deltacontrol.experiments.predicting.linear_start`,

    by the sign step    |g|_1 / s'Gs        minimises -eta |g|_1 + eta^2/2 s'Gs
    by the curvature    1 / lambda_max(P^1/2 G P^1/2)

The first is the best single step of the direction that AdamW's first update has, the second half of
the largest rate at which a descent with the metric ``P`` is stable. The estimate is their geometric
mean; its interval goes from the lower 5 % to the upper 95 % of both over rows that are drawn again,
so that it is wide where the two disagree. Rows that come twice sharpen the curvature of every draw,
hence only the spread of the draws around their median is taken. Momentum, warm-up and noise of the
batches are in neither.

Sources: LeCun, Simard & Pearlmutter, NeurIPS 1992 (1/lambda_max); Cohen, Ghorbani, Krishnan et al.,
*Adaptive gradient methods at the edge of stability*, arXiv 2207.14484 (the metric of Adam);
Balles, Pedregosa & Le Roux, *The geometry of sign gradient descent*, arXiv 2002.08056 (what
curvature sign steps meet).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deltacontrol.experiments.predicting.linear_start import LinearStart

ENDS = (0.05, 0.95)


@dataclass(frozen=True)
class RateEstimate:
    """A learning rate; NaN throughout where no gradient or no curvature is found.

    Attributes:
        value: the geometric mean of the two.
        low: the lower 5 % quantile of the two, over rows that are drawn again.
        high: the upper 95 % quantile.
        sign: by the sign step.
        curvature: by the largest eigenvalue.
    """

    value: float
    low: float
    high: float
    sign: float
    curvature: float


def rate_estimate(start: LinearStart) -> RateEstimate:
    """The peak rate of AdamW that the start of a method tells."""
    (curved, drawn_curved), (top, drawn_tops) = start.sign_curvature, start.largest
    if not (start.slope > 0 and curved > 0 and top > 0):
        return RateEstimate(*[math.nan] * 5)
    sign, stable = start.slope / curved, 1 / top
    ends = []
    for value, drawn in (
        (sign, start.drawn_slopes / drawn_curved),
        (stable, 1 / drawn_tops),
    ):
        told = drawn[drawn.isfinite() & (drawn > 0)].numpy()
        low, middle, high = np.quantile(told, (ENDS[0], 0.5, ENDS[1]))
        ends.append((value * float(low / middle), value * float(high / middle)))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return RateEstimate(math.sqrt(sign * stable), low, high, sign, stable)
