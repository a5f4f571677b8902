"""Sequential combination: deltas trained one after another, the earlier ones frozen but acting.

Stage k trains the k-th delta, and the head where it is a delta of its own, for as many updates as
the settings say; deltas of later stages act at their start. The stages of a run are the nesting
θ_k = argmin over u_k of J(u_1*, …, u_{k-1}*, u_k, start of the rest).

Source: Ding et al., Nature Machine Intelligence 2023, section "Combinations of delta-tuning
methods", sequential combination.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from deltacontrol.experiments.training import loop as training
from deltacontrol.experiments.training.results import TrainingResult
from deltacontrol.experiments.training.settings import Settings

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel


def stages(delta_model: DeltaModel) -> list[tuple[str, list[str]]]:
    """For each stage the delta's namespace, and all that is trained."""
    from deltacontrol.deltas import HeadTuning

    attachments = delta_model.attachments
    heads = [a.namespace for a in attachments if isinstance(a.delta, HeadTuning)]
    others = [a.namespace for a in attachments if a.namespace not in heads]
    return [(namespace, [namespace, *heads]) for namespace in others or heads[:1]]


def train_in_turn(
    delta_model: DeltaModel,
    data: training.Batches,
    settings: Settings,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
    tell: Callable[..., None] | None = None,
) -> TrainingResult:
    """`training.train` for each stage; a finished stage of an interrupted run is not repeated.

    The curve of the result has a column "stage", the delta's namespace, and goes on counting steps.
    ``tell(row, before=n)`` is called as in `training.train`, with n the steps of earlier stages.
    """
    import pandas as pd

    curves: list[Any] = []
    earlier, steps = 0.0, 0
    result = None
    for number, (namespace, trained) in enumerate(stages(delta_model), start=1):
        delta_model.train_only(trained)
        result = training.train(
            delta_model,
            data,
            settings,
            evaluate=evaluate,
            checkpoint_dir=checkpoint_dir / f"stage-{number}" if checkpoint_dir else None,
            progress=progress,
            keep_checkpoint=True,
            tell=None if tell is None else partial(tell, before=steps),
        )
        curve = result.curve.assign(stage=namespace, step=result.curve["step"] + steps)
        curves.append(curve)
        earlier, steps = earlier + result.earlier_seconds, int(curve["step"].iloc[-1])
        if result.status == "diverged":
            break
    delta_model.train_only(None)
    assert result is not None
    return replace(result, curve=pd.concat(curves, ignore_index=True), earlier_seconds=earlier)
