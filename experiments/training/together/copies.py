"""K copies of deltas on a model, trained together where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from deltacontrol.deltas import Delta, attach, attach_many
from deltacontrol.deltas.ensemble.stack import UnstackableError
from deltacontrol.experiments.training import devices as resources
from deltacontrol.experiments.training import loop as training
from deltacontrol.experiments.training.loop import Batches
from deltacontrol.experiments.training.results import TrainingResult
from deltacontrol.experiments.training.settings import Settings
from deltacontrol.experiments.training.together.loop import Loop, ManyResult
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = ("learning_rate", "seed")  # what may differ from copy to copy
ALONE = (
    *("optimiser", "grad_accumulation", "gradient_checkpointing", "cache_frozen", "dropout"),
    "patience",
)


def train_many(
    model: PreTrainedModel,
    deltas: Sequence[Delta],
    data: Sequence[Batches],
    settings: Sequence[Settings],
    *,
    group: int | None = None,
    progress: bool = True,
) -> ManyResult:
    """Train one copy of the deltas for each of ``settings``, and give the model back without them.

    Args:
        model: the base model.
        deltas: what each copy consists of.
        data: the batches of each copy, all with the same number of examples.
        settings: of each copy; they may differ in seed, which is also that of the initial values,
            and in learning rate.
        group: how many copies share a pass; None measures what is fastest.
        progress: whether to draw a progress bar.

    Raises:
        InputError: numbers that do not fit, settings that differ in more, or from attaching.
    """
    if len(data) != len(settings) or not settings:
        raise InputError(
            f"train_many got data for {len(data)} copies and settings for {len(settings)}; give "
            "one of each for every copy."
        )
    for field in fields(Settings):
        if field.name not in OWN and len({getattr(s, field.name) for s in settings}) > 1:
            raise InputError(
                f"copies that are trained together have one {field.name}; they may differ in "
                f"{' and '.join(OWN)}."
            )
    if group is not None and not 1 <= group <= len(settings):
        raise InputError(f"group is {group}; expected 1 to {len(settings)}, the number of copies.")
    reason = obstacle(settings[0])
    if not reason and settings[0].eval_every:
        reason = "eval_every is set"
    if not reason:
        device = resources.choose_device(settings[0].device)
        try:
            stack = attach_many(model.to(device), *deltas, seeds=[s.seed for s in settings])  # type: ignore[arg-type]
        except UnstackableError as error:
            reason = str(error)
        else:
            try:
                return Loop(stack, data, settings, device).train(group, progress)
            except UnstackableError as error:
                reason = str(error)
            finally:
                stack.detach()
    return ManyResult(_one_after_another(model, deltas, data, settings, progress), 1, reason)


def obstacle(settings: Settings) -> str:
    """The setting that asks for a training of its own; empty where there is none."""
    plain = Settings(steps=1, learning_rate=1.0)
    for name in ALONE:
        value = getattr(settings, name)
        if value is not False and value != getattr(plain, name):
            return f"{name} is set"
    return "compile is always" if settings.compile == "always" else ""


def _one_after_another(
    model: PreTrainedModel,
    deltas: Sequence[Delta],
    data: Sequence[Batches],
    settings: Sequence[Settings],
    progress: bool,
) -> tuple[TrainingResult, ...]:
    results = []
    for batches, own in zip(data, settings, strict=True):
        controlled = attach(model, *deltas, seed=own.seed)
        try:
            results.append(training.train(controlled, batches, own, progress=progress))
        finally:
            controlled.detach()
    return tuple(results)
