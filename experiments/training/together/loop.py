"""Train K copies of deltas over one frozen backbone in one pass: seeds and learning rates at once.

Each copy gets the updates that `training.train` would give it alone, up to rounding: its own batch,
gradient norm, clipping, rate and AdamW moments; only the passes are shared,

    Σ_k loss(u_k; batch_k),        with ∇ of the sum = (∇ loss(u_1), …, ∇ loss(u_K)).

A pass takes the copies in groups. A frozen map over more rows runs nearer to the machine's speed
until that is reached; beyond, a larger group costs memory and cache. So the first updates are made
by groups of several sizes, one copy at a time among them, and the others by the quickest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from deltacontrol.deltas import DeltaStack
from deltacontrol.deltas.ensemble.stack import UnstackableError
from deltacontrol.experiments.runs.interrupts import deferred
from deltacontrol.experiments.training import checkpoints
from deltacontrol.experiments.training import devices as resources
from deltacontrol.experiments.training import loop as training
from deltacontrol.experiments.training.gradients import num_tokens
from deltacontrol.experiments.training.loop import Batches
from deltacontrol.experiments.training.modes import training_mode
from deltacontrol.experiments.training.results import TrainingResult, curve, divergence, summary
from deltacontrol.experiments.training.settings import Settings, learning_rate
from deltacontrol.experiments.training.together.groups import Groups
from deltacontrol.theory.errors import InputError

BETAS, EPS = (0.9, 0.999), 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them
ROWS = 2048  # tokens of a pass from which on larger products gain nothing, and need memory


@dataclass(frozen=True)
class ManyResult:
    """What training many copies gave.

    Attributes:
        results: one for each copy, as `training.train` gives them; seconds of a step are its share
            of the common step.
        group: how many copies shared a pass; 1 is one after another.
        reason: why the copies could not share one; empty where they could.
    """

    results: tuple[TrainingResult, ...]
    group: int
    reason: str = ""


class Loop:
    """A training of all copies of a stack, and its single steps.

    Args:
        stack: the copies on their model.
        data: the batches of each copy.
        settings: of each copy.
        device: "cpu" or "cuda".
        folders: where each copy keeps its checkpoint, in the form of a training alone; those that
            are there are continued from, all at the same step.
        evaluate: metrics of the model on validation rows, for ``eval_every``.
    """

    def __init__(
        self,
        stack: DeltaStack,
        data: Sequence[Batches],
        settings: Sequence[Settings],
        device: str,
        *,
        folders: Sequence[Path] = (),
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> None:
        self.stack, self.data, self.settings = stack, data, settings
        self.device, self.folders, self.evaluate = device, folders, evaluate
        self.precision = resources.choose_precision(settings[0].precision, device)
        self.controls = stack.trainable()
        for parameter in self.controls.values():
            parameter.grad = torch.zeros_like(parameter)
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.controls.items()
        }
        self.runs = [checkpoints.Progress() for _ in settings]
        self.messages = ["" for _ in settings]
        self.groups = Groups(self._candidates(self.stack.num_copies))
        self.first = self._resume()
        self.earlier = [run.seconds for run in self.runs]

    def train(self, group: int | None, progress: bool, until: int | None = None) -> ManyResult:
        """The result.

        Args:
            group: how many copies share a pass; None measures what is fastest.
            progress: whether to draw a progress bar.
            until: a step before the last one behind which all are saved, and the result ends.

        Raises:
            UnstackableError: it would be another one than each copy's own; the text says why.
        """
        count, steps = self.stack.num_copies, self.settings[0].steps
        memory = resources.PeakMemory(self.device)
        began = saved = time.perf_counter()
        guarded = deferred() if self.folders else nullcontext()
        once = resources.cast_once(self.stack.model, self.precision)
        with training_mode(self.stack.single, False, False), once, guarded as interrupts:
            if reason := self._obstacle():
                raise UnstackableError(reason)
            stop = steps if until is None else min(until, steps)
            bar = tqdm(
                total=steps,
                initial=self.first,
                desc=f"training {count} copies",
                disable=not progress,
            )
            with bar:
                for step in range(self.first, stop):
                    self.update(step, self.groups.next() if group is None else group)
                    bar.update()
                    if all(self.messages):
                        break
                    self._validate(step + 1)
                    asked = interrupts is not None and interrupts.asked
                    due = time.perf_counter() - saved >= self.settings[0].checkpoint_seconds
                    if self.folders and (asked or due or step + 1 == until):
                        self._save(time.perf_counter() - began, memory)
                        saved = time.perf_counter()
                    if interrupts is not None and asked:
                        interrupts.stop(f"step {step + 1} of {steps} is saved")
        results = []
        for k, (run, message) in enumerate(zip(self.runs, self.messages, strict=True)):
            status = "diverged" if message else "completed"
            measures = summary(run, memory, self.precision, self.device)
            rows, controls = curve(run), self.stack.state(k)
            results.append(
                TrainingResult(status, message, rows, controls, run.best, measures, self.earlier[k])
            )
        return ManyResult(tuple(results), self.groups.best if group is None else group)

    def _resume(self) -> int:
        """Put the checkpoints in place; the step that all of them have reached.

        Raises:
            UnstackableError: they stand at different steps.
            InputError: one cannot be used.
        """
        for k, folder in enumerate(self.folders):
            self.runs[k], tensors = checkpoints.read(folder)
            if not tensors:
                continue
            try:
                self._put(k, tensors)
            except (LookupError, RuntimeError) as error:  # of other controls
                raise checkpoints.unusable(folder, error) from error
        steps = {run.step for run in self.runs}
        if len(steps) > 1:
            raise UnstackableError(f"the checkpoints stand at the steps {sorted(steps)}")
        return steps.pop()

    @torch.no_grad()
    def _put(self, k: int, tensors: dict[str, Tensor]) -> None:
        """Give copy ``k`` the values and moments of a checkpoint."""
        for name, parameter in self.controls.items():
            parameter[k].copy_(tensors[f"control/{name}"])
            for key, moment in zip(MOMENTS, self.moments[name], strict=True):
                if f"{key}/{name}" in tensors:  # absent before the first gradient
                    moment[k].copy_(tensors[f"{key}/{name}"])

    def _save(self, elapsed: float, memory: resources.PeakMemory) -> None:
        """Write the checkpoint of every copy, as that of a training alone."""
        fixed = self.stack.fixed_names
        for k, (folder, run) in enumerate(zip(self.folders, self.runs, strict=True)):
            if self.messages[k]:
                continue
            run.seconds = self.earlier[k] + elapsed / len(self.runs)
            run.peak_memory = max(run.peak_memory, memory.peak())
            tensors = {
                f"control/{name}": value
                for name, value in self.stack.state(k).items()
                if name not in fixed
            }
            for name, moments in self.moments.items():
                tensors[f"step/{name}"] = torch.tensor(float(run.step))
                for key, moment in zip(MOMENTS, moments, strict=True):
                    tensors[f"{key}/{name}"] = moment[k].clone()
            checkpoints.write(folder, run, tensors)

    def _validate(self, step: int) -> None:
        """Evaluate every copy into its last row, at the steps where that is asked for."""
        every, shared = self.settings[0].eval_every, self.settings[0]
        if self.evaluate is None or not every or step % every:
            return
        sign = 1.0 if shared.larger_is_better else -1.0
        for k, run in enumerate(self.runs):
            if self.messages[k]:
                continue
            with resources.autocast(self.precision, self.device):
                metrics = self.evaluate(self.stack.copy(k))
            run.rows[-1].update({f"validation_{name}": value for name, value in metrics.items()})
            value, best = metrics[shared.monitor], run.best
            if math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
                run.best = {"step": float(step), "value": value}

    def _obstacle(self) -> str:
        """Why a first pass shows that copies would not get what each gets alone; or nothing.

        A pass in training mode that draws from a generator of torch draws other numbers for each,
        and a control that takes no part in the loss has no gradient, which AdamW tells from zero.
        """
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []

        def states() -> list[Tensor]:
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

        leaves = {n: p.detach()[:1].requires_grad_() for n, p in self.controls.items()}
        with torch.random.fork_rng(devices), torch.enable_grad():
            before = states()
            loss = self._run(leaves, self._batches(self.first)[:1], 0, 1).sum()
            if not all(map(torch.equal, before, states())):
                return "the controls or the model draw random numbers in training"
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        unused = [name for name, grad in zip(leaves, found, strict=True) if grad is None]
        return f"no gradient reaches {unused[0]} on a first batch" if unused else ""

    def _candidates(self, count: int) -> list[int]:
        """Sizes of a group that may be the quickest, by the tokens of a first batch."""
        tokens = max(b["labels"].shape[0] * _width(b) for b in self._batches(0))
        return sorted({1, max(1, min(count, ROWS // tokens))})

    def _batches(self, step: int) -> list[dict[str, Any]]:
        return [dict(data.batch(step)) for data in self.data]

    def _run(
        self, values: dict[str, Tensor], batches: list[dict[str, Any]], start: int, stop: int
    ) -> Tensor:
        batch = join(batches, getattr(self.stack.model.config, "pad_token_id", None) or 0)
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        if self.settings[0].kind == "causal-lm":
            batch["use_cache"] = False
        with (
            resources.autocast(self.precision, self.device),
            resources.attention(batch, self.precision, self.device),
        ):
            logits = self.stack.run(values, start, stop, batch).logits
            return self.stack.losses(logits, labels, stop - start)

    def _gradients(self, batches: list[dict[str, Any]], size: int) -> Tensor:
        """Put the gradient of each copy's loss into its controls' ``grad``; the losses."""
        losses = []
        for start in range(0, len(batches), size):
            stop = min(start + size, len(batches))
            leaves: dict[str, Tensor] = {}
            for name, parameter in self.controls.items():
                leaf = parameter.detach()[start:stop].requires_grad_()
                assert parameter.grad is not None
                leaf.grad = parameter.grad[start:stop].zero_()  # a view: filled in place
                leaves[name] = leaf
            found = self._run(leaves, batches[start:stop], start, stop)
            found.sum().backward()
            losses.append(found.detach())
        return torch.cat(losses).float()

    @torch.no_grad()
    def update(self, step: int, size: int) -> None:
        """One update of every copy, ``size`` of them in a pass."""
        began = time.perf_counter()
        batches = self._batches(step)
        with torch.enable_grad():
            losses = self._gradients(batches, size)
        squares = [p.grad.reshape(len(p), -1).square().sum(1) for p in self.controls.values()]  # type: ignore[union-attr]
        norms = torch.stack(squares).sum(0).sqrt()
        rates = [self._rate(k, step) for k in range(len(batches))]
        finite = (losses.isfinite() & norms.isfinite()).tolist()
        goes_on = [
            good and not message for good, message in zip(finite, self.messages, strict=True)
        ]
        self._adamw(
            step, torch.tensor(rates, dtype=torch.float64, device=norms.device), norms, goes_on
        )
        if self.device == "cuda":
            torch.cuda.synchronize()
        running = [k for k, message in enumerate(self.messages) if not message]
        seconds = time.perf_counter() - began
        self.groups.note(size, seconds / sum(num_tokens(batch) for batch in batches))
        seconds /= len(running)
        for k in running:
            loss, norm = float(losses[k]), float(norms[k])
            if not finite[k]:
                self.messages[k] = divergence(step + 1, loss, norm, rates[k])
            else:
                self.runs[k].step = step + 1
            self.runs[k].rows.append(
                {
                    "step": step + 1,
                    "loss": loss,
                    "learning_rate": rates[k],
                    "grad_norm": norm,
                    "tokens": num_tokens(batches[k]),
                    "seconds": seconds,
                    "timed": step - self.first >= training.UNTIMED_STEPS,
                }
            )

    def _rate(self, k: int, step: int) -> float:
        own = self.settings[k]
        return learning_rate(
            step, peak=own.peak_rate, steps=own.steps, warmup=own.warmup, schedule=own.schedule
        )

    def _adamw(self, step: int, rates: Tensor, norms: Tensor, goes_on: list[bool]) -> None:
        """AdamW (Loshchilov & Hutter, ICLR 2019, Algorithm 2), each copy with its own rate.

        A copy that has diverged keeps its controls.
        """
        shared, factors = self.settings[0], self.stack.rate_factors
        bound = math.inf if shared.max_grad_norm is None else shared.max_grad_norm
        scale = (bound / (norms + 1e-6)).clamp_max(1.0)
        alive = torch.tensor(goes_on, device=norms.device)
        corrections = [1 - beta ** (step + 1) for beta in BETAS]
        for name, parameter in self.controls.items():
            first, second = self.moments[name]
            grad = parameter.grad
            assert grad is not None

            def each(values: Tensor, like: Tensor = parameter) -> Tensor:
                return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))

            grad = torch.where(each(alive).bool(), grad * each(scale), torch.zeros_like(grad))
            rate = each(torch.where(alive, rates, torch.zeros_like(rates))) * factors.get(name, 1.0)
            first.lerp_(grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            parameter.mul_(1 - rate * shared.weight_decay)
            spread = second.sqrt().div_(math.sqrt(corrections[1])).add_(EPS)
            parameter.sub_(rate / corrections[0] * first / spread)


def _width(batch: dict[str, Any]) -> int:
    sizes = [v.shape[1] for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1]
    return max(sizes, default=1)


def join(batches: Sequence[dict[str, Any]], pad_token: int) -> dict[str, Any]:
    """The batches one after another, padded on the right to the longest; labels by -100.

    Raises:
        InputError: they differ in their arguments or in the number of examples.
    """
    first = batches[0]
    for batch in batches:
        if batch.keys() != first.keys() or len(batch["labels"]) != len(first["labels"]):
            raise InputError(
                f"the copies' batches differ: {len(first['labels'])} examples with "
                f"{', '.join(first)} and {len(batch['labels'])} with {', '.join(batch)}; copies "
                "that share a pass need the same number of the same kind."
            )
    fill = {"input_ids": pad_token, "labels": -100}
    joined: dict[str, Any] = {}
    for key, value in first.items():
        values = [batch[key] for batch in batches]
        if isinstance(value, Tensor) and value.dim() == 2:
            width = max(v.shape[1] for v in values)
            values = [pad(v, (0, width - v.shape[1]), value=fill.get(key, 0)) for v in values]
        joined[key] = torch.cat(values) if isinstance(value, Tensor) else value
    return joined
