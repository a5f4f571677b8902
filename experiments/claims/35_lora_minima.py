"""Claim 35: LoRA's minima are low-rank and small, or high-rank and large, and nothing between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.solvers.lbfgs import ValueAndGradient


# Random problems: m numbers <G_i, X> of a matrix of rank one are to be met by X = B A of rank r,
# with decay of A and B, from one large start each. The decay is a share of what keeps X at zero.
SIZE, ROWS, SHARE = 5, 9, 0.02
LARGE = 10.0  # the length of a column of A' and of B at the start
DRAWS, RANK = range(60), 3  # of part a
MANY, NARROW = range(800), 2  # of part b, where the global minimum has at most this rank
EARLY, UNTRAINED = 2, range(100)  # evaluations of the controls of b and c, draws of b's
# The real model: one matrix of its last layer.
MODEL, TASK, SITE, LAYER = "minilm-l3", "movie", "attention.value", 2
EXAMPLES, TOKENS, HEAD_ROWS = 12, 8, 256
STARTS, REAL_RANK, REAL_SHARE, REAL_STEPS = range(24), 4, 0.01, 400
# Fixed before the measurement.
GAP = 1e-6  # of an objective above the global minimum, over that at X = 0: such an end is global
DEFICIENT = 1e-4  # a singular value below this share of the largest is none
STATIONARY = 1e-6  # of a gradient at the end over that at the start
REAL_GAP, REAL_DEFICIENT, REAL_STATIONARY = 1e-2, 1e-2, 1e-4
BETWEEN, LARGER = 0.25, 0.5  # the largest share of ends between, the least share of larger ones
BEND, SLIGHT = 5.0, 1e-3  # of the loss l, which the control replaces by (1 - exp(-s l)) / s


@dataclass(frozen=True, eq=False)
class _End:
    """Where a training ended: the objective, X, and the gradient over that at the start."""

    objective: float
    X: Tensor
    gradient: float

    @cached_property
    def values(self) -> Tensor:
        """The singular values of X."""
        import torch

        return torch.linalg.svdvals(self.X)

    @property
    def norm(self) -> float:
        """The Frobenius norm of X."""
        return float(self.X.norm())

    def rank(self, share: float) -> int:
        """How many singular values are above a share of the largest."""
        return int((self.values > share * self.values[0]).sum()) if self.values[0] > 1e-9 else 0


def _bent(losses: Tensor, bend: float) -> Tensor:
    """``(1 - exp(-s l)) / s``, which tends to ``l`` with ``s``."""
    import torch

    return -torch.expm1(-bend * losses) / bend if bend else losses


def _minimised(of: ValueAndGradient, at: Tensor, evaluations: int) -> tuple[float, Tensor, float]:
    """L-BFGS, begun anew until that does not help: value, place, gradient over the start's."""
    from deltacontrol.theory.solvers.lbfgs import minimise_lbfgs

    left, value, first = evaluations, float("inf"), float(of(at)[1].norm()) or 1.0

    def counted(u: Tensor) -> tuple[float, Tensor]:
        nonlocal left
        left -= 1
        return of(u)

    while left > 0:
        found = minimise_lbfgs(
            counted, at, memory=30, max_evaluations=left, gradient_tolerance=1e-10 * first
        )
        better = value - found.value > 1e-13 * abs(found.value)
        at, value = found.x, found.value
        if not better:
            break
    return value, at, float(of(at)[1].norm()) / first


# -- random problems ---------------------------------------------------------------------------


@cache
def _problem(seed: int) -> tuple[Tensor, Tensor, float]:
    """The G_i (m, n, n), their numbers (m,), and the decay."""
    import torch

    random = torch.Generator().manual_seed(seed)
    G = torch.randn(ROWS, SIZE, SIZE, generator=random, dtype=torch.float64)
    u, v = torch.randn(2, SIZE, generator=random, dtype=torch.float64)
    wanted = torch.outer(u, v) / (u.norm() * v.norm())
    y = torch.einsum("mij,ij->m", G, wanted)
    slope = torch.einsum("m,mij->ij", y, G) / ROWS
    return G, y, SHARE * float(torch.linalg.matrix_norm(slope, 2))


def _normal(seed: int, rank: int) -> Tensor:
    """Normal numbers for A and B, (2, n r), of columns of length one."""
    import torch

    random = torch.Generator().manual_seed(seed + 1)
    return torch.randn(2, SIZE * rank, generator=random, dtype=torch.float64) / SIZE**0.5


@cache
def _trained(seed: int, rank: int, size: float, bend: float, evaluations: int = 3000) -> _End:
    """One training; ``size`` 0 is LoRA's own start, with B = 0."""
    import torch

    G, y, decay = _problem(seed)
    rows = G.flatten(1)

    def value_and_gradient(u: Tensor) -> tuple[float, Tensor]:
        A, B = u[: SIZE * rank].view(rank, SIZE), u[SIZE * rank :].view(SIZE, rank)
        error = rows @ (B @ A).flatten() - y
        losses = 0.5 * error.square()
        slopes = error * torch.exp(-bend * losses) / ROWS
        slope = (slopes @ rows).view(SIZE, SIZE)
        gradient = torch.cat([(B.mT @ slope).flatten(), (slope @ A.mT).flatten()]) + decay * u
        return float(_bent(losses, bend).mean() + 0.5 * decay * u.square().sum()), gradient

    A, B = _normal(seed, rank)
    start = torch.cat([(size or 1.0) * A, size * B])
    value, at, gradient = _minimised(value_and_gradient, start, evaluations)
    A, B = at.split(SIZE * rank)
    return _End(value, B.view(SIZE, rank) @ A.view(rank, SIZE), gradient)


def _best(seed: int, bend: float, rank: int) -> _End:
    """The least minimum known: of the training itself and of trainings of full rank."""
    sizes = (0.5, LARGE) if bend else (0.5,)
    ends = [_trained(seed, SIZE, size, bend) for size in sizes]
    return min((*ends, _trained(seed, rank, LARGE, bend)), key=lambda end: end.objective)


def _at_zero(seed: int, bend: float = 0.0) -> float:
    """The mean loss of X = 0."""
    return float(_bent(0.5 * _problem(seed)[1].square(), bend).mean())


def _uncertain(seed: int) -> float:
    """How far the least minimum may be above the convex program's, by its dual, over X = 0."""
    import torch

    from deltacontrol.experiments.measures.low_rank_minima import LinearLoRA

    G, y, decay = _problem(seed)
    best = _best(seed, 0.0, RANK)
    linear = LinearLoRA(G, torch.zeros_like(y), y, "squared", decay)
    bound = linear.bound(torch.einsum("mij,ij->m", G, best.X))
    return (best.objective - bound) / _at_zero(seed)


def _deficient_ends(bend: float) -> Evidence:
    """The largest gap of the ends of less than full rank."""
    gaps, spurious, gradients = {}, 0, []
    for seed in DRAWS:
        end, best = _trained(seed, RANK, LARGE, bend), _best(seed, bend, RANK)
        gap = (end.objective - best.objective) / _at_zero(seed, bend)
        gradients.append(end.gradient)
        if end.rank(DEFICIENT) < RANK:
            gaps[f"draw {seed}"] = gap
        else:
            spurious += gap > GAP
    certain = 0.0 if bend else max(_uncertain(seed) for seed in DRAWS)
    return Evidence.worst(
        gaps,
        details={
            "ends of full rank": len(DRAWS) - len(gaps),
            "of these above the global minimum": spurious,
            "largest gradient at an end over that at its start": max(gradients),
            "largest distance of a global minimum from its dual bound": certain,
        },
        assumptions={
            "every training ended at a stationary point": max(gradients) <= STATIONARY,
            "the global minima are certified": certain <= GAP,
        },
        note=f"{len(DRAWS)} random problems, matrices of {SIZE} x {SIZE}, {ROWS} numbers, rank "
        f"{RANK}, one start of size {LARGE:g} each",
    )


def _larger(ends: Callable[[int], _End], draws: range, trained: bool) -> Evidence:
    """Among ends that are not global, the share of those with a larger norm than the minimum."""
    norms, gradients = [], [0.0]
    for seed in draws:
        end = ends(seed)
        if end.rank(DEFICIENT) < NARROW:
            continue  # a minimum of the convex problem, as part a checks
        best = _trained(seed, SIZE, 0.5, 0.0)
        gap = (end.objective - best.objective) / _at_zero(seed)
        if best.rank(DEFICIENT) > NARROW or gap <= GAP:
            continue
        norms.append(end.norm / best.norm)
        gradients.append(end.gradient)
    if not norms:
        return Evidence(float("nan"), note="no training ended above the global minimum")
    return Evidence.share(
        sum(x > 1 for x in norms),
        len(norms),
        "spurious end" if trained else "end",
        details={"norms over those of the global minima": norms},
        assumptions={
            "every training ended at a stationary point": not trained
            or max(gradients) <= STATIONARY,
        },
    )


# -- a real model ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layer:
    """LoRA on one matrix of the real model, the states that enter its layer being known.

    Attributes:
        losses: of the examples, from the controls A and B, flattened.
        shape: of the matrix, outputs and inputs.
        decay: lambda.
    """

    losses: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    decay: float

    def matrix(self, v: Tensor) -> Tensor:
        """X = B A of the controls."""
        outputs, inputs = self.shape
        A, B = v.split([REAL_RANK * inputs, outputs * REAL_RANK])
        return B.view(outputs, REAL_RANK) @ A.view(REAL_RANK, inputs)


@cache
def _layer() -> _Layer:
    import torch

    from deltacontrol.deltas import LoRA
    from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
    from deltacontrol.experiments.measures.low_rank_minima import LinearLoRA, RealLoRA
    from deltacontrol.experiments.measures.margins import MarginData
    from deltacontrol.experiments.setting import Setting

    lora = LoRA(rank=REAL_RANK, alpha=float(REAL_RANK), sites=(SITE,), layers=(LAYER,))
    setting = Setting(
        MODEL, TASK, deltas=(lora,), add_head=False, train_rows=EXAMPLES, test_rows=0,
        order="shuffled", strict_rows=True, max_length=TOKENS, head="ridge", head_rows=HEAD_ROWS,
        dtype="float64",
    )  # fmt: skip
    data = MarginData.of(setting)
    rows, margins = RealLoRA(data, SITE, LAYER).rows()
    decay = LinearLoRA.of(rows, margins, data.signs, "logistic", REAL_SHARE).penalty
    batch = setting.batch()
    steps = TransformerDynamics(setting.controlled, batch)
    u, x = steps.controls(), steps.x0
    first = next(t for t, control in enumerate(u) if len(control))
    with torch.no_grad():
        for t in range(first):
            x = steps.step(t, x, u[t])

    def losses(v: Tensor) -> Tensor:
        state = x
        for t in range(first, steps.horizon):
            state = steps.step(t, state, v if t == first else u[t])
        z = data.margins(state, batch["attention_mask"])
        return torch.nn.functional.softplus(-data.signs * z)

    return _Layer(losses, (rows.shape[1], rows.shape[2]), decay)


@cache
def _real_end(seed: int, size: float, evaluations: int) -> _End:
    """One training of the real model's matrix; ``size`` 0 is LoRA's own start, with B = 0."""
    import torch

    from deltacontrol.theory.solvers.lbfgs import differentiated

    layer = _layer()
    outputs, inputs = layer.shape
    random = torch.Generator().manual_seed(seed)
    A, B = (
        torch.randn(REAL_RANK * n, generator=random, dtype=torch.float64) / n**0.5
        for n in (inputs, outputs)
    )

    def objective(v: Tensor) -> Tensor:
        return layer.losses(v).mean() + 0.5 * layer.decay * v.square().sum()

    start = torch.cat([(size or 1.0) * A, size * B])
    value, at, gradient = _minimised(differentiated(objective), start, evaluations)
    return _End(value, layer.matrix(at), gradient)


def _between(size: float, trained: bool = True) -> Evidence:
    """The share of starts that end neither low-rank and small nor high-rank and large."""
    import torch

    ends = [_real_end(seed, size, REAL_STEPS if trained else EARLY) for seed in STARTS]
    known = [_real_end(seed, LARGE, REAL_STEPS) for seed in STARTS]
    best = min([*known, _real_end(0, 0.0, REAL_STEPS)], key=lambda end: end.objective)
    outputs, inputs = _layer().shape
    none = torch.zeros(REAL_RANK * (outputs + inputs), dtype=torch.float64)
    gained = float(_layer().losses(none).mean()) - best.objective
    kinds = dict.fromkeys(("low-rank and global", "high-rank and large", "between"), 0)
    for end in ends:
        gap, rank = (end.objective - best.objective) / gained, end.rank(REAL_DEFICIENT)
        low = rank < REAL_RANK and gap <= REAL_GAP
        high = rank == REAL_RANK and end.norm > best.norm
        kinds["low-rank and global" if low else "high-rank and large" if high else "between"] += 1
    gradients = [end.gradient for end in ends]
    return Evidence.share(
        kinds["between"],
        len(ends),
        "start",
        details={
            **kinds,
            "ranks": [end.rank(REAL_DEFICIENT) for end in ends],
            "norms": [end.norm for end in ends],
            "largest gradient at an end over that at its start": max(gradients),
        },
        assumptions={
            "every training ended at a stationary point": not trained
            or max(gradients) <= REAL_STATIONARY,
            "the least minimum is of lower rank": best.rank(REAL_DEFICIENT) < REAL_RANK,
        },
        note=f"{MODEL}, {SITE} of layer {LAYER}, {EXAMPLES} rows of {TASK}, rank {REAL_RANK}, "
        f"starts of size {size:g}",
    )


QUICK = {"DRAWS": range(12), "MANY": range(100), "STARTS": range(6)}

CLAIM = Claim(
    id=35,
    name="lora-minima",
    title="LoRA's minima are low-rank and small, or high-rank and large",
    statement=(
        "with decay of A and B and a loss that is convex in X = B A, a second-order stationary "
        "point of less than full rank is a global minimum (a), and minima that are not global are "
        "larger than it (b); of one matrix of a real model, large starts end low-rank and global "
        "or high-rank and large, and not between (c)"
    ),
    source=(
        "Kim, Kim & Ryu, ICML 2025, arXiv 2502.09376 (abstract); a is Haeffele & Vidal, "
        "arXiv 1506.07540, as in arXiv 2505.00349 (abstract)"
    ),
    notebook="35_lora_minima",
    predict=lambda: {},
    parts=(
        Part(
            name="a",
            title="Ends of less than full rank are global minima",
            threshold=Threshold("<=", GAP, "largest gap above the least minimum, over X = 0"),
            measure=lambda prediction: _deficient_ends(0.0),
            # Losses bent until they are no longer convex.
            negative_control=lambda prediction: _deficient_ends(BEND),
            passing_control=lambda prediction: _deficient_ends(SLIGHT),
            on="exact problem",
        ),
        Part(
            name="b",
            title="Minima that are not global are larger",
            threshold=Threshold(">=", LARGER, "share of them above the global minimum's norm"),
            measure=lambda prediction: _larger(
                lambda seed: _trained(seed, NARROW, LARGE, 0.0), MANY, trained=True
            ),
            # Ends that are not stationary: few steps from LoRA's own start,
            negative_control=lambda prediction: _larger(
                lambda seed: _trained(seed, NARROW, 0.0, 0.0, EARLY), UNTRAINED, False
            ),
            # and as few from a large one, which are large whether stationary or not.
            passing_control=lambda prediction: _larger(
                lambda seed: _trained(seed, NARROW, LARGE, 0.0, EARLY), UNTRAINED, False
            ),
            on="exact problem",
        ),
        Part(
            name="c",
            title="A real model's ends are of the two kinds",
            threshold=Threshold("<=", BETWEEN, "share of starts that end between"),
            measure=lambda prediction: _between(LARGE),
            # As in b: ends that are not stationary, from LoRA's own start and from large ones.
            negative_control=lambda prediction: _between(0.0, trained=False),
            passing_control=lambda prediction: _between(LARGE, trained=False),
            on="real fine-tuning",
        ),
    ),
)
