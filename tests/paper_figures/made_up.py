"""What synthetic records are made of."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace

STAGES = ["input", *(f"block.{i}" for i in range(6)), "readout"]


@dataclass(frozen=True)
class Synthetic(Experiment):
    """An experiment whose record is made up."""

    kind: ClassVar[str] = "synthetic"
    config: dict[str, Any] = field(default_factory=dict)

    def to_config(self) -> dict[str, Any]:
        return self.config

    def execute(self, workspace: Workspace) -> Outcome:
        raise AssertionError("the figures must not run this")


Grid = list[tuple[Synthetic, dict[str, Any], pd.DataFrame]]

#            accuracy, trainable share
METHODS = {
    "full": (0.83, 1.0),
    "lora": (0.82, 0.0065),
    "houlsby": (0.815, 0.013),
    "bitfit": (0.80, 0.0022),
    "prefix": (0.78, 0.0041),
    "prompt": (0.72, 0.0003),
    "head": (0.70, 0.00003),
}
