"""Learning rates as functions of the step."""

from __future__ import annotations

import math

from deltacontrol.theory.errors import unknown

SCHEDULES = ("linear", "cosine", "constant")


def learning_rate(step: int, *, peak: float, steps: int, warmup: float, schedule: str) -> float:
    """The rate of update `step` = 0..steps-1.

    With w = round(warmup·steps), the rate rises linearly to `peak` over the first w updates. After
    that, with s = (step - w)/(steps - w), it is

        linear:   peak·(1 - s)
        cosine:   peak·(1 + cos πs)/2
        constant: peak

    Raises:
        InputError: Unknown schedule.

    Example:
        >>> [learning_rate(t, peak=1.0, steps=4, warmup=0.5, schedule="linear") for t in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    warm = round(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    s = (step - warm) / max(steps - warm, 1)
    if schedule == "linear":
        return peak * (1 - s)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * s)) / 2
    if schedule == "constant":
        return peak
    raise unknown("schedule", schedule, SCHEDULES)
