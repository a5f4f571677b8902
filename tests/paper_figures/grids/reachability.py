"""Synthetic records of the figure reachability."""

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import Grid, Synthetic


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    sites = ("attention.query", "attention.value", "mlp.up")
    for model, pretrained, layers in (
        ("minilm-l6", True, 6),
        ("minilm-l6", False, 6),
        ("smollm2-135m", True, 12),
    ):
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            config = {"model": model, "pretrained": pretrained, "num_examples": 12, "seed": seed}
            parts, spectrum = [], []
            places = [(None, None), *((layer, None) for layer in range(layers))]
            places += [(None, site) for site in sites]
            places += [(layer, site) for layer in range(layers) for site in sites]
            for layer, site in places:
                size = 2.0 ** (layer or 0) * (1 + sites.index(site) if site else 6)
                size *= float(np.exp(random.normal(0, 0.2)))
                parts.append(
                    {
                        "layer": layer,
                        "site": site,
                        "trace": size,
                        "energy_one": 6 / size,
                        "energy_all": 90 / size,
                        "predicted_gain": 0.1 * size / (1 + size) if pretrained else 0.1 / size,
                        "unreachable": 1e-15,
                    }
                )
                for index in range(12):
                    row = {"layer": layer, "site": site, "index": index}
                    spectrum.append(row | {"eigenvalue": size * 0.6**index})
            curve = pd.DataFrame(spectrum).astype({"layer": "Int64", "site": "string"})
            grid.append((Synthetic(config), {"parts": parts, "num_layers": layers}, curve))
            if model == "minilm-l6" and pretrained:
                single = [part for part in parts if part["layer"] is not None and part["site"]]
                tuned = pd.DataFrame(
                    {
                        "layer": [part["layer"] for part in single],
                        "site": [part["site"] for part in single],
                        "loss_drop": [part["predicted_gain"] ** 1.5 for part in single],
                        "test_accuracy_gain": random.normal(0.01, 0.01, len(single)),
                    }
                )
                grid.append((Synthetic(config | {"steps": 15}), {"start": {}}, tuned))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "MiniLM's output moves with the least energy from the mlp up of layer 5"
