"""Two classes as one number: the margin z = logit(second class) - logit(first class) of an example.

The loss of two classes depends on the margin alone, so a model with a classification head has one
output per example; a causal language model has one as well, through two words that follow a prompt
(a verbaliser). With the sign s = ±1 of the label, loss = log(1 + exp(-s z)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from deltacontrol.deltas.editing.sites import SiteMap
from deltacontrol.experiments import models, tasks
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT, WORDS = " It was", (" terrible", " great")


@dataclass(frozen=True, eq=False)
class MarginData:
    """A model, and examples of two classes.

    Attributes:
        model: the frozen model, its head fitted where it has one.
        tokenizer: its tokenizer.
        texts: the examples that are tuned on; their labels are ``signs``.
        signs: +1 for the second class and -1 for the first, (n,).
        test_texts: unseen examples; their labels are ``test_signs``.
        test_signs: likewise.
        max_length: tokens of a text at most.
        words: the numbers of the two words, for a causal language model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    signs: Tensor
    test_texts: list[str]
    test_signs: Tensor
    max_length: int
    words: tuple[int, int] | None = None
    prompt: list[int] = field(default_factory=list)

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's arguments: tokens cut to ``max_length``, then the prompt, padded right."""
        options: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        rows = self.tokenizer(list(texts), **options)["input_ids"]
        ids = [torch.tensor(row + self.prompt) for row in rows]  # type: ignore[operator]
        pad = float(getattr(self.tokenizer, "pad_token_id", None) or 0)
        return {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], True),
        }

    def functional(self, logits: Tensor, mask: Tensor) -> Tensor:
        """K of the shape of ``logits`` with z_i = Σ K[i]·logits[i]."""
        K = torch.zeros_like(logits)
        if self.words is None:
            K[:, 0], K[:, 1] = -1, 1
            return K
        rows, last = torch.arange(len(K)), mask.sum(1) - 1
        K[rows, last, self.words[0]], K[rows, last, self.words[1]] = -1, 1
        return K

    def margins(self, logits: Tensor, mask: Tensor) -> Tensor:
        """z, (n,)."""
        return (self.functional(logits.detach(), mask) * logits).flatten(1).sum(1)


def logistic_loss(margins: Tensor, signs: Tensor) -> Tensor:
    """Mean of log(1 + exp(-s z)): the cross-entropy of two classes."""
    return softplus(-signs.to(margins) * margins).mean()


def logistic_derivatives(margins: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (n,) and Hessian (n, n) of the mean loss in the margins."""
    signs = signs.to(margins)
    gradient = -signs * torch.sigmoid(-signs * margins) / len(margins)
    curvature = torch.sigmoid(margins) * torch.sigmoid(-margins) / len(margins)
    return gradient, torch.diag(curvature)


def margin_data(
    model: str,
    task: str,
    *,
    kind: str,
    num_examples: int,
    max_length: int,
    head_rows: int = 512,
    test_rows: int = 0,
    pretrained: bool = True,
    dtype: str = "float64",
    seed: int = 0,
) -> MarginData:
    """Load a model and draw examples.

    Args:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification of two classes.
        kind: "classification", whose head is fitted here, or "causal-lm".
        num_examples: examples that are tuned on, drawn from the training rows by ``seed``.
        max_length: tokens of a text at most, before a prompt.
        head_rows: further training rows, to which the head is fitted by logistic regression with
            unit ridge (the default of scikit-learn); the examples are not among them.
        test_rows: the first rows of the test split.
        pretrained: False draws the backbone at random, from ``seed``.
        dtype: of the parameters.
        seed: of the draw of examples, and of a random backbone.

    Raises:
        InputError: the task has not two classes, too few rows or rows of one class, or the words
            are no single tokens.
    """
    data = tasks.load(task)
    if data.kind != "classification" or len(data.labels) != 2:
        raise InputError(f"{task} is no classification of two classes; try movie, rt or sms.")
    if kind not in ("classification", "causal-lm"):
        raise InputError(f"kind is {kind!r}; expected 'classification' or 'causal-lm'.")
    needed = num_examples + (head_rows if kind == "classification" else 0)
    if needed > len(data.train) or test_rows > len(data.test):
        raise InputError(
            f"{task} has {len(data.train)} training and {len(data.test)} test rows; {needed} and "
            f"{test_rows} are needed."
        )
    labels = {"num_labels": 2} if kind == "classification" else {}
    base, tokenizer = models.load(
        model, kind=kind, pretrained=pretrained, seed=seed, dtype=dtype, **labels  # type: ignore[arg-type]
    )  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(data.train))
    rows = data.train.iloc[order[:num_examples]]
    test = data.test.head(test_rows)
    words = None if kind == "classification" else _words(tokenizer)
    made = MarginData(
        base,
        tokenizer,
        list(rows["text"]),
        _signs(rows["label"]),
        list(test["text"]),
        _signs(test["label"]),
        max_length,
        words,
        [] if words is None else list(tokenizer.encode(PROMPT, add_special_tokens=False)),
    )
    if words is None:
        others = data.train.iloc[order[num_examples:needed]]
        _fit_head(made, list(others["text"]), _signs(others["label"]))
    return made


def _signs(labels: Any) -> Tensor:
    return 2 * torch.tensor(np.array(labels), dtype=torch.float64) - 1


def _words(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    found = [tokenizer.encode(word, add_special_tokens=False) for word in WORDS]
    if any(len(ids) != 1 for ids in found):
        raise InputError(f"the words {WORDS} are not single tokens of this tokenizer: {found}")
    return found[0][0], found[1][0]


def _fit_head(data: MarginData, texts: list[str], signs: Tensor) -> None:
    """Logistic regression on what enters the head; its two rows are plus and minus one half."""
    from sklearn.linear_model import LogisticRegression

    if len(signs.unique()) < 2:
        raise InputError(f"the {len(texts)} rows for the head have one class; take more head_rows.")
    paths = SiteMap(data.model).head_paths()
    head = data.model.get_submodule(paths[0]) if len(paths) == 1 else None
    if not isinstance(head, nn.Linear):
        raise InputError(f"the head of {type(data.model).__name__} is not one linear map: {paths}")
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        with torch.no_grad():
            for start in range(0, len(texts), 64):
                data.model(**data.batch(texts[start : start + 64]))
    finally:
        handle.remove()
    features = torch.cat(inputs).double().numpy()
    fitted = LogisticRegression(max_iter=2000).fit(features, signs.numpy())
    weight = torch.from_numpy(fitted.coef_[0]).to(head.weight)
    bias = float(fitted.intercept_[0])
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight, weight]) / 2)
        head.bias.copy_(head.bias.new_tensor([-bias, bias]) / 2)
