"""Several trainings over one frozen backbone in one pass.

loop    the steps of K copies
copies  K copies of deltas on a model, as a call
runs    fine-tunings of a sweep that differ in seed and learning rate alone
"""

from __future__ import annotations

from deltacontrol.experiments.training.together.copies import train_many
from deltacontrol.experiments.training.together.loop import ManyResult

__all__ = ["ManyResult", "train_many"]
