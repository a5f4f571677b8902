"""A bound on the test error of a trained model, from its training rows alone.

The hypotheses are the controls w = u - u₀ of a delta of few numbers, such as a random subspace:
what they act through (the pre-trained model, the head's start, P) is fixed before any row is seen,
by the seed. Of one trained w, and with probability at least 1 - δ each,
`deltacontrol.theory.bounds` gives

    compression   w rounded to L levels: its training error, and the length of its code;
    PAC-Bayes     the Gaussian N(w, σ²I): its mean training error, itself estimated by draws and
                  bounded, and the divergence from N(0, τ²I).

What was chosen by looking at the rows is paid for: L and τ come from lists, and ln(choices) nats
are added for the setting (d, rate, steps, what P acts over), found among at most so many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from deltacontrol.deltas import DeltaModel
    from deltacontrol.experiments.tasks import Task
    from deltacontrol.experiments.tasks.encoding import Encoded, EncodedSplit
    from deltacontrol.theory.bounds import Quantised

LAST_BLOCK = "selected-modules:sites=bert.encoder.layer.2+bert.pooler+classifier"
PRIORS = range(-96, 32)  # τ is 2^(i/4), any of 128
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class GeneralisationBound(Experiment):
    """Train a delta of few numbers and bound its error.

    Attributes:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification task; all its training rows count.
        delta: as a text, with the head among what it moves, or else the head stays at its start.
        learning_rate: peak rate.
        steps: updates.
        batch_size: examples per update.
        max_length: tokens of a text at most.
        levels: numbers of levels to which w is rounded; the best one counts.
        ratios: σ over the root mean square of w; the best one counts.
        draws: of the Gaussian, for the bound of its mean training error.
        rows_per_draw: random training rows that each draw is seen on.
        confidence: 1 - δ.
        choices: settings that this one may have been chosen from by looking at the rows.
        random_labels: every row gets another one's label: nothing can be learned then.
        seed: of the head, of P, of the batches and of the draws.
    """

    model: str = "minilm-l3"
    task: str = "movie"
    delta: str = f"subspace:dimension=300,of={LAST_BLOCK}"
    learning_rate: float = 0.3
    steps: int = 400
    batch_size: int = 16
    max_length: int = 32
    levels: Sequence[int] = (3, 5, 9, 17)
    ratios: Sequence[float] = (0.1, 0.2, 0.4, 0.8)
    draws: int = 1024
    rows_per_draw: int = 8
    confidence: float = 0.99
    choices: int = 10_000
    random_labels: bool = False
    seed: int = 0

    kind: ClassVar[str] = "generalisation-bound"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)

    def __post_init__(self) -> None:
        """Check numbers and lists."""
        if min(self.steps, self.batch_size, self.draws, self.rows_per_draw, self.choices) < 1:
            raise InputError(
                f"steps is {self.steps}, batch_size {self.batch_size}, draws {self.draws}, "
                f"rows_per_draw {self.rows_per_draw}, choices {self.choices}; expected whole "
                "numbers >= 1"
            )
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected one between 0 and 1")
        if not self.levels or min(self.levels) < 2 or not self.ratios or min(self.ratios) <= 0:
            raise InputError(
                f"levels are {list(self.levels)} and ratios {list(self.ratios)}; expected numbers "
                "of levels >= 2 and positive ratios"
            )

    @property
    def label(self) -> str:
        """Task, whether its labels are real, and seed."""
        labels = " random labels" if self.random_labels else ""
        return f"bound {self.model} {self.task}{labels} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train, round, draw, bound.

        The result holds num_rows, num_controls, chance (error of the most frequent label),
        train_error and test_error of w, and for ``compression`` and ``pac_bayes`` the bound of the
        best level or ratio, with the training and test error of what it bounds; every level and
        every ratio is in ``by_level`` and ``by_ratio``.

        Raises:
            InputError: no classification, a delta that looks at the rows before training, or a
                training that diverges.
        """
        from deltacontrol.experiments.training.loop import train
        from deltacontrol.experiments.training.settings import Settings

        bench = _Bench(self)
        settings = Settings(steps=self.steps, learning_rate=self.learning_rate, seed=self.seed)
        trained = train(
            bench.controlled,
            bench,
            settings,
            checkpoint_dir=workspace.folder,
            progress=workspace.progress,
        )
        if trained.status != "completed":
            raise InputError(f"{self.label}: {trained.message}; choose a smaller learning_rate")
        w = bench.controls()
        result = {
            "num_rows": len(bench.train),
            "num_controls": len(w),
            "chance": bench.chance,
            "train_error": bench.error(w, "train"),
            "test_error": bench.error(w, "test"),
            "test_rows": len(bench.encoded.test),
            **self._compression(bench, w),
            **self._pac_bayes(bench, w),
        }
        bench.controlled.detach()
        return Outcome("completed", result, trained.curve)

    def _compression(self, bench: _Bench, w: Tensor) -> dict[str, Any]:
        from deltacontrol.theory.bounds import countable_class_bound, quantise

        found: dict[int, Quantised] = {levels: quantise(w, levels) for levels in self.levels}
        chosen = math.log(len(self.levels)) + math.log(self.choices)
        rows = []
        for levels, rounded in found.items():
            error, code = bench.error(rounded.vector, "train"), rounded.code + chosen
            bound = countable_class_bound(error, code, len(bench.train), 1 - self.confidence)
            row = {"levels": levels, "scale": rounded.scale, "nats": code, "bound": bound}
            rows.append({**row, "train_error": error})
        best = min(rows, key=lambda row: row["bound"])
        test = bench.error(found[best["levels"]].vector, "test")
        return {"compression": {**best, "test_error": test}, "by_level": rows}

    def _pac_bayes(self, bench: _Bench, w: Tensor) -> dict[str, Any]:
        """Half of δ for the rows, half for the draws; the ratio is chosen by other draws."""
        from deltacontrol.theory.bounds import gaussian_kl, monte_carlo_bound, pac_bayes_bound

        delta, n = (1 - self.confidence) / 2, len(bench.train)
        size = float(w.square().mean().sqrt())
        chosen = math.log(len(PRIORS)) + math.log(self.choices)

        def bounded(ratio: float, draws: int, stream: int) -> dict[str, float]:
            deviation = ratio * size
            priors = [2.0 ** (i / 4) for i in PRIORS]
            divergence, prior = min((gaussian_kl(w, deviation, tau), tau) for tau in priors)
            mean = bench.mean_error(w, deviation, draws, "train", stream)
            upper = monte_carlo_bound(mean, draws, delta)
            return {
                "ratio": ratio,
                "prior_deviation": prior,
                "nats": divergence + chosen,
                "train_error": mean,
                "train_error_bound": upper,
                "bound": pac_bayes_bound(upper, divergence + chosen, n, delta),
            }

        rows = [bounded(ratio, max(1, self.draws // 16), 1) for ratio in self.ratios]
        ratio = min(rows, key=lambda row: row["bound"])["ratio"]
        best = bounded(ratio, self.draws, 2)
        test = bench.mean_error(w, ratio * size, max(1, self.draws // 4), "test", 3)
        return {"pac_bayes": {**best, "test_error": test}, "by_ratio": rows}


class _Bench:
    """The model with its delta, the rows, and errors as functions of w = u - u₀."""

    def __init__(self, experiment: GeneralisationBound) -> None:
        import numpy as np

        from deltacontrol.deltas.dynamics.frozen_states import FrozenStates
        from deltacontrol.experiments.setting import Setting

        setting = Setting(
            experiment.model,
            experiment.task,
            deltas=(experiment.delta,),
            add_head=False,
            expects="classification",
            max_length=experiment.max_length,
            seed=experiment.seed,
        )
        if experiment.random_labels:
            setting = replace(setting, task=_relabelled(setting.data, experiment.seed))
        self.experiment = experiment
        self.encoded: Encoded = setting.encoded
        self.controlled: DeltaModel = setting.controlled.eval()
        if self.controlled.needs_data:
            raise self.refusal()
        self.fixed = self._buffers()
        first = {k: v for k, v in self.train.batch(np.arange(1)).items() if k != "labels"}
        try:  # blocks below the lowest control need to run once an example only
            self.frozen = FrozenStates(self.controlled, first)
        except InputError:
            self.frozen = None
        self.start = self._flat()
        self.chance = 1 - self.train.majority_share

    def refusal(self) -> InputError:
        """For a delta whose hypotheses depend on the rows in more than w."""
        return InputError(
            f"{self.experiment.delta} sets more than its parameters by looking at the rows, which "
            "the bound does not pay for; choose another delta, such as subspace"
        )

    def _buffers(self) -> dict[str, Tensor]:
        trainable = self.controlled.trainable()
        state = self.controlled.state()
        return {name: value for name, value in state.items() if name not in trainable}

    @property
    def train(self) -> EncodedSplit:
        """All training rows."""
        return self.encoded.train

    def batch(self, step: int) -> dict[str, Any]:
        e = self.experiment
        return self.encoded.training_batch(step, seed=e.seed, batch_size=e.batch_size)

    def controls(self) -> Tensor:
        """w, (d,).

        Raises:
            InputError: training has set more than w.
        """
        import torch

        if any(not torch.equal(v, self.fixed[name]) for name, v in self._buffers().items()):
            raise self.refusal()
        return self._flat() - self.start

    def error(self, w: Tensor, split: str) -> float:
        """Share of a split's rows that are classified wrongly."""
        import numpy as np

        lengths = self.encoded.split(split).lengths
        order = np.argsort(-lengths, kind="stable")
        parts = np.array_split(order, -(-len(order) // EVALUATION_BATCH))
        self._put(w)
        return self._wrong(split, parts) / len(order)

    def mean_error(self, w: Tensor, deviation: float, draws: int, split: str, stream: int) -> float:
        """Mean over draws of N(w, σ²I), each on a few random rows of its own."""
        import numpy as np
        import torch

        e, size = self.experiment, len(self.encoded.split(split))
        generator = torch.Generator().manual_seed(1000 * e.seed + stream)
        random = np.random.default_rng([e.seed, stream])
        wrong = 0
        for _ in range(draws):
            self._put(w + deviation * torch.randn(w.shape, generator=generator))
            wrong += self._wrong(split, [random.integers(0, size, e.rows_per_draw)])
        return wrong / (draws * e.rows_per_draw)

    def _wrong(self, split: str, parts: Sequence[np.ndarray]) -> int:
        """Number of errors on the rows of all parts, one pass a part."""
        import torch

        from deltacontrol.deltas.methods.parts.coordinates import held

        rows, wrong = self.encoded.split(split), 0
        first = 0 if split == "train" else len(self.train)  # numbers of the examples
        with held(self.controlled), torch.no_grad():
            for part in parts:
                batch = rows.batch(part)
                labels, numbers = batch.pop("labels"), torch.from_numpy(part + first)
                kept = None
                if self.frozen is not None:  # whose length is zero at first
                    kept = self.frozen.passing(numbers, batch["attention_mask"])
                with kept or nullcontext():
                    wrong += int((self.controlled(**batch).logits.argmax(-1) != labels).sum())
        return wrong

    def _flat(self) -> Tensor:
        import torch

        return torch.cat([p.detach().flatten() for p in self.controlled.trainable().values()])

    def _put(self, w: Tensor) -> None:
        import torch

        parameters = list(self.controlled.trainable().values())
        values = (self.start + w).split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value.view_as(parameter))


def _relabelled(task: Task, seed: int) -> Task:
    """The task with the labels of every split dealt out again."""
    import numpy as np

    random = np.random.default_rng([seed, 17])
    frames = {}
    for name in ("train", "validation", "test"):
        frame = getattr(task, name)
        labels = random.permutation(frame["label"].to_numpy())
        frames[name] = frame.assign(label=labels)
    return replace(task, **frames)
