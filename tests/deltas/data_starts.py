"""What the tests of LoRA's starts from data share."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import DeltaModel, LoRA, attach
from tests.deltas.zoo import TOKENS, out, texts

Build = Callable[..., PreTrainedModel]
SITES = ("attention.query", "attention.value", "mlp.down")
DATA = ("eva", "corda-ipm", "corda-kpm", "lora-ga", "lora-one")
# Whole maps; slices of a fused and transposed one; slices of every head's own part.
SHAPES = pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama"])


def batches_of(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Two batches with padding: halves are exact also where a model has float32 inside."""
    lengths = [(TOKENS - 2, TOKENS, TOKENS, 3, TOKENS, 2), (3, TOKENS, 5, 4)]
    return [texts(model, some, seed=seed) for seed, some in enumerate(lengths, start=3)]


def loss_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Some loss that depends on all that is put out."""
    outputs = out(model, batch)
    return (outputs.square() + outputs).mean()


def shown(model: PreTrainedModel, delta: LoRA) -> DeltaModel:
    """The controlled model after its look at the batches."""
    controlled = attach(model, delta)
    assert controlled.needs_data and not controlled.needs_examples
    controlled.prepare(lambda: (loss_of(controlled, b) for b in batches_of(model)))
    return controlled


def factors(controlled: DeltaModel, site) -> dict[str, Tensor]:
    """A, B and, where they are subtracted, A_0 and B_0 at a site."""
    prefix = f"lora.{site.key}."
    state = controlled.state()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """∂L/∂W of all weights of a plain copy, L the mean loss over the batches."""
    plain = copy.deepcopy(model).requires_grad_(True)
    batches = batches_of(model)
    torch.stack([loss_of(plain, b) for b in batches]).mean().backward()
    return {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


def inputs_of(plain: PreTrainedModel, path: str) -> Tensor:
    """All rows of text (n, in) that go into a module, one below the other."""
    rows: list[Tensor] = []
    module = plain.get_submodule(path)
    for batch in batches_of(plain):
        text = batch["attention_mask"].bool()
        hook = module.register_forward_hook(lambda _, x, y, text=text: rows.append(x[0][text]))
        with torch.no_grad():
            plain(**batch)
        hook.remove()
    return torch.cat(rows)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to a share of the largest entry."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
