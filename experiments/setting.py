"""Where a question meets a real network: model, task rows, tokens, head, deltas, number format.

    setting = Setting("minilm-l6", "movie", deltas=["lora:rank=4"], train_rows=8, max_length=24,
                      dtype="float64")
    setting.controlled                         # the DeltaModel, deltas and head on the frozen base
    setting.batch()                            # the chosen training rows as one batch
    setting.control_problem(weight_decay=1e-3) # J(u) = mean loss of these rows + λ/2 Σ_t ‖u_t‖²

A setting is a description; each of its parts is made when it is first asked for, and once. All of
it is a function of the fields: the seeds are fixed, and no global random state is read or changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from deltacontrol.experiments import models, tasks
from deltacontrol.experiments.models import fit, words
from deltacontrol.experiments.tasks.splits import few, order_of, require_rows
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deltacontrol.deltas import Delta, DeltaModel
    from deltacontrol.experiments.heads import HeadFit
    from deltacontrol.experiments.models import ModelKind
    from deltacontrol.experiments.tasks import Kind, Task
    from deltacontrol.experiments.tasks.encoding import Batch, Encoded, EncodedSplit
    from deltacontrol.experiments.tasks.templates import BoundTemplate, Template
    from deltacontrol.theory.control.problem import ControlProblem

Order = Literal["given", "shuffled", "sampled"]
Head = Literal["own", "fitted", "ridge", "words"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Setting:
    """One model on rows of one task, with deltas.

    Attributes:
        model: as in `deltacontrol.experiments.models.load`.
        task: a packaged task's name, a file, or a task that is loaded already; None for a model
            alone, which then needs ``model_kind``.
        deltas: what acts on the model: deltas, texts such as "lora:rank=16", or dictionaries.
        add_head: the head is controlled too, where no delta trains it (and there is one).
        train_rows: the first so many training rows in the ``order``, or all that there are.
        validation_rows: the first so many validation rows.
        test_rows: the first so many test rows.
        order: of the training rows. "given": as in the task, where every head of the split has the
            class shares of the whole; "shuffled": by `numpy.random.default_rng(order_seed)`;
            "sampled": by `pandas.DataFrame.sample` with ``order_seed``.
        order_seed: ``seed`` by default.
        shots: so many training and validation rows of each class (without classes: in all), drawn
            by ``order_seed``, as in Gao et al., ACL 2021; without the other two counts.
        strict_rows: refuse a task with fewer rows than asked for.
        expects: refuse a task of another kind.
        max_length: tokens of a text at most; longer ones are cut.
        head: how the model is read out. "own": the checkpoint's head, or one drawn from ``seed``
            where it has none; "fitted": the head fitted to the training rows, its penalty chosen by
            the validation rows (`deltacontrol.experiments.heads.fit_head`); "ridge": fitted to
            ``head_rows`` training rows that follow the chosen ones (`fit_two_class_head`); "words":
            a causal language model, read out at two words after a prompt
            (`deltacontrol.experiments.heads.WORDS`).
        head_rows: of the head "ridge".
        template: every text is put into it, and its words are read out in the place of a head.
        dtype: of the parameters; "nf4" and "int8" quantise the linear maps.
        pretrained: False draws every weight from ``seed``.
        seed: of the weights that are drawn and of the controls.
        model_kind: of the model; by default the task's kind.
        num_labels: classes of the head; by default the task's.
        text_column: of a task file.
        label_column: of a task file.
        task_kind: what the labels of a task file are; inferred by default.

    Raises:
        InputError: a count that is too small, an unknown order or head, or no task and no kind.
    """

    model: str = "minilm-l6"
    task: str | Task | None = None
    _: KW_ONLY
    deltas: Sequence[Delta | str | Mapping[str, Any]] = ()
    add_head: bool = True
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    order: Order = "given"
    order_seed: int | None = None
    shots: int | None = None
    strict_rows: bool = False
    expects: Kind | None = None
    max_length: int = 64
    head: Head = "own"
    head_rows: int = 512
    template: Template | None = None
    dtype: str = "float32"
    pretrained: bool = True
    seed: int = 0
    model_kind: ModelKind | None = None
    num_labels: int | None = None
    text_column: str = "text"
    label_column: str = "label"
    task_kind: Kind | None = None
    _splits: dict[str, EncodedSplit] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name, options in (("order", get_args(Order)), ("head", get_args(Head))):
            if getattr(self, name) not in options:
                raise unknown(name, str(getattr(self, name)), options)
        if self.template is not None and self.head != "own":
            raise InputError(f"a template needs no head; leave out the head {self.head!r}")
        if self.shots is not None and (self.train_rows or self.validation_rows):
            raise InputError("shots counts the rows: leave out train_rows and validation_rows")
        for name in ("shots", "train_rows", "validation_rows", "test_rows", "head_rows"):
            count, least = getattr(self, name), 0 if name in ("validation_rows", "test_rows") else 1
            if count is not None and count < least:
                raise InputError(f"{name} is {count}; expected a whole number >= {least}")
        if self.task is None and self.model_kind is None:
            raise InputError("a setting has a task, or says model_kind, its head; give one")

    def __repr__(self) -> str:
        """The fields that are not as by default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.init}
        values["task"] = (getattr(self.task, "name", self.task), None)
        shown = [f"{name}={v!r}" for name, (v, default) in values.items() if v != default]
        return f"Setting({', '.join(shown)})"

    # -- rows and tokens -------------------------------------------------------------------------

    @cached_property
    def data(self) -> Task:
        """The task with all of its rows.

        Raises:
            InputError: there is no task, as in `deltacontrol.experiments.tasks.load`, it is not of
                the kind that is expected, or it has not two classes for "ridge" or "words".
        """
        if self.task is None:
            raise InputError("the setting has no task; give one, such as task='movie'")
        found = self.task
        if isinstance(found, str):
            columns = {"text_column": self.text_column, "label_column": self.label_column}
            found = tasks.load(found, kind=self.task_kind, **columns)
        if self.expects not in (None, found.kind):
            raise InputError(f"{self._name} is a {found.kind} task; expected a {self.expects}")
        if self.head in ("ridge", "words") and len(found.labels) != 2:
            raise InputError(
                f"{self._name} is no classification of two classes, which the head {self.head!r} "
                "needs; try movie, rt or sms"
            )
        return found

    def frame(self, split: str) -> pd.DataFrame:
        """The chosen rows of a split, as text.

        Raises:
            InputError: no such split, or fewer rows than asked for where that is refused.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        rows, wanted = getattr(self.data, split), getattr(self, f"{split}_rows")
        if self.shots is not None and split != "test":
            keys, what = [self._order_seed, SPLITS.index(split)], f"{split} rows of {self._name}"
            return few(rows, self.data.labels, self.shots, keys, what)
        if self.strict_rows and wanted is not None:
            needed = wanted + (self.head_rows if split == "train" and self.head == "ridge" else 0)
            what = "training" if split == "train" else split
            require_rows(rows, needed, f"{what} rows of {self._name}")
        return rows.iloc[self._order[:wanted] if split == "train" else slice(wanted)]

    def split(self, name: str) -> EncodedSplit:
        """The chosen rows of a split, tokenised.

        Raises:
            InputError: as in `frame` and `deltacontrol.experiments.tasks.encoding.encode_rows`.
        """
        if name not in self._splits:
            self._splits[name] = self.encode(self.frame(name))
        return self._splits[name]

    @cached_property
    def encoded(self) -> Encoded:
        """All three splits, for training.

        Raises:
            InputError: as in `split`.
        """
        from deltacontrol.experiments.tasks.encoding import Encoded

        return Encoded(**{name: self.split(name) for name in SPLITS})

    def encode(self, frame: pd.DataFrame, *, cut: bool = True) -> EncodedSplit:
        """Rows of the task, or such that are made of them, as tokens.

        Args:
            frame: the columns of the task.
            cut: at `max_length`; otherwise texts stay as long as they are.

        Raises:
            InputError: `max_length` is beyond the model's positions, or as in
                `deltacontrol.experiments.tasks.encoding.encode_rows`.
        """
        from deltacontrol.experiments.heads import prompt_tokens
        from deltacontrol.experiments.tasks.encoding import encode_rows

        model = self._loaded[0]
        suffix = prompt_tokens(self.tokenizer) if self.head == "words" else ()
        length, deltas = self.max_length, self.parsed_deltas
        fit.require_positions(model, self.model, length, deltas, behind=len(suffix))
        found = encode_rows(
            frame,
            self.tokenizer,
            kind=self.data.kind,
            max_length=length if cut else None,
            suffix=suffix,
            template=self._bound and self._bound.rows,
            name=self._name,
        )
        fit.require_tokens(model, self.model, found.tokens, found.pad)
        return found if self.class_order is None else found.renumbered(self.class_order)

    def batch(self, split: str = "train", rows: Sequence[int] | None = None) -> Batch:
        """Chosen rows of a split as one batch, with labels.

        Args:
            split: train, validation or test.
            rows: numbers among the chosen rows; all of them in order by default.

        Raises:
            InputError: as in `split`, or no rows.
        """
        return self.split(split).batch(rows)

    def take_rows(self, other: Setting) -> None:
        """Take the rows and tokens of a setting that differs in ``seed`` alone, not made again."""
        _ = other.encoded
        self.__dict__["data"] = other.data
        self._splits.update(other._splits)

    # -- model -----------------------------------------------------------------------------------

    @cached_property
    def kind(self) -> ModelKind:
        """What the model is for; `data.kind` unless said otherwise."""
        if self.template is not None:
            return models.language_kind(self.model)
        return "causal-lm" if self.head == "words" else self.model_kind or self.data.kind

    @cached_property
    def classes(self) -> int | None:
        """Of the model's head; None where it has none."""
        if self.kind != "classification":
            return None
        return len(self.data.labels) if self.num_labels is None else self.num_labels

    @cached_property
    def class_order(self) -> np.ndarray | None:
        """The model's number of each class of the task, matched by name; None where it is equal.

        Raises:
            InputError: the model's head was trained on classes of other names.
        """
        if self.kind != "classification" or self.data.kind != "classification":
            return None
        fit.require_classes(self.classes, self.data.labels, self._name)
        model = self._loaded[0]
        kept = self.head == "own" and self.pretrained and not getattr(model, "head_is_drawn", True)
        return fit.class_order(model, self.model, self.data.labels, head_is_kept=kept)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; `split` and `encode` call it."""
        return self._loaded[1]

    @property
    def base(self) -> PreTrainedModel:
        """The model with its head, without deltas.

        Raises:
            InputError: as in `deltacontrol.experiments.models.load`, and as in the fit of the head.
        """
        return self._read_out[0]

    @property
    def head_fit(self) -> HeadFit | None:
        """How the head "fitted" was fitted; None for the other heads."""
        return self._read_out[1]

    @cached_property
    def words(self) -> tuple[int, int] | None:
        """The tokens of the two words, with the head "words"."""
        from deltacontrol.experiments.heads import word_tokens

        return word_tokens(self.tokenizer) if self.head == "words" else None

    @cached_property
    def controlled(self) -> DeltaModel:
        """`base` with the deltas; what is attached once stays so until ``detach()``.

        Raises:
            InputError: as in `base` and `deltacontrol.deltas.attach`; no deltas where no head is
                added.
        """
        from deltacontrol.deltas import HeadTuning, attach

        made = self.parsed_deltas
        has_head = self.kind in ("classification", "regression")
        if self.add_head and has_head and not any(delta.trains_head for delta in made):
            made.append(HeadTuning())
        return attach(self.base, *made, seed=self.seed)

    @property
    def parsed_deltas(self) -> list[Delta]:
        """The deltas as such, without the head that is added."""
        from deltacontrol.deltas.registry import delta_of

        return [delta_of(delta) for delta in self.deltas]

    def forget_model(self) -> None:
        """Let the model go; rows and tokens stay."""
        for name in ("_loaded", "_read_out", "controlled"):
            self.__dict__.pop(name, None)

    def control_problem(
        self,
        rows: Sequence[int] | None = None,
        *,
        split: str = "train",
        weight_decay: float = 0.0,
    ) -> ControlProblem:
        """The fine-tuning of `controlled` on fixed rows, J(u) = mean loss + λ/2 Σ_t ‖u_t‖².

        It is deterministic: one batch of these rows, without dropout.

        Args:
            rows: as in `batch`.
            split: as in `batch`.
            weight_decay: λ.

        Raises:
            InputError: as in `controlled` and `batch`; the head "words", whose labels are words.
        """
        from deltacontrol.deltas.dynamics.transformer import control_problem

        if self.head == "words":
            raise InputError("the labels of the head 'words' are no logits; give another head")
        batch = self.batch(split, rows)
        return control_problem(self.controlled, batch, weight_decay=weight_decay)

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        """The task's, as the user gave it."""
        return self.task if isinstance(self.task, str) else getattr(self.task, "name", "no task")

    @cached_property
    def _bound(self) -> BoundTemplate | None:
        """The template in the model's tokens."""
        found = self.template
        return found and found.bound(self.tokenizer, self.kind, self.data.labels, self._name)

    @cached_property
    def _order(self) -> np.ndarray:
        """Numbers of all training rows (rows,), the chosen ones first."""
        return order_of(self.data.train, self.order, self._order_seed)

    @property
    def _order_seed(self) -> int:
        return self.seed if self.order_seed is None else self.order_seed

    @cached_property
    def _read_out(self) -> tuple[PreTrainedModel, HeadFit | None]:
        """The model once its head is what `head` says."""
        from deltacontrol.experiments import heads

        model, fit = self._loaded[0], None
        if self.head == "fitted":
            fit = heads.fit_head(model, self.batch("train"), self.batch("validation"))
        elif self.head == "ridge":
            first = len(self.frame("train"))
            others = self.data.train.iloc[self._order[first : first + self.head_rows]]
            heads.fit_two_class_head(model, self.encode(others).batches(64))
        if self._bound is not None:
            words.read_words(model, self._bound.tokens, self._bound.mask)
        return model, fit

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        more: Any = {"num_labels": self.classes, "pretrained": self.pretrained, "seed": self.seed}
        return models.load(self.model, kind=self.kind, dtype=self.dtype, **more)
