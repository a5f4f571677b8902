"""Attacks stay in their ball and hurt; the robustness run is made of the parts that it names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from deltacontrol.deltas.feedback.laws import attach_feedback, run
from deltacontrol.experiments.measures.attacks import EmbeddingAttack, corrupted, perturbed
from deltacontrol.experiments.measures.robustness import (
    Correction,
    Robustness,
    candidates,
    recovered,
)
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run as run_experiment
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
from deltacontrol.theory.feedback.correction import ProjectionCorrection
from tests.deltas import zoo


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(cross_entropy(run(model, batch).logits, batch["labels"]))


@pytest.fixture
def classifier() -> tuple:
    model = zoo.build("bert")
    batch = zoo.batch_of(model) | {"labels": torch.tensor([0, 1, 1])}
    return model, batch


def states(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = []
    block = model.get_submodule("bert.encoder.layer.0")
    handle = block.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    loss(model, batch)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("steps", [1, 4])
def test_the_attack_stays_in_its_ball_and_raises_the_loss(classifier: tuple, steps: int) -> None:
    model, batch = classifier
    before = zoo.snapshot(model)
    x, epsilon = states(model, batch), 0.1
    delta = EmbeddingAttack(epsilon, steps).perturbation(model, batch)
    zoo.assert_same(before, zoo.snapshot(model))
    ratio = delta.norm(dim=-1) / x.norm(dim=-1)
    text = batch["attention_mask"].bool()
    assert not delta[~text].any()
    assert bool((ratio[text] <= epsilon * (1 + 1e-12)).all())
    assert float(ratio[text].min()) > 0.9 * epsilon  # it uses its radius
    plain = loss(model, batch)
    with perturbed(model, delta):
        attacked = loss(model, batch)
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)).double()
    noise = noise * (delta.norm(dim=-1) / noise.norm(dim=-1)).unsqueeze(-1)
    with perturbed(model, noise):
        random = loss(model, batch)
    assert attacked - plain > 3 * abs(random - plain)
    zoo.assert_same(before, zoo.snapshot(model))


def test_an_adversary_who_knows_the_law_hurts_more(classifier: tuple) -> None:
    model, batch = classifier
    frame = torch.linalg.qr(torch.randn(zoo.d, zoo.d).double())[0]
    subspace = AffineSubspace(torch.zeros(zoo.d).double(), frame[:, :8])
    law = ProjectionCorrection([subspace] * (zoo.L + 1), 1.0)
    attack = EmbeddingAttack(0.2, 8)
    found = []
    for delta in (attack.perturbation(model, batch), attack.perturbation(model, batch, law)):
        with perturbed(model, delta), attach_feedback(model, law):
            found.append(loss(model, batch))
    assert found[1] > found[0] + 1e-3
    # The law sees the perturbed state: what it projects away cannot matter.
    outside = subspace.error(torch.randn_like(delta))
    with attach_feedback(model, law):
        expected = run(model, batch).logits
        with perturbed(model, outside):  # put in after the law: passes by it
            past = run(model, batch).logits
    with perturbed(model, outside), attach_feedback(model, law):
        removed = run(model, batch).logits
    torch.testing.assert_close(removed, expected, rtol=0, atol=1e-12)
    assert float((past - expected).detach().abs().max()) > 1e-3


def test_typing_errors_are_seeded_and_of_the_rate() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    assert corrupted(text, 0.0, np.random.default_rng(0)) == text
    first, again = (corrupted(text, 0.5, np.random.default_rng(3)) for _ in range(2))
    assert first == again != text
    for word in corrupted("abcdef " * 400, 1.0, np.random.default_rng(0)).split():
        assert sorted(word) == list("abcdef") and word != "abcdef"
        assert (word[0], word[-1]) == ("a", "f")
    left = len(corrupted("abcdef " * 4000, 1.0, np.random.default_rng(0)).split())
    assert abs(left / 4000 - 0.5) < 0.03
    assert corrupted("a b", 1.0, np.random.default_rng(0)) == "a b"


def test_the_share_that_is_recovered() -> None:
    accuracy = {"clean": 0.8, "attacked": 0.4, "corrected": 0.5, "untouched": 0.8}
    assert recovered(accuracy, "corrected") == pytest.approx(0.25)
    assert math.isnan(recovered(accuracy, "corrected", "untouched"))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="epsilon is -1"):
        EmbeddingAttack(-1.0)
    with pytest.raises(InputError, match="steps is 0"):
        EmbeddingAttack(0.1, 0)
    with pytest.raises(InputError, match="at least 2 examples"):
        Robustness(num_test=1)
    with pytest.raises(InputError, match="0 ranks"):
        Robustness(ranks=())
    assert Robustness(**Robustness().to_config()).to_config() == Robustness().to_config()


def test_candidates_are_all_combinations() -> None:
    found = candidates((2, 3), (0.5, 1.0))
    assert len(found) == len(set(found)) == 6
    assert sum(c.integral > 0 for c in found) == 2


@pytest.mark.slow
def test_a_small_run_end_to_end(minilm_l6: str, tmp_path: Path) -> None:
    experiment = Robustness(
        model=minilm_l6, steps=2, max_length=16, attack_steps=1, ranks=(64, 384), gains=(1.0,),
        num_calibration=8, num_validation=6, num_test=6,
    )  # fmt: skip
    record = run_experiment(experiment, RunStore(tmp_path), progress=False)
    assert record is not None
    accuracy, curve = record.result["accuracy"], record.curve()
    assert len(curve) == 6
    for name, value in accuracy.items():
        assert curve[name].mean() == pytest.approx(value)
    assert len(record.result["search"]) == 4
    whole = next(
        s for s in record.result["search"] if (s["rank"], s["integral"]) == (384, 0)
    )  # fmt: skip
    assert whole["clean_loss"] == 0  # the whole space corrects nothing
    chosen = Correction(**record.result["choice"])
    assert dataclasses.asdict(chosen) in [
        {k: v for k, v in s.items() if k not in ("clean_loss", "attacked")}
        for s in record.result["search"]
    ]
    assert 0 <= record.result["outside"] <= 1
    assert record.result["relative_time"] > 0
