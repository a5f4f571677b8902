"""Some updates of seven methods, over batch sizes, lengths and models, all else the same.

The texts are long articles, so that every one of them fills the length. A run of a sweep has a
process of its own where no other run differs from it in the seed alone (two such may share a pass):
hence one run a setting. Memory is what the process takes at most beyond what it had before the
training.

Source: Ding et al., Nature Machine Intelligence 5, 2023, section "Efficiency".
"""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.training.finetune import FineTuning

DELTAS = ("full", "lora", "houlsby", "prefix", "prompt", "bitfit", "ia3")
TASK = "bbc"
MODEL, BATCH, LENGTH = "minilm-l6", 8, 64  # where the others vary
BATCHES = (1, 4, 8, 32)
LENGTHS = (16, 32, 64, 128)
MODELS = ("minilm-l3", "minilm-l6", "mpnet-base")
STEPS = 20


def points(preset: str) -> list[tuple[str, int, int]]:
    """Model, batch size and length of every setting, each once."""
    if preset == "quick":
        return [("minilm-l3", batch, 16) for batch in (1, 8)]
    found = [(MODEL, batch, LENGTH) for batch in BATCHES]
    found += [(MODEL, BATCH, length) for length in LENGTHS]
    found += [(model, BATCH, LENGTH) for model in MODELS]
    return list(dict.fromkeys(found))


def experiments(preset: str) -> list[FineTuning]:
    """Settings × methods."""
    quick = preset == "quick"
    given: dict[str, Any] = {"steps": 8 if quick else STEPS, "eval_limit": 8, "precision": "fp32"}
    deltas = ("full", "lora", "bitfit") if quick else DELTAS
    return [
        FineTuning(
            model=model, task=TASK, deltas=(delta,), batch_size=batch,
            max_length=length, cache_frozen=False, **given,
        )
        for model, batch, length in points(preset)
        for delta in deltas
    ]  # fmt: skip
