"""The deltas that ``peft`` has too, of the same size in both."""

from __future__ import annotations

from typing import Any

from deltacontrol.deltas import IA3, Delta, DoRA, LoRA, PrefixTuning, PromptTuning, VeRA
from deltacontrol.theory.errors import InputError

RANK, LENGTH, VERA_RANK = 8, 16, 64
OURS: dict[str, Delta] = {
    "lora": LoRA(rank=RANK, alpha=2.0 * RANK),
    "dora": DoRA(rank=RANK, alpha=2.0 * RANK),
    "vera": VeRA(rank=VERA_RANK),
    "ia3": IA3(),
    "prefix": PrefixTuning(length=LENGTH),
    "prompt": PromptTuning(length=LENGTH),
}


def peft_config(name: str) -> Any:
    """The configuration of ``peft`` for the same controls of BERT.

    Raises:
        InputError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("this benchmark compares with peft: pip install peft") from error
    task, sites = peft.TaskType.SEQ_CLS, ["query", "value"]
    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": sites, "task_type": task}
    down = r".*layer\.\d+\.output\.dense"
    return {
        "lora": lambda: peft.LoraConfig(**lora),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "vera": lambda: peft.VeraConfig(r=VERA_RANK, target_modules=sites, task_type=task),
        "ia3": lambda: peft.IA3Config(
            target_modules=rf".*(key|value)|{down}", feedforward_modules=down, task_type=task
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type=task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type=task),
    }[name]()
