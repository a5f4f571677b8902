"""An optimiser is a solver of the same problem: by name, by command, and back from the record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltacontrol.deltas import HeadTuning, LoRA, attach
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.runs import kinds
from deltacontrol.experiments.runs.experiment import canonical_json, run_id
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import COMMITTED, Digests, RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.tasks.encoding import without_labels
from deltacontrol.experiments.training import execution
from deltacontrol.experiments.training.evaluation import evaluate
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.loop import train
from deltacontrol.experiments.training.settings import Options, Settings
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import NewtonCG
from tests.experiments.test_finetune import places, tiny
from tests.experiments.training_models import ParityBatches, bert, settings

__all__ = ["places"]


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def mean_loss(model, batch) -> float:
    with torch.no_grad():
        logits = model.eval()(**without_labels(batch)).logits
    return float(torch.nn.functional.cross_entropy(logits, batch["labels"]))


def solving(places: Path, **options) -> Solve:
    names = {"model": str(places / "tiny-bert"), "task": str(places / "task.csv")}
    defaults = {"deltas": ("lora:rank=1,sites=attention.query",), "rows": 4, "max_length": 12}
    return Solve(**(names | defaults | {"weight_decay": 0.1} | options))


# -- the identity of runs ------------------------------------------------------------------------


def test_committed_runs_keep_their_ids() -> None:
    """From its configuration, each record's experiment is made again, and its id."""
    records = [r for f in sorted(COMMITTED.rglob("run.json")) if (r := _document(f)) is not None]
    counts = dict.fromkeys(kinds.places(), 0)
    for document in records:
        config = document["config"]
        experiment = kinds.experiment_of(document["kind"]).from_config(config)
        made = experiment.to_config()
        if "completed" in document:  # it has fields that deltas have gained since
            assert canonical_json(made) == canonical_json(document["completed"])
        else:
            digests = Digests(**document["digests"])
            assert run_id(experiment.kind, made, digests) == document["id"]
        counts[document["kind"]] += 1
    assert counts["fine-tuning"] > 500 and sum(c > 0 for c in counts.values()) > 8


def _document(path: Path) -> dict | None:
    import json

    found = json.loads(path.read_text(encoding="utf-8"))
    return found if "kind" in found else None


def test_the_default_optimiser_is_no_part_of_the_configuration() -> None:
    plain = FineTuning(learning_rate=1e-3)
    assert "optimiser" not in plain.to_config()
    assert FineTuning(learning_rate=1e-3, optimiser="adamw:weight_decay=0") == plain
    other = FineTuning(learning_rate=1e-3, optimiser="sgd:momentum=0.9")
    assert other.to_config()["optimiser"] == "sgd:momentum=0.9"
    exact = FineTuning(optimiser=NewtonCG(radius=2.0))  # type: ignore[arg-type]
    assert exact == FineTuning(optimiser="newton-cg:radius=2") and exact.learning_rate is None
    for experiment in (plain, other, exact):
        assert FineTuning.from_config(experiment.to_config()) == experiment


def test_every_kind_of_run_is_found_by_its_name() -> None:
    for kind in kinds.places():
        assert kinds.experiment_of(kind).kind == kind
    with pytest.raises(InputError, match="unknown kind of run 'solv'; nearest: solve"):
        kinds.experiment_of("solv")


# -- optimisers of small batches -----------------------------------------------------------------


def test_the_loop_takes_adamw_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its updates are those of torch's AdamW on the same gradients, bit for bit."""
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(k) or adamw(*a, **k))
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    Settings(learning_rate=1e-3, weight_decay=0.5).optimizer(groups)
    assert made == [{"lr": 1e-3, "weight_decay": 0.5, "fused": True}]


def test_sgd_by_name_is_torchs_sgd_and_resumes(tmp_path: Path) -> None:
    def model():
        return attach(bert(dropout=0.0), LoRA(rank=2), HeadTuning(), seed=0)

    given = settings(
        optimiser="sgd:momentum=0.5", learning_rate=0.1, steps=4, schedule="constant", warmup=0.0,
        max_grad_norm=None, weight_decay=0.01, checkpoint_seconds=0.0,
    )  # fmt: skip
    trained = train(model(), ParityBatches(), given, progress=False)

    other = model()
    parameters = other.trainable().values()
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.5, weight_decay=0.01)
    for step in range(4):
        sgd.zero_grad()
        other(**ParityBatches().batch(step)).loss.backward()
        sgd.step()
    for name, value in other.state().items():
        torch.testing.assert_close(trained.controls[name], value, rtol=1e-5, atol=1e-7)

    class Stop(Exception):
        pass

    class Interrupted(ParityBatches):
        def batch(self, step: int) -> dict:
            if step == 2:
                raise Stop
            return super().batch(step)

    with pytest.raises(Stop):
        train(model(), Interrupted(), given, checkpoint_dir=tmp_path, progress=False)
    resumed = train(model(), ParityBatches(), given, checkpoint_dir=tmp_path, progress=False)
    for name, value in trained.controls.items():
        assert torch.equal(resumed.controls[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "adamm"}, "unknown solver 'adamm'; nearest: adam"),
        ({"optimiser": "sgd"}, "give a learning_rate for sgd"),
        ({"optimiser": "sgd:lr=1", "learning_rate": 0.1}, "options learning_rate and weight_decay"),
        ({"optimiser": "newton-cg", "learning_rate": 0.1}, "without learning_rate"),
        ({"optimiser": "ddp", "dropout": True, "eval_every": 3}, "without dropout, eval_every"),
        ({"optimiser": "ddp", "precision": "bf16"}, "in float64 .precision auto. or fp32"),
        ({"optimiser": 3}, "optimiser is 3; expected a text"),
    ],
)
def test_mistakes_are_named(options, message) -> None:
    with pytest.raises(InputError, match=message):
        FineTuning(**options)


def test_settings_have_the_options_of_a_fine_tuning() -> None:
    experiment = FineTuning(learning_rate=1e-3, steps=7, patience=2, eval_every=1, seed=3)
    made = Settings.of(experiment, kind="regression")
    assert isinstance(experiment, Options) and made.kind == "regression"
    assert (made.steps, made.patience, made.seed, made.learning_rate) == (7, 2, 3, 1e-3)
    with pytest.raises(InputError, match="needs a learning_rate"):
        Settings()


# -- solvers of the full-batch problem -----------------------------------------------------------


def full_batch(places: Path, **options) -> FineTuning:
    given = {"learning_rate": None, "precision": "auto", "train_limit": 8, "weight_decay": 0.01}
    return tiny(places, **(given | {"deltas": ("lora:rank=2",), "eval_limit": 20} | options))


@pytest.mark.parametrize("optimiser", ["newton-cg", "lbfgs"])
@pytest.mark.one_in(2)
def test_a_solver_by_name_fine_tunes(places: Path, store: RunStore, optimiser: str) -> None:
    experiment = full_batch(places, optimiser=optimiser, steps=15)
    record = run(experiment, store, progress=False)
    result, curve = record.result, record.curve()
    assert record.status == "completed" and result["precision"] == "fp64"
    assert result["residual"] < 0.1 * result["initial_residual"]
    assert result["objective"] < 0.99 * result["initial_objective"]
    assert len(curve) == result["num_steps"] and curve["step"].iloc[0] == 1
    problem = record.control_problem(weight_decay=0.01)
    start = problem.initial_controls()
    assert float(problem.objective(start)) == pytest.approx(result["objective"], rel=1e-12)
    assert problem.residual(start).norm == pytest.approx(result["residual"], rel=1e-6)
    assert FineTuning.from_config(record.config) == experiment
    batch = record.setting().batch("train")
    assert mean_loss(record.model(), batch) == pytest.approx(result["final_train_loss"], rel=1e-12)


def test_what_cannot_serve_is_refused(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltacontrol.experiments.runs.experiment import Workspace

    def fails(told: str, **options) -> None:
        with pytest.raises(InputError, match=told):
            full_batch(places, **options).execute(Workspace(places / "work", progress=False))

    fails("a Transformer is neither; take newton-cg", optimiser="riccati")
    fails("ask for dropout", optimiser="newton-cg", deltas=("lora:rank=2,dropout=0.1",))
    fails("ask for a penalty", optimiser="newton-cg", deltas=("adalora:rank=3,target_rank=1",))
    fails("at most 4096 entries.*NewtonCG", optimiser="ddp", train_limit=100)

    class Little:
        available, total = 1000, 2**40

    monkeypatch.setattr(execution.psutil, "virtual_memory", Little)
    fails("8 training rows are too many: NewtonCG would need about", optimiser="newton-cg")


# -- solve, and back from the record -------------------------------------------------------------


def test_solve_by_command(places: Path, store: RunStore, capsys: pytest.CaptureFixture) -> None:
    words = ["solve", "--model", str(places / "tiny-bert"), "--task", str(places / "task.csv")]
    words += ["--delta", "lora:rank=1,sites=attention.query", "--solver", "newton-cg", "--rows"]
    words += ["4", "--max-length", "12", "--weight-decay", "0.1", "--runs", str(store.root)]
    assert cli._main(words) == 0
    out = capsys.readouterr().out
    (record,) = store.records()
    for text in ("converged: residual", "block.0", "readout", "before", "after", "recorded"):
        assert text in out
    assert cli._main(words) == 0 and "found" in capsys.readouterr().out
    assert record == store.find(solving(places))
    result = record.result
    assert record.status == "converged" and result["residual"] < 1e-4 * result["initial_residual"]
    assert len(record.curve()) == result["iterations"] + 1
    assert record.curve()["objective"].iloc[0] == result["initial_objective"]
    after = result["residuals"]["after"]
    assert sum(r**2 for r in after) ** 0.5 == pytest.approx(result["residual"])
    assert cli._main([*words[:-2], "--runs", str(store.root), "--solver", "ddq"]) == 2
    assert "nearest: ddp" in capsys.readouterr().err
    assert cli._main([*words, "--rows", "100000"]) == 2
    assert "training rows" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_agree_on_the_minimum(places: Path, store: RunStore) -> None:
    found = {}
    for solver in ("newton-cg", "shooting", "ddp"):
        options = {"solver": solver, "rows": 1, "weight_decay": 1.0, "steps": 60}
        record = run(solving(places, **options), store, progress=False)
        assert record.result["residual"] < 1e-4 * record.result["initial_residual"]
        found[solver] = record.result["objective"]
    assert max(found.values()) - min(found.values()) < 1e-7 * abs(found["ddp"])


def test_a_solve_gives_back_its_problem_and_its_model(places: Path, store: RunStore) -> None:
    record = run(solving(places), store, progress=False)
    result = record.result
    problem = record.control_problem(weight_decay=0.1)
    u = problem.initial_controls()
    assert float(problem.objective(u)) == pytest.approx(result["objective"], rel=1e-12)
    assert problem.residual(u).norm == pytest.approx(result["residual"], rel=1e-6)
    some = record.control_problem([2, 0])
    loss = mean_loss(record.model(), record.setting().batch("train", [2, 0]))
    assert float(some.objective(some.initial_controls())) == pytest.approx(loss, rel=1e-12)


def test_a_trained_model_comes_back_with_its_result(places: Path, store: RunStore) -> None:
    experiment = tiny(places, deltas=("lora:rank=2",), steps=30, train_limit=64)
    record = run(experiment, store, progress=False)
    rows = record.setting().split("test")
    found = evaluate(record.model(), rows.eval_batches(8), "classification")
    for name in ("accuracy", "macro_f1", "loss"):
        assert found[name] == pytest.approx(record.result[name], rel=1e-6)
    problem = record.control_problem([5, 1, 3], split="test")
    loss = mean_loss(record.setting(dtype="float64").controlled, rows.batch([5, 1, 3]))
    assert float(problem.objective(problem.initial_controls())) == pytest.approx(loss, rel=1e-12)


def test_a_record_without_controls_or_model_says_so(places: Path, tmp_path: Path) -> None:
    bare = RunStore(tmp_path / "bare", keep_controls=False)
    record = run(tiny(places, steps=1), bare, progress=False)
    for ask in (record.model, record.control_problem):
        with pytest.raises(InputError, match="kept without controls"):
            ask()
    committed = next(f.parent for f in sorted(COMMITTED.rglob("run.json")))
    from deltacontrol.experiments.runs.record import read

    found: Record = read(committed)
    with pytest.raises(InputError, match="without"):
        found.model()
    with pytest.raises(InputError, match="'selection' leaves no model"):
        kinds.experiment_of("selection").setting_of({}, {})
