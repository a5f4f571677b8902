"""Does a feedback correction at test time restore the accuracy that a perturbation cost?

One run trains a classifier (a delta on a frozen model), calibrates the principal subspaces of its
hidden states on correctly classified *training* examples, chooses a correction on attacked and on
clean *validation* examples, and measures it once on *test* examples:

    recovered = (corrected - attacked) / (clean - attacked)      accuracies under the attack

The adversary knows the classifier, not the correction; how the correction fares against an
adversary who knows it, and against random typing errors, is measured too. The control goes through
the same choice with random subspaces in the place of the principal ones: an attack by gradients is
fitted to the network as it is, and whatever changes the network a little may spoil it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.deltas import DeltaModel
    from deltacontrol.deltas.feedback.calibration import Calibration
    from deltacontrol.theory.feedback.correction import StateFeedback

BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class Sample:
    """Labelled texts in batches of similar length.

    Attributes:
        batches: the model's arguments, with labels.
        rows: the number of the text behind each example, batch after batch.
    """

    batches: list[dict[str, Tensor]]
    rows: np.ndarray

    @classmethod
    def of(cls, setting: Setting, split: str, change: Callable[[str], str] | None = None) -> Sample:
        """The chosen texts of a split, each passed through ``change`` in their order."""
        frame = setting.frame(split)
        if change is not None:
            frame = frame.assign(text=[change(text) for text in frame["text"]])
        rows = setting.encode(frame)
        # By the lengths of the whole texts, so that those that are cut are sorted too.
        order = np.argsort(setting.encode(frame, cut=False).lengths, kind="stable")
        batches = [
            rows.batch(order[start : start + BATCH_SIZE])
            for start in range(0, len(order), BATCH_SIZE)
        ]
        return cls(batches, order)


@dataclass(frozen=True)
class Correction:
    """A correction by its numbers: rank of the subspaces, gains of the law."""

    rank: int
    proportional: float
    integral: float = 0.0
    derivative: float = 0.0

    def law(self, calibration: Calibration, *, random: int | None = None) -> StateFeedback:
        """The law on calibrated subspaces, or around their means on random ones of the rank."""
        import torch

        from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
        from deltacontrol.theory.feedback.correction import PIDCorrection, ProjectionCorrection

        subspaces = calibration.subspaces(self.rank)
        if random is not None:
            generator = torch.Generator().manual_seed(random)
            gaussian = [torch.randn(s.basis.shape, generator=generator) for s in subspaces]
            subspaces = [
                AffineSubspace(s.mean, torch.linalg.qr(noise)[0])
                for s, noise in zip(subspaces, gaussian, strict=True)
            ]
        if self.integral == self.derivative == 0:
            return ProjectionCorrection(subspaces, self.proportional)
        return PIDCorrection(subspaces, self.proportional, self.integral, self.derivative)


def candidates(ranks: Sequence[int], gains: Sequence[float]) -> list[Correction]:
    """Projections of every rank and gain, and a PID law of every rank."""
    plain = [Correction(rank, gain) for rank in ranks for gain in gains]
    return plain + [Correction(rank, 0.2, 0.1, 0.1) for rank in ranks]


@dataclass(frozen=True)
class Robustness(Experiment):
    """Accuracy clean, attacked and corrected, of one classifier.

    Attributes:
        delta: the delta of the classifier, as a dictionary with its name; the head is trained too.
        model: the model.
        task: a classification task.
        seed: of the training, and of everything random here.
        steps: of the training.
        max_length: tokens of a text at most.
        epsilon: radius of the attack; see `deltacontrol.experiments.measures.attacks`.
        attack_steps: its gradient steps.
        typo_rate: share of the words that typing errors hit.
        ranks: of the subspaces to choose from.
        gains: of the projections to choose from.
        clean_loss: a correction may cost so much clean validation accuracy to be chosen.
        num_calibration: training examples for the calibration.
        num_validation: examples for the choice.
        num_test: examples for the measurement.
    """

    delta: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    model: str = "minilm-l6"
    task: str = "movie"
    seed: int = 0
    steps: int = 150
    max_length: int = 32
    epsilon: float = 0.02
    attack_steps: int = 3
    typo_rate: float = 0.3
    ranks: tuple[int, ...] = (64, 128, 192, 256)
    gains: tuple[float, ...] = (0.5, 1.0)
    clean_loss: float = 0.005
    num_calibration: int = 512
    num_validation: int = 128
    num_test: int = 256

    kind: ClassVar[str] = "robustness"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)

    def __post_init__(self) -> None:
        """Check the counts and make tuples of the lists of a record."""
        for name in ("ranks", "gains"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = (self.num_calibration, self.num_validation, self.num_test)
        if min(counts) < 2 or not self.ranks or not self.gains:
            raise InputError(
                f"num_calibration, num_validation and num_test are {counts}, with {len(self.ranks)}"
                f" ranks and {len(self.gains)} gains; expected at least 2 examples each, and one "
                "rank and gain."
            )

    @property
    def label(self) -> str:
        """Delta, radius and seed."""
        return f"robustness {self.delta['name']} epsilon {self.epsilon:g} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train, calibrate, choose on validation, measure on test."""
        from deltacontrol.deltas.feedback.calibration import calibrate
        from deltacontrol.experiments.measures.attacks import EmbeddingAttack, corrupted

        classifier, texts = self._classifier(workspace)
        attack = EmbeddingAttack(self.epsilon, self.attack_steps)
        calibration = calibrate(classifier, texts("train").batches)

        held_out = texts("validation")
        noise = [attack.perturbation(classifier, batch) for batch in held_out.batches]
        choice, search = self._choose(classifier, calibration, held_out, noise)
        rival, rival_search = self._choose(
            classifier, calibration, held_out, noise, random=self.seed
        )

        test = texts("test")
        noise = [attack.perturbation(classifier, batch) for batch in test.batches]
        law = choice.law(calibration)
        control = rival.law(calibration, random=self.seed)
        same = choice.law(calibration, random=self.seed)
        adaptive = [attack.perturbation(classifier, batch, law) for batch in test.batches]
        generator = np.random.default_rng(self.seed)
        typos = texts("test", lambda text: corrupted(text, self.typo_rate, generator))
        right = {
            "clean": correct(classifier, test),
            "clean_corrected": correct(classifier, test, law=law),
            "clean_random": correct(classifier, test, law=control),
            "clean_same_random": correct(classifier, test, law=same),
            "attacked": correct(classifier, test, noise),
            "attacked_corrected": correct(classifier, test, noise, law),
            "attacked_random": correct(classifier, test, noise, control),
            "attacked_same_random": correct(classifier, test, noise, same),
            "adaptive_corrected": correct(classifier, test, adaptive, law),
            "typos": correct(classifier, typos),
            "typos_corrected": correct(classifier, typos, law=law),
        }
        accuracy = {name: float(values.mean()) for name, values in right.items()}
        result = {
            "accuracy": accuracy,
            "recovered": recovered(accuracy, "attacked_corrected"),
            "recovered_random": recovered(accuracy, "attacked_random"),
            "recovered_same_random": recovered(accuracy, "attacked_same_random"),
            "recovered_adaptive": recovered(accuracy, "adaptive_corrected"),
            "recovered_typos": recovered(accuracy, "typos_corrected", "typos"),
            "clean_loss": accuracy["clean"] - accuracy["clean_corrected"],
            "choice": asdict(choice),
            "choice_random": asdict(rival),
            "search": search,
            "search_random": rival_search,
            "outside": outside(calibration, choice.rank, noise),
            "relative_time": relative_time(classifier, test.batches[len(test.batches) // 2], law),
            "num_calibration_tokens": calibration.counts[0],
        }
        import pandas as pd

        return Outcome("completed", result, pd.DataFrame(right), classifier.state())

    def _classifier(self, workspace: Workspace) -> tuple[DeltaModel, Any]:
        """The trained model, frozen, and a function that gives batches of a split."""
        from deltacontrol.experiments.training.finetune import FineTuning

        setting = Setting(
            self.model,
            self.task,
            deltas=(self.delta,),
            train_rows=self.num_calibration,
            validation_rows=self.num_validation,
            test_rows=self.num_test,
            expects="classification",
            max_length=self.max_length,
            seed=self.seed,
        )
        training = FineTuning(
            model=self.model,
            task=self.task,
            deltas=(dict(self.delta),),
            seed=self.seed,
            steps=self.steps,
            max_length=self.max_length,
            eval_limit=self.num_validation,
            evaluate_on="validation",
        )
        trained = training.execute(workspace)
        if trained.controls is None or trained.status != "completed":
            raise InputError(f"the training of the classifier failed: {trained.message}")
        classifier = setting.controlled
        classifier.load(trained.controls)
        classifier.eval().requires_grad_(False)
        return classifier, partial(Sample.of, setting)

    def _choose(
        self,
        classifier: DeltaModel,
        calibration: Calibration,
        held_out: Sample,
        noise: list[Tensor],
        random: int | None = None,
    ) -> tuple[Correction, list[dict[str, float]]]:
        """The best correction under attack among those that spare clean accuracy.

        Where none spares it, the one that costs least.
        """
        clean = correct(classifier, held_out).mean()
        found = []
        for one in candidates(self.ranks, self.gains):
            law = one.law(calibration, random=random)
            loss = float(clean - correct(classifier, held_out, law=law).mean())
            attacked = float(correct(classifier, held_out, noise, law).mean())
            found.append((one, loss, attacked))
        spared = [f for f in found if f[1] <= self.clean_loss]
        best = max(spared, key=lambda f: f[2]) if spared else min(found, key=lambda f: f[1])
        search = [
            {**asdict(one), "clean_loss": loss, "attacked": attacked}
            for one, loss, attacked in found
        ]
        return best[0], search


def correct(
    model: DeltaModel,
    sample: Sample,
    perturbations: list[Tensor] | None = None,
    law: StateFeedback | None = None,
) -> np.ndarray:
    """Which examples are classified correctly: (examples,), in the order of the texts."""
    import torch

    from deltacontrol.deltas.feedback.laws import attach_feedback, run
    from deltacontrol.experiments.measures.attacks import perturbed

    right = []
    for i, batch in enumerate(sample.batches):
        with torch.no_grad(), ExitStack() as stack:
            if perturbations is not None:
                stack.enter_context(perturbed(model, perturbations[i]))
            if law is not None:
                stack.enter_context(attach_feedback(model, law))
            right.append(run(model, batch).logits.argmax(-1) == batch["labels"])
    result = np.empty(len(sample.rows), dtype=bool)
    result[sample.rows] = torch.cat(right).numpy()
    return result


def recovered(accuracy: Mapping[str, float], corrected: str, attacked: str = "attacked") -> float:
    """The share of the lost accuracy that a correction gives back; NaN where none was lost."""
    lost = accuracy["clean"] - accuracy[attacked]
    return (accuracy[corrected] - accuracy[attacked]) / lost if lost > 0 else float("nan")


def outside(calibration: Calibration, rank: int, perturbations: list[Tensor]) -> float:
    """The share of the perturbations' energy that is orthogonal to the first subspace."""
    subspace = calibration.subspaces(rank)[0]
    energy = [float(d.square().sum()) for d in perturbations]
    across = [float(subspace.error(d + subspace.mean).square().sum()) for d in perturbations]
    return sum(across) / max(sum(energy), 1e-30)


def relative_time(model: DeltaModel, batch: Mapping[str, Any], law: StateFeedback) -> float:
    """Time of a pass under the law over that of a plain one: medians of alternating passes."""
    import torch

    from deltacontrol.deltas.feedback.laws import attach_feedback, run

    plain, corrected = [], []
    with torch.no_grad():
        for _ in range(9):
            began = time.perf_counter()
            run(model, batch)
            plain.append(time.perf_counter() - began)
            with attach_feedback(model, law):
                began = time.perf_counter()
                run(model, batch)
                corrected.append(time.perf_counter() - began)
    return float(np.median(corrected) / np.median(plain))
