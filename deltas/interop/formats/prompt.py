"""PROMPT_TUNING and P_TUNING: rows in front of the embedded text.

peft collapses P-tuning's encoder on saving: the file holds the rows that it gives. An imported
P_TUNING is therefore a `PromptTuning`, and goes on from where the encoder ended.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.fields import COMMON, PROMPT, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot, shared
from deltacontrol.deltas.interop.targets import task_type
from deltacontrol.deltas.methods.intrinsic_prompt import IntrinsicPrompt
from deltacontrol.deltas.methods.p_tuning import PTuning
from deltacontrol.deltas.methods.prompt import PromptTuning
from deltacontrol.theory.errors import InputError

ROWS = "prompt_embeddings"


class RowsFormat(Format):
    """Rows (n, d), under one bare key."""

    root = "base_model."

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One PromptTuning, which stays in the states where peft's outputs depend on that."""
        check_task(config, host)
        length, width = config["num_virtual_tokens"], host.width
        check_sizes(config, {"token_dim": width})
        delta = PromptTuning(length=length, strip=not _keeps(host))
        return Plan([delta], [Slot(ROWS, (length, width), (f"{_place(host)}.rows",))], [])

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """The rows of all prompts; the one that was attached last stands in front."""
        place, model = _place(host), type(host.model).__name__
        rows = torch.cat([item.tree.get_submodule(place)().detach() for item in attached[::-1]])
        if shared(attached, "strip") and _keeps(host):
            raise InputError(
                f"peft leaves a prompt in the states, where the first position of {model} is the "
                "prompt's and not the text's, so the outputs would change; train with strip=false."
            )
        if not shared(attached, "strip") and _reads_last_token(host):
            raise InputError(
                f"{model} reads the last token of the text, which a prompt that stays displaces; "
                "train with strip=true."
            )
        config = {
            "num_virtual_tokens": len(rows),
            "token_dim": rows.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": host.config.num_attention_heads,
            "num_layers": host.config.num_hidden_layers,
            **self.encoder_fields(attached),
        }
        check_task(config | {"task_type": task_type(host.model)}, host)
        return Description(config, {f"{place}.rows": rows.cpu()})

    @abstractmethod
    def encoder_fields(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """What made the rows."""


class PromptFormat(RowsFormat):
    """The rows were trained as they are, or in a fixed subspace."""

    peft_type = "PROMPT_TUNING"
    fields = {
        **COMMON,
        **PROMPT,
        "prompt_tuning_init": Field("RANDOM", "a text"),
        "prompt_tuning_init_text": Field(None, "a text"),
        "tokenizer_name_or_path": Field(None, "a text"),
        "tokenizer_kwargs": Field(None),
    }
    writes = (PromptTuning, IntrinsicPrompt)

    def encoder_fields(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """Nothing."""
        return {}


class PTuningFormat(RowsFormat):
    """An encoder made the rows."""

    peft_type = "P_TUNING"
    fields = {
        **COMMON,
        **PROMPT,
        "encoder_reparameterization_type": Field(
            "MLP", only=("MLP", "LSTM"), why="peft has no other"
        ),
        "encoder_hidden_size": Field(None, "a positive integer"),
        "encoder_num_layers": Field(2, "a positive integer"),
        "encoder_dropout": Field(0.0, "a number"),
    }
    writes = (PTuning,)

    def encoder_fields(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """The encoder's kind and sizes."""
        return {
            "encoder_reparameterization_type": shared(attached, "encoder").upper(),
            "encoder_hidden_size": shared(attached, "hidden"),
            "encoder_num_layers": shared(attached, "num_layers"),
        }


def _place(host: Host) -> str:
    return host.sites.embedding_path or host.sites.backbone_path


def _reads_last_token(host: Host) -> bool:
    """Whether a classifier looks at the last token; transformers calls such heads ``score``."""
    return task_type(host.model) == "SEQ_CLS" and hasattr(host.model, "score")


def _keeps(host: Host) -> bool:
    """Whether peft's outputs need the rows behind the blocks.

    Outputs of each position do not, nor does a classifier of the last token: at the text they are
    those of a prompt that is taken off. A classifier of the first position reads the first row.
    """
    task = task_type(host.model)
    return task == "FEATURE_EXTRACTION" or (task == "SEQ_CLS" and not _reads_last_token(host))


def check_task(config: Mapping[str, Any], host: Host) -> None:
    """Refuse what peft cannot run, or runs with rows for a decoder as well.

    Raises:
        InputError: no task, another than the model's, or an encoder with a decoder.
    """
    own, task, model = task_type(host.model), config["task_type"], type(host.model).__name__
    if own is None:
        raise InputError(
            f"peft has no task_type for {model}, and runs no prompt without one; load a model with "
            "another head."
        )
    if task != own:
        raise InputError(
            f"the adapter's task_type is {task!r}, but {model} is for {own}; load the model with "
            "the head that the adapter was made for."
        )
    if host.model.config.is_encoder_decoder:
        raise InputError(
            f"in {model} peft's rows are also what the decoder attends to, which no delta here "
            "does; load the encoder alone."
        )


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Refuse sizes of another model; those that are left out follow from the model.

    Raises:
        InputError: a size differs; all are listed.
    """
    wrong = [
        f"{name} is {config[name]}, this model has {size}"
        for name, size in sizes.items()
        if config[name] not in (None, size)
    ]
    if wrong:
        raise InputError(f"the adapter is for another model: {'; '.join(wrong)}.")


FORMATS = (PromptFormat(), PTuningFormat())
