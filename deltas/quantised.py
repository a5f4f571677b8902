"""Frozen weights in few bits: what tells them from others, and their values as numbers.

A quantised weight holds integers and scales, W ≈ scale · code. Beside it controls act as beside any
other weight (QLoRA: Dettmers et al., NeurIPS 2023, Eq. 5), because only its values are needed; it
cannot itself be trained or take up a control.

Known are the weights of bitsandbytes, 4-bit (NF4 and FP4) and 8-bit (LLM.int8, absmax of each
row), and those that dequantise themselves, as the tensors of torchao do. Nothing here imports these
libraries before a model has such a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltacontrol.theory.errors import InputError

# Methods of this name give a tensor's values; plain tensors have one too, for torch's own formats.
_UNPACK = "dequantize"
_CLASSES_OF_BITSANDBYTES = ("Params4bit", "Int8Params")


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds codes, not its values.

    Example:
        >>> is_quantised(torch.ones(2, 2)), is_quantised(torch.ones(2, 2, dtype=torch.int8))
        (False, True)
    """
    return not weight.is_floating_point() or _unpacks_itself(weight)


def num_values(weight: Any) -> int:
    """How many numbers a weight stands for, however many of them share a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def values_of(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A module's weight as numbers: itself, or its values in ``dtype`` where it is quantised.

    Raises:
        InputError: the format is not known.
    """
    weight: Any = module.weight
    assert isinstance(weight, Tensor)
    if not is_quantised(weight):
        return weight
    with torch.no_grad():
        if _unpacks_itself(weight):
            return weight.dequantize().to(dtype)
        name = type(weight).__name__
        state = getattr(weight, "quant_state", None)
        if name == "Params4bit" and state is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, state).to(dtype)
        if name == "Int8Params":
            codes, scales = _codes_of_int8(module, weight)
            # The largest magnitude of a row has the code 127.
            return (codes.to(torch.float32) * (scales.to(torch.float32) / 127)[:, None]).to(dtype)
    raise InputError(
        f"the weight of {type(module).__name__} is quantised as {name} of {weight.dtype}, whose "
        "values cannot be read here; expected 4 or 8 bits of bitsandbytes or a tensor of torchao"
    )


def refuse_quantised(names: Mapping[str, Tensor], purpose: str) -> None:
    """Refuse a purpose that needs weights as they are.

    Args:
        names: weights by name.
        purpose: what is refused, as the beginning of a sentence: "full cannot train".

    Raises:
        InputError: one of them is quantised.
    """
    found = [name for name, weight in names.items() if is_quantised(weight)]
    if found:
        raise InputError(
            f"{purpose} {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + ": quantised weights are frozen. Choose a method that acts beside them (lora, dora, "
            "adapters, prefix, bitfit ...), or load the model in float32 or bfloat16"
        )


def _unpacks_itself(weight: Tensor) -> bool:
    """Whether it is a tensor of a class of its own, with values behind its codes."""
    kind = type(weight)
    if kind in (Tensor, nn.Parameter) or kind.__name__ in _CLASSES_OF_BITSANDBYTES:
        return False
    return _UNPACK in kind.__dict__ or any(
        _UNPACK in base.__dict__ for base in kind.__mro__ if base not in Tensor.__mro__
    )


def _codes_of_int8(module: nn.Module, weight: Any) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and largest magnitudes (out,), which move to the state at the first pass."""
    state = getattr(module, "state", None)
    for holder in (weight, state):
        codes, scales = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if scales is not None:
            return (weight.data if codes is None else codes), scales
    raise InputError(
        f"the weight of {type(module).__name__} is 8-bit but has no scales; load the model with "
        "transformers (BitsAndBytesConfig(load_in_8bit=True))"
    )
