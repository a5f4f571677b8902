"""Fine-tunings that differ in seed and learning rate alone, trained in one pass.

Each is what it is alone, up to rounding: its rows, its start, its checkpoint and its outcome are
its own, and one of them can go on alone, or with others, from where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from deltacontrol.deltas import DeltaModel, DeltaStack, registry
from deltacontrol.deltas.ensemble.stack import UnstackableError, tensors_of, unstackable
from deltacontrol.experiments.runs.experiment import Outcome, PausedError, Workspace
from deltacontrol.experiments.training import devices as resources
from deltacontrol.experiments.training.execution import (
    TrainingBatches,
    metrics_on,
    outcome_of,
    training_settings,
)
from deltacontrol.experiments.training.together.copies import obstacle
from deltacontrol.experiments.training.together.loop import Loop

if TYPE_CHECKING:
    from deltacontrol.experiments.setting import Setting

OWN = ("seed", "learning_rate")
MEMORY = 0.2  # share of what is free that the controls of a pass may take


def company(run: Any) -> dict[str, Any] | None:
    """What a `FineTuning` shares with others of its pass; None where it needs one of its own."""
    alone = run.solver() is not None or run.sequential or not run.pretrained
    alone = alone or any(registry.delta_of(delta).unstackable for delta in run.deltas)
    if (
        alone
        or obstacle(training_settings(run, "classification", 30.0))
        or run.weights != "float32"
        or run.shots is not None  # whose rows depend on the seed
        or run.template is not None  # whose words are read in a pass of its own
    ):
        return None
    return {name: value for name, value in run.to_config().items() if name not in OWN}


def fine_tune_together(
    runs: Sequence[Any], workspaces: Sequence[Workspace]
) -> list[Outcome | PausedError]:
    """Train and evaluate several fine-tunings of one `company`.

    Args:
        runs: each a `FineTuning`.
        workspaces: of each; one ``pause_after`` for all of them.

    Returns:
        Of each the outcome, or, behind ``pause_after``, where it stands still.

    Raises:
        UnstackableError: they cannot share a pass; do them one after another.
        InputError: as a single fine-tuning does.
    """
    settings = [run.setting() for run in runs]
    for other in settings[1:]:
        other.take_rows(settings[0])
    stack, device = _stacked(settings, runs), resources.choose_device(runs[0].device)
    stack = stack.to(device)
    task, pause = settings[0].data, workspaces[0].pause_after
    loop = Loop(
        stack,
        [
            TrainingBatches(s.encoded, r.seed, r.batch_size)
            for s, r in zip(settings, runs, strict=True)
        ],
        [
            training_settings(r, task.kind, w.checkpoint_seconds)
            for r, w in zip(runs, workspaces, strict=True)
        ],
        device,
        folders=[workspace.folder for workspace in workspaces],
        evaluate=partial(metrics_on, settings[0], "validation", runs[0].batch_size),
    )
    found = loop.train(None, workspaces[0].progress, until=pause)
    ends: list[Outcome | PausedError] = []
    for k, (run, setting, trained) in enumerate(zip(runs, settings, found.results, strict=True)):
        model = stack.copy(k)
        evaluated = partial(metrics_on, settings[0], batch_size=run.batch_size, module=model)
        once = resources.cast_once(stack.model, loop.precision)
        with resources.autocast(loop.precision, device), once:
            if pause is not None and pause < run.steps and trained.status != "diverged":
                ends.append(PausedError(evaluated("validation")))
                continue
            outcome = outcome_of(
                setting, trained, run.evaluate_on, model, lambda split, e=evaluated: e(split)
            )
        shared = {"copies_trained_together": len(runs), "copies_in_a_pass": found.group}
        ends.append(replace(outcome, result={**outcome.result, **shared}))
    return ends


def _stacked(settings: Sequence[Setting], runs: Sequence[Any]) -> DeltaStack:
    """The copies, each with the start of its seed, on the model of the first.

    Raises:
        UnstackableError: the deltas cannot be stacked, or the seeds draw more of the model than is
            trained.
    """
    first: DeltaModel | None = None
    base: Mapping[str, Tensor] = {}
    starts: dict[int, dict[str, Tensor]] = {}
    for setting, run in zip(settings, runs, strict=True):
        if run.seed in starts:
            continue
        drawn = {name: value.clone() for name, value in setting.base.state_dict().items()}
        controlled = setting.controlled
        reason = unstackable(controlled.host)
        if not reason and controlled.needs_data:
            reason = "a control asks for a look at the data"
        if not reason and first is not None:
            others = [n for n in drawn if not torch.equal(drawn[n], base[n])]
            if not set(others) <= set(controlled.host.replaced):
                reason = f"the seed draws weights that are not trained, such as {others[0]}"
        # Of each copy: its values, their gradient and two moments, in float32.
        needed = 16 * controlled.num_trainable * len(runs)
        if needed > MEMORY * psutil.virtual_memory().available:
            reason = f"the controls of {len(runs)} copies need {needed / 2**30:.1f} GiB"
        if reason:
            raise UnstackableError(reason)
        starts[run.seed] = {n: v.detach().clone() for n, v in tensors_of(controlled).items()}
        if first is None:
            first, base = controlled, drawn
        else:
            setting.forget_model()
    assert first is not None
    return DeltaStack(first, [run.seed for run in runs], [starts[run.seed] for run in runs])
