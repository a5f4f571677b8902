"""The traces of the solvers on the real model, at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltacontrol.experiments.runs.experiment import Workspace
from deltacontrol.experiments.studies.solvers.trace import RATES, SOLVERS, SolverTrace
from deltacontrol.theory.errors import InputError


@pytest.mark.parametrize(
    "solver",
    [s if s == "gauss-newton" else pytest.param(s, marks=pytest.mark.slow) for s in SOLVERS],
)
@pytest.mark.slow
def test_a_trace_spends_its_budget_and_descends(
    minilm_l6: str, tmp_path: Path, solver: str
) -> None:
    trace = SolverTrace(solver=solver, model=minilm_l6, num_examples=2, max_length=6, gradients=12)
    outcome = trace.execute(Workspace(tmp_path, progress=False))
    curve, result = outcome.curve, outcome.result
    assert list(curve["iteration"]) == list(range(len(curve)))
    assert curve["gradients"].iloc[0] == 1.0
    assert curve["gradients"].is_monotonic_increasing and curve["seconds"].is_monotonic_increasing
    assert curve["objective"].iloc[-1] < curve["objective"].iloc[0]
    assert result["status"] == "budget" and curve["gradients"].iloc[-1] >= 12
    assert (curve["gradients"].iloc[:-1] < 12).all()
    assert result["objective"] == curve["objective"].iloc[-1]
    if solver in RATES:
        assert result["rate"] == result["search"][-1]["rate"]
        assert [t["status"] for t in result["search"][:-1]] == ["unstable"] * (
            len(result["search"]) - 1
        )
        assert list(curve["gradients"]) == [float(i + 1) for i in range(12)]
    else:
        assert result["rate"] is None and result["search"] == []


def test_wrong_traces_are_refused() -> None:
    with pytest.raises(InputError, match="nearest: newton-cg"):
        SolverTrace(solver="newton-gc")
    with pytest.raises(InputError, match="at least 1 example and 5 gradients"):
        SolverTrace(gradients=1)
