"""Predictors and the command, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.cli.predict import Predict
from deltacontrol.experiments.heads import linear_head
from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.experiments.predicting.known_tasks import FEATURES, KnownTask, features
from deltacontrol.experiments.predicting.linear_start import linear_start
from deltacontrol.experiments.predicting.outlook import Foresight, standings
from deltacontrol.experiments.predicting.predictors.critical_sharpness import critical_rate
from deltacontrol.experiments.predicting.predictors.halving import Halving
from deltacontrol.experiments.predicting.predictors.linearised import Linearised
from deltacontrol.experiments.predicting.predictors.nearest_task import NearestTask
from deltacontrol.experiments.predicting.predictors.parameter_count import ParameterCount
from deltacontrol.experiments.predicting.registry import available, predictor_of
from deltacontrol.experiments.predicting.situation import Situation
from deltacontrol.experiments.predicting.weight_gradients import useful_rank, weight_gradients
from deltacontrol.experiments.tasks.encoding import without_labels
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError
from tests import tiny_model

ROWS = 12
QUICK = {"halving": "halving:cost=60", "probe": "probe:steps=2"}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> FineTuning:
    places: dict[str, Any] = dict(tiny_model.write(tmp_path_factory.mktemp("places")))
    return FineTuning(**places, max_length=10, steps=8, batch_size=4, evaluate_on="validation")


@pytest.fixture(scope="module")
def situation(training: FineTuning) -> Situation:
    return Situation(training, ROWS)


@pytest.fixture(scope="module")
def candidates(situation: Situation) -> list[Candidate]:
    return [Candidate(situation, text) for text in ("lora:rank=2", "bitfit", "head", "lora ia3")]


def test_rows_of_three_kinds_are_apart(situation: Situation) -> None:
    assert situation.num_rows == ROWS == situation.num_heldout
    for split in ("train", "validation"):
        numbers = [number for n, _ in situation.batches(split, 5) for number in n]
        assert sorted(numbers) == list(range(ROWS))
    heads = sum(len(batch["labels"]) for _, batch in situation.batches("head", 7))
    assert heads == len(situation.setting.split("train")) - ROWS
    assert situation.head_weight is not None
    weights, heldout = situation.draws
    assert (weights.sum(1) == ROWS).all() and (heldout.sum(1) == ROWS).all()


def test_the_drawn_head_is_there_for_a_training_alone(situation: Situation) -> None:
    fitted = linear_head(situation.base).weight.detach().clone()
    with situation.drawn_head() as base:
        assert not torch.equal(linear_head(base).weight, fitted)
    assert torch.equal(linear_head(situation.base).weight, fitted)


@pytest.mark.parametrize("name", sorted(available()))
def test_every_predictor_scores_every_method(name: str, candidates: list[Candidate]) -> None:
    kind = available()[name]
    assert kind.name == name and kind.meaning and kind.reference and kind.__doc__
    predictor = predictor_of(QUICK.get(name, name))
    if isinstance(predictor, NearestTask):
        near = KnownTask("near", "c", features(candidates[0].situation), {"bitfit": 0.5})
        far = KnownTask("far", "d", tuple(9.0 for _ in FEATURES), {"bitfit": 0.7})
        with pytest.raises(InputError, match="none are given"):
            predictor.scores(candidates)
        predictor = NearestTask((far, near))
    scores = predictor.scores(candidates)
    assert len(scores) == len(candidates)
    for score in scores:
        assert math.isfinite(score.value) or score.note
        assert score.cost >= 0 and math.isfinite(score.cost)
        assert all(map(math.isfinite, score.draws))
    assert any(math.isfinite(score.value) for score in scores)


def test_the_linearised_loss_is_that_of_its_path(candidates: list[Candidate]) -> None:
    """At the rate that was chosen, by a descent of its own, step by step."""
    candidate = candidates[0]
    score, start = Linearised().scores([candidate])[0], candidate.start
    f = start.outputs.flatten()
    n = start.num_rows * start.outputs.shape[1]
    for share in candidate.situation.schedule:
        f = f - share * score.details["rate"] * start.adam @ start.slopes(f[None, :n])[0]
    losses = start.losses(f.view_as(start.outputs))
    assert score.value == pytest.approx(float(losses[start.num_rows :].mean()), rel=1e-9)
    assert score.details["training_loss"] == pytest.approx(
        float(losses[: start.num_rows].mean()), rel=1e-9
    )
    assert score.value < score.details["loss_before"]
    assert len(score.draws) == len(start.draws)


def test_the_linearised_training_is_what_short_steps_of_adam_do(
    candidates: list[Candidate],
) -> None:
    """With its metric the first step falls as predicted, to an error of second order."""
    candidate = candidates[1]
    start, situation = candidate.start, candidate.situation
    rate = 1e-4
    n = start.num_rows
    with candidate.attached() as controlled:
        tensors = controlled.trainable()

        def loss() -> torch.Tensor:
            total = torch.zeros(())
            for _, batch in situation.batches("train"):
                logits = controlled(**without_labels(batch)).logits
                total = total + torch.nn.functional.cross_entropy(
                    logits, batch["labels"], reduction="sum"
                )
            return total / n

        before = loss()
        gradients = torch.autograd.grad(before, list(tensors.values()))
        with torch.no_grad():
            for p, g in zip(tensors.values(), gradients, strict=True):
                p -= rate * g.sign()
        fall = float(before.detach() - loss().detach())
    expected = rate * start.slope - 0.5 * rate**2 * start.sign_curvature[0]
    assert fall == pytest.approx(expected, rel=0.02)


def test_a_trial_is_a_short_training(candidates: list[Candidate]) -> None:
    fitted = linear_head(candidates[0].situation.base).weight.detach().clone()
    trial = candidates[0].tried(4)
    assert math.isfinite(trial.loss) and trial.seconds > 0
    assert trial.cost == 3 * 4 * 4 + ROWS
    assert trial.loss == candidates[0].tried(4).loss  # the same seed, the same start
    assert math.isnan(candidates[0].tried(2, evaluated=False).loss)
    assert torch.equal(linear_head(candidates[0].situation.base).weight, fitted)


def test_halving_spends_its_cost_and_gives_places(candidates: list[Candidate]) -> None:
    scores = Halving(cost=240).scores(candidates)
    assert sorted(score.value for score in scores) == [1, 2, 3, 4]
    best = next(score for score in scores if score.value == 1)
    worst = next(score for score in scores if score.value == 4)
    assert best.cost > worst.cost
    looks = ROWS * 2 * len(candidates)
    assert sum(score.cost for score in scores) <= 240 * len(candidates) + looks


def test_the_critical_rate_of_a_quadratic_is_twice_the_best() -> None:
    for best in (1e-4, 0.3, 7.0):
        rate, losses = critical_rate(lambda x, b=best: x * (x - 2 * b), 0.0, 1e-2, 24)
        assert rate == pytest.approx(2 * best, rel=0.01) and len(losses) == 24
    assert critical_rate(lambda x: 1.0, 0.0, 1.0, 5)[0] == 0


def test_weight_gradients_are_those_of_one_backward_pass(situation: Situation) -> None:
    base = situation.base
    batches = (batch for _, batch in situation.batches("train", 5))
    found = {one.key: one for one in weight_gradients(base, batches)}
    batch = situation.setting.split("train").batch(range(ROWS))
    path = "bert.encoder.layer.1.intermediate.dense"
    weight = base.get_submodule(path).get_parameter("weight").requires_grad_()
    loss = torch.nn.functional.cross_entropy(base(**without_labels(batch)).logits, batch["labels"])
    (exact,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(
        found[path].values.float(), torch.linalg.svdvals(exact), rtol=1e-3, atol=1e-6
    )
    assert found[path].energy == pytest.approx(float(exact.square().sum()), rel=1e-3)
    assert found[path].held(2) == pytest.approx(float(found[path].values[:2].square().sum()))
    assert {one.site for one in found.values()} >= {"attention.query", "mlp.down"}
    rank = useful_rank(list(found.values()))
    total = sum(one.energy for one in found.values())
    assert sum(one.held(rank) for one in found.values()) >= 0.9 * total
    assert rank == 1 or sum(one.held(rank - 1) for one in found.values()) < 0.9 * total


def test_places_and_their_spread() -> None:
    scores = [Score(0.3, 1, (0.3, 0.9)), Score.none("why"), Score(0.2, 1, (0.2, 0.2))]
    found = standings(scores)
    assert [one.place for one in found] == [2, 3, 1]
    assert (found[2].low, found[2].high, found[2].first) == (1, 1, 1.0)
    assert found[1].low is None
    assert standings([Score(1, 0), Score(0, 0)])[0].low is None


def test_what_is_beyond_the_budget_is_not_measured(situation: Situation) -> None:
    foresight = Foresight(situation, {"parameters": ParameterCount()}, "parameters", budget=100)
    assert not foresight.measure("lora:rank=4") and foresight.measure("head")
    outlook = foresight.outlook()
    assert [p.candidate.text for p in outlook.prospects] == ["head"]
    assert "beyond the budget" in outlook.left_out["lora:rank=4"]
    nothing = Foresight(situation, {"parameters": ParameterCount()}, "parameters", ends=0.0)
    assert not nothing.measure("lora")
    with pytest.raises(InputError, match="no method could be measured: lora: no time was left"):
        nothing.outlook()


def test_the_best_method_is_measured_at_its_useful_rank(situation: Situation) -> None:
    foresight = Foresight(situation, {"parameters": ParameterCount()}, "parameters")
    assert foresight.measure("lora")
    outlook = foresight.outlook()
    assert outlook.useful is not None
    own = [] if outlook.useful == 8 else [f"lora:rank={outlook.useful}"]
    assert sorted(p.candidate.text for p in outlook.prospects) == ["lora", *own]


def words(training: FineTuning, *more: str) -> list[str]:
    found = ["predict", "--model", training.model, "--task", training.task, "--rows", str(ROWS)]
    return [*found, "--max-length", "10", "--steps", "6", "--batch-size", "4", *more]


def test_the_command_orders_writes_and_recommends(
    training: FineTuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tyro

    files = ["--json", str(tmp_path / "out.json"), "--csv", str(tmp_path / "out.csv")]
    line = words(training, "--deltas", "lora:rank=2", "bitfit", "layer-norm", *files)
    assert cli._main(line) == 0
    out = capsys.readouterr().out
    assert "not calibrated against a study yet" in out and "to be tried first" in out
    recommended = next(x for x in out.splitlines() if x.startswith("  deltacontrol finetune"))
    made: Any = tyro.extras.subcommand_cli_from_dict(
        cli.available(), args=recommended.split()[1:],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )  # fmt: skip
    document = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert document["calibrated"] is False and document["rows"] == ROWS
    first = document["methods"][0]
    assert made.deltas == (first["method"],) and made.steps == 6 and made.max_length == 10
    assert made.learning_rate == pytest.approx(first["rate"], rel=0.06)
    table = pd.read_csv(tmp_path / "out.csv")
    assert table["place"].tolist() == [1, 2, 3] and table["linearised"].is_monotonic_increasing
    assert set(first["scores"]) == set(Predict().predictors)


def test_controls_that_are_left_out_are_said(
    training: FineTuning, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(training, "--deltas", "layer-norm")
    assert cli._main(line) == 0
    assert "drawn at random" not in capsys.readouterr().out
    monkeypatch.setitem(linear_start.__kwdefaults__, "capacity", 50 * ROWS)
    assert cli._main(line) == 0
    told = re.search(r"layer-norm +from (\d+) of (\d+) controls", capsys.readouterr().out)
    assert told is not None and 0 < int(told[1]) < int(told[2])


def test_what_was_foretold_is_trained(
    training: FineTuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--deltas", "lora:rank=2", "bitfit", "layer-norm", "--verify", "--top", "1"]
    more += ["--runs", str(tmp_path / "runs"), "--executor", "in-process"]
    more += ["--json", str(tmp_path / "out.json")]
    assert cli._main(words(training, *more)) == 0
    out = capsys.readouterr().out
    assert "rank correlation" in out and "of 2 trainings" in out
    verified = json.loads((tmp_path / "out.json").read_text("utf-8"))["verified"]
    assert len(verified) == 2 and all(row["loss"] > 0 for row in verified)
    assert len([p for p in (tmp_path / "runs").iterdir() if p.name[0] != "."]) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deltas": ("lora", "lora")}, "expected different ones"),
        ({"deltas": ()}, "the deltas are none"),
        ({"deltas": ("lorra",)}, "unknown delta 'lorra'; nearest: lora"),
        ({"deltas": (" ",)}, "names no delta"),
        ({"budget": 0}, "budget is 0"),
        ({"minutes": 0.0}, "minutes is 0"),
        ({"minutes": math.nan}, "minutes is nan"),
        ({"top": 0}, "top is 0"),
        ({"rows": 3}, "rows is 3; expected 10 or more"),
        ({"by": "probe"}, "unknown predictor to order by 'probe'"),
        ({"predictors": ("curvatur",)}, "unknown predictor 'curvatur'; nearest: curvature"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_what_cannot_be_foretold_is_refused(
    training: FineTuning, options: dict, message: str
) -> None:
    places: dict[str, Any] = {"model": training.model, "task": training.task, "max_length": 10}
    with pytest.raises(InputError, match=message):
        Predict(**places, **options).run()


def test_a_task_without_classes_is_refused(training: FineTuning, tmp_path: Path) -> None:
    file = tmp_path / "numbers.csv"
    rows = [{"text": f"good film {i}", "label": i / 7} for i in range(60)]
    pd.DataFrame(rows).to_csv(file, index=False)
    with pytest.raises(InputError, match="regression task; expected a classification"):
        Predict(model=training.model, task=str(file), max_length=10).run()
    few = tmp_path / "few.csv"
    pd.DataFrame([{"text": f"film {i}", "label": "ab"[i % 2]} for i in range(14)]).to_csv(
        few, index=False
    )
    with pytest.raises(InputError, match="a prediction needs"):
        Predict(model=training.model, task=str(few), max_length=10).run()


def test_only_adamw_is_foretold(training: FineTuning) -> None:
    with pytest.raises(InputError, match="predictions are of adamw"):
        Situation(replace(training, optimiser="lbfgs", learning_rate=None, batch_size=16))


def test_a_predictor_is_a_text_or_itself() -> None:
    assert predictor_of("halving:cost=100") == Halving(100.0)
    assert predictor_of(Halving(3.0)).cost == 3.0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="steps is 0"):
        predictor_of("probe:steps=0")


def test_a_users_predictor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Predictor):
        """Nothing."""

        name, meaning, reference = "mine", "nothing", "nobody"

        def scores(self, candidates):
            return [Score(0.0, 0.0) for _ in candidates]

    def members(kind: type):
        return iter([Mine] if kind is Predictor else [])

    monkeypatch.setattr("deltacontrol.theory.plugins.members", members)
    assert available()["mine"] is Mine
