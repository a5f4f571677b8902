"""The dimension that a Transformer needs for a task: fine-tuning in subspaces, as one record.

`deltacontrol.experiments.studies.d90.dimension` searches; here stands what is trained and how a
record is read. Sources: Aghajanyan et al., ACL 2021, section 3 (DID, SAID).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deltacontrol.experiments.models.family import PREFIX
from deltacontrol.experiments.studies.d90.dimension import DimensionSearch, Reading
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.experiments.runs.record import Record

METHODS = {"said": "said", "did": "subspace"}


@dataclass(frozen=True)
class _Trained:
    """What is trained, and how: the fields that a command asks for before those of the search."""

    model: str = "minilm-l6"
    """A packaged model's name, a local folder, or an id on the hub."""
    task: str = "movie"
    """A packaged task's name, or the path of a CSV, JSON Lines or Parquet file."""
    method: Literal["said", "did"] = "said"
    """said: a subspace with a trained gain for every layer; did: one of all parameters alike."""
    delta: str = ""
    """The delta whose parameters the subspace is of, such as lora:rank=8; all if empty."""
    baseline: Literal["full", "pretrained", "delta"] = "full"
    """What to reach a share of: full fine-tuning of the same start, that of the pre-trained start,
    or the delta itself."""
    baseline_model: str = ""
    """The model whose full fine-tuning gives the target; the model itself if empty. With a smaller
    model here, models of several sizes are held to one target."""
    projection: str = "fastfood"
    """The kind of P: fastfood, dense, gaussian, sparse-sign, srht or kronecker."""
    pretrained: bool = True
    """Whether to start from pre-trained weights, or from random ones of the same architecture."""
    steps: int = 100
    """Updates of a training."""
    batch_size: int = 16
    """Examples of an update."""
    max_length: int = 64
    """Longest text in tokens; longer ones are cut."""
    eval_limit: int | None = 1000
    """Evaluate on at most so many validation rows, and as many test rows."""
    text_column: str = "text"
    """Column of the texts in a task file."""
    label_column: str = "label"
    """Column of the labels in a task file."""
    task_kind: Literal["classification", "regression"] | None = None
    """What the labels of a task file are; inferred by default."""


@dataclass(frozen=True)
class FineTuningDimension(DimensionSearch, _Trained):
    """The dimension that a model needs for a task."""

    kind: ClassVar[str] = "dimension"
    younger: ClassVar[tuple[str, ...]] = ("baseline_model",)

    def __post_init__(self) -> None:
        """Check the fields and write the delta in full."""
        super().__post_init__()
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; expected said or did")
        if self.baseline not in ("full", "pretrained", "delta"):
            raise InputError(f"baseline is {self.baseline!r}; expected full, pretrained or delta")
        if self.baseline == "delta" and not self.delta:
            raise InputError("baseline is delta, but no delta is given; give one, such as lora")
        if self.baseline_model and self.baseline != "full":
            raise InputError(
                f"baseline_model is {self.baseline_model}, and baseline {self.baseline}; another "
                "model gives its full fine-tuning alone: leave baseline at full"
            )
        self.training(self.largest, 1.0, 0)  # which checks what a training takes

    @property
    def label(self) -> str:
        """Model, start, task, method and delta."""
        start = "" if self.pretrained else " from random weights"
        of = f" of {self.delta}" if self.delta else ""
        by = f" by {self.baseline_model}" if self.baseline_model else ""
        return f"{self.model}{start} {self.task} {self.method}{of}{by}"

    def training(self, dimension: int, rate: float, seed: int) -> FineTuning:
        """Fine-tuning in a subspace."""
        delta = self._subspace(self.method, dimension)
        return self._tuning(delta, rate, seed, self.pretrained)

    def baseline_training(self, rate: float, seed: int) -> FineTuning:
        """Full fine-tuning, or the delta itself."""
        start = self.pretrained or self.baseline == "pretrained"
        delta = self.delta if self.baseline == "delta" else "full"
        found = self._tuning(delta, rate, seed, start)
        return replace(found, model=self.baseline_model) if self.baseline_model else found

    def first_rate(self) -> float:
        """About what MiniLM wants, or the small models of the family."""
        small = (self.baseline_model or self.model).startswith(PREFIX)
        return 3e-3 if self.baseline == "delta" or small else 3e-4

    def reading(self, record: Record) -> Reading:
        """Accuracy against the majority class, or Pearson's correlation against zero."""
        result = record.result
        metric, loss = ("accuracy", "loss") if "accuracy" in result else ("pearson", "mse")
        if metric not in result:
            raise InputError(
                f"{self.task} is no classification or regression, and a share of a loss is no "
                "target; choose another task"
            )
        curve = record.curve()
        last = curve.get(f"validation_{loss}")
        return Reading(
            result[metric],
            result.get(f"best_validation_{metric}"),
            None if last is None else float(last.iloc[-1]),
            result["majority_share"] or 0.0,
        )

    def extent(self) -> tuple[int, int]:
        """One beside the gains of the method, and all parameters that the subspace is of."""
        from deltacontrol.deltas.methods.parts.coordinates import Coordinates
        from deltacontrol.deltas.methods.said import ScaledCoordinates

        def laid(method: str, dimension: int, kind: type[Any]) -> Any:
            delta = self._subspace(method, dimension)
            tuned = self._tuning(delta, 1.0, 0, self.pretrained).setting().controlled
            return next(module for module in tuned.modules() if isinstance(module, kind))

        most = laid("did", 1, Coordinates).full_dim
        if self.method == "did":
            return 1, most
        gains = laid("said", min(most, 1000), ScaledCoordinates).gains
        return len(gains) + 1, most

    def _subspace(self, method: str, dimension: int) -> dict[str, Any]:
        return {
            "name": METHODS[method],
            "dimension": dimension,
            "projection": self.projection,
            "of": self.delta.replace(",", ";"),
        }

    def _tuning(self, delta: Any, rate: float, seed: int, pretrained: bool) -> FineTuning:
        return FineTuning(
            model=self.model,
            task=self.task,
            deltas=(delta,),
            learning_rate=rate,
            seed=seed,
            pretrained=pretrained,
            steps=self.steps,
            eval_every=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_limit=self.eval_limit,
            text_column=self.text_column,
            label_column=self.label_column,
            task_kind=self.task_kind,
        )
