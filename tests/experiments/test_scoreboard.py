"""Claims are found, judged, kept and rendered."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from deltacontrol.experiments import claims
from deltacontrol.experiments.claims import scoreboard
from deltacontrol.theory.claims import Claim, Evidence, Threshold
from deltacontrol.theory.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Claim:
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path / "results")
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
    )
    monkeypatch.setattr(scoreboard, "available", lambda: {90: found})
    return found


def test_a_claim_is_one_file_with_a_notebook() -> None:
    files = sorted(p.stem for p in Path(claims.__path__[0]).glob("[0-9]*.py"))
    found = scoreboard.available()
    assert len(found) == len(files) > 0
    for claim, name in zip(found.values(), files, strict=True):
        assert name == f"{claim.id:02d}_{claim.name.replace('-', '_')}"
        assert (ROOT / "proofs_notebooks" / f"{claim.notebook}.py").exists()


def test_judge_keep_and_render(claim: Claim, tmp_path: Path) -> None:
    assert scoreboard.stored(claim) is None and "not judged" in scoreboard.render_table()
    assert scoreboard.evaluate(claim).verdict == "holds"
    document = json.loads(scoreboard.result_path(claim).read_text())
    assert {"packages", "project", "hardware"} <= document.keys()
    assert "**holds**" in scoreboard.render_table()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{scoreboard.BEGIN}stale\n{scoreboard.END}\nafter\n")
    assert scoreboard.update_readme(readme)
    text = readme.read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert re.search(r"\| 90 \| \[Two and two\]", text)
    assert r"distance \|sum - 4\|" in text


def test_a_value_shows_on_which_side_of_the_threshold_it_is(claim: Claim) -> None:
    """The bound is 0.5: 0.5001 would look as if it passed."""
    shown = [scoreboard._shown(value, claim) for value in (0.123, 0.4999, 0.5001, float("nan"))]
    assert shown == ["0.12", "0.5", "0.5001", "nan"]


def test_a_changed_threshold_makes_the_result_stale(claim: Claim) -> None:
    scoreboard.evaluate(claim)
    assert scoreboard.stored(claim) is not None
    changed = replace(claim, threshold=Threshold("<=", 0.9, "distance to four"))
    assert scoreboard.stored(changed) is None


def test_a_damaged_result_is_named(claim: Claim) -> None:
    scoreboard.evaluate(claim)
    path = scoreboard.result_path(claim)
    path.write_text(path.read_text()[:40])
    with pytest.raises(InputError, match=path.name):
        scoreboard.stored(claim)


def test_an_unknown_claim_names_the_known_ones(claim: Claim) -> None:
    with pytest.raises(InputError, match="90"):
        scoreboard.find(91)
