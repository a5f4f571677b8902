"""Claims are found, judged, kept, published and rendered; their rows go stale with their code."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltacontrol.experiments import claims
from deltacontrol.experiments.claims import board, scoreboard
from deltacontrol.experiments.claims.code_digest import code_digest, measuring
from deltacontrol.experiments.cli.claims import Claims
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.store import RunStore, both_homes
from deltacontrol.theory.claims import Claim, Evidence, Threshold
from deltacontrol.theory.errors import InputError
from tests.experiments.test_runs import Toy, curve

ROOT = Path(__file__).resolve().parents[2]
README = f"before\n{board.BEGIN}stale\n{board.END}\nafter\n"


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Claim:
    """A claim with a file, committed results and a README of its own."""
    found = Claim(
        id=90,
        name="two-and-two",
        title="Two and two",
        statement="2 + 2 = 4",
        source="arithmetic",
        notebook="90_two_and_two",
        threshold=Threshold("<=", 0.5, "distance |sum - 4|"),
        predict=lambda: {"sum": 4.0},
        measure=lambda prediction: Evidence(abs(2 + 2 - prediction["sum"])),
        negative_control=lambda prediction: Evidence(abs(2 + 3 - prediction["sum"])),
        passing_control=lambda prediction: Evidence(abs(1 + 3 - prediction["sum"])),
    )
    (tmp_path / "claim.py").write_text("x = 2 + 2\n")
    (tmp_path / "README.md").write_text(README)
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path / "package" / "claims")
    monkeypatch.setattr(board, "README", tmp_path / "README.md")
    monkeypatch.setattr(scoreboard, "COMMITTED", tmp_path / "package")
    monkeypatch.setattr(scoreboard, "source", lambda claim: tmp_path / "claim.py")
    show(monkeypatch, found)
    return found


def show(monkeypatch: pytest.MonkeyPatch, found: Claim) -> None:
    monkeypatch.setattr(scoreboard, "available", lambda: {90: found})


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs", committed=tmp_path / "package")


@pytest.fixture
def on_runs(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> Claim:
    """The same claim, computed from two recorded runs."""
    found = replace(
        claim,
        parts=(),
        predict=lambda records: {"sum": 4.0},
        measure=lambda prediction, records: Evidence(records(Toy(seed=0)).result["loss"] - 1.0),
        negative_control=lambda prediction, records: Evidence(records(Toy(seed=1)).result["loss"]),
        passing_control=lambda prediction, records: Evidence(0.0),
        runs=lambda: [Toy(seed=0), Toy(seed=1)],
    )
    show(monkeypatch, found)
    return found


def evaluated(claim: Claim, store: RunStore) -> None:
    scoreboard.keep(claim, scoreboard.evaluate(claim, store))


def test_a_claim_is_one_file_with_a_notebook() -> None:
    files = sorted(p.stem for p in Path(claims.__path__[0]).glob("[0-9]*.py"))
    available = scoreboard.available().values()
    found = [claim for claim in available if claim.notebook]
    for claim in available:  # a judged statement has the file in which it was written down
        assert claim.notebook or scoreboard.source(claim).suffix == ".toml"
        assert scoreboard.source(claim).exists() and scoreboard.result_path(claim).exists()
    assert len(found) == len(files) > 0
    for claim, name in zip(found, files, strict=True):
        assert name == f"{claim.id:02d}_{claim.name.replace('-', '_')}"
        assert (ROOT / "proofs_notebooks" / f"{claim.notebook}.py").exists()


def test_judge_keep_and_render(claim: Claim, store: RunStore, tmp_path: Path) -> None:
    assert scoreboard.stored(claim) is None and "not judged" in board.markdown()
    judged = scoreboard.evaluate(claim, store)
    assert judged.outcome.holds and judged.outcome.code == code_digest(tmp_path / "claim.py")
    scoreboard.keep(claim, judged)
    assert scoreboard.stored(claim) == judged.outcome
    document = json.loads(scoreboard.result_path(claim).read_text())
    assert {"packages", "project", "hardware", "processor_seconds"} <= document.keys()
    assert {"scipy", "cvxpy", "sympy"} <= document["packages"].keys()
    assert document["hardware"]["memory_bytes"] > 0
    assert "**holds** |" in board.markdown()
    assert board.update_readme()
    text = (tmp_path / "README.md").read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert len(re.findall(r"\| 90 \| \[Two and two\]", text)) == 2  # in short, and its part
    short, parts = text.split("<details>")
    assert short.count("\n| 90 |") == parts.count("\n| 90 |") == 1
    assert re.search(r"\| 90 \| .* \| exact problem \| \*\*holds\*\* \|\n", short)
    assert r"distance \|sum - 4\|" in text


def test_a_value_shows_on_which_side_of_the_threshold_it_is(claim: Claim) -> None:
    """The bound is 0.5: 0.5001 would look as if it passed."""
    (part,) = claim.parts
    shown = [board.number(value, part) for value in (0.123, 0.4999, 0.5001, float("nan"))]
    assert shown == ["0.12", "0.5", "0.5001", "nan"]


def test_a_changed_threshold_unjudges_the_claim(claim: Claim, store: RunStore) -> None:
    evaluated(claim, store)
    assert scoreboard.stored(claim) is not None
    changed = replace(claim, parts=(), threshold=Threshold("<=", 0.9, "distance to four"))
    assert scoreboard.stored(changed) is None
    with pytest.raises(InputError, match="no committed measurement"):
        scoreboard.rejudge(changed, store)


@pytest.mark.parametrize("change", ["cut", "value"])
def test_a_damaged_result_is_named(claim: Claim, store: RunStore, change: str) -> None:
    evaluated(claim, store)
    path = scoreboard.result_path(claim)
    text = path.read_text()
    changed = text[:40] if change == "cut" else text.replace('"value": 0.0', '"value": 0.1')
    assert changed != text
    path.write_text(changed)
    with pytest.raises(InputError, match=path.name):
        scoreboard.stored(claim)


def test_a_damaged_result_of_a_users_own_hides_no_row(claim: Claim, store: RunStore) -> None:
    judged = scoreboard.evaluate(claim, store)
    scoreboard.keep(claim, judged)
    own = store.root / scoreboard.CLAIMS
    path = scoreboard.keep(claim, judged, own)
    assert board.rows(own)[0]["own"].endswith("holds")
    path.write_text(path.read_text()[:40])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        (row,) = board.rows(own)
    assert row["own"] == "damaged" and row["verdict"] == "holds"


def test_an_unknown_claim_names_the_known_ones(claim: Claim) -> None:
    with pytest.raises(InputError, match="90"):
        scoreboard.find(91)


def test_a_row_is_stale_where_the_code_changed(
    claim: Claim, store: RunStore, tmp_path: Path
) -> None:
    evaluated(claim, store)
    (tmp_path / "claim.py").write_text('"""New words."""\nimport math\n\nx = (2+2)  # the same\n')
    assert "**holds** |" in board.markdown()
    (tmp_path / "claim.py").write_text("x = 2 + 3\n")
    assert "**holds**, stale |" in board.markdown()
    outcome = scoreboard.stored(claim)
    assert outcome is not None and scoreboard.is_stale(claim, replace(outcome, code=None))


def test_the_digest_follows_imports_of_what_measures(tmp_path: Path) -> None:
    package = tmp_path / "experiments"
    files = {
        "claims/a.py": "from deltacontrol.experiments.measure import f\n"
        "from deltacontrol.theory import problem\n"
        "from deltacontrol.experiments import sources, studies\n",
        "measure.py": "def f():\n"
        "    from deltacontrol.experiments.studies.grid import g\n    return g() + 1\n",
        "studies/__init__.py": "def all(): return 1\n",
        "studies/grid.py": "def g() -> int: return 2\n",
        "studies/other.py": "x = 1\n",
        "sources.py": "from deltacontrol.experiments import hidden\n",
        "hidden.py": "x = 1\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    claim = package / "claims" / "a.py"
    found = {str(path.relative_to(package)) for path in measuring(claim, package)}
    assert found == {"claims/a.py", "measure.py", "studies/__init__.py", "studies/grid.py"}
    first = code_digest(claim, package)
    (package / "sources.py").write_text("x = 2\n")
    (package / "measure.py").write_text('"""New."""\n' + files["measure.py"] + "\n\n# more\n")
    assert code_digest(claim, package) == first
    for name, text in (("measure.py", "+ 2"), ("studies/grid.py", "g(x=1)"), ("claims/a.py", "y")):
        (package / name).write_text(files[name] + f"\nz = '{text}'\n")
        assert code_digest(claim, package) != first
        (package / name).write_text(files[name])
    assert code_digest(claim, package) == first


def test_runs_are_named_and_missing_ones_are_said(on_runs: Claim, store: RunStore) -> None:
    told = "rests on 2 runs, of which 2 .*toy seed 0; toy seed 1.*claims run 90"
    with pytest.raises(InputError, match=told):
        scoreboard.rejudge(on_runs, store)
    first = store.write(Toy(seed=0), {"loss": 1.25}, curve())
    with pytest.raises(InputError, match="of which 1 "):
        scoreboard.rejudge(on_runs, store)
    second = store.write(Toy(seed=1, model_digest="other"), {"loss": 3.0}, curve())
    outcome = scoreboard.rejudge(on_runs, store).outcome
    assert (outcome.part().evidence.value, outcome.part().control.value) == (0.25, 3.0)
    assert outcome.runs == (first.id, second.id) and not scoreboard.is_stale(on_runs, outcome)


def test_run_trains_what_is_missing_and_judge_nothing(
    on_runs: Claim, store: RunStore, tmp_path: Path
) -> None:
    store.write(Toy(seed=0), {"loss": 1.25}, curve())
    outcome = scoreboard.evaluate(on_runs, store).outcome
    assert (outcome.part().evidence.value, outcome.part().control.value) == (0.25, 1.0)
    assert len(store.records()) == 2 and not (tmp_path / "package").exists()


def test_results_go_to_the_users_folder_unless_they_are_published(
    on_runs: Claim,
    store: RunStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("deltacontrol.experiments.cli.claims.both_homes", lambda root: store)
    monkeypatch.setattr(provenance, "project_commit", lambda: {"commit": "0", "modified": False})
    assert Claims(action="judge", runs=store.root).run() == 1
    captured = capsys.readouterr()
    assert "not judged: 90" in captured.out and "of which 2" in captured.err
    assert Claims(action="run", runs=store.root).run() == 0
    assert not (tmp_path / "package").exists()
    assert (tmp_path / "README.md").read_text() == README
    assert Claims(runs=store.root).run() == 0
    assert "not judged" in (text := capsys.readouterr().out) and "0, holds" in text

    monkeypatch.setattr(provenance, "modified_files", lambda: ["theory/claims.py"])
    with pytest.raises(InputError, match="clean checkout.*theory/claims.py"):
        Claims(action="judge", runs=store.root, publish=True).run()
    with pytest.raises(InputError, match="judge or run"):
        Claims(runs=store.root, publish=True).run()
    assert not (tmp_path / "package").exists()
    assert (tmp_path / "README.md").read_text() == README

    monkeypatch.setattr(provenance, "modified_files", lambda: [])
    assert Claims(action="judge", runs=store.root, publish=True).run() == 0
    published = RunStore(tmp_path / "package" / "claims" / "runs").records()
    outcome = scoreboard.stored(on_runs)
    assert outcome is not None and sorted(outcome.runs) == [record.id for record in published]
    assert "**holds** |" in (tmp_path / "README.md").read_text()


def test_a_direct_claim_is_judged_again_from_its_measurement(
    claim: Claim, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(claim, store)
    kept = json.loads(scoreboard.result_path(claim).read_text())

    def never(prediction: Mapping[str, Any]) -> Evidence:
        raise AssertionError("nothing may be measured")

    again = scoreboard.rejudge(
        replace(claim, parts=(), measure=never, negative_control=never, passing_control=never),
        store,
    )
    assert again.outcome == scoreboard.stored(claim)
    assert again.provenance == {k: v for k, v in kept.items() if k not in ("outcome", "digest")}


def close(first: Any, second: Any) -> bool:
    """Equal, numbers to nine digits: spectra depend on the number of threads in the last ones."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[k], second[k]) for k in first)
    if isinstance(first, list):
        pairs = zip(first, second, strict=True)
        return len(first) == len(second) and all(close(a, b) for a, b in pairs)
    if isinstance(first, float):
        return first == pytest.approx(second, rel=1e-9, abs=1e-15, nan_ok=True)
    return first == second


SLOW_TO_JUDGE = (15, 18, 24)  # resampling, Gramians, and singular values of every layer


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in SLOW_TO_JUDGE else n
        for n in sorted(scoreboard.available())
    ],
)
def test_judging_again_gives_the_committed_result(number: int, tmp_path: Path) -> None:
    """From committed evidence alone: no training, no model, no data."""
    claim = scoreboard.find(number)
    committed = scoreboard.stored(claim)
    assert committed is not None
    if claim.runs is not None and not committed.runs:
        pytest.skip("the runs behind this claim are not committed yet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = scoreboard.rejudge(claim, both_homes(tmp_path)).outcome
    assert again.text == committed.text and again.runs == committed.runs
    assert close(again.to_dict() | {"code": None}, committed.to_dict() | {"code": None})


@pytest.mark.slow  # what makes it pass are minutes to hours of measurement; the board says "stale"
@pytest.mark.parametrize("number", sorted(scoreboard.available()))
def test_no_row_is_stale(number: int) -> None:
    claim = scoreboard.find(number)
    outcome = scoreboard.stored(claim)
    stale = outcome is None or scoreboard.is_stale(claim, outcome)
    assert not stale, (
        f"the code that measures claim {number} is not known to be the code that measured it; from "
        f"a clean checkout: deltacontrol claims run {number} --publish"
    )
