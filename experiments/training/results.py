"""What a training gives: its curve, its measures, and what is said of a divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deltacontrol.experiments.training import checkpoints
from deltacontrol.experiments.training import devices as resources

if TYPE_CHECKING:
    import pandas as pd

FINAL_STEPS = 10


@dataclass(frozen=True)
class TrainingResult:
    """What a training gave.

    Attributes:
        status: "completed", "early_stopped" or "diverged".
        message: What happened, where it is not "completed".
        curve: One row per step: step (1-based), loss before the update, learning_rate, grad_norm,
            tokens, seconds, and, where an evaluation followed the update, validation_<metric>.
        controls: The trained controls; those of the best evaluation where `patience` was set.
        best: {"step", "value"} of the monitored metric, or None.
        measures: final_train_loss (mean of the last 10 steps), seconds_per_step (median; the first
            5 steps of each attempt left out), seconds_per_step_iqr, tokens_per_second,
            peak_memory_bytes, baseline_memory_bytes, memory_method, precision, device; kept_blocks,
            the number of blocks whose states were kept, where they were; compiled, where the pass
            was.
        earlier_seconds: Time spent by interrupted attempts.
    """

    status: str
    message: str
    curve: pd.DataFrame
    controls: dict[str, Tensor]
    best: dict[str, float] | None
    measures: dict[str, Any] = field(default_factory=dict)
    earlier_seconds: float = 0.0


def divergence(step: int, loss: float, norm: float, rate: float) -> str:
    """What happened at update ``step``, and what to try."""
    what = f"the loss was {loss}" if not math.isfinite(loss) else f"the gradient norm was {norm}"
    return (
        f"diverged at step {step}: {what} (loss {loss:.4g}, learning rate {rate:.3g}); "
        "try a lower learning rate, a longer warm-up, a smaller max_grad_norm or precision fp32"
    )


def curve(run: checkpoints.Progress) -> pd.DataFrame:
    """`TrainingResult.curve` of a training."""
    import pandas as pd

    return pd.DataFrame(run.rows).drop(columns="timed", errors="ignore")


def summary(
    run: checkpoints.Progress, memory: resources.PeakMemory, precision: str, device: str
) -> dict[str, Any]:
    """`TrainingResult.measures` of a training."""
    import numpy as np

    timed = [row for row in run.rows if row["timed"]] or run.rows
    seconds = np.array([row["seconds"] for row in timed])
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {
        "final_train_loss": float(np.mean([row["loss"] for row in run.rows[-FINAL_STEPS:]])),
        "seconds_per_step": float(median),
        "seconds_per_step_iqr": float(high - low),
        "tokens_per_second": float(sum(row["tokens"] for row in timed) / seconds.sum()),
        "peak_memory_bytes": max(run.peak_memory, memory.peak()),
        "baseline_memory_bytes": memory.baseline,
        "memory_method": memory.method,
        "precision": precision,
        "device": device,
    }
