"""Models of the real peft library: made, moved from their start, saved and loaded."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.deltas.zoo import out

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")


def save(base: PreTrainedModel, config: object, folder: Path, change=None) -> None:
    """An adapter on a copy of ``base``, all that it trains moved, in ``folder``.

    ``change`` may do more to the model before it is saved.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if change is not None:
            change(model)
        model.save_pretrained(folder)


def logits(base: PreTrainedModel, folder: Path, batch: dict[str, Tensor]) -> Tensor:
    """What peft computes with the adapter in ``folder``, in the dtype of ``base``."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        # peft builds a few numbers, VeRA's projections among them, in float32 whatever the base is
        return out(model.to(base.dtype).eval(), batch)


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal to ``tolerance``, or that share of the largest entry where it is above one."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
