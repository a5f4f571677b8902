"""Statements of papers: read strictly, judged on made-up records, and once on real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from deltacontrol.experiments import claims
from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.claims.code_digest import code_digest
from deltacontrol.experiments.claims.court import Statement
from deltacontrol.experiments.cli.judge import Judge
from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import Outcome, judge

SHIPPED = sorted((Path(claims.__path__[0]) / "statements").glob("*.toml"))
BASE = Statement(
    id=951, name="a-beats-b", title="A beats B", statement="by a point", source="here",
    first="lora:rank=2", second="bitfit", relation="higher", by=0.01,
    tasks=("movie", "trec6", "rt"), seeds=3, model="minilm-l3", steps=20,
)  # fmt: skip
NOISE = {"movie": 0.004, "trec6": -0.002, "rt": 0.001}


def judged(
    statement: Statement, lead: float, *, at_end: tuple[str, ...] = (), parameters: int = 100
) -> Outcome:
    """By records in which the first contestant is ahead by `lead`, and one step is a guess."""
    rates = {(c, t): 1e-3 for c in (statement.first, statement.second) for t in statement.tasks}

    def records(training: Any) -> Any:
        own = [delta["name"] for delta in training.deltas]
        first = own == [text.partition(":")[0] for text in statement.first.split()]
        score = 0.7 + NOISE[training.task] * (1 + training.seed / 10)
        score += lead + 0.002 * training.seed * NOISE[training.task] if first else 0.0
        score = 0.5 if training.steps == 1 else score
        result = {
            "accuracy": score, "majority_share": 0.5, "seconds_per_step": 0.1,
            "num_trainable": parameters if first else 100,
        }  # fmt: skip
        return SimpleNamespace(result=result)

    return judge(statement.claim(rates, at_end), records)


@pytest.mark.parametrize(
    ("relation", "lead", "verdict"),
    [
        ("higher", 0.05, Verdict.HOLDS),
        ("higher", 0.002, Verdict.FAILS),
        ("higher", -0.05, Verdict.FAILS),
        ("equivalent", 0.001, Verdict.HOLDS),
        ("equivalent", 0.05, Verdict.FAILS),
    ],
)
def test_the_interval_over_corpora_decides(relation: Any, lead: float, verdict: Verdict) -> None:
    part = judged(replace(BASE, relation=relation), lead).part()
    assert part.verdict is verdict, part.reason
    interval = part.evidence.interval  # movie and rt share a corpus
    assert interval is not None and (interval.unit, interval.count) == ("corpus", 2)


def test_assumptions_are_checked() -> None:
    part = judged(BASE, 0.05, at_end=("lora on movie: 0.1",)).part()
    assert part.verdict is Verdict.ASSUMPTION_NOT_MET and "end of its grid" in part.reason
    equal = replace(BASE, equal="parameters")
    assert judged(equal, 0.05).part().verdict is Verdict.HOLDS
    part = judged(equal, 0.05, parameters=200).part()
    assert part.verdict is Verdict.ASSUMPTION_NOT_MET and "equal parameters" in part.reason


def test_a_margin_within_the_noise_of_seeds_has_no_power() -> None:
    """The control compares a contestant with itself: its interval is not below so small a bound."""
    part = judged(replace(BASE, by=1e-5), 0.05).part()
    assert part.verdict is Verdict.INCONCLUSIVE and "no power" in part.reason


def test_differences_that_are_all_the_same_decide_nothing() -> None:
    """On few rows that happens by chance, and the interval would be a point."""
    rates = {(c, t): 1e-3 for c in (BASE.first, BASE.second) for t in BASE.tasks}

    def records(training: Any) -> Any:
        first = training.deltas[0]["name"] == "lora"
        noise = 0.001 * (training.seed - 3) if training.seed >= BASE.seeds else 0.0
        return SimpleNamespace(
            result={"accuracy": 0.75 if first else 0.5 + noise, "majority_share": 0.5}
        )

    part = judge(BASE.claim(rates, ()), records).part()
    assert part.verdict is Verdict.ASSUMPTION_NOT_MET and "all the same" in part.reason


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_statements_can_be_trained(path: Path) -> None:
    statement = Statement.read(path)
    assert statement.name == path.stem
    for contestant in (statement.first, statement.second):
        assert statement.search(contestant, statement.tasks[0]).rates
    rates = {(c, t): 1e-3 for c in (statement.first, statement.second) for t in statement.tasks}
    runs = statement.claim(rates, ()).runs
    assert runs is not None and len(runs()) >= 3 * 5 * len(statement.tasks)


def test_shipped_statements_are_eight_or_more_with_numbers_of_their_own() -> None:
    numbers = [Statement.read(path).id for path in SHIPPED]
    assert len(numbers) >= 8 and len(set(numbers)) == len(numbers)


TEXT = """
id = 960
name = "x"
title = "X"
statement = "x"
source = "here"
first = "head"
second = "bitfit"
relation = "higher"
by = 0.01
tasks = ["movie", "rt"]
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("id = 960", "id = 12"), "above 900"),
        (("id = 960", ""), "lacks id"),
        (("by = 0.01", "by = true"), "by is True"),
        (("relation = ", "colour = "), "colour"),
        (('"higher"', '"better"'), "relation"),
        (('"bitfit"', '"head"'), "different ones"),
        (('["movie", "rt"]', '["movie", "movie"]'), "different tasks"),
        (("by = 0.01", "by = 0.01\nseeds = 1"), "at least 2"),
        (("by = 0.01", "by = "), "no TOML"),
        (('"X"', "3"), "expected a text"),
        (('"x"\ntitle', '"a/b"\ntitle'), "names the file"),
        (("id = 960", "id = 99999999999999"), "shorter number"),
        (("by = 0.01", "by = nan"), "above 0 and below 1"),
        (("by = 0.01", "by = 0"), "above 0 and below 1"),
        (("by = 0.01", "by = 2"), "above 0 and below 1"),
        (('["movie", "rt"]', '[["movie"]]'), "different tasks"),
        (('"head"', '"head@1e-3"'), "it is tuned"),
        (('"head"', '" "'), "expected deltas"),
        (('"head"', '"bitfit "'), "different ones"),
        (("by = 0.01", "by = 0.01\nsteps = 'a'"), "steps is 'a'"),
        (("by = 0.01", "by = 0.01\neval_limit = 0"), "eval_limit is 0"),
        (("by = 0.01", "by = 0.01\nrates = [0.1, -1.0]"), "expected learning rates"),
        (("by = 0.01", "by = 0.01\nsearch_seeds = 0"), "search_seeds is 0"),
    ],
)
def test_what_is_no_statement_is_refused(
    change: tuple[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "paper.toml"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(InputError, match=words):
        Statement.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        Statement.read(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"rt"', '"no-task"'), "no-task"),
        (('"rt"', '"movie-lines"'), "movie-lines is a causal-lm task"),
        (('"x"\ntitle', '"turnpike"\ntitle'), "another claim"),
    ],
)
def test_the_plan_tells_what_cannot_be_judged(
    change: tuple[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "paper.toml"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(InputError, match=words):
        Judge(path, plan=True, runs=tmp_path / "runs").run()


def test_a_number_of_processes_that_cannot_be_is_told_before_the_searches(tmp_path: Path) -> None:
    path = tmp_path / "paper.toml"
    path.write_text(TEXT)
    with pytest.raises(InputError, match="workers is 0"):
        Judge(path, plan=True, workers=0, runs=tmp_path / "runs").run()


def test_the_command_says_its_plan_and_judges(
    minilm_l6: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{w} number {i}" for i in range(16) for w in ("good", "bad")]
    rows = tmp_path / "rows.csv"
    pd.DataFrame({"text": texts, "label": [t.split()[0] for t in texts]}).to_csv(rows, index=False)
    path = tmp_path / "paper.toml"
    small = f'seeds = 2\nsteps = 2\nbatch_size = 4\nmax_length = 8\nmodel = "{minilm_l6}"\n'
    small += "rates = [1e-3, 1e-2]\nsearch_seeds = 1\n"
    path.write_text(TEXT.replace('["movie", "rt"]', f'["{rows}"]') + small)
    assert Judge(path, plan=True, runs=tmp_path / "runs").run() == 0
    assert "2 searches of a rate (0 recorded), then 6 trainings" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    Judge(path, runs=tmp_path / "runs", workers=1).run()
    out = capsys.readouterr().out
    assert "negative control" in out and "no version control" in out
    (kept,) = (tmp_path / "runs" / scoreboard.CLAIMS).glob("960_x.json")
    assert kept.is_file()


def test_a_judged_statement_is_a_row_of_the_board(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its rates come with the committed result, and what it is judged by is its file and court."""
    text = TEXT.replace('"x"\ntitle', '"made-up"\ntitle').replace("by = 0.01", "by = 0.01\nseeds=3")
    file = tmp_path / "made-up.toml"
    file.write_text(text)
    monkeypatch.setattr(scoreboard, "STATEMENTS", tmp_path)
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path / "results")
    scoreboard.forget_statements()
    try:
        assert 960 not in scoreboard.available()
        statement = Statement.read(file)
        outcome = judged(replace(BASE, **vars(statement)), 0.05)
        outcome = replace(outcome, code=code_digest(file))
        claim = statement.claim(
            {(c, t): 1e-3 for c in ("head", "bitfit") for t in statement.tasks}, ()
        )
        scoreboard.keep(claim, scoreboard.Judged(outcome, {}))
        scoreboard.forget_statements()
        found = scoreboard.find(960)
        assert (
            scoreboard.source(found) == file and found.runs is not None and claim.runs is not None
        )
        assert [run.label for run in found.runs()] == [run.label for run in claim.runs()]
        assert scoreboard.stored(found) == outcome and not scoreboard.is_stale(found, outcome)
        file.write_text(text.replace("seeds=3", "seeds=3\nsteps = 7"))
        assert scoreboard.is_stale(found, outcome)
        kept = scoreboard.result_path(claim)
        whole = kept.read_text()
        for change, damaged, words in (
            (text.replace('"bitfit"', '"ia3"'), whole, "judge the statement anew"),
            (text.replace("by = 0.01", "by = "), whole, "is no TOML"),
            (text, whole[:-100], "is damaged"),
            (text, "[]", "is damaged"),
        ):
            file.write_text(change)
            kept.write_text(damaged)
            scoreboard.forget_statements()
            with pytest.warns(UserWarning, match=f"no row for the statement made-up: .*{words}"):
                others = scoreboard.available()
            assert 960 not in others and 1 in others
        assert Judge(file, plan=True, runs=tmp_path / "runs").run() == 0, "to judge it anew"
    finally:
        monkeypatch.undo()
        scoreboard.forget_statements()


def test_only_statements_of_this_project_are_published(tmp_path: Path) -> None:
    path = tmp_path / "paper.toml"
    path.write_text(TEXT)
    with pytest.raises(InputError, match="of your own"):
        Judge(path, publish=True, runs=tmp_path / "runs").run()
