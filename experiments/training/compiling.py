"""The base model's pass as machine code that `torch.compile` (inductor) makes, for long trainings.

Whether a training is compiled follows from its settings, its first batch and its model, never from
a clock, so that a training that is continued decides as the uninterrupted one did. The code is made
from the first batch, before the first step of each attempt, and any number of rows and tokens is an
argument of it. Nothing is compiled after that: a batch that the code does not serve (of one row,
say) takes the ordinary pass. How a step is computed is thus a function of its batch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltacontrol.experiments.sources import cache_dir
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel
    from deltacontrol.experiments.training.settings import Settings

BACKEND = "inductor"
FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
WORK_THAT_PAYS = 2e12  # multiply-adds of a training in each matrix of its model


class CompiledPass:
    """The forward pass of a frozen model with deltas, compiled; its backward pass follows.

    The model itself stays as it is: only inside `acting` do its calls take the compiled code.

    Args:
        base: the model that the deltas act in.
    """

    def __init__(self, base: nn.Module) -> None:
        # The cache outlives the process; a folder that the user chose stays the chosen one.
        os.environ.setdefault(FOLDER_VARIABLE, str(cache_dir() / "inductor"))
        self._base = base
        # Dynamo counts compilations by code object, and all modules share that of their call.
        own = FunctionType(_call.__code__.replace(), globals())
        self._code = partial(torch.compile(own, dynamic=True, backend=BACKEND), base)

    @contextmanager
    def acting(self, *, first: bool = False) -> Iterator[None]:
        """Let calls of the model take the compiled code inside; ``first`` alone makes new code."""
        self._base._compiled_call_impl = self._code
        try:
            with _compiling() if first else torch.compiler.set_stance("eager_on_recompile"):
                yield
        finally:
            self._base._compiled_call_impl = None


@contextmanager
def _compiling() -> Iterator[None]:
    """Dropout draws as in the ordinary pass; what dynamo warns of while it traces is not shown.

    Numbers such as a scale or a dropout rate are constants of the code: to have them as arguments,
    dynamo would trace the model twice.
    """
    from torch._dynamo import config as tracing
    from torch._inductor import config as coding

    constants = tracing.patch(specialize_float=True)
    with constants, coding.patch(fallback_random=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _call(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return base._call_impl(*args, **kwargs)


def compiled_pass(
    delta_model: DeltaModel,
    settings: Settings,
    batch: Mapping[str, Any],
    precision: str,
    device: str,
    trial: Callable[[], object],
) -> CompiledPass | None:
    """The compiled pass of a training, made by its first batch; None for the ordinary one.

    With ``compile`` "always" it is made, with "never" not, and with "auto" where `pays` says so.

    Args:
        delta_model: what is trained.
        settings: of the training.
        batch: of its first step.
        precision: "fp32" or "bf16".
        device: "cpu" or "cuda".
        trial: a forward and a backward pass on that batch, which changes nothing.

    Raises:
        InputError: "always", and the training is none that can be compiled, or the compiler fails.
    """
    always = settings.compile == "always"
    if settings.compile == "never" or not (
        always or pays(delta_model, settings.steps, batch, precision, device)
    ):
        return None
    reason = obstacle(delta_model, settings)
    if reason:
        if always:
            raise InputError(f"{reason}, which compiled code does not serve; leave compile at auto")
        return None
    trial()  # what the model or the deltas refuse is told as ever
    made = CompiledPass(delta_model.model)
    try:
        with made.acting(first=True):
            trial()
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"torch.compile failed on {type(delta_model.model).__name__} ({why[:200]})"
        if always:
            raise InputError(
                f"{message}; inductor needs a C++ compiler such as g++ and a folder it may write "
                f"(${FOLDER_VARIABLE}); or train with compile auto or never"
            ) from error
        warnings.warn(f"{message}; the training goes on without", stacklevel=3)
        return None
    return made


def pays(
    delta_model: DeltaModel, steps: int, batch: Mapping[str, Any], precision: str, device: str
) -> bool:
    """Whether the time that a compilation takes is won back by the steps of a training.

        steps · tokens · parameters / matrices >= 2e12

    with the tokens of the first batch, padding included, and what the base has but embeddings. What
    is saved grows with steps · tokens · parameters, and what compiling costs with the number of
    matrices. Their products inductor leaves to the library; it saves time between them.

    Measured in fp32 (torch 2.13, LoRA on 6 blocks of width 384, batch 16 x 64, two cores with AVX2
    that others used too): a compiled step took 0.97 to 0.98 of a plain one with two threads, and
    0.88 to 0.98 with one. To compile took the processor 66 steps' time with an empty cache, and 9
    with a full one, and it has no use for a second thread. By these numbers the first training
    gains from some hundred to 6,600 steps on; the rule says 6,900. At 4 x 16 the ratio was 0.85,
    and one thread gains from 5,000 steps on: there the rule waits longer than it has to. The
    committed record of `deltacontrol.experiments.benchmarks.deltas`, of a machine without other
    work, has a saving of 7 % whose quartiles overlap with none, and 67 s to compile, of 106 steps.
    bf16, GPUs, images and sounds were not measured and are never compiled unless asked for.
    """
    tokens = num_places(batch)
    if device != "cpu" or precision != "fp32" or not tokens:
        return False
    weights, maps = sizes(delta_model.model)
    return steps * tokens * weights >= WORK_THAT_PAYS * maps


def num_places(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch, padding included; 0 where it holds other data, such as images."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if any(value.dim() > 2 for value in tensors):
        return 0
    return max((value.numel() for value in tensors if value.dim() == 2), default=0)


def sizes(base: nn.Module) -> tuple[int, int]:
    """Number of parameters of a model but those of its embeddings, and of matrices among them."""
    tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    others = [p for p in base.parameters() if id(p) not in tables]
    return sum(p.numel() for p in others), sum(p.dim() > 1 for p in others)


def obstacle(delta_model: DeltaModel, settings: Settings) -> str:
    """Why a training cannot be compiled, as the beginning of a sentence; empty if it can."""
    changing = delta_model.host.requests.after_step
    if changing:
        return f"{changing[0][0]} changes its controls' structure between the updates"
    if settings.cache_frozen:
        return "cache_frozen leaves out blocks of some passes"
    if settings.gradient_checkpointing:
        return "gradient_checkpointing runs blocks again in the backward pass"
    return ""
