"""The tangent kernel of a model's outputs over its controls, tensor by tensor.

For outputs ``f_i`` of examples ``i``, ``k`` numbers each, and a tensor ``p`` of the controls

    K_p[i a, j b] = <d f_ia / d p, d f_jb / d p>,     K = sum_p K_p,

exact, from one backward pass for each example and output. Examples pass alone, so that none is
padded. Rows of ``p`` that no example touches, as of an embedding, are not kept.

Source: Jacot, Gabriel & Hongler, NeurIPS 2018, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.step_graph import differentiable_attention

Read = Callable[[Any, Batch], Tensor]

CAPACITY = 2**29
"""Numbers of derivatives that are held at a time; with more, examples pass several times."""


@dataclass(frozen=True, eq=False)
class TangentKernel:
    """Outputs of a model and inner products of their gradients.

    Attributes:
        outputs: ``f``, ``(n, k)``.
        parts: ``K_p`` by the name of the tensor, ``(n k, n k)``, float64.
    """

    outputs: Tensor
    parts: Mapping[str, Tensor]

    def total(self, names: Sequence[str] | None = None) -> Tensor:
        """``K`` over the named tensors, or over all."""
        chosen = list(self.parts) if names is None else names
        size = self.outputs.numel()
        total = self.outputs.new_zeros(size, size, dtype=torch.float64)
        for name in chosen:
            total += self.parts[name]
        return total


def tangent_kernel(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[Batch],
    read: Read,
    *,
    capacity: int = CAPACITY,
) -> TangentKernel:
    """The kernel of ``read(model(**example), example)`` over parameters.

    Args:
        model: in evaluation mode, or dropout would make the outputs random.
        parameters: of the model; they require gradients.
        examples: arguments of the model, one example each; "labels" are not handed on.
        read: gives the ``k`` outputs ``(k,)`` of an example.
        capacity: numbers held at a time.

    Raises:
        InputError: no parameter or example, or a model in training mode.
    """
    if not parameters or not examples:
        raise InputError(
            f"a kernel of {len(examples)} examples over {len(parameters)} parameters is empty; "
            "give at least one of each"
        )
    if model.training:
        raise InputError("the model is in training mode, where dropout acts; call eval() first")
    parts: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    for group in _groups(parameters, examples, capacity):
        outputs, rows = _gradients(model, group, examples, read)
        for name in group:
            parts[name] = _gram(rows.pop(name))
    return TangentKernel(torch.stack(outputs), {name: parts[name] for name in parameters})


def _groups(
    parameters: Mapping[str, nn.Parameter], examples: Sequence[Batch], capacity: int
) -> Iterator[dict[str, nn.Parameter]]:
    tokens = sum(e["input_ids"].numel() for e in examples if "input_ids" in e)
    group: dict[str, nn.Parameter] = {}
    used = 0
    for name, p in parameters.items():
        rows = min(len(p), tokens or len(p)) if p.ndim == 2 else 1
        size = len(examples) * (rows * p.shape[1] if p.ndim == 2 else p.numel())
        if group and used + size > capacity:
            yield group
            group, used = {}, 0
        group[name] = p
        used += size
    yield group


Rows = list[tuple[Tensor, Tensor]]  # of each output: which rows of p, and the derivatives there


def _gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[Batch],
    read: Read,
) -> tuple[list[Tensor], dict[str, Rows]]:
    outputs: list[Tensor] = []
    rows: dict[str, Rows] = {name: [] for name in parameters}
    for example in examples:
        with differentiable_attention():
            found = read(model(**without_labels(example)), example)
        for index, output in enumerate(found):
            gradients = torch.autograd.grad(
                output,
                list(parameters.values()),
                retain_graph=index + 1 < len(found),
                allow_unused=True,
                materialize_grads=True,
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                matrix = gradient if gradient.ndim == 2 else gradient.reshape(1, -1)
                touched = (matrix != 0).any(1).nonzero()[:, 0]
                rows[name].append((touched, matrix[touched]))
        outputs.append(found.detach())
    return outputs, rows


def _gram(rows: Rows) -> Tensor:
    """Inner products of all pairs; rows of p that any of them touches are laid side by side."""
    touched = torch.cat([index for index, _ in rows]).unique()
    columns = rows[0][1].shape[1]
    dense = rows[0][1].new_zeros(len(rows), len(touched), columns)
    for row, (index, values) in zip(dense, rows, strict=True):
        row[torch.searchsorted(touched, index)] = values
    flat = dense.flatten(1)
    return (flat @ flat.mT).double()
