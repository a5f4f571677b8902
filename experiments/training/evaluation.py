"""Metrics of a model on batches of a task.

    classification  accuracy, macro_f1
    regression      pearson, mse
    causal-lm       loss (nats per token), perplexity = exp(loss)
    masked-lm       the same, over the tokens to be filled in

and, for classification, loss: the mean cross-entropy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltacontrol.deltas.methods.parts.coordinates import held

# The metric that decides early stopping, and whether larger is better.
MONITORED = {
    "classification": ("accuracy", True),
    "regression": ("pearson", True),
    "causal-lm": ("loss", False),
    "masked-lm": ("loss", False),
}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict[str, Any]], kind: str) -> dict[str, float]:
    """Metrics of `model` over `batches`, each a dictionary of model arguments with "labels".

    Under `accelerate launch` the batches are shared out among the processes, and each of them gets
    the metrics of all. The model is left in the mode that it was in.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    state = PartialState() if PartialState._shared_state else None
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    parts = []
    with held(model):
        for index, batch in enumerate(batches):
            if index % world != rank:
                continue
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            labels = inputs.pop("labels")
            if kind == "causal-lm":
                inputs["use_cache"] = False
            logits = model(**inputs).logits
            parts.append((index, *_reduce(logits.float(), labels, kind)))
    for module, mode in training.items():
        module.training = mode
    if world > 1:
        parts = gather_object(parts)
    parts.sort(key=lambda part: part[0])
    outputs, targets, losses = zip(*(part[1:] for part in parts), strict=True)
    return METRICS[kind](np.concatenate(outputs), np.concatenate(targets), np.concatenate(losses))


def _reduce(logits: Tensor, labels: Tensor, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, targets and losses of one batch, as small arrays."""
    if kind in ("causal-lm", "masked-lm"):
        if kind == "causal-lm":
            labels, logits = labels[:, 1:], logits[:, -labels.shape[1] : -1]
        targets, logits = labels.flatten(), logits.flatten(0, 1)
        loss = cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        tokens = (targets != -100).sum().reshape(1)
        return tokens.cpu().numpy(), tokens.cpu().numpy(), loss.reshape(1).cpu().numpy()
    if kind == "regression":
        outputs = logits.reshape(len(labels), -1).squeeze(-1)
        targets = labels.float().reshape(outputs.shape)
        losses = (outputs - targets).square()
    else:
        outputs, targets = logits.argmax(-1), labels
        losses = cross_entropy(logits, labels, reduction="none")
    return outputs.cpu().numpy(), targets.cpu().numpy(), losses.cpu().numpy()


def classification(
    outputs: np.ndarray, targets: np.ndarray, losses: np.ndarray
) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that occur, and mean cross-entropy."""
    from sklearn.metrics import f1_score

    f1 = f1_score(targets, outputs, average="macro", zero_division=0)  # type: ignore[arg-type]
    return {
        "accuracy": float(np.mean(outputs == targets)),
        "macro_f1": float(f1),
        "loss": float(losses.mean(dtype=np.float64)),
    }


def regression(outputs: np.ndarray, targets: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Pearson correlation (NaN where an output is constant) and mean squared error."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        pearson = float(np.corrcoef(outputs, targets)[0, 1])
    return {"pearson": pearson, "mse": float(losses.mean(dtype=np.float64))}


def language_model(
    outputs: np.ndarray, targets: np.ndarray, losses: np.ndarray
) -> dict[str, float]:
    """Loss in nats, averaged over all predicted tokens, and perplexity."""
    del outputs
    loss = float(losses.sum(dtype=np.float64) / targets.sum())
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


METRICS = {
    "classification": classification,
    "regression": regression,
    "causal-lm": language_model,
    "masked-lm": language_model,
}
