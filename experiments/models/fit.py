"""Whether a model and the rows of a task fit: positions, tokens, and the names of classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel

    from deltacontrol.deltas import Delta

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
_COMPUTED = (
    *("inv_freq", "position_ids", "masked_bias", "relative_position_index", "causal_mask"),
    *("cos_cached", "sin_cached", "version", "scale_attn"),
)
_GENERIC = re.compile(r"LABEL_\d+")
_CLASSIFIES = ("ForSequenceClassification", "ForTextClassification")
SHOWN = 6
LANGUAGE_MODELS = (
    "smollm2-135m, one of the family such as family/encoder-192 (`deltacontrol pretrain`), or a "
    "checkpoint with a head of language modelling, such as google-bert/bert-base-uncased"
)
SHORTEST = 8  # tokens of a text that are worth reading


def require_positions(
    model: PreTrainedModel,
    name: str,
    max_length: int,
    deltas: Iterable[Delta] = (),
    *,
    behind: int = 0,
) -> None:
    """Refuse texts that are longer than the positions that deltas leave.

    Args:
        model: has the positions.
        name: of the model, for errors.
        max_length: tokens of a text at most.
        deltas: some, such as prompts, take positions.
        behind: tokens that follow every text.

    Raises:
        InputError: says how long a text may be.
    """
    from deltacontrol.deltas.editing.positions import usable_positions

    usable = usable_positions(model)
    if usable is None:
        return
    taken = [(delta.name, delta.num_positions) for delta in deltas if delta.num_positions]
    taken += [("the question behind a text", behind)] if behind else []
    left = usable - sum(number for _, number in taken)
    if max_length > left:
        and_deltas = "".join(f", of which {d} takes {n}" for d, n in taken)
        tried = f"choose max_length <= {left}" if left >= SHORTEST else "choose shorter prompts"
        raise InputError(
            f"max_length is {max_length}, but {name} has {usable} positions{and_deltas}; {tried}"
        )


def require_tokens(model: PreTrainedModel, name: str, tokens: np.ndarray, pad: int) -> None:
    """Refuse token ids (tokens,) that the model's embedding does not have.

    Raises:
        InputError: gives the largest id and the number of rows of the embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    largest = max(int(tokens.max(initial=0)), pad)
    if largest >= rows:
        raise beyond_embedding(name, largest, rows)


def beyond_embedding(name: str, token: int, rows: int) -> InputError:
    """The error of a token for which the embedding of a model has no row."""
    return InputError(
        f"the tokenizer of {name} gives the token {token}, but its embedding has {rows} rows; "
        "tokens were added without model.resize_token_embeddings(len(tokenizer)). Resize and save "
        "the model, or bring back its own tokenizer."
    )


def language_kind(config: PretrainedConfig, name: str) -> str:
    """Whether a language model fills in what is masked or goes on: "masked-lm" or "causal-lm".

    Raises:
        InputError: it is neither, as an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if not getattr(config, "is_encoder_decoder", False):
        if type(config) in AutoModelForMaskedLM._model_mapping:
            if not getattr(config, "is_decoder", False):
                return "masked-lm"
        if type(config) in AutoModelForCausalLM._model_mapping:
            return "causal-lm"
    raise InputError(
        f"{name} ({config.model_type}) is neither a masked nor a causal language model, so that no "
        f"word can be read from it; choose {LANGUAGE_MODELS}"
    )


def without_head(name: str, kind: str, lacking: Sequence[str]) -> InputError:
    """The error of a checkpoint that was saved without its language model's head."""
    what = "fills masked tokens in" if kind == "masked-lm" else "gives the next token"
    return InputError(
        f"the weights of {name} have no head that {what} ({lacking[0]} is missing), as those of an "
        f"encoder of sentences have none; choose {LANGUAGE_MODELS}"
    )


def require_classes(num_labels: int | None, labels: Sequence[str], name: str) -> None:
    """Refuse a head with fewer classes than the task of that name.

    Raises:
        InputError: it has fewer.
    """
    if (num_labels or 0) < len(labels):
        raise InputError(
            f"num_labels is {num_labels}, and {name} has {len(labels)} classes; leave num_labels "
            "out, or give as many or more"
        )


def class_order(
    model: PreTrainedModel, name: str, labels: Sequence[str], *, head_is_kept: bool
) -> np.ndarray | None:
    """The model's number of each class of a task (classes,), matched by name.

    Args:
        model: a classifier; its configuration names its classes.
        name: of the model, for errors.
        labels: names of the task's classes in the order of their numbers.
        head_is_kept: whether the model's head was trained on its classes. Without that, other
            names do not matter.

    Returns:
        None where the order is the same, or where one side has no names but numbers: ``LABEL_0`` of
        a model, or ``0`` to ``K - 1`` of a task, which are taken as the model's numbers.

    Raises:
        InputError: a head that was trained has classes of other names.
    """
    import numpy as np

    config: Any = model.config
    names = [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]
    places = {own: number for number, own in enumerate(names)}
    wanted = list(labels)
    if not set(wanted) <= set(places):
        places = {_plain(own): number for number, own in enumerate(names)}
        wanted = [_plain(label) for label in labels]
    if not set(wanted) <= set(places) or len(places) < len(names):
        by_number = wanted == [str(number) for number in range(len(labels))]
        nameless = all(map(_GENERIC.fullmatch, names))
        if not head_is_kept or by_number or nameless:
            return None
        raise InputError(
            f"the head of {name} tells the classes {_shown(names)} apart, and the task has "
            f"{_shown(labels)}; call the classes of the task as the model does, or save the model "
            "without its head (AutoModel.from_pretrained(...).save_pretrained(...)) to train a "
            "new one."
        )
    order = np.array([places[label] for label in wanted])
    return None if (order == np.arange(len(order))).all() else order


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)


def say_other_head(
    built: PreTrainedModel,
    name: str,
    reshaped: Mapping[str, Sequence[Sequence[int]]],
    goal: str | None = None,
) -> None:
    """Warn of a checkpoint's head of another size or task; `other_head` tells it afterwards.

    Args:
        built: the model, whose ``head_is_drawn`` says whether its head is a new one.
        name: of the model.
        reshaped: the shapes in the checkpoint and in the model of the head's weights that differ.
        goal: what the checkpoint says that its head was trained for (``problem_type``).
    """
    named: Any = built.config.architectures  # of a file: it may be anything
    trained = str(named[0]) if isinstance(named, list) and named else ""
    reason = ""
    if reshaped:
        key, (before, after) = next(iter(reshaped.items()))
        reason = (
            f"a head of another size ({key}: {tuple(before)} there, {tuple(after)} needed); a new "
            "one is drawn from the seed"
        )
    elif not built.head_is_drawn and "For" in trained and not trained.endswith(_CLASSIFIES):
        reason = (
            f"the head of another task ({trained}), whose weights fit by their shapes; the new "
            "task starts from them"
        )
    elif not built.head_is_drawn and goal not in (None, built.config.problem_type):
        reason = (
            f"a head for {str(goal).replace('_', ' ')}, and the new task starts from its weights"
        )
    built.other_head = reason  # type: ignore[assignment] - a plain attribute
    if reason:
        warnings.warn(f"the checkpoint of {name} has {reason}", stacklevel=3)


def refuse_left_over(built: PreTrainedModel, unexpected: Iterable[str], name: str) -> None:
    """Refuse weights that a block of the model has in the checkpoint and not in its config.json.

    They are called as those of a layer that there is, or belong into a block or a module of the
    backbone that there is, such as the bias of a map that the configuration has without one. Heads
    of other tasks may be left over, and tables that are computed (masks, frequencies).

    Raises:
        InputError: names them.
    """
    text: Any = built.config.get_text_config()
    if getattr(text, "num_hidden_layers", 1) == 0:
        raise InputError(f"the config.json of {name} has no layers (num_hidden_layers 0).")
    prefix = f"{built.base_model_prefix}."
    modules = {path.removeprefix(prefix): module for path, module in built.named_modules()}
    known = {_NUMBERS.sub("#", key.removeprefix(prefix)) for key in built.state_dict()}
    further, parts = [], []
    for key in sorted(unexpected):
        path = key.removeprefix(prefix)
        place, _, leaf = path.rpartition(".")
        numbered = _NUMBERS.search(path)
        if numbered and _NUMBERS.sub("#", path) in known:
            further.append(key)
        elif leaf not in _COMPUTED and _has_place(modules, place, leaf, numbered):
            parts.append(key)
    if further:
        raise InputError(
            f"the checkpoint of {name} has {len(further)} weights that its config.json leaves out, "
            f"such as {further[0]} and {further[-1]}; the model would be cut short. Correct the "
            "number of layers in config.json; if a shorter model is meant, load it with "
            "transformers and save it (save_pretrained)."
        )
    if parts and getattr(built.config, "quantization_config", None) is None:
        raise InputError(
            f"the checkpoint of {name} has {len(parts)} weights for which its config.json has no "
            f"place, such as {parts[0]} and {parts[-1]}; the model would be another one than was "
            "trained. Is an entry of config.json wrong (a bias, a norm, the type of the model)?"
        )


def _has_place(modules: Mapping[str, Any], place: str, leaf: str, numbered: Any) -> bool:
    """Whether the left-over weight ``leaf`` of ``place`` belongs to something that there is."""
    if place in modules:  # a mask that is kept as bias has no weight beside it
        return bool(place) and (leaf != "bias" or "weight" in modules[place]._parameters)
    return numbered is not None and place[: numbered.end()] in modules
