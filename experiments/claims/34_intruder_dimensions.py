"""Claim 34: LoRA's update has intruder dimensions, and scaling them down lowers forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.experiments.measures.language.top_layers import Leading, TopLayers, Weights

# The last layers alone are trained: the states that enter them are computed once. LoRA and full
# fine-tuning act on the same matrices; the full one ends where its training loss is LoRA's.
MODEL, TASKS, HELD = "smollm2-135m", ("movie", "rt", "sms", "amazon", "nyt"), "trec6"
LAYERS, SITES = 4, ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
TRAIN, TEST, TOKENS = 128, 100, 16
HELD_ROWS, HELD_TOKENS = 100, 16
RANK, SCALING = 4, 2.0  # LoRA's rank and s in W + s B A
LORA_RATE, FULL_RATE, STEPS, ROWS, WATCHED = 2e-3, 5e-5, 120, 8, 5
# As in the source: a leading singular vector of the tuned matrix is an intruder where no singular
# vector of the pre-trained one has this cosine with it.
LEADING, COSINE = 10, 0.5
SCALE = 0.5  # of the intruders' singular values
ALIKE = 0.05  # the training losses of both may differ by this, nats
# Fixed before the measurement: intruders a matrix, share of forgetting, accuracy.
MORE, REMOVED, COST = 0.1, 0.1, 0.05


@dataclass(frozen=True, eq=False)
class _Data:
    """A task's rows at the entry of the trained layers, and the two words that are the answers."""

    train: Mapping[str, Tensor]
    test: Mapping[str, Tensor]
    words: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Tuned:
    """A task's fine-tunings: the matrices, and the training losses reached."""

    lora: Weights
    full: Weights
    lora_loss: float
    full_loss: float


@cache
def _text() -> Any:
    """The language model and held text: texts of a task whose labels nobody looks at."""
    from deltacontrol.experiments.setting import Setting

    return Setting(
        MODEL, HELD, test_rows=HELD_ROWS, strict_rows=True, max_length=HELD_TOKENS,
        model_kind="causal-lm",
    )  # fmt: skip


@cache
def _top() -> TopLayers:
    from deltacontrol.experiments.measures.language.top_layers import TopLayers

    return TopLayers.of(_text().base, LAYERS, SITES)


@cache
def _held() -> Mapping[str, Tensor]:
    return _top().entered(_text().batch("test"))


@cache
def _data(task: str) -> _Data:
    from deltacontrol.experiments.setting import Setting

    setting = Setting(
        MODEL, task, train_rows=TRAIN, test_rows=TEST, order="shuffled", strict_rows=True,
        max_length=TOKENS, head="words",
    )  # fmt: skip
    words = setting.words
    assert words is not None
    train, test = (_top().entered(setting.batch(split)) for split in ("train", "test"))
    return _Data(train, test, words)


def _loss(data: _Data, weights: Weights, rows: Tensor | None = None) -> Tensor:
    """The training loss of some rows, or of all."""
    from torch.nn.functional import softplus

    batch = data.train if rows is None else {k: v[rows] for k, v in data.train.items()}
    signs = 2.0 * batch["labels"] - 1
    return softplus(-signs * _top().margins(batch, weights, data.words)).mean()


def _accuracy(data: _Data, weights: Weights) -> float:
    import torch

    with torch.no_grad():
        above = _top().margins(data.test, weights, data.words) > 0
    return float((above == (data.test["labels"] == 1)).float().mean())


def _descended(
    data: _Data,
    parameters: Sequence[Tensor],
    weights: Callable[[], Weights],
    rate: float,
    until: float | None = None,
) -> float:
    """AdamW for `STEPS` steps, or at most thrice as many until a training loss is reached."""
    import torch

    def now() -> float:
        with torch.no_grad():
            return float(_loss(data, weights()))

    random = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.0)
    for step in range(STEPS if until is None else 3 * STEPS):
        if until is not None and step % WATCHED == 0 and now() <= until:
            break
        rows = torch.randint(len(data.train["labels"]), (ROWS,), generator=random)
        optimiser.zero_grad()
        _loss(data, weights(), rows).backward()
        optimiser.step()
    return now()


@cache
def _tuned(task: str) -> _Tuned:
    """Both fine-tunings of one task."""
    import torch

    data, base = _data(task), _top().weights
    random = torch.Generator().manual_seed(1)
    A, B, D = {}, {}, {}
    for name, W in base.items():
        A[name] = torch.randn(RANK, W.shape[1], generator=random) / W.shape[1] ** 0.5
        B[name], D[name] = W.new_zeros(len(W), RANK), torch.zeros_like(W)
    for parameter in (*A.values(), *B.values(), *D.values()):
        parameter.requires_grad_()

    def low() -> Weights:
        return {n: W + SCALING * B[n] @ A[n] for n, W in base.items()}

    def full() -> Weights:
        return {n: W + D[n] for n, W in base.items()}

    lora_loss = _descended(data, (*A.values(), *B.values()), low, LORA_RATE)
    full_loss = _descended(data, tuple(D.values()), full, FULL_RATE, lora_loss)
    with torch.no_grad():
        return _Tuned(low(), full(), lora_loss, full_loss)


@cache
def _before(name: str) -> Tensor:
    """The left singular vectors of a pre-trained matrix."""
    import torch

    return torch.linalg.svd(_top().weights[name].double(), full_matrices=False).U


def _leading(weights: Weights) -> dict[str, Leading]:
    from deltacontrol.experiments.measures.language.top_layers import Leading

    return {n: Leading.of(W, _before(n), LEADING, COSINE) for n, W in weights.items()}


def _intruders(weights: Weights) -> float:
    """How many intruders a matrix has on average."""
    return sum(int(x.intruders.sum()) for x in _leading(weights).values()) / len(weights)


def _random(task: str, rank: int, large: bool = False) -> dict[str, Tensor]:
    """Random updates with equal singular values, each as large as LoRA's update of its matrix.

    ``large``: each singular value is thrice the matrix's largest one instead.
    """
    import torch

    found, random = {}, torch.Generator().manual_seed(2)
    for name, W in _top().weights.items():
        bases = [
            torch.linalg.qr(torch.randn(n, min(rank, *W.shape), generator=random)).Q
            for n in W.shape
        ]
        update = bases[0] @ bases[1].mT
        size = (_tuned(task).lora[name] - W).norm() / update.norm()
        found[name] = W + update * (3 * torch.linalg.matrix_norm(W, 2) if large else size)
    return found


def _more(rank: int | None = None) -> Evidence:
    """Intruders a matrix of LoRA, or of random updates of a rank, less those of the full one."""
    found, losses = [], {}
    for task in TASKS:
        tuned = _tuned(task)
        low = tuned.lora if rank is None else _random(task, rank)
        found.append(_intruders(low) - _intruders(tuned.full))
        losses[task] = [tuned.lora_loss, tuned.full_loss]
    apart = max(abs(a - b) for a, b in losses.values())
    return Evidence.mean(
        found,
        "task",
        details={"training losses, LoRA and full": losses},
        assumptions={"both reach one training loss": apart <= ALIKE},
        note=f"{MODEL}, {len(SITES)} matrices of each of the last {LAYERS} layers, the leading "
        f"{LEADING} singular vectors of each, cosine {COSINE:g}",
    )


@dataclass(frozen=True)
class _Scaled:
    """What scaling does: losses on held text, the fall of accuracy, intruders a matrix."""

    base: float
    tuned: float
    scaled: float
    fall: float
    intruders: float


@cache
def _scaled(task: str, leaders: bool, large: bool) -> _Scaled:
    """Scale the intruders down, or as many of the leading directions.

    ``large``: of random updates that exceed their matrices in all directions, so that all leading
    directions are intruders.
    """
    import torch

    tuned = _random(task, LEADING, large=True) if large else _tuned(task).lora
    less = {}
    for name, found in _leading(tuned).items():
        count = int(found.intruders.sum())
        which = torch.arange(len(found.values)) < count if leaders else found.intruders
        less[name] = found.scaled(tuned[name], which, SCALE)
    losses = [_top().text_loss(_held(), w) for w in (_top().weights, tuned, less)]
    fall = _accuracy(_data(task), tuned) - _accuracy(_data(task), less)
    return _Scaled(*losses, fall, _intruders(tuned))


def _after(what: str, leaders: bool = False, large: bool = False) -> Evidence:
    """The share of forgetting that scaling removes, or what it costs in accuracy."""
    found = {task: _scaled(task, leaders, large) for task in TASKS}
    removed = [(x.tuned - x.scaled) / (x.tuned - x.base) for x in found.values()]
    return Evidence.mean(
        removed if what == "removed" else [x.fall for x in found.values()],
        "task",
        details={task: vars(x) for task, x in found.items()},
        assumptions={
            "the model forgets": all(x.tuned > x.base for x in found.values()),
            "there are intruders": all(x.intruders > 0 for x in found.values()),
        },
        note=f"singular values times {SCALE:g}, loss on {HELD_ROWS} texts of {HELD}, accuracy on "
        f"{TEST} rows a task",
    )


QUICK = {"TASKS": ("movie", "sms"), "STEPS": 40, "TRAIN": 64, "HELD_ROWS": 40}

CLAIM = Claim(
    id=34,
    name="intruder-dimensions",
    title="LoRA has intruder dimensions, and scaling them down lowers forgetting",
    statement=(
        "at equal training loss LoRA's matrices have more leading singular vectors that are like "
        "none of the pre-trained matrix than those of full fine-tuning (a); halving the singular "
        "values of these vectors removes a tenth or more of what the loss on held text had risen "
        "by (b), and costs at most five points of accuracy (c)"
    ),
    source=(
        "Shuttleworth, Andreas, Torralba & Sharma, NeurIPS 2025, arXiv 2410.21228, abstract and "
        "algorithm 1"
    ),
    notebook="34_intruder_dimensions",
    predict=lambda: {},
    parts=(
        Part(
            name="a",
            title="LoRA has more intruders than full fine-tuning",
            threshold=Threshold(">=", MORE, "intruders a matrix, LoRA less full fine-tuning"),
            measure=lambda prediction: _more(),
            # Updates as large as LoRA's that are not of low rank, and such that are.
            negative_control=lambda prediction: _more(rank=10**6),
            passing_control=lambda prediction: _more(rank=1),
            on="real fine-tuning",
        ),
        Part(
            name="b",
            title="Scaling intruders down lowers forgetting",
            threshold=Threshold(">=", REMOVED, "share of the held loss's rise that is removed"),
            measure=lambda prediction: _after("removed"),
            # As many of the leading directions, whatever they are,
            negative_control=lambda prediction: _after("removed", leaders=True),
            # and these where all leading directions are intruders.
            passing_control=lambda prediction: _after("removed", leaders=True, large=True),
            on="real fine-tuning",
        ),
        Part(
            name="c",
            title="Scaling intruders down costs little accuracy",
            threshold=Threshold("<=", COST, "fall of test accuracy"),
            measure=lambda prediction: _after("cost"),
            negative_control=lambda prediction: _after("cost", leaders=True),
            # Under such updates the model is at chance before and after.
            passing_control=lambda prediction: _after("cost", leaders=True, large=True),
            on="real fine-tuning",
        ),
    ),
)
