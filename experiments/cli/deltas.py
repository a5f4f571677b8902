"""``deltacontrol deltas``: the delta methods by name."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import cleandoc


@dataclass(frozen=True)
class Deltas:
    """List the delta methods: category, control law, number of parameters, source.

    Attributes:
        show: One method, with its fields and what they mean.
    """

    show: str | None = None

    def run(self) -> None:
        """Print the list, or one method."""
        from deltacontrol.deltas.registry import available, fields
        from deltacontrol.theory.errors import unknown

        methods = available()
        if self.show is None:
            width = max(map(len, methods))
            for name, method in methods.items():
                print(f"{name:{width}}  {method.category:17}  {method.law}")
            print("\nFields, formula and source: deltacontrol deltas --show lora")
            print("In commands: --delta lora:rank=16,sites=attention.query+mlp.up bitfit")
            return
        if self.show not in methods:
            raise unknown("delta", self.show, methods)
        method = methods[self.show]
        print(f"{method.name} ({method.__name__}), {method.category}")
        print(f"  law         {method.law}")
        print(f"  parameters  {method.num_parameters_formula}")
        print(f"  source      {method.reference}")
        print(f"  at start    {'the model itself' if method.identity_at_start else 'perturbed'}\n")
        print(f"{cleandoc(method.__doc__ or '')}\n\nDefaults:")
        for field, (_, default) in fields(self.show).items():
            print(f"  {field} = {default!r}")


COMMAND = Deltas
