"""A search for a dimension hands its trainings over several at a time, and its result stays."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deltacontrol.experiments.runs import running, sweep
from deltacontrol.experiments.runs.experiment import Outcome, Workspace
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run, run_all
from deltacontrol.experiments.studies.d90 import trainings
from deltacontrol.experiments.studies.d90.dimension import BASELINE, SEARCH
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.experiments.studies.d90.search import Search, Trial, climb, steadiest
from deltacontrol.experiments.studies.d90.trainings import Line
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError
from tests import tiny_model
from tests.experiments.test_dimension import curve


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FineTuningDimension]:
    """Makes searches on a tiny model."""
    places = tiny_model.write(tmp_path_factory.mktemp("searches"))

    def make(**fields: Any) -> FineTuningDimension:
        given = {"steps": 3, "batch_size": 4, "max_length": 8, "eval_limit": 20}
        given |= {"start": 100, "largest": 1000, "budget": 5, "seeds": 2, "baseline_seeds": 3}
        return FineTuningDimension(**places, **(given | fields))

    return make


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[FineTuning]:
    """Make trainings up, in this process; lists them."""
    found: list[FineTuning] = []

    def execute(self: FineTuning, workspace: Workspace) -> Outcome:
        found.append(self)
        accuracy = 0.9 if self.deltas[0]["name"] == "full" else 0.7 + 0.001 * self.seed
        result = {
            "accuracy": accuracy,
            "best_validation_accuracy": accuracy - self.learning_rate * 1e-3,
            "majority_share": 0.3,
        }
        return Outcome("completed", result, pd.DataFrame({"step": [1], "validation_loss": [0.5]}))

    monkeypatch.setattr(FineTuning, "execute", execute)
    monkeypatch.setattr(sweep, "default_workers", lambda: 1)
    return found


@pytest.mark.parametrize("truth", [30.0, 400.0, 20_000.0])
@pytest.mark.parametrize("budget", [2, 5, 13, 25])
def test_what_is_told_ahead_is_trained_and_nothing_else_changes(truth: float, budget: int) -> None:
    """In the order of the trainings, which are those of a search that tells nothing."""
    told: list[tuple[int, float, int]] = []
    started: list[tuple[int, float, int]] = []

    def ahead(certain: Sequence[tuple[int, float, int]]) -> None:
        told.extend(key for key in certain if key not in started)

    def measure(d: int, move: float, seed: int) -> Trial:
        started.append((d, move, seed))
        return curve(truth, seed=1)(d, move, seed)

    search = Search(measure, 0.7, budget=budget, ahead=ahead)
    found = search.run()
    assert len(told) >= 2 and [key for key in started if key in told] == told
    plain = Search(curve(truth, seed=1), 0.7, budget=budget)
    assert plain.run() == found and plain.trials == search.trials


def test_moves_between_two_dimensions_are_told_together() -> None:
    told: list[list[tuple[int, float, int]]] = []

    def measure(d: int, move: float, seed: int) -> Trial:
        best = 10.0 if d <= 1000 else 99.9
        return curve(2000.0, noise=0.0, best_move=best)(d, move, seed)

    search = Search(measure, 0.7, budget=20, ahead=lambda certain: told.append(list(certain)))
    search.run()
    moves = [[move for _, move, _ in certain] for certain in told if certain[0][0] == 3162]
    assert moves == [[10.0, 31.6, 100.0]]


@pytest.mark.parametrize("tries", [1, 2, 5])
@pytest.mark.parametrize("ways", [(1, -1), (-1, 1), (1,), (-1,)])
@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_the_first_two_of_a_climb_are_told(tries: int, ways: tuple, slope: float) -> None:
    told: list[float] = []
    tried: list[float] = []

    def known(rate: float) -> Trial:
        tried.append(rate)
        return Trial(None, 0, rate, rate, 0.0, slope * rate, 0.0, "completed", f"{rate:g}")

    climb(1.0, known, tries, ways, told.extend)
    assert told == (tried[:2] if tries > 1 else [])


def test_all_seeds_of_a_rate_are_told() -> None:
    told: list[list[tuple[float, int]]] = []
    tried: list[tuple[float, int]] = []

    def known(rate: float, seed: int) -> Trial:
        tried.append((rate, seed))
        height = {1.0: 0.75, 3.16: 0.8 if seed != 1 else 0.5, 10.0: 0.4}.get(rate, 0.3)
        return Trial(None, seed, rate, rate, height, height, 0.0, "completed", f"{rate}-{seed}")

    steadiest(1.0, known, 3, lambda certain: told.append(list(certain)))
    assert told == [[(1.0, 0), (3.16, 0)], [(3.16, 1), (3.16, 2)], [(1.0, 1), (1.0, 2)]]
    assert tried == [(1.0, 0), (3.16, 0), (10.0, 0), *told[1], *told[2]]


@pytest.mark.parametrize("other", [{"method": "did"}, {"delta": "bitfit"}])
def test_a_second_search_trains_no_baseline_again(
    other: dict[str, Any],
    searches: Callable[..., FineTuningDimension],
    done: list[FineTuning],
    tmp_path: Path,
) -> None:
    store = RunStore(tmp_path)
    first = run(searches(), store, progress=False)
    baselines = [one for one in done if one.deltas[0]["name"] == "full"]
    done.clear()
    second = run(searches(**other), store, progress=False)
    assert first is not None and second is not None and first.id != second.id
    assert len(baselines) > 3 and not [one for one in done if one.deltas[0]["name"] == "full"]
    assert done
    runs = [r.curve()[r.curve()["dimension"].isna()]["run"].tolist() for r in (first, second)]
    assert runs[0] == runs[1] and first.result["baseline"] == second.result["baseline"]


def test_what_fails_among_others_is_tried_alone(
    searches: Callable[..., FineTuningDimension],
    done: list[FineTuning],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm = run(searches(), RunStore(tmp_path / "calm"), progress=False)
    handed: list[int] = []

    def dying(experiments: Sequence[FineTuning], *_: Any, **__: Any) -> None:
        handed.append(len(experiments))
        raise InputError("its process died")

    monkeypatch.setattr(sweep, "default_workers", lambda: 4)
    monkeypatch.setattr(sweep, "run_all", dying)
    record = run(searches(), RunStore(tmp_path / "b"), progress=False)
    assert calm is not None and record is not None and handed[:2] == [2, 2]
    assert record.id == calm.id and record.result == calm.result
    pd.testing.assert_frame_equal(record.curve(), calm.curve())

    def failing(self: FineTuning, workspace: Workspace) -> Outcome:
        raise InputError("this training cannot be")

    monkeypatch.setattr(FineTuning, "execute", failing)
    with pytest.raises(InputError, match="^this training cannot be$"):
        run(searches(), RunStore(tmp_path / "c"), progress=False)


def test_recorded_trainings_are_not_handed_over(
    searches: Callable[..., FineTuningDimension],
    done: list[FineTuning],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handed: list[list[FineTuning]] = []

    def several(experiments: Any, store: RunStore, workers: int, **options: Any) -> Any:
        handed.append(list(experiments))
        return running.run_together(experiments, store, progress=False)

    monkeypatch.setattr(sweep, "default_workers", lambda: 2)
    monkeypatch.setattr(sweep, "run_all", several)
    spec, store = searches(), RunStore(tmp_path)
    run(spec.baseline_training(spec.first_rate(), 0), store, progress=False)
    run(spec, store, progress=False)
    given = [one for group in handed for one in group]
    assert handed and all(len(group) > 1 for group in handed)
    assert spec.baseline_training(spec.first_rate(), 0) not in given
    assert len({store.path(one) for one in given}) == len(given)
    assert len(done) == len({store.path(one) for one in done})


def test_copies_share_a_pass_where_they_can(
    searches: Callable[..., FineTuningDimension],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The baseline of a delta does; nothing in a subspace, nor full fine-tuning, tries to."""
    monkeypatch.setattr(sweep, "default_workers", lambda: 1)
    given = {"delta": "bitfit", "baseline": "delta", "largest": 200, "budget": 2, "share": 3.0}
    spec, store = searches(**given), RunStore
    record = run(spec, store(tmp_path / "together"), progress=False)
    assert record is not None
    shared = {
        part: {found.result.get("copies_trained_together") for found in store_runs}
        for part, store_runs in _by_part(store(tmp_path / "together")).items()
    }
    assert 2 in shared["bitfit"] and shared["said"] == {None}
    monkeypatch.setattr(running, "companies", lambda found, *_: [[one] for one in found])
    alone = run(spec, store(tmp_path / "alone"), progress=False)
    assert alone is not None and alone.id == record.id
    columns = ["dimension", "seed", "move", "rate", "performance", "status", "run", "used"]
    pd.testing.assert_frame_equal(record.curve()[columns], alone.curve()[columns])
    assert record.result == alone.result and record.result["num_runs"] == 2
    for one in (spec.training(50, 1.0, 0), searches().baseline_training(1e-3, 0)):
        both = [one, replace(one, seed=1)]
        assert [len(group) for group in sweep.companies(both)] == [1, 1]


def _by_part(store: RunStore) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in store.records():
        if record.kind == "fine-tuning":
            found.setdefault(record.config["deltas"][0]["name"], []).append(record)
    return found


@pytest.mark.slow
def test_processes_give_what_one_after_another_gives(
    searches: Callable[..., FineTuningDimension],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "default_workers", lambda: 1)
    spec = searches(share=3.0)
    calm = run(spec, RunStore(tmp_path / "a"), progress=False)
    ended: list[int] = []

    def watched(experiments: Any, *given: Any, watch: Any, **options: Any) -> Any:
        def told(number: int) -> None:
            ended.append(number)
            watch(number)

        before = sum(ended)
        found = run_all(experiments, *given, watch=told, **options)
        assert sum(ended) - before == len(experiments) == len(found)
        return found

    monkeypatch.setattr(sweep, "default_workers", lambda: 2)
    monkeypatch.setattr(sweep, "run_all", watched)
    record = run(spec, RunStore(tmp_path / "b"), progress=False)
    assert calm is not None and record is not None and sum(ended) >= 4
    assert record.id == calm.id and record.result == calm.result
    pd.testing.assert_frame_equal(record.curve(), calm.curve(), rtol=1e-5)


def test_a_worker_of_a_sweep_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "default_workers", lambda: 7)
    assert trainings._processes() == 7
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert trainings._processes() == 1


def test_a_search_is_not_launched_in_several_processes(
    searches: Callable[..., FineTuningDimension], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without accelerate"):
        run(searches(), RunStore(tmp_path), progress=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(trainings.time, "perf_counter", lambda: now[0])
    yield now


def test_the_line_tells_what_is_left_at_most(clock: list[float]) -> None:
    line = Line("a search", {BASELINE: 6, SEARCH: 10}, shown=False)
    assert line.text == "0 of at most 16" and line.seconds_left is None
    with line.timed(BASELINE, 2, at_a_time=2):
        line.ended(0)
        line.ended(1)
        assert line.text == "1 of at most 16"
        clock[0] += 30
    line.count(BASELINE, "one")
    line.count(BASELINE, "two")
    line.count(BASELINE, "two")  # found again when the search asks for it
    assert line.text == "2 of at most 16" and line.seconds_left is None  # no subspace was timed
    with line.timed(SEARCH, 1):
        clock[0] += 7
    line.count(SEARCH, "three")
    assert line.seconds_left == 4 * 30 + 9 * 7
    line.count(BASELINE, "found")  # which takes no time
    line.finish(BASELINE)
    assert line.text == "4 of at most 13" and line.seconds_left == 9 * 7
    with pytest.raises(InputError), line.timed(SEARCH, 2):
        line.ended(1)
        raise InputError("failed")
    assert line.text == "4 of at most 13" and line.seconds_left == 9 * 7
    line.finish(SEARCH)
    assert line.text == "4 of at most 4" and line.seconds_left == 0


@pytest.mark.parametrize("label", ["short", "a model in a folder with a long name, and a task"])
def test_the_line_fits_eighty_columns(
    label: str, clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    line = Line(label, {BASELINE: 15, SEARCH: 200}, shown=True)
    with line.timed(SEARCH, 1):
        clock[0] += 1000
    line.count(SEARCH, "one")
    line.finish(BASELINE)
    line.close()
    drawn = capsys.readouterr().err
    assert drawn.count("\n") == 1  # one line, drawn again and again
    lines = [text for text in drawn.replace("\n", "\r").split("\r") if text]
    assert max(map(len, lines)) < 80
    assert label[:20] in lines[-1] and "1 of at most 200 [" in lines[-1]
    assert "at most 55:16:40 left]" in lines[-1]


def test_a_search_draws_its_line(
    searches: Callable[..., FineTuningDimension],
    done: list[FineTuning],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = run(searches(), RunStore(tmp_path), progress=True)
    assert record is not None
    drawn = capsys.readouterr().err
    last = drawn.replace("\n", "\r").rstrip("\r").rpartition("\r")[2]
    most = len(record.curve()) - record.result["num_runs"] + 5
    assert f"{len(record.curve())} of at most {most} [" in last
    assert drawn.count("\n") == 1 and "0 of at most 20 [" in drawn
