"""The last layers of a language model, tuned by themselves on states computed once.

With the states that enter layer L - k of all texts known, only the last k layers are run: by
functional calls, with any matrices in the place of theirs.

The spectrum of a tuned matrix W is compared with that of the pre-trained W₀: a leading left
singular vector u of W is an *intruder* where max_i |⟨u, u_i(W₀)⟩| is below a cosine.

Source: Shuttleworth, Andreas, Torralba & Sharma, NeurIPS 2025, arXiv 2410.21228, algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Weights = Mapping[str, Tensor]  # matrices by name


@dataclass(frozen=True, eq=False)
class TopLayers:
    """The last layers of a decoder with rotary positions, such as Llama, and its readout.

    Attributes:
        model: the whole language model.
        layers: its last layers, from states (rows, tokens, width) to final states.
        weights: the matrices that may be replaced, by name.
    """

    model: Any
    layers: Any
    weights: Weights

    @classmethod
    def of(cls, model: Any, count: int, sites: Sequence[str]) -> TopLayers:
        """The last ``count`` layers, copied, with matrices named as in the model's layers."""
        layers = copy.copy(model.model.eval())
        layers._modules = dict(model.model._modules)
        layers.layers = copy.deepcopy(model.model.layers[-count:])
        for number, layer in enumerate(layers.layers):
            layer.self_attn.layer_idx = number
        layers.config = copy.deepcopy(model.config)
        layers.config.num_hidden_layers, layers.config.use_cache = count, False
        layers.requires_grad_(False)
        names = [f"layers.{i}.{site}.weight" for i in range(count) for site in sites]
        return cls(model, layers, {name: layers.get_parameter(name) for name in names})

    @property
    def readout(self) -> Tensor:
        """A row of each word, (words, width)."""
        return self.model.get_output_embeddings().weight.detach()

    def entered(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the states that enter these layers."""
        rows = []
        with torch.no_grad():
            for start in range(0, len(batch["input_ids"]), 32):
                found = self.model.model(
                    input_ids=batch["input_ids"][start : start + 32],
                    attention_mask=batch["attention_mask"][start : start + 32],
                    output_hidden_states=True,
                    use_cache=False,
                )
                rows.append(found.hidden_states[-len(self.layers.layers) - 1])
        return {**batch, "states": torch.cat(rows)}

    def states(self, batch: Mapping[str, Tensor], weights: Weights) -> Tensor:
        """The final states of an entered batch, with these matrices."""
        inputs = {"inputs_embeds": batch["states"], "attention_mask": batch["attention_mask"]}
        return torch.func.functional_call(self.layers, dict(weights), (), inputs).last_hidden_state

    def margins(
        self, batch: Mapping[str, Tensor], weights: Weights, words: tuple[int, int]
    ) -> Tensor:
        """logit(second word) - logit(first word) at the last token, (rows,)."""
        states = self.states(batch, weights)
        last = states[torch.arange(len(states)), batch["attention_mask"].sum(1) - 1]
        return last @ (self.readout[words[1]] - self.readout[words[0]])

    def text_loss(self, batch: Mapping[str, Tensor], weights: Weights) -> float:
        """The mean loss of the next token, in nats, without a gradient."""
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(batch["states"]), 16):
                part = {k: v[start : start + 16] for k, v in batch.items()}
                asked = part["attention_mask"][:, 1:].bool()
                logits = self.states(part, weights)[:, :-1][asked] @ self.readout.mT
                losses = cross_entropy(logits, part["input_ids"][:, 1:][asked], reduction="sum")
                total, count = total + float(losses), count + int(asked.sum())
        return total / count


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading singular vectors of a tuned matrix.

    Attributes:
        left: (outputs, k), a vector a column.
        values: (k,), the largest first.
        right: (k, inputs).
        intruders: which of them no vector of the pre-trained matrix is like, (k,) of booleans.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    intruders: Tensor

    @classmethod
    def of(cls, tuned: Tensor, before: Tensor, count: int, cosine: float) -> Leading:
        """The ``count`` leading ones; ``before`` has the singular vectors of the other matrix."""
        U, S, Vh = torch.linalg.svd(tuned.double(), full_matrices=False)
        U, S, Vh = U[:, :count], S[:count], Vh[:count]
        return cls(U, S, Vh, (before.mT @ U).abs().amax(0) < cosine)

    def first(self, count: int, *, intruders: bool) -> Tensor:
        """The first so many of the intruders, or of the others, (k,) of booleans."""
        kind = self.intruders if intruders else ~self.intruders
        return kind & (kind.cumsum(0) <= count)

    def scaled(self, tuned: Tensor, which: Tensor, factor: float) -> Tensor:
        """The tuned matrix with the chosen singular values times a factor."""
        less = (factor - 1) * self.values * which
        return tuned + ((self.left * less) @ self.right).to(tuned)
