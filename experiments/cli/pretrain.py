"""``deltacontrol pretrain``: make a family of models of one recipe."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from deltacontrol.experiments.models.family import (
    BATCH_ROWS,
    FAMILIES,
    LENGTH,
    PRESETS,
    SIZES,
    Member,
    told_time,
)
from deltacontrol.experiments.runs.executors.registry import DEFAULT, executor_of
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.sources import sha256_of
from deltacontrol.experiments.training.pretraining import experiment as pretraining
from deltacontrol.experiments.training.pretraining.experiment import Pretraining
from deltacontrol.theory.errors import InputError

_MARKS = 1000  # of the line of progress


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a family of small models of one recipe, to be used by name.

    Encoders (ModernBERT, a masked language model) and decoders (Llama, a causal one) of several
    widths differ in size alone: one vocabulary, the same text in the same order, one schedule, a
    rate and a depth by rule. A finished model is a name wherever a model is asked for. The text is
    out of packages, without the rows that packaged tasks are tested on (English, lower case).

    Each pre-training is recorded, with its held-out loss, its curve and the digest of its weights.
    The same command again computes nothing; a killed one goes on from its checkpoints.

    For example

        deltacontrol pretrain --plan                          # what it makes, and how long it takes
        deltacontrol pretrain --preset quick                  # all ten, a few updates each
        deltacontrol pretrain                                 # all ten, about an hour on two cores
        deltacontrol pretrain --family encoder --sizes 48 80  # two of them
        deltacontrol finetune --model family/encoder-48 --task movie --delta lora

    Models are called family/encoder-48 (preset paper, seed 0), family/encoder-48@quick,
    family/encoder-48@steps=200,seed=1.
    """

    family: Literal["both", "encoder", "decoder"] = "both"
    """Encoders, decoders, or both."""
    sizes: tuple[int, ...] = SIZES
    """Widths, multiples of 16. A width d has max(2, round(d/48)) layers, heads of size 16, and the
    learning rate 0.5/d."""
    preset: Literal["quick", "paper"] = "paper"
    """How many updates: quick 60, to try it out, or paper 2000. Every size has the same."""
    steps: int | None = None
    """Another number of updates, of 1024 tokens each."""
    minutes: float | None = None
    """As many updates as all of them together can make in this time, by the estimate; their names
    then have that number."""
    seed: int = 0
    """Seed of the weights at the start, the order of the text, and the masks."""
    workers: int | None = None
    """Models at a time: by default one a core, or one where there is a GPU."""
    out: Path | None = None
    """Copy the finished models into this folder too; they always are in the cache."""
    plan: bool = False
    """Say what would be made and how long it takes, and stop."""
    runs: Path = Path("runs")
    """Folder in which the runs are recorded."""
    executor: str = DEFAULT
    """Who makes the runs: in-process, processes, ray or slurm, with options behind the name, such
    as ray:gpus=1."""
    limit_minutes: float = LIMIT_MINUTES
    """How long one model may take. At the limit it is saved, and the same command goes on."""

    def run(self) -> int:
        """Pre-train, record, print; exit code 1 where one diverged."""
        from deltacontrol.experiments.runs.sweep import require_workers, run_all

        require_minutes(self.limit_minutes)
        require_workers(self.workers)
        executor_of(self.executor)
        found = self._experiments()
        print(_plan(found))
        if self.plan:
            return 0
        from deltacontrol.experiments.training.pretraining.tokens import tokens

        store = RunStore(self.runs)
        _report_text(tokens().counts)  # made once, before the processes that would all want it
        for one in found:
            _restore(one, store)
        with _Line(found, store) as line:
            records = run_all(
                found,
                store,
                self.workers,
                limit_minutes=self.limit_minutes,
                watch=line.look,
                executor=self.executor,
            )
        print(_table(found, records))
        alive = [one for one, r in zip(found, records, strict=True) if r.status == "completed"]
        if self.out is not None:
            for one in alive:
                _copy(one.member, self.out)
        print(f"recorded in {store.root}; use one as --model {found[-1].member.name}")
        return int(len(alive) < len(found))

    def _experiments(self) -> list[Pretraining]:
        if not self.sizes:
            raise InputError(f"no sizes; give widths, such as --sizes {SIZES[0]} {SIZES[1]}")
        if self.steps is not None and self.minutes is not None:
            raise InputError("steps and minutes both say how many updates to make; give one")
        families = FAMILIES if self.family == "both" else (self.family,)
        kinds: dict[str, Any] = {"families": families, "sizes": self.sizes, "seed": self.seed}
        steps = self.steps
        if self.minutes is not None:
            from deltacontrol.experiments.runs.provenance import usable_cores

            require_minutes(self.minutes)
            made = pretraining.experiments(steps=PRESETS["paper"], **kinds)
            steps = pretraining.affordable_steps(self.minutes, made, self.workers or usable_cores())
        return pretraining.experiments(self.preset, steps=steps, **kinds)


def _plan(found: Sequence[Pretraining]) -> str:
    lines = [f"{'model':32} {'parameters':>12} {'layers':>6} {'rate':>8} {'on one core':>12}"]
    for member in (one.member for one in found):
        there = "is there" if member.path.is_dir() else told_time(member.seconds)
        lines.append(
            f"{member.name:32} {member.num_parameters:12,d} {member.depth:6d} "
            f"{member.rate:8.2g} {there:>12}"
        )
    left = [one.member.seconds for one in found if not one.member.path.is_dir()]
    steps = found[0].steps
    tokens = steps * BATCH_ROWS * LENGTH
    lines.append(f"{steps:,d} updates each, {tokens:,d} tokens with [CLS] and [SEP]")
    if left:
        together = max(sum(left) / 2, max(left))
        lines.append(
            f"about {told_time(together)} on two cores such as those of an EPYC of the third "
            "generation"
        )
    return "\n".join(lines)


def _report_text(counts: dict[str, Any]) -> None:
    from deltacontrol.experiments.training.pretraining.tokens import BODY

    left_out = sum(one["with_tested_rows"] for one in counts["corpora"].values())
    documents, rows = counts["documents"], counts["rows"]
    print(
        f"text: {documents['training']:,d} documents ({', '.join(counts['corpora'])}), "
        f"{rows['training']:,d} rows of {BODY} tokens; {documents['held_out']:,d} documents held "
        f"out; {left_out:,d} left out, for they contain rows that tasks are tested on"
    )


def _restore(one: Pretraining, store: RunStore) -> None:
    """Make a model again that is recorded and no longer in the cache; say whether it is equal."""
    record = store.find(one)
    if record is None or record.status != "completed" or one.member.path.is_dir():
        return
    from deltacontrol.experiments.runs.experiment import Workspace

    print(f"{one.member.name} is recorded, and no longer in the cache: it is made again")
    partial = store.partial(one)
    again = one.execute(Workspace(partial))
    shutil.rmtree(partial, ignore_errors=True)
    same = again.result.get("weights_sha256") == record.result["weights_sha256"]
    print("its weights are those of the record" if same else
          "its weights differ from the record's, made on other hardware or threads; "
          f"delete {store.path(one)} to record this one")  # fmt: skip


def _table(found: Sequence[Pretraining], records: Sequence[Record]) -> str:
    lines = [f"{'model':32} {'loss':>7} {'perplexity':>10} {'minutes':>8}  weights (SHA-256)"]
    for one, record in zip(found, records, strict=True):
        result = record.result
        if result.get("loss") is None:
            lines.append(f"{one.member.name:32} {record.status}: {record.message}")
            continue
        minutes = result["seconds_per_step"] * result["num_steps"] / 60
        lines.append(
            f"{one.member.name:32} {result['loss']:7.3f} {result['perplexity']:10.1f} "
            f"{minutes:8.1f}  {result['weights_sha256'][:12]}"
        )
    lines.append("loss: nats a predicted token, on held-out text; of an encoder the masked ones")
    told = [r.result for r in records if r.result.get("loss") is not None]
    if told:
        lines.append(f"the frequencies of single tokens alone: {told[0]['unigram_loss']:.3f}")
    blind = [r["model"] for r in told if r["loss"] >= r["unigram_loss"]]
    if blind:
        lines.append(
            f"NOT BETTER THAN THAT, so that no context is learnt: {', '.join(blind)}; give more "
            "--steps"
        )
    return "\n".join(lines)


def _copy(member: Member, out: Path) -> None:
    """Copy a finished model into a folder, whole or not at all, unless it is there.

    Raises:
        InputError: another model is there, or the folder cannot be written.
    """
    source, target = member.folder(), out / f"{member.family}-{member.width}"
    weights = "model.safetensors"
    if target.exists():
        if (target / weights).is_file() and sha256_of(target / weights) == sha256_of(
            source / weights
        ):
            return
        raise InputError(
            f"{target} is there already and is another model; give an --out without it"
        )
    partial = out / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".*"))
        partial.rename(target)
    except OSError as error:
        raise InputError(
            f"{member.name} cannot be copied to {target} ({error.strerror or error}); it is in the "
            "cache: make room, or give another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"copied {member.name} to {target}")


@dataclass
class _Line:
    """The progress of all of them: what is done, what the time was, and what is left."""

    found: Sequence[Pretraining]
    store: RunStore
    bar: Any = field(default=None, init=False)
    looked: float = field(default=0.0, init=False)
    every: float = 2.0

    def __enter__(self) -> _Line:
        """Begin to draw; what was done before does not count as speed."""
        self.bar = tqdm(
            total=_MARKS,
            initial=self._done(),
            desc="pre-training",
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Draw the end."""
        self._draw()
        self.bar.close()

    def look(self, _: int) -> None:
        """Draw anew, unless that was just done."""
        if time.monotonic() - self.looked >= self.every:
            self.looked = time.monotonic()
            self._draw()

    def _draw(self) -> None:
        self.bar.update(self._done() - self.bar.n)
        self.bar.refresh()

    def _done(self) -> int:
        """How much of the work need not be done again, of `_MARKS`, each model by its estimate."""
        from deltacontrol.experiments.training.checkpoints import steps_done

        done, total = 0.0, 0.0
        for one in self.found:
            whole = one.member.path.is_dir()
            share = 1.0 if whole else steps_done(self.store.partial(one)) / one.steps
            done += share * one.member.seconds
            total += one.member.seconds
        return round(_MARKS * done / total)


COMMAND = Pretrain
