"""Small models and batches to be trained on."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from deltacontrol.deltas import HeadTuning, LoRA, attach
from deltacontrol.experiments.training.settings import Settings

VOCABULARY, WIDTH = 50, 16


def bert(num_labels: int = 2, dropout: float = 0.1, **overrides):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **overrides,
    )
    return BertForSequenceClassification(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).eval()


class ParityBatches:
    """Label 1 where the first token is odd: learnable; a batch is a function of (seed, step)."""

    def __init__(self, seed: int = 0, rows: int = 8, kind: str = "classification") -> None:
        self.seed, self.rows, self.kind = seed, rows, kind

    def batch(self, step: int) -> dict:
        generator = np.random.default_rng([self.seed, step])
        ids = torch.from_numpy(generator.integers(2, VOCABULARY, (self.rows, 6)))
        mask = torch.ones_like(ids)
        mask[: self.rows // 2, 4:] = 0
        if self.kind == "causal-lm":
            labels = ids.masked_fill(mask == 0, -100)
        elif self.kind == "regression":
            labels = (ids[:, 0] / VOCABULARY).float()
        else:
            labels = ids[:, 0] % 2
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_model(**overrides):
    return attach(bert(**overrides), LoRA(rank=2, dropout=0.2), HeadTuning(), seed=0)


def settings(**overrides) -> Settings:
    defaults = {"steps": 12, "learning_rate": 3e-3, "weight_decay": 0.01, "precision": "fp32"}
    return Settings(**(defaults | {"device": "cpu"} | overrides))
