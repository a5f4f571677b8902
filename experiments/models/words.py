"""Words that a language model is read out at, in the place of a head of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput


def read_words(model: PreTrainedModel, words: Sequence[int], mask: int | None) -> None:
    """Let a language model give the logits (batch, classes) of words at one place of each text.

    The place is that of the mask or, without one, of the last token that is no padding. Its state
    alone enters the head, which is the model's own and stays as it is. With labels (batch,) the
    loss is the mean cross-entropy of these logits. Modules and parameters keep their names, so that
    deltas on this model fit the plain language model, and the other way round.

    Args:
        model: a masked or causal language model, without deltas.
        words: the token of each class.
        mask: the token at which the words are read, of which each row has one; None reads behind
            the last token.

    Raises:
        InputError: the model has no head beside its backbone.
    """
    from deltacontrol.deltas.editing.sites import SiteMap

    heads = SiteMap(model).head_paths()
    if not heads:
        raise InputError(
            f"{type(model).__name__} has no head beside its backbone, from which words are read; "
            "choose a model such as BertForMaskedLM or LlamaForCausalLM"
        )
    reading = _Reading(list(words), mask)
    model.register_forward_pre_hook(reading.begin, with_kwargs=True)
    model.get_submodule(heads[0]).register_forward_pre_hook(reading.choose)
    model.register_forward_hook(reading.end)


class _Reading:
    """What happens in a pass of the model; place and labels are those of the present pass."""

    def __init__(self, words: list[int], mask: int | None) -> None:
        self.words, self.mask = words, mask
        self.place: Tensor | None = None  # (batch,), from the end: a prompt's rows are in front
        self.labels: Tensor | None = None

    def begin(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Note where the words are read, and keep the labels, which are no tokens."""
        import torch

        tokens = args[0] if args else kwargs.get("input_ids")
        if not isinstance(tokens, torch.Tensor):
            raise InputError("words are read at a token's place; give the model its input_ids")
        here = kwargs.get("attention_mask") if self.mask is None else tokens == self.mask
        here = torch.ones_like(tokens) if here is None else here
        self.place = here.flip(1).int().argmax(1)
        self.labels = kwargs.get("labels")
        given = {name: value for name, value in kwargs.items() if name != "labels"}
        return args, given | {"return_dict": True}

    def choose(self, _head: nn.Module, args: tuple) -> tuple:
        """The state (batch, 1, d) at the place, of the states (batch, tokens, d)."""
        import torch

        states, *rest = args
        rows = torch.arange(len(states), device=states.device)
        return states[rows, states.shape[1] - 1 - self.place][:, None], *rest

    def end(self, _model: nn.Module, _args: tuple, output: Any) -> SequenceClassifierOutput:
        """The words' logits, and their loss where there are labels."""
        import torch
        from torch.nn.functional import cross_entropy
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = output.logits[:, 0, self.words]
        labels, self.labels, self.place = self.labels, None, None
        loss = None
        if labels is not None:
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = cross_entropy(precise, labels)
        return SequenceClassifierOutput(
            loss=loss,  # type: ignore[arg-type] - annotated as always there
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )
