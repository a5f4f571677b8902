"""What may be done to a model: all of it can be suspended, and undone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
from deltacontrol.deltas.editing.queries import Queries
from deltacontrol.deltas.quantised import refuse_quantised
from deltacontrol.theory.errors import InputError


class Edits:
    """What deltas do to one model, and how to take it back.

    Args:
        queries: the model.

    Attributes:
        namespace: of the delta that edits.
        controls: the controllers.
        state_path: control parameter -> path of the module that it acts at.
        shared: control parameters that act on all layers at once.
        replaced: base parameter -> control that stands for it.
        merges: how base parameters take up controls.
        acted_on: of each namespace, the modules whose inputs or outputs its laws change.
        prefixes: what attention modules see beside their own keys and values.
        is_reparametrised: whether base parameters are functions of controls.
        copies: while several copies of the deltas share a pass.
        is_suspended: whether the base acts alone at present.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self.model = queries.model
        self.namespace = ""
        self.controls = ControlTree()
        self.state_path: dict[str, str] = {}
        self.shared: list[str] = []
        self.replaced: dict[str, str] = {}
        self.merges: list[Merge] = []
        self.acted_on: dict[str, list[nn.Module]] = {}
        self.prefixes: list[attention.Prefix] = []
        self.is_reparametrised = False
        self.copies: Copies | None = None
        self.is_suspended = False
        self._undo: list[Callable[[], None]] = []
        # Each puts something of the base's own in its place, and gives what takes it away again.
        self._aside: list[Callable[[], Callable[[], None]]] = []
        self._back: list[Callable[[], None]] = []  # what takes away the base's own, while suspended
        self._taken: set[str] = set()  # base parameters that a control stands for
        self._intercepted = False
        self._carried: list[Carried] = []

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
        owners = self._queries.owners()
        self._refuse_taken(names)
        refuse_quantised({n: owners[n] for n in names}, f"{self.namespace} cannot train")
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
        for name, original in self._queries.distinct(names).items():
            control = nn.Parameter(original.detach().clone())
            self.controls.place(f"{self.namespace}.{name}", control)
            self.state_path[f"{self.namespace}.{name}"] = name.rpartition(".")[0]
            aliases = [n for n in names if owners[n] is original]
            for alias in aliases:
                self._queries.originals[alias] = original
                self.replaced[alias] = f"{self.namespace}.{name}"
                self.set_parameter(alias, control)
            self._undo.append(lambda a=aliases, p=original, c=control: self._put_back(a, p, c))
            self._step_aside(aliases, lambda _, p=original, c=control: _beside(c, p))
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

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.set_parameter(name, value)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Put a tensor in the place of a base parameter."""
        path, _, leaf = name.rpartition(".")
        self._queries.sites.modules[path]._parameters[leaf] = value  # type: ignore[assignment]

    def on_output(
        self, module: nn.Module, law: Callable[[tuple, Tensor], Tensor], *, first: bool = False
    ) -> None:
        """Pass a module's output through ``law(inputs, output)``; ``first``: before others.

        ``inputs`` are the positional arguments; a module that is called with keywords alone has
        its ``hidden_states``, or else the first of them.
        """

        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if self.is_suspended:
                return output
            if not args and kwargs:
                args = (kwargs.get("hidden_states", next(iter(kwargs.values()))),)
            state = first_tensor(output)
            copies = self.copies
            changed = copies.output(law, args, state) if copies else law(args, state)
            return with_first_tensor(output, changed)

        self.acted_on.setdefault(self.namespace, []).append(module)
        handle = module.register_forward_hook(hook, prepend=first, with_kwargs=True)
        self._undo.append(handle.remove)

    def on_call(self, module: nn.Module, law: Callable[[tuple, dict], tuple[tuple, dict]]) -> None:
        """Pass a module's arguments through ``law(args, kwargs)``."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if self.is_suspended:
                return args, kwargs
            return self.copies.call(law, args, kwargs) if self.copies else law(args, kwargs)

        self.acted_on.setdefault(self.namespace, []).append(module)
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def reparametrise(self, names: list[str], values: Callable[[], dict[str, Tensor]]) -> None:
        """Let base parameters be a function of controls, computed once in every forward pass.

        Under gradient checkpointing the values stay in place until the next pass, because the
        backward pass runs parts of the forward again.

        Raises:
            InputError: another delta controls one of the parameters already.
        """
        self.is_reparametrised = True
        originals = {name: self._queries.parameter(name) for name in names}
        refuse_quantised(originals, f"{self.namespace} cannot change")
        merging: dict[str, Tensor] = {}  # computed once for all, and each taken out when used

        def merged(name: str) -> Tensor:
            if name not in merging:
                merging.update({n: value.detach() for n, value in values().items()})
            return merging.pop(name).double()

        for name in names:
            self.on_merge(name, lambda _, n=name: merged(n), whole=True)
        owned = {id(p): name for name, p in originals.items()}
        places = {n: owned[id(p)] for n, p in self._queries.owners().items() if id(p) in owned}
        self._refuse_taken(places)
        self._taken.update(places)
        earlier: dict[str, Tensor] = {}

        def put(value: Callable[[str], Tensor]) -> None:
            for alias in places:
                self.set_parameter(alias, value(alias))

        def original(alias: str) -> Tensor:
            return originals[places[alias]]

        def begin() -> None:
            owners = self._queries.owners()
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
        self._step_aside(places, original)
        self.around_passes(begin, end)

    def around_passes(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Call ``begin`` before and ``end`` behind every pass; see `editing.passes`."""

        def unless_suspended(act: Callable[[], None]) -> Callable[[], None]:
            return lambda: None if self.is_suspended else act()

        self._undo += around_passes(self.model, unless_suspended(begin), unless_suspended(end))

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

        self.around_passes(begin, end)

    def add_prefix(self, module: nn.Module, prefix: attention.Prefix) -> None:
        """Let an attention module see ``prefix`` beside its own keys and values."""
        if not self._intercepted:
            interception = attention.Interception(self.model)
            self._undo.append(interception.undo)
            self._aside.append(interception.step_aside)
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

    def controlled(self, name: str) -> Tensor:
        """The base parameter in float64, under the control that stands for it, if there is one."""
        value = self._queries.original(name).detach().double()
        for merge in self.merges:
            if merge.whole and merge.name == name:
                value = merge.value(value)
        return value

    def override(self, name: str, value: Any) -> None:
        """Give the base model's object an attribute of its own, before that of its class."""
        earlier = {key: own for key, own in self.model.__dict__.items() if key == name}

        def restore() -> None:
            del self.model.__dict__[name]
            self.model.__dict__.update(earlier)

        self.model.__dict__[name] = value
        self._undo.append(restore)

    def on_undo(self, restore: Callable[[], None]) -> None:
        """Call ``restore`` in its turn when everything is taken back."""
        self._undo.append(restore)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the base act as if nothing had been done to it, bit for bit; may be nested."""
        if self.is_suspended:
            yield
            return
        self.is_suspended = True
        try:
            for step_aside in self._aside:
                self._back.append(step_aside())
            yield
        finally:
            while self._back:
                self._back.pop()()
            self.is_suspended = False

    def _step_aside(self, names: Iterable[str], original: Callable[[str], Tensor]) -> None:
        """While suspended, have ``original(name)`` in the places of these base parameters."""
        names = list(names)

        def step_aside() -> Callable[[], None]:
            owners = self._queries.owners()
            present = {name: owners[name] for name in names}
            self._put({name: original(name) for name in names})
            return lambda: self._put(present)

        self._aside.append(step_aside)

    def undo(self) -> None:
        """Take everything back, last thing first."""
        self._back.clear()  # inside of `suspended`, the base's own stays
        while self._undo:
            self._undo.pop()()


def _beside(control: nn.Parameter, original: nn.Parameter) -> nn.Parameter:
    """A base parameter where the model is now, which may have moved since a control replaced it."""
    if original.device == control.device and original.dtype == control.dtype:
        return original
    return nn.Parameter(original.detach().to(control.device, control.dtype), requires_grad=False)
