"""What each layer and site could gain, by Gramians, and what tuning it alone does gain."""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.studies.reachability.measurement import SiteGramians, SiteTuning

SEEDS = (0, 1, 2)


def experiments(preset: str) -> list[SiteGramians | SiteTuning]:
    """Gramians of three models, and the tuning of every site of the first."""
    if preset == "quick":
        small: dict[str, Any] = {
            "sites": ("attention.query", "attention.value", "mlp.up"),
            "num_examples": 12,
            "head_rows": 128,
        }
        return [SiteGramians(**small), SiteTuning(**small, steps=5, test_rows=64)]
    return [*predictions(), *measurements(), *predictions(pretrained=False), *language_model()]


def predictions(*, pretrained: bool = True) -> list[SiteGramians]:
    """Gramians of MiniLM's margins, or of the same architecture with random weights."""
    return [SiteGramians(pretrained=pretrained, seed=seed) for seed in SEEDS]


def measurements() -> list[SiteTuning]:
    """Tuning of each of MiniLM's sites alone, on the same examples."""
    return [SiteTuning(seed=seed) for seed in SEEDS]


def language_model() -> list[SiteGramians]:
    """Gramians of SmolLM2: the margin of two words after a prompt, without a fitted head."""
    return [
        SiteGramians(
            model="smollm2-135m", head="causal-lm", num_examples=16, dtype="float32", seed=seed
        )
        for seed in SEEDS
    ]
