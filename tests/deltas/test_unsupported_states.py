"""Models whose states cannot be followed block by block say why."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from deltacontrol.deltas import FullFineTuning, LoRA, Subspace, attach
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.theory.errors import InputError
from tests.deltas.architectures import FAMILIES, V, d
from tests.deltas.augmented import end_to_end, problem_of
from tests.deltas.zoo import assert_same, batch_of, move, relative, snapshot


def root_mean_square(norm: nn.Module, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * x * scale


class SkipConfig(hf.PreTrainedConfig):
    model_type = "skip"
    between = False
    behind = False


class SkipBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, early: Tensor | None = None) -> Tensor:
        moved = hidden_states + self.map(hidden_states).tanh()
        return moved if early is None else moved + early.square()


class SkipModel(hf.PreTrainedModel):
    """What the first block gives is read by the last as well.

    ``between`` changes it on its way, and ``behind`` reads it behind the blocks once more.
    """

    config_class = SkipConfig

    def __init__(self, config: SkipConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([SkipBlock() for _ in range(4)])
        self.post_init()

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        early = self.layers[0](self.embed(input_ids))
        middle = self.layers[2](self.layers[1](early))
        last = self.layers[3](middle, early=2 * early if self.config.between else early)
        return (last + early if self.config.behind else last,)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed


class TestMessages:
    def test_a_skip_connection(self):
        controlled = move(attach(SkipModel(SkipConfig()).double(), FullFineTuning()))
        problem = problem_of(controlled, {"input_ids": torch.tensor([[1, 2], [3, 4]])})
        dynamics, u = problem.dynamics, problem.dynamics.controls()
        parts = [list(dynamics.parts(t, x)) for t, x in enumerate(problem.rollout(u))]
        assert parts[1:6] == [["hidden"], *[["hidden", "early"]] * 3, ["hidden"]]
        assert relative(problem.gradient(u), end_to_end(controlled, problem)) <= 1e-12

    def test_what_is_computed_between_two_blocks(self):
        model = SkipModel(SkipConfig(between=True)).double()
        controlled = attach(model, LoRA(rank=2, sites=("map",)))
        before = snapshot(model)
        with pytest.raises(InputError, match="block 3 receives 'early'.* computed between two"):
            TransformerDynamics(controlled, {"input_ids": torch.tensor([[1, 2]])})
        assert_same(before, snapshot(model))

    def test_a_readout_of_more_than_the_last_state(self):
        controlled = attach(SkipModel(SkipConfig(behind=True)), LoRA(rank=2, sites=("map",)))
        with pytest.raises(InputError, match="differ by nan.* reads more than the last one gives"):
            TransformerDynamics(controlled, {"input_ids": torch.tensor([[1, 2]])})
        config = FAMILIES["whisper"].config()
        config.update({"use_weighted_layer_sum": True})
        model = hf.WhisperForAudioClassification(config).double().eval()
        controlled = attach(model, LoRA(rank=2))
        with pytest.raises(InputError, match="stages of WhisperForAudioClassification .* fails"):
            TransformerDynamics(controlled, batch_of(model))

    def test_one_block_called_several_times(self):
        config = hf.AlbertConfig(
            vocab_size=V, embedding_size=8, hidden_size=d, num_attention_heads=4,
            intermediate_size=d, num_hidden_layers=3,
        )  # fmt: skip
        model = hf.AlbertModel(config).eval()
        controlled = attach(model, LoRA(rank=2, sites=("query",)))
        with pytest.raises(InputError, match="called 3 blocks, expected 1, each once"):
            TransformerDynamics(controlled, {"input_ids": torch.ones(1, 3, dtype=torch.long)})

    def test_tokens_that_a_short_float_cannot_hold(self, build):
        model = build("bert", dtype=torch.bfloat16, vocab_size=600)
        controlled = attach(model, Subspace(3))
        tokens = torch.tensor([[3, 513]])
        with pytest.raises(InputError, match=r"subspace\.z\.z act in several .* up to 513 exactly"):
            TransformerDynamics(controlled, {"input_ids": tokens})
        TransformerDynamics(controlled, {"input_ids": tokens - 1})
        controlled.detach()
