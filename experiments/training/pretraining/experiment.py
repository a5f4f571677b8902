"""The pre-training of one model of the family, as an experiment that is recorded.

All of them are trained by the loop of `deltacontrol.experiments.training.loop`, every parameter a
control: AdamW, a warm-up of a tenth of the updates, then a cosine to zero, `BATCH_ROWS` rows an
update. Sizes differ in shape and rate alone (`deltacontrol.experiments.models.family`).

A finished model lies in the cache, as a plain transformers folder with `pretraining.json` and
`curve.parquet` beside the weights, which is what its record tells.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments import models
from deltacontrol.experiments.models.family import (
    BATCH_ROWS,
    FAMILIES,
    LENGTH,
    PRESETS,
    RECIPE,
    SIZES,
    FamilyName,
    Member,
)
from deltacontrol.experiments.runs.experiment import Digests, Experiment, Outcome, Workspace
from deltacontrol.experiments.sources import build_once, sha256_of
from deltacontrol.experiments.tasks import corpus
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltacontrol.experiments.training.pretraining.tokens import Tokens
    from deltacontrol.experiments.training.results import TrainingResult
    from deltacontrol.experiments.training.settings import Settings

WARMUP, WEIGHT_DECAY = 0.1, 0.01
LOOKS = 10  # at held-out rows on the way
ROWS_LOOKED_AT, ROWS_AT_THE_END = 32, 256
RESULT, CURVE = "pretraining.json", "curve.parquet"
_KINDS = {"encoder": "masked-lm", "decoder": "causal-lm"}


@dataclass(frozen=True)
class Pretraining(Experiment):
    """Pre-train one model of the family from a seed.

    Attributes:
        family: encoder (masked language model) or decoder (causal language model).
        width: of its states.
        steps: updates.
        seed: of its weights at the start, the order of the rows, and the masks.
        recipe: the version of all that is the same for every member.
    """

    family: FamilyName = "encoder"
    width: int = 48
    steps: int = PRESETS["paper"]
    seed: int = 0
    recipe: int = RECIPE

    kind: ClassVar[str] = "pre-training"

    def __post_init__(self) -> None:
        """Check the fields."""
        _ = self.member
        if self.recipe != RECIPE:
            raise InputError(
                f"recipe is {self.recipe}; this version of deltacontrol follows recipe {RECIPE}"
            )

    @property
    def member(self) -> Member:
        """The model that it makes."""
        return Member(self.family, self.width, self.steps, self.seed)

    @property
    def label(self) -> str:
        """The model's name."""
        return f"pre-training {self.member.name}"

    def digests(self) -> Digests:
        """The digest of the text; there is no model before."""
        return Digests(data=corpus.digest())

    def execute(self, workspace: Workspace) -> Outcome:
        """Pre-train the model and put it into the cache, or tell what the cache keeps of it.

        The result holds the model's name, loss and perplexity on held-out rows, unigram_loss (what
        the frequencies of single tokens reach there), num_total,
        num_layers, the digests weights_sha256 and tokens_sha256, tokens_seen, learning_rate,
        num_evaluated (rows), and the measures of `TrainingResult`. After a divergence nothing is
        kept, and loss is None.

        Raises:
            InputError: the text cannot be had, or the cache cannot be written.
        """
        member = self.member
        if member.path.is_dir():
            return kept(member.folder())
        trained, model, found = self._train(workspace)
        if trained.status == "diverged":
            return Outcome(trained.status, found, trained.curve, message=trained.message)
        texts = self._tokens()

        def write(folder: Path) -> None:
            with without_bars():
                model.save_pretrained(folder)
            texts.tokenizer(member).save_pretrained(folder)
            found["weights_sha256"] = sha256_of(folder / "model.safetensors")
            document = {"config": self.to_config(), "result": found}
            (folder / RESULT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            trained.curve.to_parquet(folder / CURVE, index=False)

        folder = build_once(member.path, write)
        return kept(folder, trained.earlier_seconds)

    def _tokens(self) -> Tokens:
        from deltacontrol.experiments.training.pretraining.tokens import tokens

        return tokens()

    def settings(self, checkpoint_seconds: float = 30.0) -> Settings:
        """How it is trained."""
        from deltacontrol.experiments.training.settings import Settings

        return Settings(
            kind=_KINDS[self.family],
            monitor="loss",
            larger_is_better=False,
            seed=self.seed,
            learning_rate=self.member.rate,
            steps=self.steps,
            warmup=WARMUP,
            schedule="cosine",
            weight_decay=WEIGHT_DECAY,
            eval_every=max(1, math.ceil(self.steps / LOOKS)),
            checkpoint_seconds=checkpoint_seconds,
        )

    def start(self, folder: Path) -> PreTrainedModel:
        """The model at its random start; configuration and tokenizer are written into a folder."""
        from transformers import LlamaConfig, ModernBertConfig

        texts, member = self._tokens(), self.member
        made: Any = ModernBertConfig if self.family == "encoder" else LlamaConfig
        special = texts.special(member)
        shutil.rmtree(folder, ignore_errors=True)
        made(**member.configuration(texts.vocabulary, special)).save_pretrained(folder)
        texts.tokenizer(member).save_pretrained(folder)
        kind: Any = _KINDS[self.family]
        return models.load(str(folder), kind=kind, pretrained=False, seed=self.seed)[0]

    def _train(
        self, workspace: Workspace
    ) -> tuple[TrainingResult, PreTrainedModel, dict[str, Any]]:
        """The training, the plain model behind it, and the result without the weights' digest."""
        from deltacontrol.deltas import attach
        from deltacontrol.deltas.methods.full import FullFineTuning
        from deltacontrol.experiments.training.devices import autocast
        from deltacontrol.experiments.training.evaluation import evaluate
        from deltacontrol.experiments.training.loop import train
        from deltacontrol.experiments.training.pretraining.batches import RowBatches

        texts, kind = self._tokens(), _KINDS[self.family]
        own = {"family": self.family, "vocabulary": texts.vocabulary, "seed": self.seed}
        unseen = RowBatches(texts.rows["held_out"], **own)

        def look(model: Any, rows: int = ROWS_LOOKED_AT) -> dict[str, float]:
            return evaluate(model, unseen.held_out(rows), kind)

        delta_model = attach(self.start(workspace.folder / "start"), FullFineTuning())
        trained = train(
            delta_model,
            RowBatches(texts.rows["training"], **own),
            self.settings(workspace.checkpoint_seconds),
            evaluate=look,
            checkpoint_dir=workspace.folder,
            progress=workspace.progress,
            keep_checkpoint=True,
        )
        model = delta_model.merge()
        final: dict[str, Any] = {"loss": None, "perplexity": None}
        if trained.status != "diverged":
            with autocast(trained.measures["precision"], trained.measures["device"]):
                final = look(model, ROWS_AT_THE_END)
        result = {
            "model": self.member.name,
            **final,
            "unigram_loss": texts.unigram_loss,
            "num_evaluated": min(len(texts.rows["held_out"]), ROWS_AT_THE_END),
            "num_total": sum(p.numel() for p in model.parameters()),
            "num_layers": self.member.depth,
            "learning_rate": self.member.rate,
            "tokens_seen": len(trained.curve) * BATCH_ROWS * LENGTH,
            "tokens_sha256": texts.digest,
            "num_steps": len(trained.curve),
            **trained.measures,
        }
        return trained, model.cpu(), result


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for a file that is written at once."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging._tqdm_active = False
    try:
        yield
    finally:
        logging._tqdm_active = shown


def kept(folder: Path, earlier_seconds: float = 0.0) -> Outcome:
    """What a finished model's folder tells of its pre-training."""
    import pandas as pd

    document = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    curve = pd.read_parquet(folder / CURVE)
    return Outcome("completed", document["result"], curve, earlier_seconds=earlier_seconds)


def experiments(
    preset: str = "paper",
    *,
    families: Sequence[FamilyName] = FAMILIES,
    sizes: Sequence[int] = SIZES,
    steps: int | None = None,
    seed: int = 0,
) -> list[Pretraining]:
    """The pre-trainings of a family, those that take longest first.

    Args:
        preset: one of `PRESETS`, which says the number of updates.
        families: encoder, decoder, or both.
        sizes: widths.
        steps: updates, in place of the preset's.
        seed: of all of them.

    Raises:
        InputError: an unknown preset or family, or a size that cannot be.
    """
    from deltacontrol.theory.errors import unknown

    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    number = PRESETS[preset] if steps is None else steps
    found = {(f, width): Pretraining(f, width, number, seed) for f in families for width in sizes}
    made = list(found.values())
    return sorted(made, key=lambda one: -one.member.seconds)


def affordable_steps(minutes: float, found: Sequence[Pretraining], workers: int) -> int:
    """The updates with which all of them take about so many minutes, by the estimate alone.

    A function of its arguments, so that the same command names the same models.

    Raises:
        InputError: not even ten updates are.
    """
    each = sum(one.member.seconds / one.steps for one in found)
    longest = max(one.member.seconds / one.steps for one in found)
    steps = int(60.0 * minutes / max(each / workers, longest))
    if steps < 10:
        raise InputError(
            f"in {minutes:g} minutes only {steps} updates could be made; give more minutes or "
            "smaller sizes"
        )
    return steps - steps % 10
