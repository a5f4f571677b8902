"""Claim 13: prompted fine-tuning follows the tangent kernel of its start, and LoRA keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from deltacontrol.experiments.measures.kernel_regime import Followed
    from deltacontrol.experiments.measures.margins import MarginData

MODEL, TASK = "smollm2-135m", "movie"
SEEDS = (0, 1)  # of the examples, of A, and of the head without a prompt
SHOTS, UNSEEN, TOKENS = 8, 8, 12
FALL, STEPS = 0.5, 30
RANK, RANKS = 8, (1, 8, 64)
# Fixed before the measurement; the judged number is the largest of measured / limit.
ERROR = 0.25  # of the margins' changes on unseen examples, relative
DRIFT = 0.25  # of the kernel in training, relative
DISTANCE = 0.25  # of LoRA's kernel from that of full fine-tuning of the same matrices


@cache
def _data(seed: int, prompted: bool) -> MarginData:
    from deltacontrol.experiments.measures.margins import MarginData
    from deltacontrol.experiments.setting import Setting

    setting = Setting(
        MODEL, TASK, train_rows=SHOTS, test_rows=UNSEEN, order="shuffled", strict_rows=True,
        max_length=TOKENS, head="words" if prompted else "own", seed=seed,
    )  # fmt: skip
    return MarginData.of(setting)


@cache
def _followed(seed: int, head: str) -> Followed:
    """With a prompt ("none" has a head of its own), or a drawn head that is trained or frozen."""
    from deltacontrol.deltas import HeadTuning, LoRA
    from deltacontrol.experiments.measures.kernel_regime import follow

    trained = [HeadTuning()] if head == "trained" else []
    return follow(
        _data(seed, head == "none"), [LoRA(rank=RANK), *trained], fall=FALL, steps=STEPS, seed=seed
    )


@cache
def _full(seed: int) -> Followed:
    """With a prompt, the matrices that LoRA acts on trained themselves."""
    from deltacontrol.deltas import LoRA
    from deltacontrol.deltas.methods.selected_modules import SelectedModules
    from deltacontrol.experiments.measures.kernel_regime import follow

    delta = SelectedModules(sites=LoRA().sites)
    return follow(_data(seed, True), [delta], fall=FALL, steps=STEPS, seed=seed)


@cache
def _distances(seed: int) -> dict[int, float]:
    """LoRA's kernel against that of the matrices it acts on, by rank."""
    from deltacontrol.deltas import LoRA, attach
    from deltacontrol.deltas.methods.selected_modules import SelectedModules
    from deltacontrol.experiments.measures.kernel_regime import kernel_distance, kernel_of

    data, kernels = _data(seed, True), {}
    deltas: dict[int, Any] = {rank: LoRA(rank=rank) for rank in RANKS}
    for rank, delta in {0: SelectedModules(sites=LoRA().sites), **deltas}.items():
        controlled = attach(data.model, delta, seed=seed)
        try:
            kernels[rank] = kernel_of(data, controlled).total()
        finally:
            controlled.detach()
    return {rank: kernel_distance(kernels[rank], kernels[0]) for rank in RANKS}


def _predict() -> dict[str, Any]:
    """The loss that gradient descent reaches in the linear model, in so many steps."""
    found = {}
    for seed in SEEDS:
        run = _followed(seed, "none")
        found[f"seed {seed}"] = {"start": run.start, "loss": run.predicted, "steps": run.steps}
    return found


def _ratio(run: Followed) -> float:
    return max(run.error / ERROR, run.drift / DRIFT)


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """With a prompt, read out by the words great and terrible; beside it, a trained head."""
    ratios, details = [], {}
    for seed in SEEDS:
        run, distances = _followed(seed, "none"), _distances(seed)
        details[f"seed {seed}"] = dict(vars(run))
        details[f"seed {seed}, distance of LoRA's kernel by rank"] = distances
        details[f"seed {seed}, no prompt, head trained"] = dict(vars(_followed(seed, "trained")))
        if seed == SEEDS[0]:
            name = f"seed {seed}, the matrices themselves trained, without LoRA"
            details[name] = dict(vars(_full(seed)))
        ratios.append(max(_ratio(run), distances[RANK] / DISTANCE))
    return Evidence(
        value=max(ratios),
        details=details,
        spread=(min(ratios), max(ratios)),
        note=(
            f"SmolLM2-135M, {SHOTS} rows of movie, LoRA of rank {RANK}, gradient descent until the "
            f"linear model's loss has halved, at most {STEPS} steps; {UNSEEN} unseen rows; spread "
            "over the draws of examples and of A; a drawn head that is trained beside LoRA has "
            "nearly all of the kernel and is linear, so that it says nothing of features: it is "
            "shown, and judged is the contrast to a head that is frozen"
        ),
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """Without a prompt: a head that is drawn and frozen, so that the features alone can learn."""
    runs = {seed: _followed(seed, "frozen") for seed in SEEDS}
    return Evidence(
        value=max(_ratio(run) for run in runs.values()),
        details={f"seed {seed}": dict(vars(run)) for seed, run in runs.items()},
        note="no prompt; a head that is drawn and frozen",
    )


CLAIM = Claim(
    id=13,
    name="tangent-kernel",
    title="Prompted fine-tuning follows the tangent kernel of its start; LoRA keeps the kernel",
    statement=(
        "with a prompt, a few examples and gradient descent, the margins of LoRA's fine-tuning "
        "are those of its linearisation at the start, whose kernel hardly changes in training, "
        "and is in proportion to the kernel of full fine-tuning of the same matrices"
    ),
    source="Malladi, Wettig, Yu, Chen & Arora, ICML 2023, definition 3.2 and theorem 6.2",
    notebook="13_tangent_kernel",
    threshold=Threshold(
        "<=",
        1.0,
        f"largest of error / {ERROR:g}, kernel drift / {DRIFT:g}, distance from full fine-tuning's "
        f"kernel / {DISTANCE:g}",
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
