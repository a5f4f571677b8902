"""Feedback laws on models: nothing is left behind, padding does not matter, all architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from deltacontrol.deltas import LoRA, PromptTuning, attach
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.deltas.editing.passes import first_tensor
from deltacontrol.deltas.feedback.calibration import Calibration, calibrate
from deltacontrol.deltas.feedback.laws import attach_feedback, attended, run
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
from deltacontrol.theory.feedback.correction import PIDCorrection, ProjectionCorrection
from deltacontrol.theory.feedback.laws import AffineFeedback
from tests.deltas import zoo

F64 = torch.float64
each_family = pytest.mark.parametrize("family", zoo.ONE_STACK)
each_text = pytest.mark.parametrize("family", zoo.TEXT)
STATES = zoo.L + 1


def subspaces(rank: int, count: int = STATES) -> list[AffineSubspace]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        frame = torch.linalg.qr(
            torch.randn(zoo.d, zoo.d, generator=generator, dtype=F64)
        )[0]  # fmt: skip
        mean = 0.1 * torch.randn(zoo.d, generator=generator, dtype=F64)
        found.append(AffineSubspace(mean, frame[:, :rank]))
    return found


Build = Callable[..., PreTrainedModel]


@each_family
def test_acts_and_detaches_bit_for_bit(family: str, build: Build) -> None:
    model = build(family)
    batch = zoo.batch_of(model)
    before, plain = zoo.snapshot(model), zoo.out(model, batch)
    with attach_feedback(model, ProjectionCorrection(subspaces(8), 0.5)) as attached:
        corrected = zoo.out(model, batch)
        assert len(attached.paths) == STATES
    zoo.assert_same(before, zoo.snapshot(model))
    assert torch.equal(zoo.out(model, batch), plain)
    assert zoo.relative([corrected], [plain]) > 1e-3


@each_family
def test_the_whole_space_corrects_nothing(family: str, build: Build) -> None:
    model = build(family)
    batch = zoo.batch_of(model)
    plain = zoo.out(model, batch)
    for law in (
        ProjectionCorrection(subspaces(zoo.d), 1.0),
        PIDCorrection(subspaces(zoo.d), 1.0, 0.5, 0.5),
    ):
        with attach_feedback(model, law):
            assert torch.equal(zoo.out(model, batch), plain)


@each_text
def test_padding_does_not_matter(family: str, build: Build) -> None:
    model = build(family)
    law = PIDCorrection(subspaces(8), 0.4, 0.1, 0.1)
    text = zoo.batch_of(model, pad=0)
    pad = model.config.pad_token_id or 0
    longer = {
        "input_ids": torch.cat([text["input_ids"], torch.full((3, 3), pad)], 1),
        "attention_mask": torch.cat([text["attention_mask"], torch.zeros(3, 3).long()], 1),
    }
    with attach_feedback(model, law):
        short, long = zoo.out(model, text), zoo.out(model, longer)
        if short.ndim == 3:
            long = long[:, : zoo.TOKENS]
        assert zoo.relative([long], [short]) < max(1e-11, zoo.FAMILIES[family].tolerance)


@pytest.mark.parametrize("family", ["bert", "gpt2", "distilbert", "electra", "mpnet", "roberta"])
def test_is_the_law_in_the_layered_system(family: str, build: Build) -> None:
    """Stage by stage through `TransformerDynamics`, the law applied by hand."""
    model = build(family)
    batch = zoo.batch_of(model)
    controlled = zoo.move(attach(model, LoRA(rank=2)))
    dynamics = TransformerDynamics(controlled, batch)
    law = PIDCorrection(subspaces(8), 0.4, 0.1, 0.1)
    x, u = dynamics.step(0, dynamics.x0, dynamics.controls()[0]), dynamics.controls()
    for t in range(STATES):
        x = x + law.control(t, x).reshape(x.shape)
        x = dynamics.step(t + 1, x, u[t + 1])
    with attach_feedback(controlled, law):
        assert zoo.relative([zoo.out(controlled, batch)], [x]) < 1e-12
    controlled.detach()


def test_composes_with_deltas_in_either_order_of_detaching(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    plain = zoo.out(model, batch)
    law = ProjectionCorrection(subspaces(8), 0.5)
    with attach_feedback(model, law):
        alone = zoo.out(model, batch)
    controlled = zoo.move(attach(model, LoRA(rank=2)))
    tuned = zoo.out(controlled, batch)
    handle = attach_feedback(controlled, law)
    both = zoo.out(controlled, batch)
    assert zoo.relative([both], [tuned]) > 1e-3 and zoo.relative([both], [alone]) > 1e-3
    handle.detach()
    assert torch.equal(zoo.out(controlled, batch), tuned)
    handle = attach_feedback(controlled, law)
    controlled.detach()
    assert torch.equal(zoo.out(model, batch), alone)
    handle.detach()
    handle.detach()  # a second time is harmless
    assert torch.equal(zoo.out(model, batch), plain)


def test_gradients_flow_through_the_law(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    table = model.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)
    embedded = table(batch["input_ids"]).detach()

    mask = {"attention_mask": batch["attention_mask"]}

    def loss(e: Tensor) -> Tensor:
        return run(model, {"inputs_embeds": e, **mask}).logits.square().sum()

    with attach_feedback(model, ProjectionCorrection(subspaces(8), 0.5)):
        leaf = embedded.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        direction = torch.randn_like(embedded)
        h = 1e-6
        slope = (loss(embedded + h * direction) - loss(embedded - h * direction)) / (2 * h)
    assert float(slope.detach()) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_generates_with_a_cache_as_without(build: Build) -> None:
    model: Any = build("gpt2", "causal-lm")
    batch = zoo.batch_of(model, pad=0)
    with attach_feedback(model, ProjectionCorrection(subspaces(8), 0.5)):
        texts = [
            model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
    assert torch.equal(*texts)


def test_an_affine_law_acts_too(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    x = torch.zeros(3, zoo.TOKENS, zoo.d, dtype=F64)
    n = zoo.TOKENS * zoo.d
    still = AffineFeedback(
        [torch.zeros(n, n, dtype=F64)] * zoo.L, (torch.zeros(n, dtype=F64),) * zoo.L, [x] * zoo.L
    )
    plain = zoo.out(model, batch)
    with attach_feedback(model, still, site="block"):
        assert torch.equal(zoo.out(model, batch), plain)
    wrong = dataclasses.replace(
        still, gains=[torch.zeros(2, n, dtype=F64)] * zoo.L,
        controls=(torch.zeros(2, dtype=F64),) * zoo.L,
    )  # fmt: skip
    handle = attach_feedback(model, wrong, site="block")
    with pytest.raises(InputError, match="control at bert.encoder.layer.0 has shape"):
        zoo.out(model, batch)
    handle.detach()


def test_bad_sites_and_laws_are_refused(build: Build) -> None:
    model = build("bert")
    law = ProjectionCorrection(subspaces(8), 0.5)
    with pytest.raises(InputError, match="matches no module"):
        attach_feedback(model, law, site="blokc")
    with pytest.raises(InputError, match="3 steps, but 'block' has 2 sites"):
        attach_feedback(model, law, site="block")
    with pytest.raises(InputError, match="expected a PreTrainedModel"):
        attach_feedback(torch.nn.Linear(2, 2), law)  # type: ignore[arg-type]
    controlled = attach(model, LoRA(rank=2))
    controlled.detach()
    with pytest.raises(InputError, match="were detached"):
        attach_feedback(controlled, law)
    before = zoo.snapshot(model)
    with pytest.raises(RuntimeError), attach_feedback(model, law):
        raise RuntimeError  # an error inside detaches as well
    zoo.assert_same(before, zoo.snapshot(model))


@each_text
def test_calibration_is_the_covariance_of_correct_texts_without_padding(
    family: str, build: Build
) -> None:
    model = build(family)
    batch = zoo.batch_of(model)
    text = batch["attention_mask"].bool()
    if family != "t5":
        with torch.no_grad():
            guess = zoo.out(model, batch).argmax(-1)
        guess[1] = 1 - guess[1]  # the second text is classified wrongly
        batch["labels"] = guess
    states: dict[int, Tensor] = {}
    found = calibrate(model, [batch])
    handles = [
        model.get_submodule(path.removeprefix("input:")).register_forward_hook(
            lambda _m, _a, out, t=t: states.update({t: first_tensor(out)})
        )
        for t, path in enumerate(found.paths)
        if not path.startswith("input:")
    ]
    with torch.no_grad():
        run(model, batch)
    for handle in handles:
        handle.remove()
    kept = text
    if family != "t5":
        kept = kept & torch.tensor([True, False, True]).unsqueeze(1)
    assert found.counts == (int(kept.sum()),) * STATES
    for t, x in states.items():
        rows = x[kept].double()
        covariance = torch.cov(rows.mT)
        vectors = found.eigenvectors[t]
        torch.testing.assert_close(vectors * found.eigenvalues[t] @ vectors.mT, covariance)
        torch.testing.assert_close(found.means[t], rows.mean(0))


def test_calibration_does_not_see_padding_and_is_saved(build: Build, tmp_path: Path) -> None:
    model = build("bert")
    text = zoo.batch_of(model, pad=0)
    longer = {
        "input_ids": torch.cat([text["input_ids"], torch.full((3, 3), 7)], 1),
        "attention_mask": torch.cat([text["attention_mask"], torch.zeros(3, 3).long()], 1),
    }
    found, other = calibrate(model, [text]), calibrate(model, [longer])
    for a, b in zip(found.eigenvalues, other.eigenvalues, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    found.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    assert (again.site, again.paths, again.counts) == (found.site, found.paths, found.counts)
    for name in ("means", "eigenvalues", "eigenvectors"):
        assert all(map(torch.equal, getattr(again, name), getattr(found, name)))
    with pytest.raises(InputError, match="no saved calibration"):
        Calibration.load(tmp_path / "missing.safetensors")
    for rank in (0, 5, zoo.d):
        assert {s.basis.shape[1] for s in found.subspaces(rank)} == {rank}
    for subspace, values in zip(found.subspaces(energy=0.9), found.eigenvalues, strict=True):
        rank = subspace.basis.shape[1]
        held = values.flip(0).cumsum(0) / values.sum()
        assert float(held[rank - 1]) >= 0.9 - 1e-12 and float(held[rank - 2]) < 0.9
    assert {s.basis.shape[1] for s in found.subspaces(energy=0.0)} == {0}
    for rank, energy in ((None, None), (3, 0.5), (None, 1.5), (99, None)):
        with pytest.raises(InputError):
            found.subspaces(rank, energy=energy)


def test_calibration_needs_evaluation_mode_and_correct_examples(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    with torch.no_grad():
        wrong = 1 - zoo.out(model, batch).argmax(-1)
    with pytest.raises(InputError, match="0 vectors"):
        calibrate(model, [{**batch, "labels": wrong}])
    with pytest.raises(InputError, match="not reached"):
        calibrate(model, [])
    model.train()
    with pytest.raises(InputError, match="training mode"):
        calibrate(model, [batch])
    model.eval()


def test_a_prompt_counts_as_text(build: Build) -> None:
    model = build("bert")
    batch = zoo.batch_of(model)
    controlled = attach(model, PromptTuning(length=4))
    found = calibrate(controlled, [batch])
    assert found.counts == (int(batch["attention_mask"].sum()) + 3 * 4,) * STATES
    controlled.detach()
    state = torch.zeros(3, zoo.TOKENS + 2, 1)
    assert attended(batch, state)[0].tolist() == [True] * 7 + [False] * 2
    assert attended({}, state).all()


def test_acts_on_both_stacks_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=zoo.d, num_layers=2, num_heads=4, d_ff=zoo.m, d_kv=8, vocab_size=zoo.V
    )  # fmt: skip
    config.decoder_start_token_id = 0
    model: Any = T5ForConditionalGeneration(config).double().eval()
    batch = zoo.batch_of(model) | {"decoder_input_ids": torch.tensor([[0, 5]] * 3)}
    plain = zoo.out(model, batch)
    changed = []
    for acting in (slice(0, 3), slice(3, 6)):
        laws: list[AffineSubspace | None] = [None] * 6
        laws[acting] = subspaces(8, 3)
        with attach_feedback(model, ProjectionCorrection(laws, 0.5)) as attached:
            assert [p.startswith("input:") for p in attached.paths] == [True, False, False] * 2
            changed.append(zoo.relative([zoo.out(model, batch)], [plain]))
            model.generate(**zoo.batch_of(model), max_new_tokens=3)
    assert min(changed) > 1e-3
    assert torch.equal(zoo.out(model, batch), plain)
    with (
        attach_feedback(model, PIDCorrection(subspaces(8, 6))),
        pytest.raises(InputError, match="takes states of one shape"),
    ):
        zoo.out(model, batch)
