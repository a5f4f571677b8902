"""The board in its forms, its history, and claims that a reader begins."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deltacontrol.experiments.claims import board, scoreboard, template
from deltacontrol.experiments.cli.claims import Claims
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory import plugins
from deltacontrol.theory.claims import Claim, Part, Threshold
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import Evidence

BELOW = Threshold("<=", 1.0, "ratio_of_100 % & more")


def part(name: str, values: list[float]) -> Part:
    return Part(
        name,
        f"Part {name} <of two>",
        BELOW,
        lambda prediction: Evidence.mean(values, "seed"),
        lambda prediction: Evidence(9.0),
        lambda prediction: Evidence(0.0),
        "real fine-tuning",
    )


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Claim:
    """A claim of two parts with a place of its own."""
    found = Claim(
        id=90,
        name="two-parts",
        title="Two parts",
        statement="both are small",
        source="arithmetic",
        notebook="90_two_parts",
        predict=dict,
        parts=(part("a", [0.1, 0.2, 0.3]), part("b", [2.0, 2.1, 2.2])),
        revised="intervals decide now",
    )
    (tmp_path / "claim.py").write_text("x = 1\n")
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path / "package")
    monkeypatch.setattr(scoreboard, "source", lambda claim: tmp_path / "claim.py")
    monkeypatch.setattr(scoreboard, "available", lambda: {90: found})
    scoreboard.keep(found, scoreboard.evaluate(found, RunStore(tmp_path / "runs")))
    return found


def test_each_part_is_a_row_with_its_interval(claim: Claim) -> None:
    rows = board.rows()
    assert [(r["#"], r["verdict"]) for r in rows] == [("90a", "holds"), ("90b", "fails")]
    assert re.fullmatch(r"0\.2 \[-0\.048, 0\.45\]", rows[0]["measured"])
    assert rows[0]["on"] == "real fine-tuning"


def test_chance_counts_claims_with_intervals(claim: Claim) -> None:
    told = board.chance()
    assert told.startswith("2 parts of 1 claims, 2 of them decided")
    assert "all of the 1 claims" in told and "the 0 parts that are exact" in told


class Cells(HTMLParser):
    """The cells of a page's tables, and whether each tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def test_forms_carry_the_same_rows(claim: Claim) -> None:
    hidden = ("bound", "part")
    rows = [{k: str(v) for k, v in r.items() if k not in hidden} for r in board.rows()]
    assert list(csv.DictReader(io.StringIO(board.csv()))) == rows
    page = Cells()
    page.feed(board.web())
    assert not page.open
    width = len(rows[0]) + 1  # and the page behind it
    assert [dict(zip(rows[0], page.cells[i * width :], strict=False)) for i in (0, 1)] == rows
    assert "http" not in board.web()
    latex = board.latex()
    assert r"ratio\_of\_100 \% \& more" in latex and latex.count(r" \\") == 3
    assert all(row["measured"] in board.markdown() for row in rows)
    assert board.chance() in board.markdown()


def test_a_changed_check_is_kept_as_history(claim: Claim, tmp_path: Path) -> None:
    assert scoreboard.history(claim) == []
    runs = RunStore(tmp_path / "runs")
    scoreboard.keep(claim, scoreboard.evaluate(claim, runs))
    assert scoreboard.history(claim) == []  # the same check and the same verdicts
    wider = Threshold("<=", 3.0, "ratio")
    parts = (claim.parts[0], replace(claim.parts[1], threshold=wider))
    changed = replace(claim, parts=parts)
    scoreboard.keep(changed, scoreboard.evaluate(changed, runs))
    (entry,) = scoreboard.history(changed)
    assert entry["why"] == "intervals decide now"
    assert [p["verdict"] for p in entry["parts"]] == ["holds", "fails"]
    assert entry["parts"][1]["condition"] == str(BELOW)
    assert entry["parts"][1]["measured"] == pytest.approx(2.1)
    rows = board.rows()
    assert rows[1]["verdict"] == "not judged"  # the board still lists the claim of the fixture
    assert "before" in board.page_of(changed) and "b fails: measured 2.1" in board.page_of(changed)
    again = scoreboard.evaluate(claim, runs)
    scoreboard.keep(claim, again)
    assert len(scoreboard.history(claim)) == 2
    # The same again says why by its present words.
    scoreboard.keep(replace(claim, revised="said better"), again)
    assert [entry["why"] for entry in scoreboard.history(claim)][1:] == ["said better"]


def test_a_result_of_an_earlier_form_becomes_history(claim: Claim, tmp_path: Path) -> None:
    path = scoreboard.result_path(claim)
    old = {
        "id": 90,
        "name": "two-parts",
        "threshold": {"op": "within", "value": [0.0, 1.0], "description": "ratio"},
        "evidence": {"value": 0.5},
        "control": {"value": 0.7},
        "verdict": "inconclusive",
    }
    document = scoreboard.sealed({"outcome": old, "project": {"commit": "abc"}})
    path.write_text(json.dumps(document))
    assert scoreboard.stored(claim) is None
    scoreboard.keep(claim, scoreboard.evaluate(claim, RunStore(tmp_path / "runs")))
    (entry,) = scoreboard.history(claim)
    assert entry["commit"] == "abc" and entry["parts"][0]["condition"] == "ratio within [0, 1]"
    assert entry["parts"][0]["name"] == ""


def test_a_result_of_an_earlier_form_that_says_the_same_is_no_history(
    claim: Claim, tmp_path: Path
) -> None:
    one = replace(
        claim, parts=(), threshold=BELOW, measure=lambda prediction: Evidence(0.5),
        negative_control=lambda prediction: Evidence(9.0),
        passing_control=lambda prediction: Evidence(0.0),
    )  # fmt: skip
    old = {
        "id": 90, "name": "two-parts", "verdict": "holds", "evidence": {"value": 0.4},
        "control": {"value": 8.0}, "threshold": dict(vars(BELOW)),
    }  # fmt: skip
    path = scoreboard.result_path(one)
    path.write_text(json.dumps(scoreboard.sealed({"outcome": old, "project": {}})))
    scoreboard.keep(one, scoreboard.evaluate(one, RunStore(tmp_path / "runs")))
    assert scoreboard.history(one) == []


def test_the_list_fits_80_columns(claim: Claim, capsys: pytest.CaptureFixture[str]) -> None:
    assert Claims().run() == 0
    out = capsys.readouterr().out
    table = out.partition("\n\n")[0].splitlines()
    assert len(table) == 3 and max(map(len, table)) <= 80
    assert Claims(format="csv").run() == 0
    assert capsys.readouterr().out == board.csv()
    with pytest.raises(InputError, match="goes with list"):
        Claims(action="judge", format="csv").run()


def test_a_new_claim_runs_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", dict(plugins._loaded))
    assert Claims(action="new", which=("my_idea",)).run() == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "my_idea.py", "my_idea_notebook.py", "test_my_idea.py",
    }  # fmt: skip
    assert Claims(action="run", which=("my_idea",)).run() == 0
    assert "verdict           holds" in capsys.readouterr().out
    space: dict[str, object] = {}
    exec(compile(Path("test_my_idea.py").read_text(), "test_my_idea.py", "exec"), space)
    space["test_it_holds"]()  # type: ignore[operator]
    space["test_another_prediction_does_not"]()  # type: ignore[operator]
    exec(compile(Path("my_idea_notebook.py").read_text(), "notebook", "exec"), {})
    with pytest.raises(InputError, match="there already"):
        template.write("my_idea", tmp_path)


def test_the_quick_preset_takes_fewer_cases_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", dict(plugins._loaded))
    template.write("my_quick_idea", tmp_path)
    path = tmp_path / "my_quick_idea.py"
    path.write_text(path.read_text() + '\nQUICK = {"SEEDS": range(20)}\n')
    loaded = template.load("my_quick_idea", tmp_path)
    assert loaded is not None
    store = RunStore(tmp_path / "runs")
    counts = []
    for quick in (True, False):
        found = scoreboard.evaluate(loaded, store, quick=quick).outcome.part().evidence
        counts.append(found.interval.count if found.interval else 0)
    assert counts == [20, 24]
    with pytest.raises(InputError, match="not published"):
        Claims(action="run", preset="quick", publish=True).run()
    with pytest.raises(InputError, match="goes with run"):
        Claims(action="judge", preset="quick").run()


def test_a_quick_result_says_so_and_keeps_the_full_one(claim: Claim, tmp_path: Path) -> None:
    folder, full = tmp_path / "own", scoreboard.evaluate(claim, RunStore(tmp_path / "runs"))
    path = scoreboard.keep(claim, full, folder)
    before = path.read_text()
    quick = replace(full, provenance={**full.provenance, "preset": "quick"})
    for _ in range(2):
        scoreboard.keep(claim, quick, folder)
        assert path.with_suffix(".paper.json").read_text() == before
    assert "fewer cases" in board.page_of(claim, folder)
    assert board.rows(folder)[0]["own"].endswith(", quick")


@pytest.mark.parametrize(
    ("measure", "words"),
    [("lambda p: 1 / 0", "ZeroDivisionError"), ("lambda p: 0.5", "expected an Evidence")],
)
def test_a_claim_that_fails_is_a_message_and_the_others_are_measured(
    measure: str, words: str, claim: Claim, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    space: dict = {}
    exec(f"f = {measure}", space)
    part = replace(claim.parts[0], measure=space["f"])
    broken = replace(claim, id=91, name="broken", parts=(part,))
    monkeypatch.setattr(scoreboard, "available", lambda: {91: broken, 90: claim})
    assert Claims(action="run", runs=tmp_path / "mine").run() == 1
    told = capsys.readouterr()
    assert words in told.err and "not judged: 91" in told.out and "Part b" in told.out


def test_the_whole_board_is_printed_in_other_formats(claim: Claim) -> None:
    with pytest.raises(InputError, match="whole board"):
        Claims(which=("90",), format="csv").run()
    with pytest.raises(InputError, match="unknown claim"):
        Claims(action="show", which=("9" * 5000,)).run()


def test_revised_checks_are_told_with_both_verdicts(capsys: pytest.CaptureFixture) -> None:
    found = board.changes()
    revised = [c for c in scoreboard.available().values() if scoreboard.history(c)]
    assert {row["claim"].partition(" ")[0] for row in found} == {str(c.id) for c in revised}
    for row in found:
        claim = scoreboard.find(int(row["claim"].partition(" ")[0]))
        outcome = scoreboard.stored(claim)
        assert outcome is not None and row["why"] and len(row["commit"]) == 12
        for part in outcome.parts:
            assert part.name in row["now"] and part.verdict.text.rstrip("s") in row["now"]
    assert Claims(action="changes").run() == 0
    told = capsys.readouterr().out
    assert told.endswith(f"{len(found)} checks were revised\n")
    assert max(map(len, told.splitlines())) < 140
    one = str(revised[0].id)
    assert Claims(action="changes", which=(one,)).run() == 0
    assert capsys.readouterr().out.startswith(f"{one} ")


def test_verdicts_of_several_parts_are_joined() -> None:
    parts = [("a", "holds"), ("b", "fails"), ("c", "holds"), ("d", "assumption_not_met")]
    assert board._verdicts(parts) == "a, c hold; b fails; d assumption not met"
    assert board._verdicts([("", "holds")]) == "holds"


def test_a_name_is_one_of_a_file_and_of_one_claim(
    claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="names files"):
        replace(claim, name="../x")
    monkeypatch.undo()
    taken = next(iter(scoreboard.available().values())).name
    twin = replace(claim, id=999, name=taken)
    monkeypatch.setattr(plugins, "values", lambda name: [("twin.py", twin)])
    with pytest.raises(InputError, match="one name"):
        scoreboard.available()


def test_a_package_is_not_hidden_by_a_new_claim(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Python package"):
        template.write("numpy", tmp_path)


@pytest.mark.parametrize("name", ["my idea", "1st", "class", "a/b", "", "a" * 300])
def test_names_that_no_file_can_have_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no name of a Python file"):
        template.write(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_claim_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty_one.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="defines no claim"):
        template.load("empty_one", tmp_path)
    assert template.load("absent", tmp_path) is None


def test_an_unknown_name_is_told_the_known_ones(claim: Claim) -> None:
    with pytest.raises(InputError, match="two-parts"):
        Claims(action="show", which=("two-part",)).run()
