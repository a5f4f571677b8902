"""The training loop: minimise the loss over the controls of a `DeltaModel`.

Randomness is stateless. The batch of a step is a function of (seed, step), and so is the state of
torch's generator when the step begins, so that a training continued from a checkpoint repeats the
uninterrupted one exactly, on the same hardware with the same number of threads.

    update t = 0..steps-1:   g = ∇_u loss(batch(t)),  clipped to max_grad_norm
                             u ← AdamW(u, g; learning_rate(t), weight_decay)

or another optimiser of `torch.optim` in its place.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from deltacontrol.deltas.dynamics.frozen_states import FrozenStates
from deltacontrol.experiments.runs.experiment import PausedError
from deltacontrol.experiments.runs.interrupts import deferred
from deltacontrol.experiments.training import checkpoints, kept_states
from deltacontrol.experiments.training import devices as resources
from deltacontrol.experiments.training.compiling import CompiledPass, compiled_pass
from deltacontrol.experiments.training.devices import attention, autocast
from deltacontrol.experiments.training.gradients import (
    Batches,
    accumulate,
    ahead,
    examples,
    num_tokens,
    shares,
)
from deltacontrol.experiments.training.modes import training_mode
from deltacontrol.experiments.training.results import TrainingResult, curve, divergence, summary
from deltacontrol.experiments.training.settings import Settings, learning_rate
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import DeltaModel

UNTIMED_STEPS = 5
WATCHED_STEPS = 5  # after which every delta has to have had a gradient
PREPARATION_BATCHES = 8


def train(
    delta_model: DeltaModel,
    data: Batches,
    settings: Settings,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
    keep_checkpoint: bool = False,
    pause_after: int | None = None,
    tell: Callable[[Mapping[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train the controls of `delta_model` in place.

    Args:
        delta_model: A model with its controls.
        data: The batches.
        settings: How to train.
        evaluate: Metrics of the model on validation data; needed for `settings.eval_every`.
        checkpoint_dir: Where to keep a checkpoint; one that is there is continued from.
        progress: Whether to draw a progress bar.
        keep_checkpoint: Whether the last state is kept there too, so that the same call gives the
            same result at once.
        pause_after: A step before the last one behind which the training is saved and paused; it
            needs `checkpoint_dir` and `evaluate`. The same call without it goes on from there, and
            gives what an uninterrupted training gives.
        tell: is given the curve's row of each step when it is made.

    Returns:
        The result. A loss or gradient that is not finite ends the training with status "diverged",
        before it reaches the controls.

    Raises:
        InputError: The checkpoint folder cannot be used; a batch smaller than its number of slices;
            `settings.compile` is "always" and cannot be followed.
        PausedError: behind `pause_after`, with the metrics of the model there.
    """
    device = resources.choose_device(settings.device)
    precision = resources.choose_precision(settings.precision, device)
    loop = _Loop(delta_model, data, settings, _accelerator(device, precision))
    if checkpoint_dir is not None:
        loop.resume(checkpoint_dir)
    if delta_model.needs_data and not loop.run.step:
        loop.prepare()
    run, earlier = loop.run, loop.run.seconds
    began = saved = time.perf_counter()
    memory = resources.PeakMemory(device)
    status, message = "completed", ""
    bar = tqdm(
        total=settings.steps,
        initial=run.step,
        desc="training",
        disable=not (progress and loop.accelerator.is_main_process),
    )
    mode = training_mode(delta_model, settings.dropout, settings.gradient_checkpointing)
    once = resources.cast_once(delta_model.model, precision)
    guarded = deferred() if checkpoint_dir is not None else nullcontext()
    batches = ahead(data, settings.steps, loop.accelerator.device)
    with bar, mode, once, batches as loop.data, guarded as interrupts:
        if loop.exhausted:
            status, message = "early_stopped", "stopped before this attempt"
        elif run.step < settings.steps:
            loop.begin()
        while run.step < settings.steps and status == "completed":
            if pause_after is not None and run.step >= pause_after:
                assert checkpoint_dir is not None and evaluate is not None
                run.seconds = earlier + time.perf_counter() - began
                run.peak_memory = max(run.peak_memory, memory.peak())
                loop.save(checkpoint_dir)
                raise PausedError(evaluate(delta_model))
            message = loop.update()
            bar.update()
            bar.set_postfix(loss=f"{run.rows[-1]['loss']:.3f}", refresh=False)
            if tell is not None:
                tell(run.rows[-1])
            if message:
                status = "diverged"
                break
            if evaluate and settings.eval_every and run.step % settings.eval_every == 0:
                message = loop.validate(evaluate)
                if message:
                    status = "early_stopped"
                    break
            now = time.perf_counter()
            stopping = interrupts is not None and interrupts.asked
            due = stopping or now - saved >= settings.checkpoint_seconds
            due = due and run.step < settings.steps
            if checkpoint_dir is not None and due and loop.accelerator.is_main_process:
                run.seconds = earlier + now - began
                run.peak_memory = max(run.peak_memory, memory.peak())
                loop.save(checkpoint_dir)
                saved = time.perf_counter()
            if interrupts is not None and stopping and due:
                interrupts.stop(f"step {run.step} of {settings.steps} is saved")
        last = interrupts is not None and interrupts.asked  # while the last step was made
    keep_checkpoint = keep_checkpoint or last
    if checkpoint_dir is not None and keep_checkpoint and status != "diverged":
        if loop.accelerator.is_main_process:
            run.seconds = earlier + time.perf_counter() - began
            run.peak_memory = max(run.peak_memory, memory.peak())
            loop.save(checkpoint_dir)
    if interrupts is not None and last:
        kept = "the training diverged" if status == "diverged" else "it is saved"
        interrupts.stop(f"step {run.step} of {settings.steps}: {kept}")
    loop.finish()
    measures = summary(run, memory, precision, device)
    if loop.frozen is not None:
        measures["kept_blocks"] = loop.frozen.num_frozen
    if loop.compiled is not None:
        measures["compiled"] = True
    return TrainingResult(
        status, message, curve(run), delta_model.state(), run.best, measures, earlier
    )


class _Loop:
    """The parts of a training, and its single steps."""

    def __init__(
        self,
        delta_model: DeltaModel,
        data: Batches,
        settings: Settings,
        accelerator: Accelerator,
    ) -> None:
        self.delta_model, self.data, self.settings = delta_model, data, settings
        self.accelerator = accelerator
        self.controls = delta_model.trainable()
        self.variables = delta_model.variables()
        factors = delta_model.rate_factors
        grouped: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.controls.items():
            grouped.setdefault(factors.get(name, 1.0), []).append(parameter)
        self.optimizer = settings.optimizer(
            [{"params": group, "factor": factor} for factor, group in grouped.items()]
        )
        self.model, self.prepared = accelerator.prepare(delta_model, self.optimizer)
        self.run = checkpoints.Progress()
        self.first = 0
        self.moved: set[str] = set()  # deltas of which a control has had a gradient
        self.frozen: FrozenStates | None = None
        kept_states.check(data, settings)
        self.compiled: CompiledPass | None = None
        self.best_controls: dict[str, Tensor] | None = None

    def resume(self, folder: Path) -> None:
        self.run, self.best_controls = checkpoints.load(folder, self.variables, self.optimizer)
        self.first = self.run.step

    def save(self, folder: Path) -> None:
        checkpoints.save(folder, self.run, self.variables, self.optimizer, self.best_controls)

    def prepare(self) -> None:
        """Show the first batches to deltas that depend on the data.

        Each example comes alone where one of the deltas needs that, otherwise a batch at a time.
        """
        device, alone = self.accelerator.device, self.delta_model.needs_examples

        def losses() -> Iterator[Tensor]:
            for step in range(PREPARATION_BATCHES):
                batch = self.data.batch(step)
                for one in examples(batch, self.settings.kind) if alone else (dict(batch),):
                    if self.settings.kind == "causal-lm":
                        one["use_cache"] = False
                    inputs = {
                        k: v.to(device) if isinstance(v, Tensor) else v for k, v in one.items()
                    }
                    yield self.delta_model(**inputs).loss

        self.delta_model.prepare(losses)

    def begin(self) -> None:
        """Keep states, or else compile the pass, where that is asked for or pays."""
        if self.settings.compile != "always":
            self._keep_states()
        if self.frozen is None:  # kept states leave out blocks of some passes
            self._compile()

    def _compile(self) -> None:
        settings = self.settings
        if settings.compile == "never":
            return
        batch = dict(self.data.batch(0))

        def trial() -> None:
            try:
                self._gradient(batch, 0)
            finally:
                self.optimizer.zero_grad(set_to_none=True)

        self.compiled = compiled_pass(
            self.delta_model,
            settings,
            batch,
            "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32",
            self.accelerator.device.type,
            trial,
        )

    @property
    def exhausted(self) -> bool:
        """Whether the patience was at its end already when this attempt began."""
        patience = self.settings.patience
        return patience is not None and self.run.stale >= patience

    def update(self) -> str:
        """Do one update and add its row; returns a message if it had to be left out."""
        start, step, settings = time.perf_counter(), self.run.step, self.settings
        rate = learning_rate(
            step,
            peak=settings.peak_rate,
            steps=settings.steps,
            warmup=settings.warmup,
            schedule=settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batch = dict(self.data.batch(step))
        if self.frozen is not None:
            batch["examples"] = self.data.examples(step)  # type: ignore[attr-defined]
        with self.compiled.acting() if self.compiled is not None else nullcontext():
            loss = self._gradient(batch, step)
        self._require_gradients(step)
        bound = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
        clipped = self.accelerator.clip_grad_norm_(self.controls.values(), bound)
        norm = float(clipped)  # type: ignore[arg-type]
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.prepared.step()
            self.run.step = step + 1
            if self.delta_model.after_step(step + 1, settings.steps):
                # Another model from here on: the moments, and the best so far, were the old one's.
                self.optimizer.state.clear()
                self.run.best, self.run.stale, self.best_controls = None, 0, None
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.run.rows.append(
            {
                "step": step + 1,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": num_tokens(batch),
                "seconds": time.perf_counter() - start,
                "timed": step - self.first >= UNTIMED_STEPS,
            }
        )
        return "" if finite else divergence(step + 1, loss, norm, rate)

    def _gradient(self, batch: dict[str, Any], step: int) -> float:
        """Accumulate the gradient of a batch; returns its loss."""
        return accumulate(
            self.accelerator,
            self.model,
            batch,
            kind=self.settings.kind,
            seed=self.settings.seed,
            step=step,
            slices=self.settings.grad_accumulation,
            penalty=self.delta_model.penalty if self.delta_model.is_penalised else None,
            frozen=self.frozen,
        )

    def _require_gradients(self, step: int) -> None:
        """Refuse a delta of which no control takes part in the loss of the first batches.

        One batch alone does not tell: it may call no token's expert, or drop a block.
        """
        if step >= self.first + WATCHED_STEPS:
            return
        for attachment in self.delta_model.attachments:
            start = f"{attachment.namespace}."
            own = [p for name, p in self.controls.items() if name.startswith(start)]
            if not own or any(p.grad is not None for p in own):
                self.moved.add(attachment.namespace)
        last = min(self.first + WATCHED_STEPS, self.settings.steps) - 1
        still = [a.namespace for a in self.delta_model.attachments if a.namespace not in self.moved]
        if step == last and still:
            raise InputError(
                f"no gradient reaches the controls of {still[0]}: nothing that it acts on takes "
                f"part in the loss of {type(self.delta_model.model).__name__} on these data; "
                "choose other sites or layers, or another delta"
            )

    def _keep_states(self) -> None:
        """Keep the states below the lowest control, where that is asked for or pays."""

        def replay(step: int, frozen: FrozenStates) -> None:
            batch = dict(self.data.batch(step))
            batch["examples"] = self.data.examples(step)  # type: ignore[attr-defined]
            slices = settings.grad_accumulation
            for inputs in shares(self.accelerator, batch, settings.kind, slices):
                with autocast(precision, device.type), attention(inputs, precision, device.type):
                    frozen.learn(inputs.pop("examples"), inputs)

        settings, device = self.settings, self.accelerator.device
        precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"
        self.frozen = kept_states.kept(
            self.delta_model,
            self.data,
            settings,
            device,
            precision=precision,
            first=self.first,
            replay=replay,
        )

    def validate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> str:
        """Evaluate into the last row; returns a message if the patience is at its end."""
        run, settings = self.run, self.settings
        metrics = evaluate(self.delta_model)
        run.rows[-1].update({f"validation_{name}": value for name, value in metrics.items()})
        value, sign = metrics[settings.monitor], 1.0 if settings.larger_is_better else -1.0
        best = run.best
        if math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
            run.best, run.stale = {"step": float(run.step), "value": value}, 0
            if settings.patience:
                self.best_controls = {
                    k: v.detach().cpu().clone() for k, v in self.variables.items()
                }
            return ""
        run.stale += 1
        if settings.patience is None or run.stale < settings.patience:
            return ""
        reached = f"{best['value']:.4g} of step {best['step']:.0f}" if best else "no finite value"
        return f"stopped after step {run.step}: {settings.monitor} has not improved on {reached}"

    def finish(self) -> None:
        """Give the model back without accelerate's wrappers, with the best controls if kept."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        with torch.no_grad():
            for name, value in (self.best_controls or {}).items():
                self.variables[name].copy_(value)


def _accelerator(device: str, precision: str) -> Accelerator:
    # Accelerate keeps one global state, and refuses another precision or device in one process.
    AcceleratorState._reset_state(reset_partial_state=int(os.environ.get("WORLD_SIZE", "1")) == 1)
    mixed = "bf16" if precision == "bf16" else "no"
    return Accelerator(mixed_precision=mixed, cpu=device == "cpu")
