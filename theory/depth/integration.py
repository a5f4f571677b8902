"""The integration of a differential equation over one layer, with an end to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torchdiffeq import odeint
from tqdm.auto import tqdm

from deltacontrol.theory.errors import InputError

__all__ = ["Accuracy", "integrate"]


class Accuracy(Protocol):
    """How exactly to integrate, and for how long."""

    @property
    def rtol(self) -> float:
        """Relative tolerance of a step."""
        ...

    @property
    def atol(self) -> float:
        """Absolute tolerance of a step."""
        ...

    @property
    def max_steps(self) -> int:
        """Steps at most, accepted ones and others."""
        ...

    @property
    def progress(self) -> bool:
        """Whether to show how far it is."""
        ...


def integrate(
    flow: Callable[[Tensor, Any], Any],
    begin: float,
    end: float,
    y: tuple[Tensor, ...],
    t: int,
    accuracy: Accuracy,
) -> tuple[Tensor, ...]:
    """The value at ``end`` of the solution that is ``y`` at ``begin``, both ends of layer ``t``.

    Dormand and Prince's pair of order 5(4). Its steps are explicit: where the Jacobian of ``flow``
    has an eigenvalue ``lambda`` with a large negative real part, they are at most about
    ``3.3 / |lambda|`` long (Hairer & Wanner, *Solving Ordinary Differential Equations II*, 1996,
    section IV.2), whatever the tolerances.

    Raises:
        InputError: it takes more than the steps that are allowed, or no step meets the tolerances.
    """
    times = torch.tensor([begin, end], dtype=torch.float64, device=y[0].device)
    options = {
        "step_t": times[1:],  # end there, rather than step beyond the layer and interpolate
        "max_num_steps": accuracy.max_steps,
    }
    with tqdm(total=1.0, disable=not accuracy.progress, desc=f"layer {t}", unit="layer") as bar:

        def shown(s: Tensor, z: Any) -> Any:
            bar.update(max(0.0, abs(float(s) - begin) - bar.n))
            return flow(s, z)

        try:
            path = odeint(
                shown if accuracy.progress else flow,
                y,
                times,
                rtol=accuracy.rtol,
                atol=accuracy.atol,
                method="dopri5",
                options=options,
            )
        except AssertionError as error:  # how torchdiffeq says that it cannot go on
            raise _refused(str(error), y[0], t, accuracy) from error
    return tuple(part[-1] for part in path)


def _refused(reason: str, x: Tensor, t: int, accuracy: Accuracy) -> InputError:
    if "max_num_steps" in reason:
        return InputError(
            f"the integration of layer {t} takes over max_steps = {accuracy.max_steps} steps: the "
            "layer is stiff (it pulls states together very fast), or the tolerances are too "
            "small; raise rtol and atol, allow more max_steps, or refine(factor) with steps of "
            "your own"
        )
    return InputError(
        f"the integration of layer {t} cannot meet rtol = {accuracy.rtol:g} and atol = "
        f"{accuracy.atol:g} in {x.dtype} ({reason}); raise them, use float64, and check that "
        "the layer gives finite numbers"
    )
