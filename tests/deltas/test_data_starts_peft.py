"""LoRA's starts from data beside peft's own, and what peft computes after an export."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.interop import export_peft
from tests.deltas.data_starts import (
    DATA,
    batches_of,
    close,
    loss_of,
    shown,
)
from tests.deltas.zoo import TOKENS, move, out, texts

Build = Callable[..., PreTrainedModel]


class TestAgainstPeft:
    """peft's own starts on one batch, in float32; its random decompositions are exact here."""

    RANK = 16

    def start(self, base: PreTrainedModel, init: str, rank: int, show, **options):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=5,
            target_modules=["query", "value"],
            init_lora_weights=init,
            **options,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            show(peft, base, config)
            return peft.get_peft_model(base, config)

    def ours(self, base: PreTrainedModel, rank: int, init: str, batch) -> dict[str, Tensor]:
        controlled = attach(base, LoRA(rank=rank, alpha=5.0, init=init))
        controlled.prepare(lambda: iter([loss_of(controlled, batch)]))
        state = {k.removeprefix("lora."): v.double() for k, v in controlled.state().items()}
        controlled.detach()
        return state

    def pairs(self, model, state: dict[str, Tensor]):
        for name, module in model.base_model.model.named_modules():
            if f"{name}.A" in state:
                theirs = module.lora_A["default"].weight, module.lora_B["default"].weight
                yield (
                    name,
                    [w.detach().double() for w in theirs],
                    state[f"{name}.A"],
                    state[f"{name}.B"],
                )

    def spans(self, a: Tensor, b: Tensor) -> float:
        """The sine of the largest angle between the spans of the rows."""
        left, right = (torch.linalg.svd(m, full_matrices=False)[2] for m in (a, b))
        return float(torch.linalg.matrix_norm(left - left @ right.T @ right, 2))

    def test_lora_ga(self, build: Build):
        base = build("bert", dtype=torch.float32)
        batch = texts(base, (TOKENS,) * 20)

        def show(peft, model, config):
            from peft.tuners.lora.loraga import preprocess_loraga

            preprocess_loraga(model, config, lambda: loss_of(model, batch).backward())

        peft = pytest.importorskip("peft")
        plain = copy.deepcopy(base).eval()
        plain.train = lambda mode=True: plain  # type: ignore[method-assign] # no dropout in it
        model = self.start(plain, "lora_ga", 8, show, lora_ga_config=peft.LoraGAConfig())
        state = self.ours(base, 8, "lora-ga", batch)
        count = 0
        for name, (down, up), mine_down, mine_up in self.pairs(model, state):
            assert self.spans(down, mine_down) < 1e-3, name
            assert self.spans(up.T, mine_up.T) < 1e-3, name
            count += 1
        assert count == 4

    def test_corda(self, build: Build):
        peft = pytest.importorskip("peft")
        base = build("bert", dtype=torch.float32)
        batch = texts(base, (40,))  # theirs takes one text at a time
        for mode in ("ipm", "kpm"):

            def show(peft, model, config):
                from peft.tuners.lora.corda import preprocess_corda

                preprocess_corda(model, config, lambda: model(**batch))

            settings = peft.tuners.lora.config.CordaConfig(corda_method=mode)
            plain = copy.deepcopy(base).eval()
            model = self.start(plain, "corda", 4, show, corda_config=settings)
            state = self.ours(base, 4, f"corda-{mode}", batch)
            count = 0
            for _, (down, up), mine_down, mine_up in self.pairs(model, state):
                close(mine_up @ mine_down, up @ down, 1e-3)
                count += 1
            assert count == 4

    def test_eva(self, build: Build):
        peft = pytest.importorskip("peft")
        base = build("bert", dtype=torch.float32)
        batch = texts(base, (TOKENS - 2, *(TOKENS,) * 7))
        settings = peft.EvaConfig(rho=1.0)
        model = self.start(
            copy.deepcopy(base).eval(), "eva", self.RANK, lambda *_: None, eva_config=settings
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
        state = self.ours(base, self.RANK, "eva", batch)
        count = 0
        for name, (down, up), mine_down, mine_up in self.pairs(model, state):
            assert self.spans(down, mine_down) < 1e-3, name
            assert not up.any() and not mine_up.any()
            count += 1
        assert count == 4


@pytest.mark.parametrize("init", DATA)
def test_peft_computes_the_same_after_export(build: Build, tmp_path, init):
    from tests.deltas.peft_models import logits, same

    model = build("gpt2", "causal-lm", dtype=torch.float32)
    controlled = move(shown(model, LoRA(rank=2, init=init)), scale=0.1)
    batch = batches_of(model)[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = out(controlled, batch)
        export_peft(controlled, tmp_path / "adapter")
        controlled.detach()
        same(logits(model, tmp_path / "adapter", batch), ours, 1e-5)
