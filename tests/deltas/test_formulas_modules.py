"""Deltas that train whole modules, against their definition."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas import BitFit, LayerNormTuning, RandomMask, SelectedModules, attach
from tests.deltas.zoo import L, batch_of, d, m, move, out

Build = Callable[..., PreTrainedModel]


class TestModules:
    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    @pytest.mark.parametrize(
        "delta",
        [
            BitFit(part="attention"),
            BitFit(part="mlp"),
            LayerNormTuning(),
            LayerNormTuning(layers=(1,)),
            SelectedModules(),
            SelectedModules(sites=("mlp.up",), layers=(0,)),
        ],
        ids=str,
    )
    def test_equals_the_model_with_those_parameters(self, build: Build, family, delta):
        model = build(family)
        written = copy.deepcopy(model)
        controlled = move(attach(model, delta))
        prefix = controlled.attachments[0].namespace + "."
        values = {k.removeprefix(prefix): v for k, v in controlled.state().items()}
        assert not written.load_state_dict(values, strict=False).unexpected_keys
        batch = batch_of(model)
        assert torch.equal(out(controlled, batch), out(written, batch))
        controlled.detach()

    @pytest.mark.parametrize(
        ("family", "delta", "leaves"),
        [
            ("bert", BitFit(part="attention"), ["query", "key", "value", "attention.output.dense"]),
            ("bert", BitFit(part="mlp"), ["intermediate.dense", "output.dense"]),
            ("gpt2", BitFit(part="attention"), ["attn.c_attn", "attn.c_proj"]),
            ("gpt2", BitFit(part="mlp"), ["mlp.c_fc", "mlp.c_proj"]),
            ("gpt2", SelectedModules(), ["attn.c_attn", "attn.c_proj"]),
            ("bert", LayerNormTuning(layers=(0,)), ["LayerNorm"]),
        ],
        ids=str,
    )
    def test_takes_whole_modules(self, build, family, delta, leaves):
        """GPT-2's query, key and value together are one module, and are taken as such."""
        controlled = attach(build(family), delta)
        paths = {name.partition(".")[2].rpartition(".")[0] for name in controlled.trainable()}
        assert all(any(path.endswith(leaf) for leaf in leaves) for path in paths)
        assert all(any(path.endswith(leaf) for path in paths) for leaf in leaves)
        if isinstance(delta, BitFit):
            assert {name.rpartition(".")[2] for name in controlled.trainable()} == {"bias"}
            assert "LayerNorm" not in " ".join(paths)
        controlled.detach()

    def test_counts(self, build):
        for delta, count in (
            (BitFit(part="attention"), L * 4 * d),
            (BitFit(part="mlp"), L * (m + d)),
            (LayerNormTuning(layers=(1,)), 4 * d),
            (SelectedModules(layers=(0,)), 4 * (d * d + d)),
        ):
            controlled = attach(build("bert"), delta)
            assert controlled.num_trainable == count
            controlled.detach()

    def test_the_head_is_not_touched(self, build):
        """A masked-language-model head has a normalisation of its own."""
        model = build("bert", "masked-lm")
        for delta in (LayerNormTuning(), RandomMask(density=1.0)):
            controlled = attach(model, delta)
            assert "cls." not in "".join(controlled.trainable())
            controlled.detach()
        sizes = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("cls."))
        controlled = attach(model, RandomMask(density=1.0))
        assert controlled.num_trainable == sizes
        controlled.detach()
