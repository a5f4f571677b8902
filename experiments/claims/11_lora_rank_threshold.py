"""Claim 11: from a certain rank on, LoRA turns a deep ReLU network into a given one.

Part a is the construction of the theorem, in fractions. Part b asks what the theorem does not say:
whether training finds such a network, from LoRA's usual start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.rank.expressive_rank import ReLUNetwork

WIDTH, LAYERS, RADIUS, INPUTS = 12, 2, 2, 400
DEPTHS = (1, 2, 3)  # frozen layers for each layer of the target
MISSING = (6, WIDTH)  # rank of target - product of the frozen layers
SEEDS = (0, 1, 2)
BITS, EXACT_INPUTS = 8, 24  # weights are multiples of 2^-BITS, so that fractions stay short
TRAINED_DEPTH, TRAINED = 2, 6  # depth and missing rank that training is tried on
TRAINED_SEEDS = tuple(range(10, 18))
ITERATIONS, REACHED = 1500, 1e-2
SINGULAR = 1e12  # condition number from which on a map counts as singular


@dataclass(frozen=True, eq=False)
class _Case:
    """A frozen network and the factors of the target's differences, rounded to fractions.

    Attributes:
        depth: M, frozen layers for each layer of the target.
        missing: rank of the differences.
        seed: of everything.
        frozen: W_l.
        factors: (B, A) of each group; the target's weight is W_M ... W_1 + B A.
        biases: of the target.
        inputs: in the ball of `RADIUS`, (inputs, n).
    """

    depth: int
    missing: int
    seed: int
    frozen: list[Tensor]
    factors: list[tuple[Tensor, Tensor]]
    biases: list[Tensor]
    inputs: Tensor

    @property
    def name(self) -> str:
        return f"{self.depth} for 1, missing rank {self.missing}, seed {self.seed}"

    def group(self, index: int) -> list[Tensor]:
        """The frozen layers that stand for a layer of the target."""
        return self.frozen[index * self.depth : (index + 1) * self.depth]

    def target(self) -> ReLUNetwork:
        """In floating point."""
        from deltacontrol.theory.rank.expressive_rank import ReLUNetwork, product

        weights = [product(self.group(i)) + B @ A for i, (B, A) in enumerate(self.factors)]
        return ReLUNetwork(weights, self.biases)

    def error(self, network: Any) -> float:
        """Relative error of the outputs, in floating point."""
        wanted = self.target()(self.inputs)
        return float((network(self.inputs) - wanted).norm() / wanted.norm())


@cache
def _cases() -> list[_Case]:
    return [_case(d, m, s) for d in DEPTHS for m in MISSING for s in SEEDS]


def _case(depth: int, missing: int, seed: int) -> _Case:
    import torch

    generator = torch.Generator().manual_seed(1000 * seed + 10 * depth + missing)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (drawn / math.sqrt(shape[-1]) * 2**BITS).round() / 2**BITS

    frozen = [normal(WIDTH, WIDTH) for _ in range(depth * LAYERS)]
    factors = [(normal(WIDTH, missing), normal(missing, WIDTH)) for _ in range(LAYERS)]
    z = normal(INPUTS, WIDTH)
    z = (0.99 * RADIUS * z / z.norm(dim=1, keepdim=True) * 2**BITS).round() / 2**BITS
    return _Case(depth, missing, seed, frozen, factors, [normal(WIDTH) for _ in range(LAYERS)], z)


def _exact(rows: Tensor | Sequence[Sequence[Any]]) -> Any:
    """A matrix of fractions, equal to the floating-point one."""
    from sympy import QQ
    from sympy.polys.matrices import DomainMatrix

    table = [[QQ(*float(v).as_integer_ratio()) for v in row] for row in rows]
    return DomainMatrix(table, (len(table), len(table[0])), QQ)


def _product(maps: Sequence[Any]) -> Any:
    from sympy import QQ
    from sympy.polys.matrices import DomainMatrix

    result = DomainMatrix.eye(WIDTH, QQ)
    for matrix in maps:
        result = matrix * result
    return result


def _exact_error(case: _Case, rank: int) -> float:
    """The theorem's construction in fractions: relative error of the outputs, zero or not.

    Raises:
        AssertionError: a change has a rank above ``rank``.
    """
    inputs = _exact(case.inputs[:EXACT_INPUTS]).transpose()
    reached = wanted = inputs
    radius = RADIUS
    for index, (B, A) in enumerate(case.factors):
        frozen, bias = [_exact(w) for w in case.group(index)], _exact(case.biases[index][:, None])
        columns, rows = _exact(B), _exact(A)
        changed: list[Any] = []
        for layer, weight in enumerate(frozen):
            run = range(min(layer * rank, case.missing), min((layer + 1) * rank, case.missing))
            every = range(WIDTH)
            part = columns.extract(every, run) * rows.extract(run, every)
            after = _product(frozen[layer + 1 :])
            change = after.inv() * part * _product(changed).inv()
            if change.rank() > rank:
                raise AssertionError(f"a change has rank {change.rank()}, above {rank}")
            changed.append(weight + change)
        reached, size = _passed(changed, bias, reached, radius)
        wanted = _relu(_shifted(_product([*frozen]) * wanted + columns * rows * wanted, bias))
        radius = size
    off, whole = _numbers(reached - wanted), _numbers(wanted)
    return math.hypot(*off) / math.hypot(*whole)


def _passed(changed: list[Any], bias: Any, states: Any, radius: float) -> tuple[Any, float]:
    """States behind a group of layers: all ReLUs but the last are kept active by large biases.

    Also an upper bound of their norm, from row sums in the place of row norms.
    """
    whole = _product(changed)
    last = radius * math.sqrt(WIDTH) * _row_sum(whole) + math.hypot(*_numbers(bias))
    ones, shift = _exact([[1.0]] * WIDTH), 0.0
    for layer, weight in enumerate(changed[:-1]):
        needed = math.ceil(radius * _row_sum(_product(changed[: layer + 1])))
        own = ones * _exact([[needed]]) - weight * ones * _exact([[shift]])
        states, shift = _relu(_shifted(weight * states, own)), float(needed)
    own = bias - changed[-1] * ones * _exact([[shift]])
    return _relu(_shifted(changed[-1] * states, own)), float(math.ceil(last))


def _shifted(states: Any, bias: Any) -> Any:
    return states + bias * _exact([[1.0] * states.shape[1]])


def _relu(states: Any) -> Any:
    return states.applyfunc(lambda value: max(value, 0 * value))


def _row_sum(matrix: Any) -> float:
    return max(sum(abs(float(v)) for v in row) for row in matrix.to_list()) * (1 + 1e-9)


def _numbers(matrix: Any) -> list[float]:
    return [float(value) for row in matrix.to_list() for value in row]


def _constructed(case: _Case, rank: int) -> tuple[float, float]:
    """The same in floating point, by singular parts: error, and the worst condition number."""
    from deltacontrol.theory.rank.expressive_rank import adapted_network

    network, groups = adapted_network(case.target(), case.frozen, rank, RADIUS)
    return case.error(network), max(group.condition for group in groups)


def _trained(case: _Case, rank: int, *, linear: bool) -> float:
    """Relative error after L-BFGS on LoRA's factors and the biases, from the usual start.

    Of the network's outputs, or ``linear``, of the product of the first group of maps.
    """
    import torch

    from deltacontrol.theory.rank.expressive_rank import ReLUNetwork, product

    generator = torch.Generator().manual_seed(case.seed)
    frozen = torch.stack(case.group(0) if linear else case.frozen)
    A = torch.randn(len(frozen), rank, WIDTH, generator=generator, dtype=torch.float64)
    A = (A / math.sqrt(WIDTH)).requires_grad_()
    B = torch.zeros(len(frozen), WIDTH, rank, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(len(frozen), WIDTH, dtype=torch.float64, requires_grad=True)
    target = case.target()
    wanted = target.weights[0] if linear else target(case.inputs)
    optimiser = torch.optim.LBFGS(
        [A, B] if linear else [A, B, b],
        max_iter=ITERATIONS,
        history_size=30,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        maps = list(frozen + B @ A)
        found = product(maps) if linear else ReLUNetwork(maps, list(b))(case.inputs)
        loss = (found - wanted).square().sum() / wanted.square().sum()
        loss.backward()
        return loss.detach()

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    return math.sqrt(float(closure()))


@cache
def _exact_errors(shift: str) -> dict[str, float]:
    """The construction in fractions at ranks of all cases, see `_ranks`."""
    return {case.name: _exact_error(case, rank) for case, rank in _ranks(shift)}


def _ranks(shift: str) -> list[tuple[_Case, int]]:
    """Cases and the ranks that they are given.

    "threshold" is what the theorem asks for; "below" one less. "harmless" is one less too, but than
    what a target of any rank needs, in the cases whose target needs fewer.
    """
    if shift == "harmless":
        generic = [(case, math.ceil(WIDTH / case.depth) - 1) for case in _cases()]
        return [(case, rank) for case, rank in generic if rank >= _threshold(case)]
    return [(case, _threshold(case) - (shift == "below")) for case in _cases()]


@cache
def _threshold(case: _Case) -> int:
    """⌈rank(target - product) / M⌉, the largest over the groups, from the weights alone."""
    ranks = [(_exact(B) * _exact(A)).rank() for B, A in case.factors]
    return max(math.ceil(rank / case.depth) for rank in ranks)


def _predict() -> dict[str, Any]:
    """The rank from which on the theorem's construction exists."""
    return {case.name: _threshold(case) for case in _cases()}


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """The construction at the predicted rank, in fractions; in floats beside it."""
    floats = {case.name: _constructed(case, prediction[case.name]) for case in _cases()}
    worst = max(condition for _, condition in floats.values())
    return Evidence.worst(
        _exact_errors("threshold"),
        details={
            "errors in float64": {name: error for name, (error, _) in floats.items()},
            "condition numbers": {name: condition for name, (_, condition) in floats.items()},
        },
        assumptions={"frozen maps and partial sums are invertible": worst < SINGULAR},
        note=(
            "ReLU networks of width 12, target of 2 layers, 1 to 3 frozen layers for each, missing "
            "rank 6 or 12, three seeds; exact arithmetic, as large biases cost digits where the "
            "frozen maps are nearly singular"
        ),
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """One rank less, in fractions, and with the nearest products that such changes reach."""
    nearest = {
        f"{case.name}, nearest products": _constructed(case, rank)[0]
        for case, rank in _ranks("below")
    }
    return Evidence.worst(
        _exact_errors("below") | nearest,
        least=True,
        note="one rank below the threshold; the case that comes closest",
    )


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """One rank less than what a generic target of this width needs, where fewer are missing."""
    note = "one rank below ⌈width / M⌉, where the target misses only rank 6: still enough"
    return Evidence.worst(_exact_errors("harmless"), note=note)


@cache
def _trainings(shift: str) -> dict[str, float]:
    """Trained errors of other draws of the case of two frozen layers for each of the target.

    "threshold" and "below" train the networks; "harmless" has the ReLUs removed, and one rank less
    than what a generic target needs, which is more than what this one does.
    """
    errors = {}
    for seed in TRAINED_SEEDS:
        case = _case(TRAINED_DEPTH, TRAINED, seed)
        generic = math.ceil(WIDTH / case.depth)
        rank = generic - 1 if shift == "harmless" else _threshold(case) - (shift == "below")
        errors[f"seed {seed}"] = _trained(case, rank, linear=shift == "harmless")
    return errors


def _share(shift: str, note: str) -> Evidence:
    errors = _trainings(shift)
    reached = sum(error <= REACHED for error in errors.values())
    return Evidence.share(
        reached, len(errors), "seed", details={"trained errors": errors}, note=note
    )


PARTS = (
    Part(
        name="a",
        title="such changes exist",
        threshold=Threshold("<=", 1e-9, "largest relative error of the outputs at the threshold"),
        measure=_measure,
        negative_control=_negative_control,
        passing_control=_passing_control,
        on="exact problem",
    ),
    Part(
        name="b",
        title="training finds them",
        threshold=Threshold(
            ">=",
            0.5,
            f"share of trainings at the threshold that reach a relative error {REACHED:g}",
        ),
        measure=lambda prediction: _share(
            "threshold",
            f"width 12, two frozen layers for each of the target's two, missing rank 6; L-BFGS, "
            f"{ITERATIONS} iterations at most, on {INPUTS} inputs, from LoRA's usual start; a miss "
            "does not refute existence",
        ),
        negative_control=lambda prediction: _share("below", "one rank less, trained alike"),
        passing_control=lambda prediction: _share(
            "harmless",
            "one rank below what a generic target needs, which is more than this one does, and no "
            "ReLU in the way",
        ),
        on="random network",
    ),
)

# Fewer cases, for `claims run --preset quick`.
QUICK = {"SEEDS": (0,), "TRAINED_SEEDS": tuple(range(10, 14))}

CLAIM = Claim(
    id=11,
    name="lora-rank-threshold",
    title="LoRA reaches a target network from a predicted rank on",
    statement=(
        "if M frozen ReLU layers stand for each layer of a target network, LoRA of rank "
        "⌈rank(target weight - product of the frozen weights) / M⌉ with free biases computes the "
        "target exactly on a ball, provided the frozen weights and the partial sums are "
        "invertible (a); training from LoRA's start finds such changes more often than not (b)"
    ),
    source="Zeng & Lee, ICLR 2024",
    notebook="11_lora_rank_threshold",
    revised="existence and what training reaches are two parts; the second was shown, not judged",
    predict=_predict,
    parts=PARTS,
)
