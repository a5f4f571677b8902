"""Where a delta can act: names with a meaning, resolved per architecture.

A *site* is a module of the frozen model, possibly a slice of its output features (GPT-2 computes
query, key and value in one matrix, GPT-NeoX as well and head by head). The semantic names are

    attention.query | attention.key | attention.value | attention.output   linear maps
    mlp.up | mlp.down                                                      linear maps
    attention | mlp | block | norm | embedding | head                      modules

``attention`` is the module that computes softmax(QKᵀ)V of a layer's own states (not the
cross-attention of a decoder), ``mlp.up`` the branch of a gated MLP without the activation, and
``mlp`` exists only where one module spans both of its matrices. Besides these, a target may be a
module's full path, the end of a path ("c_proj", "self.query") or a regular expression that matches
a full path. A target that matches nothing is an error that names the nearest candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.editing.architectures import HEADS, BlockSites, find_blocks, find_sites
from deltacontrol.deltas.patterns import match_whole
from deltacontrol.theory.errors import InputError

SEMANTIC = (
    "attention.query attention.key attention.value attention.output mlp.up mlp.down "
    "attention mlp block norm embedding head"
).split()


@dataclass(frozen=True)
class Site:
    """A module of the base model, or the output features ``part`` of it.

    Attributes:
        path: the module's name in the base model.
        module: the module itself.
        layer: index of the block that contains it; None outside the blocks.
        part: range of output features, for matrices that hold several maps side by side.
        groups: the output features are so many runs of equal length, and ``part`` is a range of
            each of them (1: of the whole).
    """

    path: str
    module: nn.Module
    layer: int | None = None
    part: tuple[int, int] | None = None
    groups: int = 1

    @property
    def in_features(self) -> int:
        """Width of the input of the linear map at this site."""
        return self._shape()[0]

    @property
    def out_features(self) -> int:
        """Width of the output of the linear map at this site (of ``part``, where there is one)."""
        return self.groups * (self.part[1] - self.part[0]) if self.part else self._shape()[1]

    @property
    def total_out_features(self) -> int:
        """Width of the whole module's output, whatever ``part`` says."""
        return self._shape()[1]

    @property
    def key(self) -> str:
        """A name of its own for each site: the path, and the range of a slice behind it."""
        return self.path if self.part is None else f"{self.path}.{self.part[0]}-{self.part[1]}"

    @property
    def margins(self) -> tuple[int, int]:
        """How many output features lie before and behind this site in each of the groups."""
        length = self.total_out_features // self.groups
        start, stop = self.part or (0, length)
        return start, length - stop

    def spread(self, values: Tensor) -> Tensor:
        """(…, out_features) at the site's place in (…, total_out_features), zero beside it."""
        return spread(values, self.margins, self.groups)

    def take(self, values: Tensor) -> Tensor:
        """The site's share (…, out_features) of (…, total_out_features)."""
        if self.part is None:
            return values
        start, stop = self.part
        if self.groups == 1:
            return values[..., start:stop]
        return values.unflatten(-1, (self.groups, -1))[..., start:stop].flatten(-2)

    def rows(self, weight: Tensor) -> Tensor:
        """This site's map (out, in) in a tensor of the shape of the module's weight."""
        return self.take(weight if isinstance(self.module, Conv1D) else weight.T).T

    def _shape(self) -> tuple[int, int]:
        if isinstance(self.module, nn.Linear):
            return self.module.in_features, self.module.out_features
        if isinstance(self.module, Conv1D):
            return self.module.weight.shape[0], self.module.weight.shape[1]
        raise InputError(
            f"{self.path} is a {type(self.module).__name__}, not a linear map; expected a Linear "
            "or Conv1D. Choose sites such as attention.query, attention.value or mlp.down."
        )


def spread(values: Tensor, margins: tuple[int, int], groups: int) -> Tensor:
    """See :meth:`Site.spread`; for controllers that keep the numbers, not the site."""
    if not any(margins):
        return values
    if groups == 1:
        return pad(values, margins)
    return pad(values.unflatten(-1, (groups, -1)), margins).flatten(-2)


def add_change(site: Site, change: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """The module's weight after ``change()``, (out, in), is added to the map at a site."""
    moved = site.spread(change().T)  # (in, out), as Conv1D keeps its weight
    return weight + (moved if isinstance(site.module, Conv1D) else moved.T)


def whole_paths(sites: Iterable[Site], method: str) -> list[str]:
    """Paths of the modules at ``sites``, each once, for a method that takes whole modules.

    Slices count where together they are the whole module, as GPT-2's query, key and value are.

    Raises:
        InputError: only a part of a module's output features is there.
    """
    parts: dict[str, list[Site]] = {}
    for site in sites:
        parts.setdefault(site.path, []).append(site)
    for path, members in parts.items():
        covered = sum(site.out_features for site in members if site.part)
        if all(site.part for site in members) and covered != members[0].total_out_features:
            raise InputError(
                f"{method}: {path} computes several maps at once and holds them in one tensor; "
                f"take the whole, sites={path!r}."
            )
    return list(parts)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """What the model reads its input through; None where transformers names no such module."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by its class's name, and no layer around one."""
    maps = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    named = "Norm" in type(module).__name__
    return named and not any(isinstance(m, maps) for m in module.modules())


class SiteMap:
    """The sites of one model.

    Attributes:
        backbone_path: path of the backbone in the model ("" when the model is one).
        xs of all blocks, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        backbone = getattr(model, "base_model", model)
        self.backbone_path = next(path for path, m in self.modules.items() if m is backbone)
        self._config: Any = getattr(model, "config", None)
        self.model_type = getattr(self._config, "model_type", type(model).__name__)
        self._blocks = find_blocks(self.modules, self._config)
        self._block_sites: dict[str, BlockSites] = {}
        embedding = input_embedding(model)
        self._output_embedding = getattr(model, "get_output_embeddings", lambda: None)()
        self.embedding_path = next((p for p, m in self.modules.items() if m is embedding), None)

    @property
    def block_paths(self) -> list[str]:
        """Paths of all blocks, in order.

        Raises:
            InputError: the model has several towers of blocks.
        """
        if self._blocks.unclear:
            raise InputError(
                f"{self.model_type} {self._blocks.unclear}, so it is not known which blocks are "
                "meant; give one of the towers as the model, or choose modules by their names."
            )
        return self._blocks.paths

    @property
    def calls(self) -> int:
        """How often the forward pass calls each block: more than once where layers share one."""
        return self._blocks.calls

    def check_called_once(self, method: str, advice: str) -> None:
        """Refuse a model whose layers share their blocks.

        Args:
            method: who asks, for the error's message.
            advice: what to try.

        Raises:
            InputError: the forward pass calls a block several times.
        """
        if self.calls > 1:
            raise InputError(
                f"{method}: {self.model_type} calls the same block for {self.calls} layers, so no "
                f"layer has a block of its own; {advice}."
            )

    def sites_of(self, block: str) -> BlockSites:
        """The sites of the block at a path."""
        if block not in self._block_sites:
            config = getattr(self._config, "get_text_config", lambda: self._config)()
            self._block_sites[block] = find_sites(block, self.modules, self.model_type, config)
        return self._block_sites[block]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order."""
        return [self.modules[path] for path in self.block_paths]

    @property
    def num_stacks(self) -> int:
        """Lists that the blocks lie in: two in an encoder-decoder."""
        return len({path.rpartition(".")[0] for path in self.block_paths})

    def layer_of(self, path: str) -> int | None:
        """Index of the block that contains ``path``; None outside the blocks."""
        for index, block in enumerate(self._blocks.paths):
            if path == block or path.startswith(block + "."):
                return index
        return None

    def head_paths(self) -> list[str]:
        """Top-level modules beside the backbone that hold parameters: the task head."""
        if not self.backbone_path:  # T5 keeps its stacks and its head side by side, Whisper too
            return [
                p
                for p, m in self.modules.items()
                if p and (m is self._output_embedding or p in HEADS)
            ]
        root = self.backbone_path.split(".")[0]
        return [
            path
            for path, module in self.modules.items()
            if path and "." not in path and path != root and any(True for _ in module.parameters())
        ]

    def resolve(self, targets: Iterable[str], layers: Iterable[int] | None = None) -> list[Site]:
        """Sites of all ``targets``, in the order of the model, each once.

        Args:
            targets: semantic names, module paths, ends of paths, or regular expressions.
            layers: keep only sites in these blocks.

        Raises:
            InputError: a target matches nothing, a layer does not exist.
        """
        if isinstance(targets, str):
            raise InputError(f"sites is the text {targets!r}; expected a tuple: ({targets!r},).")
        if isinstance(layers, int):
            raise InputError(f"layers is the number {layers}; expected a tuple: ({layers},).")
        found: dict[tuple[str, tuple[int, int] | None], Site] = {}
        for target in targets:
            matches = self._match(target, layers)
            if not matches:
                raise self._no_match(target)
            found.update({(site.path, site.part): site for site in matches})
        order = {path: i for i, path in enumerate(self.modules)}
        sites = sorted(found.values(), key=lambda s: (order[s.path], s.part or (0, 0)))
        if layers is None:
            return sites
        wanted = set(layers)
        unknown = sorted(wanted - set(range(len(self.block_paths))))
        if unknown or not wanted:
            raise InputError(
                f"layers {unknown or 'is empty'}: this model has blocks 0 to "
                f"{len(self.block_paths) - 1}."
            )
        kept = [site for site in sites if site.layer in wanted]
        if not kept:
            raise InputError(f"none of {sorted(set(targets))} lies in the layers {sorted(wanted)}.")
        return kept

    def _match(self, target: str, layers: Iterable[int] | None) -> list[Site]:
        if target in SEMANTIC:
            return self._match_semantic(target, layers)
        paths = [p for p in self.modules if p and (p == target or p.endswith("." + target))]
        if not paths:
            paths = [p for p in self.modules if p and match_whole(target, p)]
        return [self._site(path) for path in paths]

    def _match_semantic(self, target: str, layers: Iterable[int] | None) -> list[Site]:
        if target == "embedding":
            return [self._site(self.embedding_path)] if self.embedding_path else []
        if target == "head":
            return [self._site(path) for path in self.head_paths()]
        if target == "block":
            return [self._site(path) for path in self.block_paths]
        if target == "norm":
            norms = [p for p, m in self.modules.items() if _is_norm(m)]
            return [self._site(p) for p in norms if p.rpartition(".")[0] not in norms]
        blocks, wanted = list(enumerate(self.block_paths)), None if layers is None else set(layers)
        if wanted is not None and wanted & set(range(len(blocks))):
            blocks = [(index, block) for index, block in blocks if index in wanted]
        sites: list[Site] = []
        for index, block in blocks:
            found = self.sites_of(block)
            if target in found.lacking:
                raise InputError(
                    f"{self.model_type} has no single module for {target!r} in {block}, because "
                    f"{found.lacking[target]}; choose other sites, blocks that have it (layers), "
                    "or modules by their names."
                )
            for place in found.places.get(target, ()):
                module = self.modules[place.path]
                sites.append(Site(place.path, module, index, place.part, place.groups))
        if not sites:
            raise self._no_place(target)
        return sites

    def _no_place(self, target: str) -> InputError:
        """A semantic name that no block has a module for."""
        names = {name for block in self.block_paths for name in self.sites_of(block).places}
        names |= {"block", "norm", "embedding", "head"}
        has = ", ".join(name for name in SEMANTIC if name in names)
        if names & {"attention.query", "attention"}:
            return InputError(
                f"{self.model_type} has no single module for {target!r}; it has {has}."
            )
        return InputError(
            f"the site name {target!r} has no meaning for {self.model_type!r}, in whose blocks no "
            "attention with maps of query, key and value is found. Use module names or a regular "
            "expression instead."
        )

    def _site(self, path: str) -> Site:
        return Site(path, self.modules[path], self.layer_of(path))

    def _no_match(self, target: str) -> InputError:
        leaves = {path.rsplit(".", 1)[-1] for path in self.modules if path}
        names = sorted({*SEMANTIC, *leaves, *self.modules} - {""})
        near = get_close_matches(target, names, n=5, cutoff=0.4) or SEMANTIC[:6]
        return InputError(
            f"the site {target!r} matches no module of {self.model_type}; nearest: "
            f"{', '.join(near)}. `deltacontrol inspect` prints the module tree."
        )
