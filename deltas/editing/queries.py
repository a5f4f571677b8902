"""What a model looks like to a delta: its sites, its widths, its parameters and their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas.editing.sites import Site, SiteMap, whole_paths
from deltacontrol.deltas.quantised import is_quantised, values_of
from deltacontrol.theory.errors import InputError


class Queries:
    """Questions about a model; none of them changes it.

    Args:
        model: the base model.

    Attributes:
        sites: of the model.
        originals: the base's own parameters where controls stand in for them, by name; filled by
            :class:`deltacontrol.deltas.editing.edits.Edits`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sites = SiteMap(model)
        self.originals: dict[str, nn.Parameter] = {}

    @property
    def config(self) -> Any:
        """The model's configuration (of its text part, where there are several)."""
        return self.model.config.get_text_config()

    @property
    def width(self) -> int:
        """Width of the token embeddings; raises as ``embedding_weight`` does."""
        return self.embedding_weight.shape[1]

    @property
    def embedding_weight(self) -> Tensor:
        """The matrix of token embeddings, (vocabulary, width).

        Raises:
            InputError: the model reads no tokens.
        """
        embedding = self.model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise InputError(
                f"{type(self.model).__name__} reads {self.model.main_input_name} through a "
                f"{type(embedding).__name__}, not tokens through a table of embeddings, so nothing "
                "can enter in front of its tokens; choose another delta, such as prefix or lora."
            )
        return embedding.weight

    def weight(self, site: Site) -> Tensor:
        """The weight of the linear map at a site; its values, where it is quantised."""
        return values_of(site.module, self.model.dtype)

    def like(self, site: Site) -> Tensor:
        """A tensor of the device and the dtype that controls at a site take."""
        device = self.model.device
        for parameter in site.module.parameters():
            if not is_quantised(parameter):
                return parameter
            device = parameter.device
        return torch.empty(0, device=device, dtype=self.model.dtype)

    def find(self, targets: Iterable[str], layers: Iterable[int] | None = None) -> list[Site]:
        """Sites of ``targets``; see :meth:`deltacontrol.deltas.editing.sites.SiteMap.resolve`."""
        return self.sites.resolve(targets, layers)

    def parameter_names(self, module_paths: Iterable[str]) -> list[str]:
        """Names of all parameters in the given modules, in the model's order, tied names too."""
        prefixes = tuple(path + "." for path in module_paths)
        return [n for n in self.owners() if n.startswith(prefixes)]

    def backbone_names(
        self,
        sites: Iterable[str] | None = None,
        layers: Iterable[int] | None = None,
        *,
        method: str = "",
    ) -> list[str]:
        """Names of the backbone's parameters, without the task head, tied names too.

        Args:
            sites: only those in these modules; None means all.
            layers: only those in these blocks; None means all.
            method: who asks, for the error's message.

        Raises:
            InputError: a target matches nothing, or is a part of a module.
        """
        if sites is None and layers is None:
            names = list(self.owners())
        else:
            found = self.find(("block",) if sites is None else sites, layers)
            names = self.parameter_names(whole_paths(found, method))
        head = tuple(path + "." for path in self.sites.head_paths())
        return [name for name in names if not name.startswith(head)]

    def parameter(self, name: str) -> nn.Parameter:
        """The base parameter of that name."""
        return self.owners()[name]

    def distinct(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The base parameters of these names, tied ones once, under their first name."""
        owners = self.owners()
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name in names:
            found.setdefault(id(owners[name]), (name, owners[name]))
        return dict(found.values())

    def original(self, name: str) -> Tensor:
        """The base model's own parameter of that name, also where a control stands in for it."""
        return self.originals.get(name, self.owners()[name])

    def tied(self, name: str) -> list[str]:
        """Other names of the base parameter ``name``."""
        owners = self.owners()
        return [other for other, p in owners.items() if p is owners[name] and other != name]

    def owners(self) -> dict[str, nn.Parameter]:
        """All base parameters by all of their names, tied names too."""
        return dict(self.model.named_parameters(remove_duplicate=False))
