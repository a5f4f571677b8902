"""LoRA in networks of growing width: which step sizes of A and B fit a target best.

    f(x) = w_out' φ((W + B A) h),   h = φ(W_in x),   φ = ReLU,  W, W_in, w_out frozen,  rank r

W_in, W and w_out are Gaussian with variance 1/fan-in, as at initialisation or after a training in
the standard parametrisation; A starts Gaussian with variance 1/m for the m entries of h, B at zero.
The target is a network with another product B* A* of rank r and an effect that does not depend on
the width n.
Adam trains A and B with rates η_A and η_B, all pairs of a grid and all seeds at once.

Source of the setting: Hayou, Ghosh & Yu, *LoRA+*, ICML 2024, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WidthStudy:
    """Losses after training, over a grid of step sizes.

    Attributes:
        inputs: size of x.
        rank: r.
        examples: training examples.
        steps: of Adam.
        rates_a: η_A, as powers of two.
        rates_b: η_B, as powers of two.
        features: entries of h, on which A acts, over the width n.
        fixed: entries of h at every width; 0 where they grow with it.
    """

    inputs: int = 16
    rank: int = 4
    examples: int = 64
    steps: int = 60
    rates_a: tuple[int, ...] = tuple(range(-15, -3))
    rates_b: tuple[int, ...] = tuple(range(-8, 2))
    features: float = 1.0
    fixed: int = 0

    def losses(self, width: int, seed: int) -> Tensor:
        """Final training loss over initial loss, (η_A, η_B); infinite where it diverged."""
        generator = torch.Generator().manual_seed(1000 * seed + width)

        def normal(*shape: int, fan_in: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(fan_in)

        n, r = width, self.rank
        m = self.fixed or round(self.features * width)
        x = torch.randn(self.examples, self.inputs, generator=generator)
        h = torch.relu(x @ normal(m, self.inputs, fan_in=self.inputs).T * math.sqrt(2))
        before = h @ normal(n, m, fan_in=m).T * math.sqrt(2)
        out = normal(n, fan_in=n)
        away = h @ normal(r, m, fan_in=m).T @ normal(n, r, fan_in=r).T
        y = torch.relu(before + away) @ out
        start = normal(r, m, fan_in=m)
        eta = torch.cartesian_prod(
            2.0 ** torch.tensor(self.rates_a), 2.0 ** torch.tensor(self.rates_b)
        )
        A = start.expand(len(eta), r, m).clone().requires_grad_()
        B = torch.zeros(len(eta), n, r).requires_grad_()
        optimisers = _Adam(A, eta[:, 0]), _Adam(B, eta[:, 1])
        first = float((torch.relu(before) @ out - y).square().mean())
        for _ in range(self.steps):
            path = (h @ A.mT) @ B.mT
            error = torch.relu(before + path) @ out - y
            loss = error.square().mean(-1).sum()
            gradients = torch.autograd.grad(loss, (A, B))
            for optimiser, gradient in zip(optimisers, gradients, strict=True):
                optimiser.step(gradient)
        with torch.no_grad():
            path = (h @ A.mT) @ B.mT
            final = (torch.relu(before + path) @ out - y).square().mean(-1) / first
        final = torch.where(final.isfinite(), final, torch.inf)
        return final.reshape(len(self.rates_a), len(self.rates_b))

    def best_ratio(self, losses: Tensor) -> float:
        """log2 of the η_B/η_A of least loss, whatever their product; between grid points too.

        For every ratio the least loss along its diagonal of the grid; the minimum over the ratios
        by the parabola through the best and its neighbours, in log loss.
        """
        a, b = torch.tensor(self.rates_a), torch.tensor(self.rates_b)
        ratio = b[None] - a[:, None]
        ratios = ratio.unique()
        least = torch.stack([losses[ratio == value].min() for value in ratios]).log()
        i = int(least.argmin())
        if i in (0, len(ratios) - 1) or not least[i - 1 : i + 2].isfinite().all():
            return float(ratios[i])
        low, mid, high = (float(value) for value in least[i - 1 : i + 2])
        curvature = low - 2 * mid + high
        return float(ratios[i]) + (0.5 * (low - high) / curvature if curvature > 0 else 0.0)


class _Adam:
    """Adam with one rate for each row."""

    def __init__(self, value: Tensor, rates: Tensor) -> None:
        self.value, self.rates, self.count = value, rates.view(-1, 1, 1), 0
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        self.count += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.001)
        mean = self.mean / (1 - 0.9**self.count)
        root = (self.square / (1 - 0.999**self.count)).sqrt_().add_(1e-12)
        self.value.sub_(self.rates * mean / root)
