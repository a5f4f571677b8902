"""The first-order model of the logits in the weights and biases of linear maps.

For a linear map ``y = W x + b`` inside a model, with the tokens t of example i,

    ∂z_ik/∂W = Σ_t d_ikt x_itᵀ,    ∂z_ik/∂b = Σ_t d_ikt,    d_ikt = ∂z_ik/∂y_it,

so one forward pass and K backward passes over a batch give the features of all sites at once: the
inputs x and the derivatives d, but no derivative in a weight is ever formed. Examples do not
interact, so the gradient of Σ_i z_ik holds d_ikt of each of them; it is zero on padding, which no
other token sees.

Source: Goodfellow, *Efficient per-example gradient computations*, arXiv 1510.01799, 2015.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.theory.convex import DenseFeatures, OuterProducts
from deltacontrol.theory.errors import InputError


def weight_features(
    model: PreTrainedModel,
    paths: Sequence[str],
    batch: Mapping[str, Tensor],
    *,
    chunk: int = 64,
) -> tuple[Tensor, dict[str, OuterProducts]]:
    """The logits of a batch, and their features in the weights of linear maps.

    Args:
        model: a classifier in evaluation mode.
        paths: module paths of ``nn.Linear`` layers.
        batch: the model's arguments; "labels" are not used.
        chunk: examples that go through the model at once.

    Returns:
        The logits (N, K), and for each path left factors (N, K, T, out) and right ones (N, T, in).

    Raises:
        InputError: a path is no linear map, its input is not (examples, tokens, width), or the
            model's logits are not (examples, classes).
    """
    parts = list(_derivatives(model, paths, batch, chunk))
    features = {
        path: OuterProducts(
            torch.cat([left[path] for _, left, _ in parts]).numpy(),
            torch.cat([right[path] for _, _, right in parts]).numpy(),
        )
        for path in paths
    }
    return torch.cat([z for z, _, _ in parts]), features


def bias_features(
    model: PreTrainedModel,
    paths: Sequence[str],
    batch: Mapping[str, Tensor],
    *,
    chunk: int = 64,
) -> tuple[Tensor, dict[str, DenseFeatures]]:
    """The logits of a batch, and their features (N, K, out) in the biases of linear maps.

    Arguments and errors are those of `weight_features`.
    """
    parts = [
        (z, {path: d.sum(2) for path, d in left.items()})
        for z, left, _ in _derivatives(model, paths, batch, chunk)
    ]
    features = {
        path: DenseFeatures(torch.cat([summed[path] for _, summed in parts]).numpy())
        for path in paths
    }
    return torch.cat([z for z, _ in parts]), features


def _derivatives(
    model: PreTrainedModel, paths: Sequence[str], batch: Mapping[str, Tensor], chunk: int
) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Logits, d (n, K, T, out) and x (n, T, in) of one chunk of examples after the other."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    num_examples = len(next(iter(inputs.values())))
    modules = {path: _linear(model, path) for path in paths}
    for start in range(0, num_examples, chunk):
        part = {name: value[start : start + chunk] for name, value in inputs.items()}
        with _recorded(modules) as (sources, probes), torch.enable_grad():
            z = _class_logits(model, model(**part))
        found = [
            torch.autograd.grad(z[:, k].sum(), list(probes.values()), retain_graph=True)
            for k in range(z.shape[1])
        ]
        left = {
            path: torch.stack([row[number] for row in found], dim=1)
            for number, path in enumerate(probes)
        }
        yield z.detach(), left, sources


def _class_logits(model: nn.Module, output: Any) -> Tensor:
    """The logits (n, K) of an output; refused where there are none, or some for each token."""
    z = getattr(output, "logits", None)
    if z is None or z.dim() != 2:
        found = "no logits" if z is None else f"logits of shape {tuple(z.shape)}"
        raise InputError(
            f"{type(model).__name__} gives {found}; the features are those of logits (examples, "
            "classes), as AutoModelForSequenceClassification gives them"
        )
    return z


@contextmanager
def _recorded(modules: Mapping[str, nn.Linear]) -> Iterator[tuple[dict, dict]]:
    """Keep the inputs of modules, and add a zero to their outputs to differentiate in."""
    sources: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def add(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if args[0].dim() != 3:
                raise InputError(
                    f"{path} receives {tuple(args[0].shape)}; expected (examples, tokens, width)"
                )
            sources[path] = args[0].detach()
            probes[path] = torch.zeros_like(output, requires_grad=True)
            return output + probes[path]

        return add

    handles = [m.register_forward_hook(hook(path)) for path, m in modules.items()]
    try:
        yield sources, probes
    finally:
        for handle in handles:
            handle.remove()


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, nn.Linear):
        raise InputError(
            f"{path} is {'no module' if module is None else type(module).__name__}; the features "
            "of a weight need the path of an nn.Linear"
        )
    return module
