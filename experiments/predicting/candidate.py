"""One method in a situation: what it is before training, and short trainings of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from deltacontrol.deltas import HeadTuning, attach, registry
from deltacontrol.experiments.heads import head_controls
from deltacontrol.experiments.models import fit
from deltacontrol.experiments.predicting.linear_start import LinearStart, linear_start
from deltacontrol.experiments.predicting.situation import Situation
from deltacontrol.experiments.training import loop
from deltacontrol.experiments.training.evaluation import evaluate
from deltacontrol.experiments.training.execution import TrainingBatches, training_settings
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import Delta, DeltaModel


@dataclass(frozen=True)
class Trial:
    """A short training from the drawn head.

    Attributes:
        loss: on the validation rows; infinite after a divergence.
        seconds: of a step, the median.
        memory: bytes that the training added to the process at its peak.
        cost: in forward passes of one row, a backward pass counted as two.
    """

    loss: float
    seconds: float
    memory: int
    cost: float


@dataclass(frozen=True)
class Place:
    """Where a control acts.

    Attributes:
        count: of its entries.
        layer: the block; None outside of the blocks.
        in_head: whether it stands for a parameter of the head.
    """

    count: int
    layer: int | None
    in_head: bool


@dataclass(frozen=True, eq=False)
class Candidate:
    """Deltas that are trained together in a situation.

    Attributes:
        situation: shared by all candidates; one of them at a time acts on its model.
        text: a delta such as ``"lora:rank=8"``, or several with spaces between them.
        rate: of short trainings that are told no other; by default the recorded or default one.

    Raises:
        InputError: there is no such delta, or the text names none.
    """

    situation: Situation
    text: str
    rate: float | None = None

    def __post_init__(self) -> None:
        """Check the text."""
        if not self.deltas:
            raise InputError(f"{self.text!r} names no delta; expected one such as lora:rank=8")

    @cached_property
    def deltas(self) -> tuple[Delta, ...]:
        """Without the head that is added."""
        return tuple(registry.parse(word) for word in self.text.split())

    def training(self, rate: float | None = None) -> FineTuning:
        """The whole training, at a rate or the recorded or default one."""
        deltas = tuple(self.text.split())
        return replace(self.situation.training, deltas=deltas, learning_rate=rate)

    @cached_property
    def num_parameters(self) -> int:
        """Of the deltas, without the head's."""
        return sum(place.count for place in self.places.values() if not place.in_head)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each control acts, by its name."""
        with self.attached() as controlled:
            host, head = controlled.host, {*head_controls(controlled)}
            return {
                name: Place(p.numel(), host.sites.layer_of(host.state_path[name]), name in head)
                for name, p in controlled.trainable().items()
            }

    @cached_property
    def start(self) -> LinearStart:
        """Linearised; computed once."""
        situation = self.situation
        with self.attached() as controlled:
            if controlled.needs_data:
                controlled.prepare(lambda: self._losses(controlled))
            return linear_start(
                controlled.eval(),
                situation.batches,
                situation.labels,
                situation.contrasts,
                situation.draws[0],
                batch_size=situation.training.batch_size,
                seed=situation.training.seed,
            )

    def tried(self, steps: int, rate: float | None = None, *, evaluated: bool = True) -> Trial:
        """Train for some steps, with a schedule of so many, and look at the validation rows.

        Args:
            steps: of the training, on the rows of the situation.
            rate: by default that of the candidate.
            evaluated: without it the loss is not a number, and only time and memory are told.
        """
        chosen = self.rate if rate is None else rate
        situation, training = self.situation, replace(self.training(chosen), steps=steps)
        training = replace(training, compile="never", eval_every=None, patience=None)
        setting = situation.setting
        settings = training_settings(training, "classification", math.inf)
        data = TrainingBatches(setting.encoded, training.seed, training.batch_size)
        cost, loss = 3.0 * steps * training.batch_size, math.nan
        with situation.drawn_head() as base:
            with self.attached() as controlled:
                result = loop.train(controlled, data, settings, progress=False)
                if evaluated and result.status == "diverged":
                    loss = math.inf
                elif evaluated:
                    rows = setting.split("validation").eval_batches(64)
                    loss = evaluate(controlled, rows, "classification")["loss"]
                    cost += situation.num_heldout
            base.to("cpu")  # type: ignore[arg-type] - a GPU is for trainings
        measures = result.measures
        memory = measures["peak_memory_bytes"] - measures["baseline_memory_bytes"]
        loss = math.inf if evaluated and not math.isfinite(loss) else loss
        return Trial(loss, measures["seconds_per_step"], memory, cost)

    @contextmanager
    def attached(self) -> Iterator[DeltaModel]:
        """The model with these deltas at their start, and the head where they train none."""
        situation, made = self.situation, list(self.deltas)
        training = situation.training
        fit.require_positions(situation.base, training.model, training.max_length, made)
        if not any(delta.trains_head for delta in made):
            made.append(HeadTuning())
        controlled = attach(situation.base, *made, seed=training.seed)
        try:
            yield controlled.eval()
        finally:
            controlled.detach()

    def _losses(self, controlled: DeltaModel) -> Iterator[Tensor]:
        """What deltas look at that depend on data: as many rows as a training shows them."""
        alone = controlled.needs_examples
        size = 1 if alone else self.situation.training.batch_size
        shown = loop.PREPARATION_BATCHES * self.situation.training.batch_size
        for _, batch in self.situation.batches("train", size):
            if shown <= 0:
                return
            shown -= size
            yield controlled(**batch).loss
