"""The certificate of a solve: by command, and on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltacontrol.experiments.certifying import certificate_of
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.theory.certificates import Kind, Tightness
from deltacontrol.theory.errors import InputError
from tests.experiments.test_finetune import places, tiny

__all__ = ["places"]


def words(places: Path, store: Path, *more: str) -> list[str]:
    names = ["solve", "--model", str(places / "tiny-bert"), "--task", str(places / "task.csv")]
    names += ["--rows", "4", "--max-length", "12", "--weight-decay", "0.1", "--runs", str(store)]
    return [*names, *more]


def test_a_solve_is_certified_by_command(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A head is convex: the bound at its minimum is about nothing, and proved."""
    head = words(places, tmp_path, "--delta", "head", "--tol", "1e-9")
    assert cli._main([*head, "--certify"]) == 0
    out = capsys.readouterr().out
    for told in ("recorded", "Certificate", "a convex loss of affine outputs", "proved", "exact"):
        assert told in out
    assert "estimate" not in out
    (record,) = RunStore(tmp_path).records()
    found = certificate_of(record)
    assert found.kind is Kind.CONVEX and 0 <= found.upper < 1e-9
    assert cli._main([*head, "--certify", "--radius", "0.25"]) == 0
    assert "radius     0.25" in capsys.readouterr().out
    for wrong in (["--radius", "1"], ["--certify", "--radius", "-1"]):
        assert cli._main([*head, *wrong]) == 2
        assert "give --certify --radius 0.5" in capsys.readouterr().err


def test_of_another_delta_the_linearisation_is_certified(places: Path, tmp_path: Path) -> None:
    lora = words(places, tmp_path, "--delta", "lora:rank=1,sites=attention.query", "--steps", "1")
    assert cli._main(lora) in (0, 1)
    (record,) = RunStore(tmp_path).records()
    found = certificate_of(record, 0.1)
    for told in ("the linearised problem", "an estimate and not a bound", "if the remainder is"):
        assert told in repr(found)
    assert found.kind is Kind.LINEARISED and found.remainder is not None
    assert found.upper >= found.lower > 0 and found.estimate >= found.attained > 0
    problem = record.control_problem(weight_decay=0.1)
    gained = found.objective - float(problem.objective(found.controls))
    assert gained == pytest.approx(found.attained, abs=1e-12)


def test_a_certificate_is_for_a_solve(places: Path, tmp_path: Path) -> None:
    record = run(tiny(places, steps=1), RunStore(tmp_path), progress=False)
    with pytest.raises(InputError, match="of the kind 'fine-tuning'; a certificate is for a solve"):
        certificate_of(record)


@pytest.mark.slow
@pytest.mark.parametrize("delta", ["head", "bitfit", "lora:rank=4", "ia3"])
def test_tight_on_the_linearised_real_model(minilm_l3: str, tmp_path: Path, delta: str) -> None:
    """Within a factor of 2, after one step and after some, near and far."""
    for steps in (1, 6):
        given = {"rows": 4, "max_length": 16, "weight_decay": 1e-4, "steps": steps}
        solve = Solve(model=minilm_l3, task="movie", deltas=(delta,), **given)
        record = run(solve, RunStore(tmp_path), progress=False)
        for radius in (0.01, None):
            found = certificate_of(record, radius)
            assert found.tightness in (Tightness.EXACT, Tightness.TIGHT), str(found)
            assert (found.kind is Kind.CONVEX) == (delta == "head")
            assert found.estimate >= found.attained >= 0
