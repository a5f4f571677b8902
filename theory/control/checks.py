"""What is asked of controls, states and terms before anything is computed with them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltacontrol.theory.errors import InputError

__all__ = ["require_control", "require_one_dtype"]


def require_control(control_sizes: Sequence[int], t: int, x: Tensor, u: Tensor) -> None:
    """Refuse a control that step ``t`` of a system cannot take at a state.

    Raises:
        InputError: with the shapes of both, unless the control is ``(m_t,)``, or ``(batch, m_t)``
            where the state has the same batch axis, and holds floats.
    """
    m = control_sizes[t]
    if not isinstance(u, Tensor) or not u.is_floating_point():
        found = f"of {u.dtype}" if isinstance(u, Tensor) else f"a {type(u).__name__}"
        raise InputError(f"the control of step {t} is {found}; expected a tensor of floats")
    per_example = x.ndim > 1 and u.shape == (x.shape[0], m)
    if u.shape != (m,) and not per_example:
        raise InputError(
            f"the control of step {t} has shape {tuple(u.shape)} at a state of shape "
            f"{tuple(x.shape)}; expected {(m,)}, or one for each example of a batch"
        )


def require_one_dtype(**terms: Sequence[Tensor] | Tensor | None) -> None:
    """Refuse terms of several dtypes, or of whole numbers.

    Raises:
        InputError: naming the dtypes of each term.
    """
    found = {
        name: {item.dtype for item in (given[None] if isinstance(given, Tensor) else given)}
        for name, given in terms.items()
        if given is not None
    }
    kinds = set().union(*found.values())
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        shown = ", ".join(
            f"{name} {' and '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}"
            for name, kinds in found.items()
        )
        raise InputError(f"the terms have dtypes {shown}; expected one float dtype for all")
