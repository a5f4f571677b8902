"""Perturbations of a classifier's input: adversarial ones of its embeddings, random ones of text.

The adversary adds δ to the state x that enters the first block, within a ball for each token,

    ‖δ_i‖₂ <= ε ‖x_i‖₂   for every token i of the text; padding stays,

and ascends the loss by projected gradient steps (Madry et al., ICLR 2018), normalised for each
token. A single step is the fast gradient method in the Euclidean norm (Goodfellow et al., ICLR
2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltacontrol.deltas.feedback.laws import Model, StateTaps, attach_feedback, attended, run
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.laws import FeedbackLaw


@contextmanager
def perturbed(model: Model, delta: Tensor) -> Iterator[None]:
    """Add ``delta`` to the state that enters the first block, before laws that come later."""
    taps = StateTaps(model)
    taps.put(lambda t, x: x + delta if t == 0 else x)
    try:
        yield
    finally:
        taps.remove()


@dataclass(frozen=True)
class EmbeddingAttack:
    """Projected gradient ascent of the loss on the embedded text.

    Attributes:
        epsilon: radius of a token's ball, relative to the token's own norm.
        steps: of ascent; each moves 2.5/steps of the radius, or all of it if there is one.

    Raises:
        InputError: a radius below zero, or no step.
    """

    epsilon: float
    steps: int = 5

    def __post_init__(self) -> None:
        """Check radius and steps."""
        if not self.epsilon >= 0 or self.steps < 1:
            raise InputError(
                f"epsilon is {self.epsilon} and steps is {self.steps}; expected a radius that is "
                "not negative and at least one step."
            )

    def perturbation(
        self, model: Model, batch: Mapping[str, Any], law: FeedbackLaw | None = None
    ) -> Tensor:
        """δ for a batch with labels, (batch, tokens, width).

        Args:
            model: the classifier, in evaluation mode.
            batch: its arguments and the labels.
            law: a law that the adversary knows and goes through (an adaptive attack).
        """
        taps = StateTaps(model)
        present: dict[str, Tensor] = {}

        def add(t: int, x: Tensor) -> Tensor:
            if t:
                return x
            if "delta" not in present:
                present.update(delta=torch.zeros_like(x), state=x.detach())
            present["leaf"] = present["delta"].detach().requires_grad_()
            return x + present["leaf"]

        taps.put(add)
        try:
            with nullcontext() if law is None else attach_feedback(model, law):
                for _ in range(self.steps):
                    with torch.enable_grad():
                        logits = run(model, batch).logits
                        loss = cross_entropy(logits, batch["labels"], reduction="sum")
                        (gradient,) = torch.autograd.grad(loss, present["leaf"])
                    radius = self.epsilon * present["state"].norm(dim=-1, keepdim=True)
                    text = attended(batch, gradient).unsqueeze(-1)
                    present["delta"] = self._ascended(present["delta"], gradient, radius) * text
        finally:
            taps.remove()
        return present["delta"]

    def _ascended(self, delta: Tensor, gradient: Tensor, radius: Tensor) -> Tensor:
        """One normalised step, and back into the ball."""
        step = radius * (1.0 if self.steps == 1 else 2.5 / self.steps)
        tiny = torch.finfo(delta.dtype).tiny
        unit = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(tiny)
        moved = delta + step * unit
        return moved * (radius / moved.norm(dim=-1, keepdim=True).clamp_min(tiny)).clamp_max(1.0)


def corrupted(text: str, rate: float, generator: np.random.Generator) -> str:
    """The text with random typing errors.

    Each word is hit with probability ``rate``. Half of the time two neighbouring letters inside of
    it change places, otherwise (and always if it is too short for that) it is left out. A text that
    would be empty stays as it is.
    """
    words = []
    for word in text.split():
        if generator.random() >= rate:
            words.append(word)
        elif generator.random() < 0.5 and len(word) > 3:
            i = int(generator.integers(1, len(word) - 2))
            words.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    return " ".join(words) if words else text
