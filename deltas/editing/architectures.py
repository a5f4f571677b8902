"""Where a model keeps its blocks, and where a block keeps its sites: laws, not a list of models.

Blocks. They are the members of the one outermost list of modules that hold attention (or, where no
list does, of those that transformers may run again under gradient checkpointing): what the forward
pass calls once each, in order. An encoder-decoder has two such lists, the encoder's first. Two
lists in any other model are two towers, and which of them is meant is not known.

Sites. Models name the parts of a block in few ways. Three maps of one module that are called query,
key and value by one of the `_TRIPLES` are an attention; its output map is beside them. Of the maps
outside of it, `_UP` and `_DOWN` are the MLP's. What is special to a model is in the tables: how the
features of a map that is query, key and value at once are laid out (`_FUSED`), and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

# Names of the maps of query, key and value.
_TRIPLES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("Wq", "Wk", "Wv"),
)
_QUERIES = {query: (key, value) for query, key, value in _TRIPLES}
# One map for all three, and how its output features lie: first all queries, then all keys, then all
# values ("whole"), or so for each head of keys and the queries that share it ("heads").
_FUSED = {
    "c_attn": {"gpt2": "whole", "imagegpt": "whole", "openai-gpt": "whole",
               "decision_transformer": "whole", "gpt_bigcode": "heads"},
    "Wqkv": {"mpt": "whole", "modernbert": "whole", "dbrx": "whole"},
    "qkv_proj": {"phi3": "whole"},
    "query_key_value": {"bloom": "heads", "falcon": "heads", "gpt_neox": "heads",
                        "gpt_neox_japanese": "heads", "persimmon": "heads"},
    "qkv": {},
}  # fmt: skip
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "o", "Wo", "c_proj", "dense")
_UP = (
    "up_proj", "fc1", "c_fc", "lin1", "dense_h_to_4h", "fc_in", "wi", "wi_1", "intermediate_dense",
    "ffn", "intermediate.dense",
)  # fmt: skip
_UP_HALF = ("gate_up_proj", "Wi")  # act(first half) ⊙ second half
_DOWN = (
    "down_proj", "fc2", "c_proj", "lin2", "dense_4h_to_h", "fc_out", "wo", "Wo", "output_dense",
    "ffn_output", "output.dense",
)  # fmt: skip
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)  # attention to another text
# Modules of a task's head, in models that keep it beside the parts of the backbone.
HEADS = ("projector", "classifier", "classification_head")


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model.

    Attributes:
        paths: in the order in which the forward pass calls them.
        calls: how often it calls each of them: more than once where layers share their weights.
        unclear: why it is not known which modules are the blocks, where that is so.
    """

    paths: list[str] = field(default_factory=list)
    calls: int = 1
    unclear: str = ""


@dataclass(frozen=True)
class Place:
    """A module, or the range ``part`` in each of ``groups`` equal runs of its output features."""

    path: str
    part: tuple[int, int] | None = None
    groups: int = 1


@dataclass
class BlockSites:
    """Where a block has the sites of each name, and why it has none of another.

    Attributes:
        places: by name.
        lacking: reasons, by name, that tell more than that there is no such module.
    """

    places: dict[str, list[Place]] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, place: Place) -> None:
        """Note a place."""
        self.places.setdefault(name, []).append(place)


def find_blocks(modules: Mapping[str, nn.Module], config: Any) -> Blocks:
    """The blocks of the model that has these modules; see the head of this file."""
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and _has_weights(m)]
    attending = [p for p in lists if any(_attends(n) for n, _ in modules[p].named_modules())]
    again = [
        p for p in lists if isinstance(next(modules[p].children()), GradientCheckpointingLayer)
    ]
    found = attending or again or lists
    found = [p for p in found if not any(p.startswith(other + ".") for other in found)]
    if len(found) > 1 and not attending:  # without attention, the depth tells
        depths = [p for p in found if len(list(modules[p].children())) == _depth(config)]
        found = depths if len(depths) == 1 else found
    if len(found) == 2 and getattr(config, "is_encoder_decoder", False):
        pairs = zip(*(path.split(".") for path in found), strict=False)
        first, second = next(((a, b) for a, b in pairs if a != b), ("", ""))
        if "decoder" in first and "encoder" in second:
            found.reverse()
        if {"encoder", "decoder"} <= {first, second}:
            return Blocks([path for p in found for path in _members(p, modules)])
    if len(found) > 1:
        return Blocks(
            unclear=f"has several towers of blocks ({', '.join(found)}), of which none follows "
            "the other as a decoder follows its encoder"
        )
    if not found:
        return Blocks()
    paths = _members(found[0], modules)
    listed, depth = len(modules[found[0]]), _depth(config)  # type: ignore[arg-type]
    if listed > len(paths):
        return Blocks(paths, calls=listed // len(paths))
    shared = len(paths) < depth and depth % len(paths) == 0 and len(paths) not in _depths(config)
    return Blocks(paths, calls=depth // len(paths) if shared else 1)


def find_sites(
    block: str, modules: Mapping[str, nn.Module], model_type: str, config: Any
) -> BlockSites:
    """The sites of the block at a path."""
    found = BlockSites()
    inside = {p: m for p, m in modules.items() if p.startswith(block + ".")}
    maps = {
        path: module
        for path, module in inside.items()
        if isinstance(module, nn.Linear | Conv1D) and not _CROSS.search(path[len(block) :])
    }
    taken: list[str] = []  # attentions and their output maps: no part of an MLP
    for path in maps:
        core, _, leaf = path.rpartition(".")
        if any(core.startswith(prefix) for prefix in taken):
            continue
        if f"{core}.kv_b_proj" in maps and leaf in ("q_proj", "q_b_proj"):
            _add_latent(found, core, leaf, modules)
        elif leaf in _QUERIES and all(f"{core}.{other}" in maps for other in _QUERIES[leaf]):
            for name, other in zip(("query", "key", "value"), (leaf, *_QUERIES[leaf]), strict=True):
                found.add(f"attention.{name}", Place(f"{core}.{other}"))
        elif leaf in _FUSED:
            _add_fused(found, path, maps[path], model_type, config)
        else:
            continue
        found.add("attention", Place(core))
        output = _output(core, block, maps)
        if output:
            found.add("attention.output", Place(output))
        taken += [core + ".", *([output] if output else [])]
    rest = {p: m for p, m in maps.items() if not any(p.startswith(prefix) for prefix in taken)}
    _add_mlp(found, block, rest, inside, taken)
    return found


def _add_latent(found: BlockSites, core: str, query: str, modules: Mapping[str, Any]) -> None:
    """DeepSeek's attention: keys without positions and values of each head come from one map."""
    module = modules[core]
    found.add("attention.query", Place(f"{core}.{query}"))
    heads, key, value = module.num_heads, module.qk_nope_head_dim, module.v_head_dim
    found.add("attention.value", Place(f"{core}.kv_b_proj", (key, key + value), heads))
    found.lacking["attention.key"] = (
        "its keys are put together from a latent by kv_b_proj and kv_a_proj_with_mqa"
    )


def _add_fused(found: BlockSites, path: str, module: Any, model_type: str, config: Any) -> None:
    """The parts of a map that is query, key and value at once: (H + 2 H_kv) w features."""
    layout = _FUSED[path.rpartition(".")[2]].get(model_type)
    if layout is None:
        for name in ("query", "key", "value"):
            found.lacking[f"attention.{name}"] = (
                f"{path} computes query, key and value at once, and how they lie in its output is "
                "not known"
            )
        return
    total = _features(module)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (total // width - heads) // 2
    groups = keys if layout == "heads" else 1
    queries, keys = heads * width // groups, keys * width // groups
    ends = (0, queries, queries + keys, queries + 2 * keys)
    for k, name in enumerate(("query", "key", "value")):
        found.add(f"attention.{name}", Place(path, (ends[k], ends[k + 1]), groups))


def _features(module: Any) -> int:
    """Width of a map's output. Its weight does not tell: in 4 bits two numbers share a byte."""
    return module.nf if isinstance(module, Conv1D) else module.out_features


def _output(core: str, block: str, maps: Mapping[str, Any]) -> str | None:
    """The attention's output map: in its own module, or beside it as BERT's."""
    around = core.rpartition(".")[0]
    beside = [f"{around}.output.dense"] if around != block else []
    names = [*(f"{core}.{leaf}" for leaf in _OUTPUTS), *beside]
    return next((name for name in names if name in maps), None)


def _add_mlp(found: BlockSites, block: str, maps: Mapping[str, Any],
             inside: Mapping[str, nn.Module], attentions: list[str]) -> None:  # fmt: skip
    """The maps of the MLPs, and the one module around both of them where there is one.

    A mixture of experts is an MLP, but no single map is its first or last.
    """
    experts = [p for p in inside if _expert(p, block)]
    for path in experts:
        before = re.split(r"\.[^.]*expert", path[len(block) :], maxsplit=1, flags=re.IGNORECASE)[0]
        around = block + before
        if around != block and Place(around) not in found.places.get("mlp", []):
            found.add("mlp", Place(around))
        for name in ("mlp.up", "mlp.down"):
            found.lacking[name] = f"the MLP at {around} is a mixture of experts"
    up = {}
    for path, module in maps.items():
        if path in experts:
            continue
        if _ends(path, block, _UP):
            up[_around(path, "intermediate.dense")] = path
            found.add("mlp.up", Place(path))
        elif _ends(path, block, _UP_HALF):
            half = _features(module) // 2
            up[path.rpartition(".")[0]] = path
            found.add("mlp.up", Place(path, (half, 2 * half)))
        elif _ends(path, block, _DOWN):
            found.add("mlp.down", Place(path))
            around = _around(path, "output.dense")
            apart = not any(taken.startswith(around + ".") for taken in attentions)
            if around in up and around != block and apart:
                found.add("mlp", Place(around))


def _around(path: str, ending: str) -> str:
    """Where both maps of an MLP lie, by the path of one of them."""
    whole = path.removesuffix("." + ending)
    return path.rpartition(".")[0] if whole == path else whole


def _ends(path: str, block: str, names: tuple[str, ...]) -> bool:
    relative = path[len(block) :]
    return any(relative.endswith("." + name) for name in names)


def _expert(path: str, block: str) -> bool:
    return "expert" in path[len(block) :].lower()


def _attends(path: str) -> bool:
    leaf = path.rpartition(".")[2]
    return leaf in _QUERIES or leaf in _FUSED or leaf == "kv_b_proj"


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _members(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The blocks of a list, those of the lists in it included; a list itself is never called."""
    children = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    nested = [isinstance(modules[child], nn.ModuleList) for child in children]
    if any(nested):
        return [
            p
            for c, n in zip(children, nested, strict=True)
            for p in (_members(c, modules) if n else [c])
        ]
    return children


def _depths(config: Any) -> Iterator[int]:
    for name in ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            yield value


def _depth(config: Any) -> int:
    value = getattr(config, "num_hidden_layers", 0)
    return value if isinstance(value, int) else 0
