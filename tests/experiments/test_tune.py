"""A search of learning rates: what goes on is what an uninterrupted training gives."""

from __future__ import annotations

import pytest

from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.running import advance
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.studies.learning_rates.search import RateSearch
from deltacontrol.theory.errors import InputError
from tests import tiny_model

RATES = (1e-5, 1e-2, 3e-2, 1e-1)


@pytest.fixture
def search(tmp_path):
    """Makes a search on a tiny model."""
    places = tiny_model.write(tmp_path)

    def make(**fields) -> RateSearch:
        given = {"rates": RATES, "seeds": 2, "steps": 20, "look": 0.4, "keep": 2, "batch_size": 4}
        return RateSearch(**places, deltas=("bitfit",), max_length=8, **(given | fields))

    return make


def test_the_rest_of_a_paused_training_is_the_uninterrupted_one(search, tmp_path) -> None:
    one, store = search().training(1e-2, 0), RunStore(tmp_path / "a")
    whole = run(one, RunStore(tmp_path / "b"), progress=False)
    (metrics,) = advance([one], store, 8)
    assert metrics is not None and {"accuracy", "loss"} <= metrics.keys()
    assert store.find(one) is None and store.partial(one).is_dir()
    assert advance([one], store, 8) == [metrics]  # nothing is trained again
    record = run(one, store, progress=False)
    assert record is not None and whole is not None and record.id == whole.id
    assert record.result["accuracy"] == whole.result["accuracy"]
    for column in ("loss", "grad_norm"):
        assert record.curve()[column].tolist() == whole.curve()[column].tolist()
    for name, value in whole.controls().items():
        assert (record.controls()[name] == value).all()
    assert not store.partial(one).exists() and advance([one], store, 8) == [None]


@pytest.mark.slow
def test_hopeless_rates_are_given_up_and_the_choice_is_that_of_all(search, tmp_path) -> None:
    store = RunStore(tmp_path / "runs")
    record = run(search(), store, progress=False)
    everything = run(search(look=1.0), RunStore(tmp_path / "all"), progress=False)
    assert record is not None and everything is not None
    found, table = record.result, record.curve()
    assert found["rate"] == everything.result["rate"] != RATES[0]
    assert found["score"] == everything.result["score"]
    assert len(found["kept"]) == 2 and RATES[0] not in found["kept"]
    assert found["steps_done"] == 2 * (2 * 20 + 2 * 8) and found["steps_of_all"] == 2 * 4 * 20
    assert len(table) == 8 and table["accuracy_at_look"].notna().all()
    trained = table[table["rate"].isin(found["kept"])]
    assert table["run"].notna().sum() == len(trained) == 4 and trained["accuracy"].notna().all()
    assert {r.id for r in store.records()} == {record.id, *trained["run"]}
    assert not list((store.root / ".partial").iterdir())  # nothing is left of the others


@pytest.mark.slow
def test_an_interrupted_search_goes_on_with_what_it_saw(search, tmp_path, monkeypatch) -> None:
    from deltacontrol.experiments.runs import sweep

    calm = run(search(), RunStore(tmp_path / "calm"), progress=False)
    store, looked, everything = RunStore(tmp_path / "runs"), [], sweep.run_all

    def watched(experiments, where, step, **options):
        looked.extend(experiment.learning_rate for experiment in experiments)
        return advance(experiments, where, step)

    def stopping(experiments, *args, **options):
        everything(experiments[:3], *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "advance_all", watched)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_all", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(search(), store, progress=False)
    assert len(looked) == 8 and len(store.records()) == 3
    record = run(search(), store, progress=False)
    assert len(looked) == 8  # no look is taken again, though three trainings are recorded now
    assert record is not None and calm is not None
    assert record.result["rate"] == calm.result["rate"]
    assert record.result["score"] == pytest.approx(calm.result["score"], abs=1e-6)


@pytest.mark.slow
def test_a_recorded_training_goes_along(search, tmp_path) -> None:
    store = RunStore(tmp_path / "runs")
    for seed in (0, 1):
        run(search().training(RATES[0], seed), store, progress=False)
    record = run(search(), store, progress=False)
    assert record is not None and RATES[0] in record.result["kept"]
    assert len(record.result["kept"]) == 3


@pytest.mark.slow
def test_a_rate_that_diverges_is_not_kept(search, tmp_path) -> None:
    record = run(search(rates=(1e-2, 3e-2, 1e25)), RunStore(tmp_path / "runs"), progress=False)
    assert record is not None and record.result["kept"] == [1e-2, 3e-2]


def test_the_command(search, tmp_path, capsys) -> None:
    one = search()
    words = ["tune", "--model", one.model, "--task", one.task, "--delta", "bitfit", "--runs"]
    words += [str(tmp_path / "runs"), "--rates", "1e-5", "1e-2", "3e-2", "--seeds", "1"]
    words += ["--steps", "10", "--keep", "1", "--batch-size", "4", "--max-length", "8"]
    assert cli._main(words) == 0
    first = capsys.readouterr().out
    assert "given up" in first and "of the steps of all rates were trained" in first
    assert "--learning-rate" in first and "recorded" in first
    assert cli._main(words) == 0
    assert "found" in capsys.readouterr().out
    assert cli._main([*words, "--look", "0"]) == 2
    assert "expected a share of the steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rates": (1e-2, 1e-2)}, "expected different numbers above 0"),
        ({"rates": (float("nan"),)}, "expected different numbers above 0"),
        ({"rates": (-1.0,)}, "expected different numbers above 0"),
        ({"look": 1.5}, "expected a share of the steps"),
        ({"keep": 0}, "keep"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, fields, message) -> None:
    with pytest.raises(InputError, match=message):
        search(**fields)


def test_a_rate_that_float32_cannot_step_with_is_refused(search) -> None:
    with pytest.raises(InputError, match=r"learning_rate is 1e\+38.* at most 1e\+30"):
        search().training(1e38, 0)


def test_a_search_is_not_launched_in_several_processes(search, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without accelerate"):
        run(search(), RunStore(tmp_path / "runs"), progress=False)
