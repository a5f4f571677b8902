"""Sites of the real model: their rows against finite differences, their tuning against attaching.

The examples are few and short, because what is tested does not depend on their number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.measures.margins import (
    MarginData,
    logistic_derivatives,
    logistic_loss,
)
from deltacontrol.experiments.measures.site_maps import SiteTuner, attach_everywhere, margin_map
from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.studies.reachability.measurement import (
    SITES,
    SiteGramians,
    SiteTuning,
)
from deltacontrol.theory.errors import InputError

FEW = ("attention.value", "mlp.up")


def margin_data(model: str, **options: Any) -> MarginData:
    sizes = {"train_rows": 4, "test_rows": 0, "max_length": 8, "head_rows": 64}
    kind = {"task": "movie", "order": "shuffled", "head": "ridge", "dtype": "float64"}
    return MarginData.of(Setting(model, strict_rows=True, **sizes | kind | options))


@pytest.fixture(scope="module")
def data(minilm_l6: str) -> MarginData:
    return margin_data(minilm_l6, test_rows=6)


def plain_margins(data: MarginData, model: torch.nn.Module) -> torch.Tensor:
    batch = data.batch(data.examples)
    with torch.no_grad():
        return data.margins(model(**batch).logits, batch["attention_mask"])


def test_margins_are_differences_of_logits_and_carry_the_loss(data: MarginData) -> None:
    batch = data.batch(data.examples)
    with torch.no_grad():
        logits = data.model(**batch).logits
    margins = data.margins(logits, batch["attention_mask"])
    assert torch.equal(margins, logits[:, 1] - logits[:, 0])
    labels = ((data.signs + 1) / 2).long()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.allclose(logistic_loss(margins, data.signs), expected, rtol=1e-12)
    loss = lambda z: logistic_loss(z, data.signs)  # noqa: E731
    gradient, hessian = logistic_derivatives(margins, data.signs)
    assert torch.allclose(gradient, torch.func.grad(loss)(margins), rtol=1e-10)
    assert torch.allclose(hessian, torch.func.hessian(loss)(margins), rtol=1e-10, atol=1e-15)


@pytest.mark.slow
def test_the_fitted_head_is_stationary_for_its_ridge_regression(minilm_l6: str) -> None:
    """Logistic regression with unit ridge on 64 other rows: its gradient in (w, b) vanishes."""
    few, many = margin_data(minilm_l6), margin_data(minilm_l6, train_rows=68, head_rows=16)
    batch, signs = many.batch(many.examples, range(4, 68)), many.signs[4:]
    ids = [data.batch(data.examples, range(4))["input_ids"] for data in (few, many)]
    assert torch.equal(*ids)
    features = []
    head = few.model.get_submodule("classifier")
    assert isinstance(head, torch.nn.Linear)
    handle = head.register_forward_pre_hook(lambda _m, a: features.append(a[0]))
    with torch.no_grad():
        few.model(**batch)
    handle.remove()
    weight = (2 * head.weight[1]).detach().requires_grad_()
    bias = (2 * head.bias[1]).detach().requires_grad_()
    margins = features[0] @ weight + bias
    total = len(signs) * logistic_loss(margins, signs) + 0.5 * weight.square().sum()
    gradient = torch.autograd.grad(total, [weight, bias])
    assert max(float(g.abs().max()) for g in gradient) <= 1e-3 * len(signs)


@pytest.mark.slow
def test_rows_are_the_derivatives_of_the_margins(data: MarginData) -> None:
    """(z(u + h v) - z(u - h v)) / 2h against C v: the error falls as h^2, site by site."""
    found = margin_map(data, SITES, 4, seed=1)
    assert torch.allclose(found.margins, plain_margins(data, data.model), rtol=1e-10)
    generator = torch.Generator().manual_seed(3)
    controlled = attach_everywhere(data, SITES, 4, seed=1)
    trainable = controlled.trainable()
    try:
        for (layer, site), (t, entries) in found.parts.items():
            if layer not in (0, 5):
                continue
            path = controlled.host.sites.resolve((site,), (layer,))[0].path
            A, B = (trainable[f"lora.{path}.{x}"] for x in "AB")
            direction = torch.randn(B.shape, generator=generator, dtype=B.dtype)
            du = torch.cat([torch.zeros(A.numel(), dtype=B.dtype), direction.flatten()])
            expected = found.outputs.blocks[t][:, entries] @ du
            errors = []
            for h in (2e-2, 1e-2):
                ends = []
                for sign in (1, -1):
                    B.data = sign * h * direction
                    ends.append(plain_margins(data, controlled))
                B.data.zero_()
                slope = (ends[0] - ends[1]) / (2 * h)
                errors.append(float((slope - expected).norm() / expected.norm()))
            assert errors[1] < 1e-2 and errors[0] / errors[1] == pytest.approx(4, rel=0.25)
        total = sum(entries.stop - entries.start for _, entries in found.parts.values())
        assert total == controlled.num_trainable
        assert len(found.parts) == 6 * len(SITES)
    finally:
        controlled.detach()


def test_tuning_a_site_is_tuning_lora_attached_there_alone(data: MarginData) -> None:
    tuner = SiteTuner(data, FEW, 2, seed=5, weight_decay=1e-3)
    state = tuner.controlled.state()
    site, layer = "mlp.up", 4
    t, entries = tuner.parts[layer, site]
    change = 0.1 * torch.randn(
        entries.stop - entries.start,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    value = tuner._train.controls[t][entries] + change
    with torch.no_grad():
        found = tuner._train.margins_at(t, entries, value)
    tuned = tuner.tune((layer, site), steps=3)
    tuner.controlled.detach()
    alone = attach(data.model, LoRA(rank=2, alpha=4.0, sites=(site,), layers=(layer,)))
    try:
        alone.load({name: state[name] for name in alone.state()})
        before = plain_margins(data, alone)
        A, B = alone.trainable().values()
        A.data, B.data = (part.view_as(x) for part, x in zip(
            value.split([A.numel(), B.numel()]), (A, B), strict=True))  # fmt: skip
        assert torch.allclose(plain_margins(data, alone), found, rtol=1e-9)
    finally:
        alone.detach()
    assert tuned.objective_drop > 0
    assert tuned.loss_drop == pytest.approx(tuned.objective_drop + 1e-3 * tuned.energy)
    assert tuner.start()["loss"] == pytest.approx(float(logistic_loss(before, data.signs)))


@pytest.mark.slow
def test_small_gains_are_those_of_the_linear_quadratic_model(minilm_l6: str, tmp_path) -> None:
    """A heavy weight decay keeps the control where the model is linear: both agree."""
    sizes = {
        "model": minilm_l6, "num_examples": 3, "max_length": 6, "head_rows": 32, "rank": 2,
        "weight_decay": 30.0, "sites": ("attention.value",),
    }  # fmt: skip
    space = Workspace(tmp_path, progress=False)
    predicted = SiteGramians(**sizes).execute(space).result["parts"]
    measured = SiteTuning(**sizes, steps=12, test_rows=2, dtype="float64").execute(space).curve
    pairs = {(r["layer"], r["site"]): r for r in predicted if r["layer"] is not None and r["site"]}
    assert len(measured) == len(pairs) == 6
    for row in measured.itertuples():
        expected = pairs[row.layer, row.site]
        assert row.objective_drop == pytest.approx(expected["predicted_gain"], rel=0.02)
        assert row.loss_drop == pytest.approx(expected["predicted_loss_drop"], rel=0.02)


@pytest.mark.slow
def test_parts_add_up(minilm_l6: str, tmp_path) -> None:
    study = SiteGramians(
        model=minilm_l6, num_examples=3, max_length=6, head_rows=32, rank=2, sites=FEW
    )
    outcome = study.execute(Workspace(tmp_path, progress=False))
    rows = {(r["layer"], r["site"]): r for r in outcome.result["parts"]}
    whole = rows[None, None]["trace"]
    layers = [rows[layer, None]["trace"] for layer in range(6)]
    sites = [rows[None, site]["trace"] for site in FEW]
    assert sum(layers) == pytest.approx(whole, rel=1e-10)
    assert sum(sites) == pytest.approx(whole, rel=1e-10)
    # More controls never cost more energy.
    assert all(rows[None, None]["energy_all"] <= row["energy_all"] for row in rows.values())
    curve = outcome.curve
    of_whole = curve[curve["layer"].isna() & curve["site"].isna()]
    assert of_whole["eigenvalue"].sum() == pytest.approx(whole, rel=1e-10)


def test_a_language_model_has_the_margin_of_two_words_at_the_last_token(data: MarginData) -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    words = replace(data, words=(3, 5))
    expected = torch.stack([logits[0, 3, 5] - logits[0, 3, 3], logits[1, 1, 5] - logits[1, 1, 3]])
    assert torch.equal(words.margins(logits, mask), expected)


@pytest.mark.slow
def test_rows_of_a_language_model_are_derivatives_too() -> None:
    """SmolLM2 in float32: finite differences along one direction of one site, to 1 %."""
    try:
        words = margin_data("smollm2-135m", head="words", train_rows=2, dtype="float32")
    except InputError as error:
        pytest.skip(f"smollm2-135m cannot be had here: {error}")
    site, layer = "mlp.up", 20
    found = margin_map(words, (site,), 4, seed=0)
    t, entries = found.parts[layer, site]
    controlled = attach_everywhere(words, (site,), 4, seed=0)
    try:
        path = controlled.host.sites.resolve((site,), (layer,))[0].path
        A, B = (controlled.trainable()[f"lora.{path}.{x}"] for x in "AB")
        rows = found.outputs.blocks[t][:, entries]
        direction = (rows.sum(0)[A.numel() :]).view_as(B)
        direction = direction / direction.norm()
        du = torch.cat([torch.zeros(A.numel()), direction.flatten()]).double()
        ends, h = [], 0.05
        for sign in (1, -1):
            B.data = sign * h * direction.float()
            ends.append(plain_margins(words, controlled))
        slope = (ends[0] - ends[1]).double() / (2 * h)
        assert (slope - rows @ du).norm() <= 0.01 * (rows @ du).norm()
    finally:
        controlled.detach()


def test_wrong_data_is_refused(minilm_l6: str) -> None:
    with pytest.raises(InputError, match="two classes"):
        margin_data(minilm_l6, task="trec6")
    with pytest.raises(InputError, match="two classes"):
        margin_data(minilm_l6, task="trec6", head="own")
    with pytest.raises(InputError, match="unknown head 'regression'"):
        SiteGramians(model=minilm_l6, head="regression").setting()
    with pytest.raises(InputError, match="training rows of movie were asked for; it has"):
        margin_data(minilm_l6, head_rows=10**6)
    with pytest.raises(InputError, match="one class"):
        margin_data(minilm_l6, head_rows=1)
    with pytest.raises(InputError, match="positive"):
        SiteGramians(weight_decay=0.0)
