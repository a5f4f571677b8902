"""The one way a delta may touch a model: everything done here can be undone, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas.editing import prefix_attention as attention
from deltacontrol.deltas.editing.control_tree import ControlTree
from deltacontrol.deltas.editing.copies import Copies, map_over_copies
from deltacontrol.deltas.editing.merging import Merge
from deltacontrol.deltas.editing.passes import (
    Carried,
    around_passes,
    first_tensor,
    with_first_tensor,
)
from deltacontrol.deltas.editing.sites import Site, SiteMap, whole_paths
from deltacontrol.theory.errors import InputError

# Losses of the model under control, each with its graph, of single examples where a quantity is
# defined by them; anew at each call.
Losses = Callable[[], Iterable[Tensor]]


class Host:
    """A model that deltas are being attached to.

    Args:
        model: the base model.
        seed: seed of the controllers' initial values.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        self.model = model
        self.sites = SiteMap(model)
        self.controls = ControlTree()
        self.generator = torch.Generator().manual_seed(seed)
        self.namespace = ""
        self.state_path: dict[str, str] = {}  # control parameter -> path of the module it acts at
        self.shared: list[str] = []  # control parameters that act on all layers at once
        self.rate_factors: dict[str, float] = {}  # control parameter -> factor on the learning rate
        # What a delta asks of the training, with the delta's namespace.
        self.preparations: list[tuple[str, Callable[[Losses], None]]] = []
        self.penalties: list[tuple[str, Callable[[], Tensor]]] = []
        self.after_step: list[tuple[str, Callable[[int, int], bool | None]]] = []
        self.merges: list[Merge] = []
        self._undo: list[Callable[[], None]] = []
        self.replaced: dict[str, str] = {}  # base parameter -> control that stands for it
        self.prefixes: list[attention.Prefix] = []
        self.is_reparametrised = False
        self.copies: Copies | None = None  # while several copies of the deltas share a pass
        self._originals: dict[str, nn.Parameter] = {}
        self._taken: set[str] = set()  # base parameters that a control stands for
        self._intercepted = False
        self._carried: list[Carried] = []

    # -- what the model looks like ---------------------------------------------------------------

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
        """The weight of the linear map at a site."""
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def find(self, targets: Iterable[str], layers: Iterable[int] | None = None) -> list[Site]:
        """Sites of ``targets``; see :meth:`deltacontrol.deltas.editing.sites.SiteMap.resolve`."""
        return self.sites.resolve(targets, layers)

    def parameter_names(self, module_paths: Iterable[str]) -> list[str]:
        """Names of all parameters in the given modules, in the model's order, tied names too."""
        prefixes = tuple(path + "." for path in module_paths)
        return [n for n in self._owners() if n.startswith(prefixes)]

    def backbone_names(
        self, sites: Iterable[str] | None = None, layers: Iterable[int] | None = None
    ) -> list[str]:
        """Names of the backbone's parameters, without the task head, tied names too.

        Args:
            sites: only those in these modules; None means all.
            layers: only those in these blocks; None means all.

        Raises:
            InputError: a target matches nothing, or is a part of a module.
        """
        if sites is None and layers is None:
            names = list(self._owners())
        else:
            found = self.find(("block",) if sites is None else sites, layers)
            names = self.parameter_names(whole_paths(found, self.namespace))
        head = tuple(path + "." for path in self.sites.head_paths())
        return [name for name in names if not name.startswith(head)]

    def parameter(self, name: str) -> nn.Parameter:
        """The base parameter of that name."""
        return self._owners()[name]

    def distinct(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The base parameters of these names, tied ones once, under their first name."""
        owners = self._owners()
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name in names:
            found.setdefault(id(owners[name]), (name, owners[name]))
        return dict(found.values())

    def original(self, name: str) -> Tensor:
        """The base model's own parameter of that name, also where a control stands in for it."""
        return self._originals.get(name, self._owners()[name])

    def controlled(self, name: str) -> Tensor:
        """The base parameter in float64, under the control that stands for it, if there is one."""
        value = self.original(name).detach().double()
        for merge in self.merges:
            if merge.whole and merge.name == name:
                value = merge.value(value)
        return value

    def tied(self, name: str) -> list[str]:
        """Other names of the base parameter ``name``."""
        owners = self._owners()
        return [other for other, p in owners.items() if p is owners[name] and other != name]

    def _owners(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def normal(self, *shape: int, std: float) -> Tensor:
        """Gaussian initial values, from this host's generator."""
        return torch.randn(*shape, generator=self.generator) * std

    def kaiming(self, rows: int, columns: int) -> Tensor:
        """Uniform initial values in ±1/√columns, from this host's generator."""
        return nn.init.kaiming_uniform_(
            torch.empty(rows, columns), a=math.sqrt(5), generator=self.generator
        )

    def draw_seed(self) -> int:
        """A seed for random constants, from this host's generator."""
        return int(torch.randint(2**31, (), generator=self.generator))

    # -- what a delta may do ---------------------------------------------------------------------

    def add(
        self, site_path: str, controller: nn.Module, like: Tensor, key: str | None = None
    ) -> Any:
        """Register a controller that acts at a module.

        Args:
            site_path: path of the module in the base model.
            controller: holds the control's parameters; it is moved to device and dtype of ``like``.
            like: a parameter of the site.
            key: name of the controller in the tree; None means the path itself.
        """
        controller = controller.to(like.device, like.dtype)
        key = f"{self.namespace}.{key or site_path}"
        self.controls.place(key, controller)
        for name, _ in controller.named_parameters():
            self.state_path[f"{key}.{name}"] = site_path
        return controller

    def replace(self, names: Iterable[str]) -> None:
        """Make base parameters trainable: a copy takes their place until ``detach``.

        Raises:
            InputError: a parameter is tied to one that is not in ``names``, or another delta
                controls it already.
        """
        names = list(names)
        owners = self._owners()
        self._refuse_taken(names)
        for name in names:
            tied = [
                other for other, p in owners.items() if p is owners[name] and other not in names
            ]
            if tied:
                raise InputError(
                    f"{name} is tied to {', '.join(tied)}: training it would change both. Choose "
                    "targets that include all of them (full), or untie the model "
                    "(tie_word_embeddings=False)."
                )
        for name, original in self.distinct(names).items():
            control = nn.Parameter(original.detach().clone())
            self.controls.place(f"{self.namespace}.{name}", control)
            self.state_path[f"{self.namespace}.{name}"] = name.rpartition(".")[0]
            aliases = [n for n in names if owners[n] is original]
            for alias in aliases:
                self._originals[alias] = original
                self.replaced[alias] = f"{self.namespace}.{name}"
                self.set_parameter(alias, control)
            self._undo.append(lambda a=aliases, p=original, c=control: self._put_back(a, p, c))
            self.on_merge(name, lambda _, c=control: c.detach().double(), whole=True)
        self._taken.update(names)

    def _put_back(self, names: list[str], original: nn.Parameter, control: nn.Parameter) -> None:
        """Put a base parameter back; it follows the model if that went elsewhere meanwhile."""
        original.data = original.data.to(control.device, control.dtype)
        for name in names:
            self.set_parameter(name, original)

    def _refuse_taken(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._taken:
                raise InputError(f"{name} is controlled by two deltas; drop one of them.")

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Put a tensor in the place of a base parameter."""
        path, _, leaf = name.rpartition(".")
        self.sites.modules[path]._parameters[leaf] = value  # type: ignore[assignment]

    def on_output(
        self, module: nn.Module, law: Callable[[tuple, Tensor], Tensor], *, first: bool = False
    ) -> None:
        """Pass a module's output through ``law(inputs, output)``; ``first``: before others.

        ``inputs`` are the positional arguments; a module that is called with keywords alone has
        its ``hidden_states``, or else the first of them.
        """

        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not args and kwargs:
                args = (kwargs.get("hidden_states", next(iter(kwargs.values()))),)
            state = first_tensor(output)
            copies = self.copies
            changed = copies.output(law, args, state) if copies else law(args, state)
            return with_first_tensor(output, changed)

        handle = module.register_forward_hook(hook, prepend=first, with_kwargs=True)
        self._undo.append(handle.remove)

    def on_call(self, module: nn.Module, law: Callable[[tuple, dict], tuple[tuple, dict]]) -> None:
        """Pass a module's arguments through ``law(args, kwargs)``."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return self.copies.call(law, args, kwargs) if self.copies else law(args, kwargs)

        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def reparametrise(self, names: list[str], values: Callable[[], dict[str, Tensor]]) -> None:
        """Let base parameters be a function of controls, computed once in every forward pass.

        Under gradient checkpointing the values stay in place until the next pass, because the
        backward pass runs parts of the forward again.

        Raises:
            InputError: another delta controls one of the parameters already.
        """
        self.is_reparametrised = True
        originals = {name: self.parameter(name) for name in names}
        merging: dict[str, Tensor] = {}  # computed once for all, and each taken out when used

        def merged(name: str) -> Tensor:
            if name not in merging:
                merging.update({n: value.detach() for n, value in values().items()})
            return merging.pop(name).double()

        for name in names:
            self.on_merge(name, lambda _, n=name: merged(n), whole=True)
        owned = {id(p): name for name, p in originals.items()}
        places = {n: owned[id(p)] for n, p in self._owners().items() if id(p) in owned}
        self._refuse_taken(places)
        self._taken.update(places)
        earlier: dict[str, Tensor] = {}

        def put(value: Callable[[str], Tensor]) -> None:
            for alias in places:
                self.set_parameter(alias, value(alias))

        def original(alias: str) -> Tensor:
            return originals[places[alias]]

        def begin() -> None:
            owners = self._owners()
            earlier.update({alias: owners[alias] for alias in places})
            current = values()
            put(lambda alias: current[places[alias]])

        def end() -> None:
            if not self.model.is_activation_checkpointing:
                put(original)
            elif not torch.is_grad_enabled():  # a backward pass may still need what was there
                put(earlier.__getitem__)
            earlier.clear()

        self._undo.append(lambda: put(original))
        self._undo += around_passes(self.model, begin, end)

    def carry(self) -> Carried:
        """A place where one module of a forward pass leaves something for a later one.

        It is emptied when the pass ends. Under gradient checkpointing it stays, because the
        backward pass runs the blocks again; a pass without gradients in between gives back what it
        found.
        """
        if not self._carried:
            self._empty_after_passes()
        self._carried.append(Carried())
        return self._carried[-1]

    def _empty_after_passes(self) -> None:
        earlier: list[Any] = []

        def begin() -> None:
            earlier[:] = [carried.value for carried in self._carried]

        def end() -> None:
            checkpointing = self.model.is_activation_checkpointing
            if not checkpointing or not torch.is_grad_enabled():
                for carried, value in zip(self._carried, earlier, strict=True):
                    carried.value = value if checkpointing else None
            earlier.clear()

        self._undo += around_passes(self.model, begin, end)

    def add_prefix(self, module: nn.Module, prefix: attention.Prefix) -> None:
        """Let an attention module see ``prefix`` beside its own keys and values."""
        if not self._intercepted:
            self._undo.append(attention.intercept(self.model))
            self._intercepted = True
        self.prefixes.append(prefix)
        self._undo.append(attention.add_prefix(module, self._of_each_copy(prefix)))

    def _of_each_copy(self, prefix: attention.Prefix) -> attention.Prefix:
        if hasattr(prefix, "gate"):
            return prefix
        return lambda: self.copies.prefix(prefix) if self.copies else prefix()

    @property
    def carried(self) -> tuple[Carried, ...]:
        """The places of `carry`: a control reads there what another module of the pass left."""
        return tuple(self._carried)

    def map_over_copies(self, module: nn.Module) -> None:
        """Let a module whose weights are controls use each copy's own while copies share a pass."""
        self._undo.append(map_over_copies(module, lambda: self.copies))

    # -- what a delta may ask of the training ----------------------------------------------------

    def on_data(self, prepare: Callable[[Losses], None]) -> None:
        """Call ``prepare(losses)`` before training: for controls that depend on the data."""
        self.preparations.append((self.namespace, prepare))

    def add_penalty(self, penalty: Callable[[], Tensor]) -> None:
        """Add a scalar to the training loss."""
        self.penalties.append((self.namespace, penalty))

    def on_step(self, act: Callable[[int, int], bool | None]) -> None:
        """Call ``act(step, num_steps)`` after update ``step`` (from 1); gradients still stand.

        It returns true where it has put the controls elsewhere, so that the training should forget
        the optimiser's moments and its best evaluation.
        """
        self.after_step.append((self.namespace, act))

    def scale_rate(self, controller: nn.Module, leaf: str, factor: float) -> None:
        """Train the parameter ``leaf`` of a controller at ``factor`` times the learning rate."""
        parameter = controller.get_parameter(leaf)
        owners = self.controls.named_parameters()
        self.rate_factors[next(name for name, p in owners if p is parameter)] = factor

    def on_merge(
        self,
        name: str,
        value: Callable[[Tensor], Tensor],
        *,
        whole: bool = False,
        last: bool = False,
    ) -> None:
        """Say how the base parameter ``name`` takes up this delta's controls; see `Merge`."""
        self.merges.append(Merge(self.namespace, name, value, whole, last))

    def undo(self) -> None:
        """Take everything back, last thing first."""
        while self._undo:
            self._undo.pop()()
