"""LoRA at every site of a model, seen one site at a time: its Gramian, and its tuning.

LoRA starts at B = 0, so that no path acts, whatever A is: attaching it at all sites and moving one
of them is the same as attaching it there alone. In the linearised model B alone acts, through the
drawn A; its Gramian depends on that draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.experiments.measures.margins import MarginData, logistic_loss
from deltacontrol.experiments.tasks.encoding import EncodedSplit
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import Linearisation, differentiable_attention
from deltacontrol.theory.linear.output_map import OutputMap
from deltacontrol.theory.linear.reachability import Reachability
from deltacontrol.theory.solvers.lbfgs import differentiated, minimise_lbfgs

Where = tuple[int, str]


def attach_everywhere(data: MarginData, sites: Sequence[str], rank: int, seed: int) -> DeltaModel:
    """LoRA at all sites of all layers; α = 2 rank."""
    return attach(data.model, LoRA(rank=rank, alpha=2.0 * rank, sites=tuple(sites)), seed=seed)


def site_parts(
    controlled: DeltaModel, dynamics: TransformerDynamics, sites: Sequence[str]
) -> dict[Where, tuple[int, slice]]:
    """The stage and the entries of its flat control that belong to each (layer, site).

    Raises:
        InputError: the controls of a site do not lie side by side.
    """
    host = controlled.host
    of_path: dict[str, Where] = {}
    for site in sites:
        for found in host.sites.resolve((site,)):
            if found.layer is None or found.part is not None or found.path in of_path:
                raise InputError(f"{found.path} is not a site of its own within one layer")
            of_path[found.path] = (found.layer, site)
    sizes = {name: p.numel() for name, p in controlled.trainable().items()}
    parts: dict[Where, tuple[int, slice]] = {}
    for t in range(dynamics.horizon):
        start = 0
        for name in dynamics.control_names(t):
            stop = start + sizes[name]
            where = of_path[host.state_path[name]]
            if where in parts and parts[where][1].stop != start:
                raise InputError(f"the controls at {where} do not lie side by side")
            begin = parts[where][1].start if where in parts else start
            parts[where] = (t, slice(begin, stop))
            start = stop
    return dict(sorted(parts.items(), key=lambda item: (item[0][0], sites.index(item[0][1]))))


@dataclass(frozen=True, eq=False)
class MarginMap:
    """The linearised margins of an ensemble under LoRA everywhere.

    Attributes:
        outputs: one row per example; the control is shared.
        margins: the margins themselves, (n,).
        parts: stage and entries of each (layer, site).
    """

    outputs: OutputMap
    margins: Tensor
    parts: dict[Where, tuple[int, slice]]


def margin_map(data: MarginData, sites: Sequence[str], rank: int, seed: int) -> MarginMap:
    """Linearise example by example: a row then costs a pull through its example alone."""
    controlled = attach_everywhere(data, sites, rank, seed)
    try:
        maps, margins, parts = [], [], {}
        for batch in data.singles(data.examples):
            dynamics = TransformerDynamics(controlled, batch)
            parts = parts or site_parts(controlled, dynamics, sites)
            controls = dynamics.controls()
            states = _states(dynamics, dynamics.x0, controls)
            reach = Reachability(Linearisation(dynamics, states, controls))
            K = data.functional(states[-1], batch["attention_mask"])
            maps.append(reach.output_map(K[None]))
            margins.append(data.margins(states[-1], batch["attention_mask"]))
        return MarginMap(_double(OutputMap.stack(maps)), torch.cat(margins).double(), parts)
    finally:
        controlled.detach()


def _double(outputs: OutputMap) -> OutputMap:
    """The rows of a float32 model in float64: what is computed from them loses nothing more."""
    blocks, access = (tuple(x.double() for x in xs) for xs in (outputs.blocks, outputs.access))
    return OutputMap(blocks, access, outputs.control_shapes)


@dataclass(frozen=True)
class Tuned:
    """What tuning one site gained.

    Attributes:
        loss_drop: fall of the training loss.
        objective_drop: fall of the training loss plus weight_decay/2 ‖du‖².
        energy: 1/2 ‖du‖².
        test_loss_drop: fall of the loss on unseen examples; NaN where there are none.
        test_accuracy_gain: rise of the accuracy on unseen examples; NaN where there are none.
        evaluations: of loss and gradient.
    """

    loss_drop: float
    objective_drop: float
    energy: float
    test_loss_drop: float
    test_accuracy_gain: float
    evaluations: int


class SiteTuner:
    """Tune the sites of a model one at a time, from one start.

    A stage's states are kept up to the site, so that a step costs the layers above it alone.

    Args:
        data: the model and the examples.
        sites: where LoRA is attached.
        rank: its rank.
        seed: of its A.
        weight_decay: λ of the objective loss + λ/2 ‖du‖², du the change of A and B from the start.
    """

    def __init__(
        self, data: MarginData, sites: Sequence[str], rank: int, seed: int, weight_decay: float
    ) -> None:
        self.data, self.weight_decay = data, weight_decay
        self.controlled = attach_everywhere(data, sites, rank, seed)
        self._train = _Examples(self.controlled, data, data.examples, data.signs)
        self._test = (
            _Examples(self.controlled, data, data.test, data.test_signs) if len(data.test) else None
        )
        self.parts = site_parts(self.controlled, self._train.dynamics, sites)

    def tune(self, where: Where, steps: int) -> Tuned:
        """At most ``steps`` iterations of L-BFGS on the controls of one site."""
        t, entries = self.parts[where]
        start = self._train.controls[t][entries]
        loss_at_start = self._train.loss

        def objective(change: Tensor) -> Tensor:
            margins = self._train.margins_at(t, entries, start + change)
            loss = logistic_loss(margins, self.data.signs)
            return loss + 0.5 * self.weight_decay * change.square().sum()

        found = minimise_lbfgs(
            differentiated(objective), torch.zeros_like(start), memory=20, max_iterations=steps
        )
        change = found.x
        energy = 0.5 * float(change.double().square().sum())
        with torch.no_grad():
            loss = self._train.loss_at(t, entries, start + change)[0]
        test_loss, test_accuracy = float("nan"), float("nan")
        if self._test is not None:
            with torch.no_grad():
                after = self._test.loss_at(t, entries, start + change)
            test_loss = self._test.loss - after[0]
            test_accuracy = after[1] - self._test.accuracy
        drop = loss_at_start - loss
        objective_drop = drop - self.weight_decay * energy
        return Tuned(drop, objective_drop, energy, test_loss, test_accuracy, found.evaluations)

    def start(self) -> Mapping[str, float]:
        """Loss and accuracy before tuning."""
        found = {"loss": self._train.loss, "accuracy": self._train.accuracy}
        if self._test is not None:
            found |= {"test_loss": self._test.loss, "test_accuracy": self._test.accuracy}
        return found


class _Examples:
    """One batch, and its states under the untouched controls."""

    def __init__(
        self, controlled: DeltaModel, data: MarginData, rows: EncodedSplit, signs: Tensor
    ) -> None:
        batch = data.batch(rows)
        self.data, self.signs, self.mask = data, signs, batch["attention_mask"]
        self.dynamics = TransformerDynamics(controlled, batch)
        self.controls = self.dynamics.controls()
        self.states = _states(self.dynamics, self.dynamics.x0, self.controls)
        self.loss, self.accuracy = self._measured(data.margins(self.states[-1], self.mask))

    def margins_at(self, t: int, entries: slice, value: Tensor) -> Tensor:
        """The margins with some entries of u_t changed."""
        u = self.controls[t]
        changed = torch.cat([u[: entries.start], value, u[entries.stop :]])
        x = self.dynamics.step(t, self.states[t], changed)
        for s in range(t + 1, self.dynamics.horizon):
            x = self.dynamics.step(s, x, self.controls[s])
        return self.data.margins(x, self.mask)

    def loss_at(self, t: int, entries: slice, value: Tensor) -> tuple[float, float]:
        """Loss and accuracy there."""
        return self._measured(self.margins_at(t, entries, value))

    def _measured(self, margins: Tensor) -> tuple[float, float]:
        right = (margins * self.signs.to(margins) > 0).double().mean()
        return float(logistic_loss(margins.double(), self.signs)), float(right)


def _states(dynamics: TransformerDynamics, x: Tensor, u: Sequence[Tensor]) -> list[Tensor]:
    states = [x]
    with torch.no_grad(), differentiable_attention():
        for t, control in enumerate(u):
            states.append(dynamics.step(t, states[-1], control))
    return states
