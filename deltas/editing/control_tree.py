"""Where controllers live: a tree beside the model, of the same shape."""

from __future__ import annotations

from torch import nn

from deltacontrol.theory.errors import InputError


class ControlTree(nn.Module):
    """Controllers in a tree that mirrors the base model's module paths.

    Its ``state_dict`` keys read ``<delta>.<module path>.<parameter>``.
    """

    def place(self, path: str, item: nn.Module | nn.Parameter) -> None:
        """Put a controller, or a single parameter, at a dotted path."""
        *parents, leaf = path.split(".")
        node: nn.Module = self
        for name in parents:
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node._modules[name]  # type: ignore[assignment]
        if leaf in node._modules or leaf in node._parameters:
            raise InputError(f"two controllers at {path}; a delta controls a site once.")
        if isinstance(item, nn.Module):
            node.add_module(leaf, item)
        else:
            node.register_parameter(leaf, item)
