"""A controlled Transformer as a layered system: states, costates, refusals."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from transformers import (
    BloomConfig,
    BloomForQuestionAnswering,
    PreTrainedModel,
)

from deltacontrol.deltas import (
    BitFit,
    DeltaModel,
    FullFineTuning,
    HeadTuning,
    LoRA,
    PromptTuning,
    attach,
)
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics, control_problem
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.errors import InputError
from tests.deltas.more_architectures import MORE
from tests.deltas.zoo import (
    DEEP,
    FAMILIES,
    METHODS,
    L,
    V,
    assert_same,
    attached,
    batch_of,
    cells,
    gradients,
    move,
    out,
    relative,
    snapshot,
)

Build = Callable[..., PreTrainedModel]
# Encoder-decoders, and every method on them, are in test_augmented_states.py.
TWO_STACKS = ("bart", "t5-seq2seq", "pegasus", "mt5")
# The stages of ALBERT would be one block's: see test_unsupported_states.py.
LAYERED = [(f, name) for f, name in DEEP if f not in (*TWO_STACKS, "albert")]
SHARED = ("compacter", "fisher-mask", "random-mask", "said", "subspace", "vblora")
# Hidden states are shown behind the last norm.
PRE_NORM = (
    "gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma3", "t5", "modernbert", "whisper",
    *(f for f in MORE if f not in ("camembert", "albert")),
)  # fmt: skip
LABELS = torch.tensor([0, 1, 1])


def problem_of(controlled: DeltaModel, batch: dict[str, Tensor], family: str) -> ControlProblem:
    if FAMILIES[family].head:
        return control_problem(controlled, batch | {"labels": LABELS})
    dynamics = TransformerDynamics(controlled, batch)
    target = torch.randn(out(controlled, batch).shape, dtype=torch.float64)
    return ControlProblem(dynamics, SquaredErrorCost(target), dynamics.x0)


class TestStages:
    @pytest.mark.parametrize(("family", "method"), cells(LAYERED, ("gpt2",)))
    @pytest.mark.one_in(4)
    def test_states_are_the_models_and_costates_give_the_gradient(self, build, family, method):
        model = copy.deepcopy(build(family))  # hidden states leave hooks of transformers behind
        batch = batch_of(model)
        controlled = move(attached(model, METHODS[method][0]))
        problem = problem_of(controlled, batch, family)
        dynamics, u = problem.dynamics, problem.dynamics.controls()
        # Torch may lay out a product of three factors in another way where it needs a gradient;
        # parts of a state are copies, which may be laid out in another way too.
        rounding = 1e-14 if method == "lokr" or method in SHARED else 0.0
        assert dynamics.replay_error <= rounding
        assert dynamics.stage_names[: -L - 1] == (
            ("shared", "input") if method in SHARED else ("input",)
        )
        assert sum(dynamics.control_sizes) == controlled.num_trainable

        states = problem.rollout(u)
        # A cache lays keys out differently, which changes the rounding.
        plain = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
        output = controlled(**batch, **plain, output_hidden_states=True)
        assert relative([states[-1]], [out(controlled, batch, **plain)]) <= rounding
        # Decoders and T5 show their last state behind the final norm; a prompt leaves before it.
        pre_norm = family in PRE_NORM or method in ("intrinsic-prompt", "p-tuning", "prompt")
        parts = [dynamics.parts(t, state) for t, state in enumerate(states)]
        shown = [found["hidden"] for found in parts if "hidden" in found]
        if family == "mamba2":  # it does not show what goes into the first block
            shown = shown[1:]
        for state, hidden in zip(shown[: -1 if pre_norm else None], output.hidden_states):  # noqa: B905
            assert relative([state], [hidden]) <= rounding

        evaluation = problem.evaluate(u)
        loss = problem.cost.terminal(dynamics.logits())
        expected = gradients(loss, controlled.trainable().values())
        names = list(controlled.trainable())
        order = [name for t in range(dynamics.horizon) for name in dynamics.control_names(t)]
        assert sorted(order) == sorted(names)
        expected = [expected[names.index(name)] for name in order]
        assert relative(evaluation.gradient, expected) <= 1e-12
        assert float(abs(evaluation.objective - loss.detach())) <= rounding

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
    def test_sdpa_gives_the_same(self, build: Build, family):
        model = build(family, attention="sdpa")
        controlled = move(attach(model, LoRA(rank=2), HeadTuning()))
        problem = problem_of(controlled, batch_of(model), family)
        u = problem.dynamics.controls()
        loss = problem.cost.terminal(problem.dynamics.logits())
        trained = controlled.trainable()
        found = dict(zip(trained, gradients(loss, trained.values()), strict=True))
        dynamics = problem.dynamics
        order = [name for t in range(dynamics.horizon) for name in dynamics.control_names(t)]
        assert relative(problem.gradient(u), [found[name] for name in order]) <= 1e-12
        controlled.detach()

    def test_controls_lie_where_they_act(self, build):
        model = build("bert")
        controlled = attach(model, BitFit(sites=("LayerNorm",)), LoRA(2, sites=("query",)),
                            PromptTuning(2), HeadTuning())  # fmt: skip
        dynamics = TransformerDynamics(controlled, batch_of(model))
        assert dynamics.stage_names == ("input", "block.0", "block.1", "readout")
        names = [dynamics.control_names(t) for t in range(dynamics.horizon)]
        assert set(names[0]) == {
            "bitfit.bert.embeddings.LayerNorm.bias",
            "prompt.bert.embeddings.word_embeddings.rows",
        }
        for t in (1, 2):
            assert len(names[t]) == 4 and all(f".layer.{t - 1}." in name for name in names[t])
        assert names[3] == ("head.classifier.weight", "head.classifier.bias")
        controlled.detach()

    def test_a_step_is_pure_and_differentiable_in_both_arguments(self, build):
        model = build("bert")
        controlled = move(attach(model, LoRA(rank=2), PromptTuning(2), HeadTuning()))
        before = controlled.state()
        dynamics = TransformerDynamics(controlled, batch_of(model))
        u = dynamics.controls()
        states = [dynamics.x0]
        for t, u_t in enumerate(u):
            x = states[-1]
            states.append(dynamics.step(t, x, u_t))
            with torch.no_grad():
                dynamics.step(t, x, u_t + 1)
            assert torch.equal(dynamics.step(t, x, u_t), states[-1])
            du = torch.randn_like(u_t)
            value, pushed = jvp(lambda v, t=t, x=x: dynamics.step(t, x, v), (u_t,), (du,))
            _, pull = vjp(lambda v, t=t, x=x: dynamics.step(t, x, v), u_t)
            p = torch.randn_like(value)
            torch.testing.assert_close((p * pushed).sum(), (pull(p)[0] * du).sum())
            stacked = vmap(lambda v, t=t, x=x: dynamics.step(t, x, v))(torch.stack([u_t, u_t + du]))
            torch.testing.assert_close(stacked[1], dynamics.step(t, x, u_t + du))
            if x.is_floating_point():
                dx = torch.randn_like(x)
                _, pushed = jvp(lambda y, t=t, v=u_t: dynamics.step(t, y, v), (x,), (dx,))
                _, pull = vjp(lambda y, t=t, v=u_t: dynamics.step(t, y, v), x)
                torch.testing.assert_close((p * pushed).sum(), (pull(p)[0] * dx).sum())
        assert all(torch.equal(before[k], v) for k, v in controlled.state().items())
        controlled.detach()

    def test_controls_are_written_and_read(self, build):
        model = build("gpt2")
        batch = batch_of(model)
        controlled = move(attach(model, LoRA(rank=2), HeadTuning()))
        dynamics = TransformerDynamics(controlled, batch)
        first, logits = dynamics.controls(), out(controlled, batch)
        other = tuple(torch.randn_like(control) for control in first)
        dynamics.load_controls(other)
        assert all(torch.equal(a, b) for a, b in zip(dynamics.controls(), other, strict=True))
        states = ControlProblem(dynamics, SquaredErrorCost(logits), dynamics.x0).rollout(other)
        assert torch.equal(states[-1], out(controlled, batch, use_cache=False))
        dynamics.load_controls(first)
        assert torch.equal(out(controlled, batch), logits)
        for wrong in (first[:-1], (*first[:-1], torch.zeros(1)), tuple(c[None] for c in first)):
            with pytest.raises(InputError, match="one flat control a stage of sizes"):
                dynamics.load_controls(wrong)
        assert torch.equal(out(controlled, batch), logits)
        controlled.detach()

    def test_it_is_put_into_evaluation_mode(self, build):
        model = build("bert")
        controlled = move(attach(model, LoRA(rank=2, dropout=0.5))).train()
        problem = problem_of(controlled, batch_of(model), "bert")
        u = problem.dynamics.controls()
        assert torch.equal(problem.objective(u), problem.objective(u))
        assert not controlled.training
        controlled.detach()


class TestLoss:
    @pytest.mark.parametrize("use_cache", [None, True, False])
    @pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
    def test_of_a_causal_model_is_its_own(self, build, family, use_cache):
        model = build(family, "causal-lm")
        batch = batch_of(model)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        controlled = move(attach(model, LoRA(rank=2)))
        extra = {} if use_cache is None else {"use_cache": use_cache}
        model.config.use_cache = use_cache is not True  # the batch has the last word
        problem = control_problem(controlled, batch | extra | {"labels": labels})
        loss = controlled(**batch, labels=labels).loss
        # Their loss upcasts the logits to float32.
        torch.testing.assert_close(
            problem.objective(problem.dynamics.controls()), loss.double(), rtol=1e-6, atol=1e-6
        )
        controlled(**batch, use_cache=True)
        again = problem.objective(problem.dynamics.controls())
        assert torch.equal(again, problem.objective(problem.dynamics.controls()))
        model.config.use_cache = True
        controlled.detach()

    @pytest.mark.parametrize("family", ["bert", "electra", "distilbert"])
    def test_of_a_masked_model_is_not_shifted(self, build, family):
        model = build(family, "masked-lm")
        batch = batch_of(model)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        controlled = move(attach(model, LoRA(rank=2)))
        problem = control_problem(controlled, batch | {"labels": labels})
        loss = controlled(**batch, labels=labels).loss
        torch.testing.assert_close(problem.objective(problem.dynamics.controls()), loss)
        controlled.detach()

    def test_of_classes_and_of_numbers(self, build):
        model = build("roberta")
        batch = batch_of(model)
        controlled = move(attach(model, LoRA(rank=2)))
        problem = control_problem(controlled, batch | {"labels": LABELS}, weight_decay=0.1)
        u = problem.dynamics.controls()
        decay = 0.05 * sum(c.square().sum() for c in u)
        loss = controlled(**batch, labels=LABELS).loss
        torch.testing.assert_close(problem.objective(u), loss + decay)
        controlled.detach()
        model = build("roberta", num_labels=1)
        controlled = move(attach(model, LoRA(rank=2)))
        targets = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        problem = control_problem(controlled, batch | {"labels": targets})
        loss = controlled(**batch, labels=targets).loss
        torch.testing.assert_close(problem.objective(problem.dynamics.controls()), loss / 2)
        controlled.detach()

    @pytest.mark.parametrize(("family", "kind"), [("roberta", "multi_label_classification"),
                                                  ("bert", None), ("vit", None)])  # fmt: skip
    def test_of_several_labels_an_example_is_its_own(self, build, family, kind):
        model = build(family, num_labels=3, problem_type=kind)
        batch = batch_of(model)
        labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0.25, 1, 0]], dtype=torch.float64)
        controlled = move(attach(model, LoRA(rank=2)))
        problem = control_problem(controlled, batch | {"labels": labels}, weight_decay=0.1)
        u = problem.dynamics.controls()
        decay = 0.05 * sum(c.square().sum() for c in u)
        loss = controlled(**batch, labels=labels).loss
        torch.testing.assert_close(problem.objective(u), loss + decay)
        for wrong, found in ((labels.long(), "int64"), (2 * labels, "float64 from 0 to 2")):
            with pytest.raises(InputError, match=f"labels are {found}; expected real numbers fr"):
                control_problem(controlled, batch | {"labels": wrong})
        controlled.detach()


class TestRefusals:
    def test_a_recorded_cache(self):
        """Bloom's question answering keeps its cache whatever the batch says."""
        config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=V)
        model = BloomForQuestionAnswering(config).eval()
        batch = batch_of(model, pad=0)
        controlled = attach(model, HeadTuning())
        with pytest.raises(InputError, match="receives a cache.*use_cache = False"):
            TransformerDynamics(controlled, batch)
        model.config.use_cache = False
        TransformerDynamics(controlled, batch)

    def test_an_untied_language_model_is_layered(self, build):
        model = build("gpt2", "causal-lm", tie_word_embeddings=False)
        controlled = attach(model, FullFineTuning())
        assert TransformerDynamics(controlled, batch_of(model)).replay_error == 0.0
        controlled.detach()

    def test_batches(self, build):
        model = build("bert")
        batch = batch_of(model)
        controlled = attach(model, LoRA(rank=2))
        with pytest.raises(InputError, match="no 'labels'; it has input_ids, attention_mask"):
            control_problem(controlled, batch)
        with pytest.raises(InputError, match="no 'input_ids'; it has attention_mask"):
            TransformerDynamics(controlled, {"attention_mask": batch["attention_mask"]})
        controlled.detach()
        with pytest.raises(InputError, match="were detached"):
            TransformerDynamics(controlled, batch)

    def test_controls_of_single_examples(self, build):
        controlled = attach(build("bert"), LoRA(rank=2))
        problem = problem_of(controlled, batch_of(controlled.model), "bert")
        u = problem.dynamics.controls()
        rows = tuple(c.expand(3, -1) for c in u)
        with pytest.raises(InputError, match="one control for the whole batch"):
            problem.objective(rows)
        with pytest.raises(InputError, match=r"block\.0: the control has shape \(3,\)"):
            problem.dynamics.step(1, torch.zeros(3, 7, 32, dtype=torch.float64), torch.zeros(3))
        controlled.detach()

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_after_a_failing_stage_the_model_is_as_before(self, build, family):
        model = build(family)
        batch = batch_of(model)
        controlled = move(attach(model, LoRA(rank=2), PromptTuning(2)))
        problem = problem_of(controlled, batch, family)
        dynamics, u = problem.dynamics, problem.dynamics.controls()
        logits, during, objective = out(controlled, batch), snapshot(model), problem.objective(u)
        bad = [torch.full((3, 7), V + 9), *[torch.zeros(3, 9, 5, dtype=torch.float64)] * 3]
        for t, x in enumerate(bad):
            with pytest.raises((IndexError, RuntimeError)):
                dynamics.step(t, x, u[t])
        with pytest.raises(InputError, match="the model cannot run on this batch .index out of"):
            TransformerDynamics(controlled, batch | {"input_ids": bad[0]})
        with pytest.raises(InputError, match=r"input_ids \(\), attention_mask \(3, 7\)"):
            TransformerDynamics(controlled, batch | {"input_ids": torch.tensor(1)})
        assert_same(during, snapshot(model))
        assert torch.equal(out(controlled, batch), logits)
        assert torch.equal(problem.objective(u), objective)
        controlled.detach()
