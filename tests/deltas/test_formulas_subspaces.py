"""Subspaces of parameters and of prompts, each against its paper's formula, by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    DeltaModel,
    IntrinsicPrompt,
    PromptTuning,
    StructuredSubspace,
    attach,
)
from deltacontrol.theory.dimension.projections import DenseProjection, FastfoodProjection
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import FAMILIES, L, batch_of, d, move, out

Build = Callable[..., PreTrainedModel]


class TestStructuredSubspace:
    @pytest.mark.parametrize("projection", [DenseProjection, FastfoodProjection])
    @pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
    def test_every_layer_has_a_gain(self, build: Build, family, projection):
        """θ_i + λ_i (P z)_i; d numbers, of which m are gains."""
        model = build(family)
        written = copy.deepcopy(model)
        gains = L + 2 if FAMILIES[family].head else L + 1
        name = {DenseProjection: "dense", FastfoodProjection: "fastfood"}[projection]
        delta = StructuredSubspace(dimension=9, projection=name, projection_seed=5)
        controlled = move(attach(model, delta), scale=10.0)
        state = controlled.state()
        z, scales = state["said.coordinates.subspace.z"], state["said.coordinates.gains"]
        assert len(z) == 9 - gains and len(scales) == gains
        parameters = dict(written.named_parameters())
        sizes = [p.numel() for p in parameters.values()]
        matrix = projection(sum(sizes), len(z), seed=5, dtype=torch.float64).dense()
        order: list[str] = []  # layers in the order of the model
        with torch.no_grad():
            for (key, p), change in zip(parameters.items(), (matrix @ z).split(sizes), strict=True):
                numbers = [part for part in key.split(".") if part.isdigit()]
                head = key.startswith(("classifier", "score"))
                layer = numbers[0] if numbers else "head" if head else "outside"
                if layer not in order:
                    order.append(layer)
                p += scales[order.index(layer)] * change.view_as(p)
        assert len(order) == gains
        batch = batch_of(model)
        found, expected = out(controlled, batch).detach(), out(written, batch).detach()
        tolerance = max(1e-11, FAMILIES[family].tolerance)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        controlled.detach()
        assert float((found - out(model, batch)).detach().abs().max()) > 1e-2

    def test_the_gains_are_paid_for(self, build):
        model = build("bert")
        with pytest.raises(InputError, match="dimension 4 leaves nothing beside the gains of 4"):
            attach(model, StructuredSubspace(dimension=4))
        controlled = attach(model, StructuredSubspace(dimension=5))
        assert controlled.num_trainable == 5
        controlled.detach()


class TestIntrinsicPrompt:
    def rows(self, controlled: DeltaModel) -> Tensor:
        """The prompt that enters."""
        key = "intrinsic-prompt.bert.embeddings.word_embeddings"
        return controlled.controls.get_submodule(key)().detach()

    def assert_is_the_prompt(self, build, controlled: DeltaModel) -> None:
        """The model computes as prompt tuning with the decoded rows does."""
        batch, rows = batch_of(controlled.model), self.rows(controlled)
        found = out(controlled, batch).detach()
        controlled.detach()
        plain = attach(build("bert"), PromptTuning(length=len(rows)))
        with torch.no_grad():
            next(iter(plain.trainable().values())).copy_(rows)
        assert torch.equal(out(plain, batch).detach(), found)
        plain.detach()

    def test_random_subspace(self, build: Build):
        model = build("bert")
        controlled = attach(model, IntrinsicPrompt(length=4, dimension=3))
        table = model.get_input_embeddings().weight
        start = self.rows(controlled)
        assert all(bool((table == row).all(-1).any()) for row in start)
        move(controlled, scale=2.0)
        (z,) = controlled.trainable().values()
        change = self.rows(controlled) - start
        assert float(change.norm()) == pytest.approx(float(z.detach().norm()), rel=1e-12)
        assert {k.rpartition(".")[2] for k in controlled.state()} == {"rows", "seed"}
        self.assert_is_the_prompt(build, controlled)

    def test_learnt_subspace(self, build, tmp_path):
        """Prompts in a plane around their mean: the decoder of dimension 2 reaches each of them."""
        generator = torch.Generator().manual_seed(0)
        mean, first, second = torch.randn(3, 4, d, generator=generator, dtype=torch.float64)
        weights = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        prompts = mean + torch.einsum("tk,knd->tnd", weights, torch.stack([first, second]))
        one, many = str(tmp_path / "one.safetensors"), str(tmp_path / "many.safetensors")
        save_file({"prompt.embeddings.rows": prompts[0].clone(), "seed": torch.zeros(1)}, one)
        save_file({"prompts": prompts[1:].clone()}, many)
        delta = IntrinsicPrompt(length=4, dimension=2, prompts=(one, many))
        controlled = attach(build("bert"), delta)
        torch.testing.assert_close(self.rows(controlled), prompts.mean(0), rtol=0, atol=1e-12)
        state = controlled.state()
        assert {k.rpartition(".")[2] for k in state} == {"rows", "mean", "frame"}
        frame = next(v for k, v in state.items() if k.endswith("frame")).flatten(1)
        gaps = (prompts - prompts.mean(0)).flatten(1)
        coordinates = torch.linalg.lstsq(frame.T, gaps.T).solution
        torch.testing.assert_close(frame.T @ coordinates, gaps.T, rtol=0, atol=1e-10)
        # A unit of z is a standard deviation of the prompts, and the components are uncorrelated.
        covariance = coordinates @ coordinates.T / 5
        torch.testing.assert_close(covariance, torch.eye(2).double(), rtol=0, atol=1e-10)
        (z,) = controlled.trainable().values()
        with torch.no_grad():
            z.copy_(coordinates[:, 3])
        torch.testing.assert_close(self.rows(controlled), prompts[3], rtol=0, atol=1e-10)
        self.assert_is_the_prompt(build, controlled)

    def test_refusals(self, build, tmp_path):
        model = build("bert")
        path = str(tmp_path / "prompts.safetensors")
        save_file({"a": torch.zeros(2, 4, d), "b": torch.zeros(3)}, path)
        for delta, message in (
            (IntrinsicPrompt(4, 2, (path,)), r"2 prompts of shape \(4, 32\) span no subspace.*3"),
            (IntrinsicPrompt(5, 1, (path,)), r"no prompt of shape \(5, 32\).*\(2, 4, 32\), \(3,\)"),
            (IntrinsicPrompt(4, 2, (path + "x",)), "cannot read prompts from"),
            (IntrinsicPrompt(1, 33), "dimension 33 is above the 32 numbers"),
        ):
            with pytest.raises(InputError, match=message):
                attach(model, delta)
