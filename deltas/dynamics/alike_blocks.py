"""Consecutive blocks of a Transformer that compute one function of different tensors.

Such blocks have modules of the same classes and settings, tensors of the same shapes, and the same
controls, and receive the same beside the state. Then block b is the first of them with its own
tensors in the places of the first one's,

    f_t(x, u) = f(c_t, x, u),    c_t: what is frozen in block b, and in its controls,

so that `torch.vmap` along t computes all of them. What no structure shows, such as a number that a
control keeps to itself, shows in the values: `f` must agree with the steps at a random state and
control, in values and in adjoints.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deltacontrol.deltas.dynamics.stages import Stages
from deltacontrol.deltas.dynamics.state_layout import StateLayout
from deltacontrol.deltas.quantised import is_quantised
from deltacontrol.theory.control.dynamics import Alike
from deltacontrol.theory.linear.linearisation import differentiable_attention

Step: TypeAlias = Callable[[Mapping[str, Tensor], int, Tensor, Tensor], Tensor]
"""``run(c, t, x, u)``: the step t with other tensors in the places of its frozen ones."""

MOST_STACKED = 2**23
"""Entries of the tensors of all alike blocks, which are copied: 64 MiB in float64."""

_NUMBER = re.compile(r"layer_?(idx|id|index|number)")  # which block it is; the values must tell
_BLOCK = "*"


@dataclass(frozen=True)
class BlockFace:
    """How a block looks from outside.

    Attributes:
        step: the step that it is.
        entry: the layout of the state that enters it.
        exit: of the state that leaves it.
        controls: where each of its controls lies in the stages, and its shape.
    """

    step: int
    entry: StateLayout
    exit: StateLayout
    controls: Sequence[tuple[Sequence[str], torch.Size]]


class AlikeBlocks:
    """Some alike blocks.

    Args:
        stages: the stages of the model, recorded.
        blocks: which of its blocks they are, in a row.
        start: the step that the first of them is.
        run: one step.
    """

    def __init__(self, stages: Stages, blocks: range, start: int, run: Step) -> None:
        self._stages, self._blocks, self._start, self._run = stages, blocks, start, run
        self._versions: list[Any] = []
        self._held: list[Tensor] = []
        self._stacked: dict[str, Tensor] = {}

    def steps(self) -> Alike:
        """The steps that they are, with what is frozen in them as it is now."""
        return Alike(
            self._start, self._start + len(self._blocks), self._constants(), self._function
        )

    def _function(self, c: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        return self._run(c, self._start, x, u)

    def _constants(self) -> dict[str, Tensor]:
        """Each tensor of all blocks, ``(blocks, ...)``, by its name in the first of them.

        They are copied at the first call, and again where one has changed since.
        """
        blocks = [_tensors(self._stages, block) for block in self._blocks]
        versions = [_version(value) for found in blocks for value in found.values()]
        if versions != self._versions:
            columns = zip(*(found.values() for found in blocks), strict=True)
            self._stacked = {
                name: torch.stack([value.detach() for value in column])
                for name, column in zip(blocks[0], columns, strict=True)
            }
            self._versions = versions
            # Held, so that no other tensor can come to lie where one of these lay.
            self._held = [value.detach() for found in blocks for value in found.values()]
        return self._stacked


def alike_blocks(stages: Stages, faces: Sequence[BlockFace], run: Step) -> AlikeBlocks | None:
    """The longest row of alike blocks, or None.

    None too where weights are computed for the whole model at once, hold codes in few bits, or are
    more than `MOST_STACKED`, and where the values are not those of the steps.

    Args:
        stages: the stages of the model, recorded.
        faces: of its blocks.
        run: one step.
    """
    if stages.delta_model.host.edits.is_reparametrised:
        return None
    looks = [_look(stages, block, face) for block, face in enumerate(faces)]
    longest, start = range(0), 0
    for block, look in enumerate(looks):
        if look != looks[start] or not stages.called_alike(start, block):
            start = block
        if look is not None and block + 1 - start > len(longest):
            longest = range(start, block + 1)
    if len(longest) < 2:
        return None
    tensors = _tensors(stages, longest.start).values()
    if sum(value.numel() for value in tensors) * len(longest) > MOST_STACKED:
        return None
    if any(is_quantised(value) for value in tensors if isinstance(value, nn.Parameter)):
        return None
    face = faces[longest.start]
    found = AlikeBlocks(stages, longest, face.step, run)
    return found if _agrees(found.steps(), face, run) else None


def _agrees(found: Alike, face: BlockFace, run: Step) -> bool:
    """Whether values and adjoints are those of the steps, at a random state and control."""
    generator = torch.Generator().manual_seed(0)
    sizes = [face.entry.shape, torch.Size([sum(shape.numel() for _, shape in face.controls)])]
    like, number = next(iter(found.constants.values())), found.stop - found.start
    x, u, p = (
        torch.randn((number, *size), generator=generator, dtype=face.entry.dtype).to(like.device)
        for size in (sizes[0], sizes[1], sizes[0])
    )

    def values(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        y, pull = torch.func.vjp(f, x, u)[:2]
        return torch.cat([part.reshape(-1) for part in (y, *pull(p))])

    def single(c: Mapping[str, Tensor], x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return values(lambda x, u: found.function(c, x, u), x, u, p)

    with differentiable_attention(), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it has no batched form
        try:
            at_once = torch.vmap(single)(found.constants, x, u / 4, p)
        except (LookupError, NotImplementedError, RuntimeError, TypeError, ValueError, Warning):
            return False
        each = [
            values(lambda x, u, t=t: run({}, t, x, u), x[k], u[k] / 4, p[k])
            for k, t in enumerate(range(found.start, found.stop))
        ]
    wanted = torch.stack(each)
    error = (at_once - wanted).norm(dim=1) / wanted.norm(dim=1)
    return bool((error <= 1e3 * torch.finfo(wanted.dtype).eps).all())


def _open_name(stages: Stages, block: int, name: str) -> str:
    """A name with the path of the block left open, the same for alike blocks."""
    path = stages.delta_model.host.sites.block_paths[block]
    return f".{name}.".replace(f".{path}.", f".{_BLOCK}.", 1)[1:-1]


def _look(stages: Stages, block: int, face: BlockFace) -> tuple[Any, ...] | None:
    """What alike blocks have in common; None for one that can be alike to no other."""
    if face.entry != face.exit or face.entry.dtype not in (torch.float32, torch.float64):
        return None
    controls = [
        (shape, [_open_name(stages, block, place) for place in places])
        for places, shape in face.controls
    ]
    modules = [
        (name, type(module), _settings(module), len(module._forward_hooks))
        for name, module in stages.delta_model.host.sites.blocks[block].named_modules()
    ]
    tensors = [
        (_open_name(stages, block, name), value.shape, value.dtype)
        for name, value in _tensors(stages, block).items()
    ]
    return face.entry, controls, modules, tensors


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module."""
    plain = (bool, int, float, str, tuple, type(None))
    found = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
    return {name: value for name, value in found.items() if not _NUMBER.fullmatch(name)}


def _tensors(stages: Stages, block: int) -> dict[str, Tensor]:
    """Parameters and buffers of a block, and of the controls that act there, by name."""
    sites, controls = stages.delta_model.host.sites, stages.delta_model.controls
    path = sites.block_paths[block]
    found = {
        f"delta_model.model.{path}.{name}": value
        for name, value in _all_tensors(sites.blocks[block])
    }
    for name, value in _all_tensors(controls):
        if f".{path}." in f".{name}.":
            found[f"delta_model.controls.{name}"] = value
    return found


def _all_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


def _version(value: Tensor) -> tuple[int, int | None]:
    """What changes when a tensor's values do."""
    return value.data_ptr(), None if value.is_inference() else value._version
