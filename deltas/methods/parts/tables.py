"""Tables of embeddings as sites."""

from __future__ import annotations

from torch import nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


def check_table(name: str, host: Host, site: Site) -> None:
    """Refuse an embedding that only lends its table to the modules that look tokens up.

    Args:
        name: the method's.
        host: the model.
        site: any site; one that is no embedding passes.

    Raises:
        InputError: a path at the site would have no effect.
    """
    if not isinstance(site.module, nn.Embedding) or site.path != host.sites.embedding_path:
        return
    others = [other.rpartition(".")[0] for other in host.tied(f"{site.path}.weight")]
    others = [p for p in others if isinstance(host.sites.modules[p], nn.Embedding)]
    if others:
        raise InputError(
            f"{name}: {host.sites.model_type} looks tokens up at {' and '.join(others)}, which "
            f"{site.path} only lends its table, so a path there has no effect; choose them as "
            "sites."
        )
