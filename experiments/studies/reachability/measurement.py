"""What each layer and each site of a model could gain, predicted from Gramians, and what it gains.

Outputs are the two-class margins z of a few training examples, one each; the control is LoRA,
shared by all examples. `SiteGramians` computes without training, from the linearised model,

    W_t = C_t C_tᵀ of every layer and site, its spectrum and trace,
    the least energy that moves the margins by one towards their labels,
    the gain ½ gᵀ(λI + W_t H)⁻¹ W_t g of the linear-quadratic model (g, H: loss derivatives).

`SiteTuning` trains each site alone, on the same examples, from the same draw of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Head, Setting
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.experiments.measures.margins import MarginData
    from deltacontrol.experiments.measures.site_maps import MarginMap
    from deltacontrol.theory.linear.output_map import Part

SITES = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "mlp.up",
    "mlp.down",
)


@dataclass(frozen=True)
class _OnSites(Experiment):
    """The fields of both experiments.

    Attributes:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification of two classes.
        head: "classification" (a head, fitted by logistic regression to other training rows) or
            "causal-lm" (two words after a prompt).
        pretrained: False for a backbone of random weights.
        sites: where LoRA acts.
        rank: its rank r; α = 2 r.
        num_examples: training examples, drawn by the seed.
        max_length: tokens of an example at most.
        head_rows: further training rows to which the head is fitted.
        weight_decay: λ.
        dtype: of the arithmetic.
        seed: of the examples, of A, and of a random backbone.
    """

    model: str = "minilm-l6"
    task: str = "movie"
    head: str = "classification"
    pretrained: bool = True
    sites: Sequence[str] = SITES
    rank: int = 8
    num_examples: int = 48
    max_length: int = 16
    head_rows: int = 512
    weight_decay: float = 1e-3
    dtype: str = "float64"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        if min(self.num_examples, self.max_length, self.rank) < 1 or not self.weight_decay > 0:
            raise InputError(
                f"num_examples is {self.num_examples}, max_length {self.max_length}, rank "
                f"{self.rank}, weight_decay {self.weight_decay}; expected positive numbers."
            )

    def _data(self, test_rows: int = 0) -> MarginData:
        from deltacontrol.experiments.measures.margins import MarginData

        return MarginData.of(self.setting(test_rows))

    def setting(self, test_rows: int = 0) -> Setting:
        """The model, the examples, and so many unseen ones."""
        heads: dict[str, Head] = {"classification": "ridge", "causal-lm": "words"}
        if self.head not in heads:
            raise unknown("head", self.head, heads)
        return Setting(
            self.model,
            self.task,
            train_rows=self.num_examples,
            test_rows=test_rows,
            order="shuffled",
            strict_rows=True,
            max_length=self.max_length,
            head=heads[self.head],
            head_rows=self.head_rows,
            dtype=self.dtype,
            pretrained=self.pretrained,
            seed=self.seed,
        )


@dataclass(frozen=True)
class SiteGramians(_OnSites):
    """Gramians of the margins, layer by layer and site by site. Trains nothing."""

    kind: ClassVar[str] = "site-gramians"
    steps: ClassVar[int] = 0

    @property
    def label(self) -> str:
        """Model and seed."""
        return f"Gramians {self.model}{'' if self.pretrained else ' random'} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """One row for every layer, every site, and every pair; the spectra as the curve."""
        import pandas as pd

        from deltacontrol.experiments.measures.margins import logistic_derivatives, logistic_loss
        from deltacontrol.experiments.measures.site_maps import margin_map

        data = self._data()
        found = margin_map(data, self.sites, self.rank, self.seed)
        derivatives = logistic_derivatives(found.margins, data.signs)
        rows, curve = [], []
        for layer, site, part in _groups(found):
            row, values = _describe(found, part, data.signs, derivatives, self.weight_decay)
            rows.append({"layer": layer, "site": site, **row})
            curve += [
                {"layer": layer, "site": site, "index": i, "eigenvalue": v}
                for i, v in enumerate(values)
            ]
        result = {
            "parts": rows,
            "loss": float(logistic_loss(found.margins, data.signs)),
            "accuracy": float((found.margins * data.signs > 0).double().mean()),
            "margin_mean_size": float(found.margins.abs().mean()),
            "num_layers": 1 + max(layer for layer, _ in found.parts),
        }
        table = pd.DataFrame(curve).astype({"layer": "Int64", "site": "string"})
        return Outcome("completed", result, table)


@dataclass(frozen=True)
class SiteTuning(_OnSites):
    """Real tuning of each site alone, by L-BFGS.

    Attributes:
        steps: iterations of L-BFGS.
        test_rows: unseen examples on which the gain is measured too.
    """

    steps: int = 15
    test_rows: int = 256
    dtype: str = "float32"

    kind: ClassVar[str] = "site-tuning"

    @property
    def label(self) -> str:
        """Model and seed."""
        return f"tuning each site {self.model} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """One row for every pair of layer and site."""
        import pandas as pd
        from tqdm.auto import tqdm

        from deltacontrol.experiments.measures.site_maps import SiteTuner

        tuner = SiteTuner(
            self._data(self.test_rows), self.sites, self.rank, self.seed, self.weight_decay
        )
        rows = []
        for layer, site in tqdm(tuner.parts, disable=not workspace.progress, unit="site"):
            tuned = tuner.tune((layer, site), self.steps)
            rows.append({"layer": layer, "site": site, **asdict(tuned)})
        return Outcome("completed", {"start": dict(tuner.start())}, pd.DataFrame(rows))


def _groups(found: MarginMap) -> list[tuple[int | None, str | None, Part]]:
    """Everything, each layer, each site over all layers, and each pair; None stands for all."""
    pairs = found.parts
    layers = dict.fromkeys(layer for layer, _ in pairs)
    sites = dict.fromkeys(site for _, site in pairs)
    groups: list[tuple[int | None, str | None, Part]] = [
        (None, None, {t: slice(None) for t, _ in pairs.values()})
    ]
    for layer in layers:
        stages = {t for (other, _), (t, _) in pairs.items() if other == layer}
        groups.append((layer, None, {t: slice(None) for t in stages}))
    for site in sites:
        groups.append((None, site, {t: e for (_, s), (t, e) in pairs.items() if s == site}))
    groups += [(layer, site, {t: e}) for (layer, site), (t, e) in pairs.items()]
    return groups


def _describe(
    found: MarginMap, part: Part, signs: Any, derivatives: Any, weight_decay: float
) -> tuple[dict[str, float], list[float]]:
    """The numbers of one part, and the eigenvalues of its Gramian."""
    import torch

    from deltacontrol.theory.linear.output_map import linear_quadratic_gain

    gradient, hessian = derivatives
    gramian = found.outputs.gramian(part)
    gain = linear_quadratic_gain(gramian, gradient, hessian, weight_decay)
    least = found.outputs.minimum_energy(signs, part)
    row = {
        "num_controls": sum(int(found.outputs.access[t][e].numel()) for t, e in part.items()),
        "trace": float(gramian.trace()),
        "slope": float(gradient @ gramian @ gradient),  # gᵀWg: what a small gradient step gains
        "predicted_gain": gain.objective_drop,
        "predicted_loss_drop": gain.loss_drop,
        "energy_one": float((0.5 / gramian.diagonal()).mean()),
        "energy_all": least.energy,
        "unreachable": float(least.unreachable.norm() / signs.norm()),
    }
    return row, torch.linalg.eigvalsh(gramian).flip(0).clamp_min(0).tolist()
