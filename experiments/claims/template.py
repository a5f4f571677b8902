"""The files of a new claim: the claim itself, its derivation as a notebook, and a test.

What they hold runs as it is and judges a small true statement, so that a reader changes one thing
after another.
"""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.theory import plugins
from deltacontrol.theory.claims import Claim
from deltacontrol.theory.errors import InputError

LONGEST = 60  # letters of a name
FIRST = 900  # numbers of users' claims begin behind it

CLAIM = '''"""A claim of your own: {title}. Change one thing after another, and run it in between.

    deltacontrol claims run {name}
"""

from deltacontrol.theory.claims import Claim, Evidence, Threshold

# The design, written before anything is measured: how many independent cases, and of what.
SEEDS = range(24)
STEP = 1e-3


def predict():
    """Numbers that theory gives without the measured data; the judge gets them below."""
    return {{"ratio": 1.0}}


def fall(seed, elsewhere=0.0):
    """Actual fall of J along its gradient over the predicted one, on a random network.

    With ``elsewhere`` the gradient is that of controls so far away: the assumption that is broken.
    """
    import torch

    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.systems import ResidualNetwork

    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)  # noqa: E731
    network = ResidualNetwork.random(4, width=5, hidden=8, control_size=3, seed=seed)
    problem = ControlProblem(network, SquaredErrorCost(normal(6, 5)), normal(6, 5))
    u = tuple(normal(3) for _ in range(4))
    other = tuple(a + elsewhere * normal(3) for a in u)
    gradient = problem.gradient(other)
    ahead = tuple(a - STEP * g for a, g in zip(u, gradient, strict=True))
    predicted = STEP * sum(float(g.square().sum()) for g in gradient)
    return float(problem.objective(u) - problem.objective(ahead)) / predicted


def evidence(prediction, elsewhere, note):
    """The mean over seeds with its interval. Other forms: Evidence.share, .resampled, .worst."""
    errors = [abs(fall(seed, elsewhere) - prediction["ratio"]) for seed in SEEDS]
    return Evidence.mean(
        errors,
        unit="seed",
        note=note,
        # Assumptions are code: where one is not met, the claim neither holds nor fails.
        assumptions={{"the predicted fall is not zero": max(errors) < float("inf")}},
    )


CLAIM = Claim(
    id={number},
    name="{name}",
    title="{title}",
    statement="J(u) - J(u - s g) is s |g|^2 to first order in s, with g the gradient at u",
    source="Taylor's theorem",
    on="random network",
    # Fixed before the measurement: what must be true of the whole 95 % interval.
    threshold=Threshold("<=", 0.05, "mean |actual / predicted fall - 1|"),
    predict=predict,
    measure=lambda prediction: evidence(prediction, 0.0, "the gradient at u"),
    # One assumption broken, all else equal. It must fail, or the check has no power ...
    negative_control=lambda prediction: evidence(prediction, 3.0, "a gradient from far away"),
    # ... and the same control must pass where the break is harmless, or it could never pass.
    passing_control=lambda prediction: evidence(prediction, 1e-6, "a gradient from next to u"),
)
'''

NOTEBOOK = """# %% [markdown]
# # {title}
#
# Derive here what the claim states. By Taylor's theorem
#
# $$J(u - s g) = J(u) - s |g|^2 + O(s^2), \\qquad g = \\nabla J(u),$$
#
# so that the fall over its prediction tends to one with the step.

# %%
from deltacontrol.theory import plugins
from deltacontrol.theory.judging import judge

claim = plugins.load("{name}.py").CLAIM
outcome = judge(claim)
outcome
"""

TEST = '''"""The claim {name} is judged as expected, and a wrong prediction does not pass."""

from dataclasses import replace

from deltacontrol.theory import plugins
from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

CLAIM = plugins.load("{name}.py").CLAIM


def test_it_holds():
    assert judge(CLAIM).holds


def test_another_prediction_does_not():
    wrong = replace(CLAIM, parts=(), predict=lambda: {{"ratio": 2.0}})
    assert judge(wrong).part().verdict is not Verdict.HOLDS
'''


def write(name: str, folder: Path) -> list[Path]:
    """Write the files of a new claim and return their paths.

    Raises:
        InputError: the name is no name of a Python module, or a file is there already.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or len(name) > LONGEST:
        raise InputError(f"{name!r} is no name of a Python file; take one such as my_idea")
    known = scoreboard.available()
    number = max([FIRST, *(i for i in known if i > FIRST)]) + 1
    fields = {"name": name, "title": name.replace("_", " "), "number": number}
    texts = {
        f"{name}.py": CLAIM.format(**fields),
        f"{name}_notebook.py": NOTEBOOK.format(**fields),
        f"test_{name}.py": TEST.format(**fields),
    }
    there = [file for file in texts if (folder / file).exists()]
    if there or name in {claim.name for claim in known.values()}:
        raise InputError(f"{', '.join(there) or name} is there already; choose another name")
    if importlib.util.find_spec(name) is not None:
        raise InputError(
            f"{name!r} is the name of a Python package, which a file {name}.py would hide; choose "
            "another name"
        )
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def load(name: str, folder: Path = Path()) -> Claim | None:
    """The claim of a file ``name.py`` in the folder, taken in; None where there is none.

    Raises:
        InputError: the file cannot be run, or defines no claim.
    """
    file = folder / f"{name.removesuffix('.py')}.py"
    try:
        there = file.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        return None
    claim = getattr(plugins.load(file), "CLAIM", None)
    if not isinstance(claim, Claim):
        raise InputError(f"{file} defines no claim: expected CLAIM = Claim(...) in it")
    return claim
