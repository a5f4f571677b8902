"""States of several parts: shared controls, encoder-decoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.func import jvp, vjp, vmap
from transformers.models.t5.modeling_t5 import T5LayerNorm

from deltacontrol.deltas import (
    Compacter,
    Delta,
    DeltaModel,
    FullFineTuning,
    HeadTuning,
    LadderSideTuning,
    LoRA,
    Subspace,
    attach,
)
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics, control_problem
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import NewtonCG, Shooting, Status, solve
from tests.deltas.architectures import FAMILIES, V, d
from tests.deltas.augmented import REFUSED, Build, end_to_end, model_of, problem_of
from tests.deltas.test_unsupported_states import root_mean_square
from tests.deltas.zoo import (
    METHODS,
    assert_same,
    attached,
    batch_of,
    gradients,
    move,
    one_of_a_kind,
    out,
    relative,
    snapshot,
)


@pytest.mark.parametrize("method", one_of_a_kind(METHODS))
@pytest.mark.parametrize(
    "family",
    ["gpt2", "t5-seq2seq", *(pytest.param(f, marks=pytest.mark.slow) for f in ("bert", "bart"))],
)
@pytest.mark.one_in(2)
def test_costates_give_the_gradient_of_every_method(build: Build, family: str, method: str) -> None:
    model = model_of(build, family)
    if (family, method) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[family, method]):
            attach(model, METHODS[method][0])
        return
    controlled = move(attached(model, METHODS[method][0]))
    problem = problem_of(controlled, batch_of(model))
    dynamics, u = problem.dynamics, problem.dynamics.controls()
    assert dynamics.replay_error <= 100 * torch.finfo(torch.float64).eps
    assert sum(dynamics.control_sizes) == controlled.num_trainable
    assert all(u_t.shape == (m,) for u_t, m in zip(u, dynamics.control_sizes, strict=True))
    assert float(torch.cat(u).norm()) > 0
    assert relative(problem.gradient(u), end_to_end(controlled, problem)) <= 1e-12
    controlled.detach()


BART_STAGES = ("input", "block.0", "block.1", "decoder.input", "block.2", "block.3", "readout")
X, Y = (3, 7, d), (3, 4, d)  # hidden states of an encoder, and of T5's decoder
BIAS, BIAS_Y = (1, 4, 7, 7), (1, 4, 4, 4)  # of relative positions
TOKENS = {"input_ids": (3, 7)}
S = {"shared": (V * d,)}


class TestStages:
    @pytest.mark.parametrize(
        ("family", "delta", "names", "sizes", "parts"),
        [
            ("gpt2", LadderSideTuning(reduction=4), ("input", "block.0", "block.1", "readout"),
             (0, d * 8 + d * 8 + 2 * 8 * 32 + 1, d * 8 + 2 * 8 * 32 + 1 + 8 * d, 0),
             [TOKENS, {"hidden": X}, {"hidden": X, "carried.0": (3, 7, 8)}, {"hidden": X}]),
            ("bert", Subspace(9), ("shared", "input", "block.0", "block.1", "readout"),
             (9, 0, 0, 0, 0), [TOKENS, TOKENS | {"shared": (9,)}]
             + [{"hidden": X, "shared": (9,)}] * 3),
            ("mpnet", FullFineTuning(), ("input", "block.0", "block.1", "readout"), None,
             [TOKENS, {"hidden": X, "position_bias": (3, 4, 7, 7)},
              {"hidden": X, "position_bias": (3, 4, 7, 7)}, {"hidden": X}]),
            ("bart", LoRA(rank=1), BART_STAGES, (0, 4 * d * 1 * 1, 4 * d, 0, 4 * d, 4 * d, 0),
             [TOKENS, {"hidden": X}, {"hidden": X}, {"hidden": X}]
             + [{"hidden": X, "encoder_hidden_states": X}] * 2 + [{"hidden": X}]),
            ("t5-seq2seq", FullFineTuning(), ("shared", *BART_STAGES), None,
             [TOKENS, TOKENS | S, {"hidden": X} | S, {"hidden": X, "position_bias": BIAS} | S,
              {"hidden": X} | S, {"hidden": Y, "encoder_hidden_states": X} | S,
              {"hidden": Y, "encoder_hidden_states": X, "position_bias": BIAS_Y} | S,
              {"hidden": Y} | S]),
        ],
        ids=["ladder", "subspace", "mpnet", "bart", "t5"],
    )  # fmt: skip
    def test_what_goes_from_one_to_the_next(self, build, family, delta, names, sizes, parts):
        controlled = attach(model_of(build, family), delta)
        dynamics = TransformerDynamics(controlled, batch_of(controlled.model))
        assert dynamics.stage_names == names
        assert sizes is None or dynamics.control_sizes == sizes
        x = dynamics.x0
        for t, u in enumerate(dynamics.controls()):
            found = {name: tuple(part.shape) for name, part in dynamics.parts(t, x).items()}
            assert found == parts[t]
            if len(found) > 1:
                assert x.shape == (sum(p.numel() for p in dynamics.parts(t, x).values()),)
            x = dynamics.step(t, x, u)
        assert list(dynamics.parts(dynamics.horizon, x)) == ["logits"]
        controlled.detach()

    @pytest.mark.parametrize("family", ["t5-seq2seq", "bart"])
    @pytest.mark.parametrize("delta", [LoRA(rank=2), Subspace(9)], ids=lambda delta: delta.name)
    def test_the_states_are_the_encoders_and_the_decoders(self, build, family, delta):
        model = copy.deepcopy(model_of(build, family))
        batch, controlled = batch_of(model), move(attach(model, delta))
        problem = problem_of(controlled, batch)
        dynamics = problem.dynamics
        states = problem.rollout(dynamics.controls())
        parts = [dynamics.parts(t, x) for t, x in enumerate(states)]
        output = controlled(**batch, output_hidden_states=True, use_cache=False)
        of_encoder, of_decoder = output.encoder_hidden_states, output.decoder_hidden_states
        behind_norm = family == "t5-seq2seq"  # where the last of them is shown
        cut = dynamics.stage_names.index("decoder.input")
        first = cut - 2
        pairs = list(zip(parts[first : cut + 1], of_encoder, strict=True))
        pairs += list(zip(parts[cut + 1 : -1], of_decoder, strict=True))
        for t, (part, hidden) in enumerate(pairs):
            if not (behind_norm and t in (2, 5)):
                assert relative([part["hidden"]], [hidden]) <= 1e-14
        last = output.encoder_last_hidden_state
        assert relative([parts[cut + 1]["encoder_hidden_states"]], [last]) <= 1e-14
        controlled.detach()

    def test_controls_lie_where_they_act(self, build):
        """The rule of all adapters is shared; what belongs to one adapter is with its block."""
        controlled = attach(build("bert"), Compacter(bottleneck=4), HeadTuning())
        dynamics = TransformerDynamics(controlled, batch_of(controlled.model))
        names = [dynamics.control_names(t) for t in range(dynamics.horizon)]
        assert names[0] == ("compacter.rule.A",) and names[1] == ()
        assert all(f".layer.{t - 2}." in name for t in (2, 3) for name in names[t])
        assert names[4] == ("head.classifier.weight", "head.classifier.bias")
        controlled.detach()

    def test_a_control_that_one_stage_alone_uses_is_not_shared(self, build):
        controlled = attach(build("bert"), Compacter(bottleneck=4, layers=(1,)))
        dynamics = TransformerDynamics(controlled, batch_of(controlled.model))
        assert dynamics.stage_names[0] == "input"
        assert "compacter.rule.A" in dynamics.control_names(2)
        controlled.detach()

    def test_a_tied_weight_is_shared(self, build):
        model = build("gpt2", "causal-lm")
        batch, controlled = batch_of(model), move(attach(model, FullFineTuning()))
        problem = control_problem(controlled, batch | {"labels": batch["input_ids"]})
        dynamics = problem.dynamics
        assert dynamics.stage_names[0] == "shared"
        assert dynamics.control_names(0) == ("full.transformer.wte.weight",)
        found = problem.gradient(dynamics.controls())
        assert relative(found, end_to_end(controlled, problem)) <= 1e-12
        controlled.detach()

    @pytest.mark.parametrize("of", ["lora:rank=2", "ladder:reduction=4", "compacter:bottleneck=4"])
    def test_a_subspace_of_another_delta(self, build, of):
        controlled = move(attach(build("bert"), Subspace(7, of=of)))
        problem = problem_of(controlled, batch_of(controlled.model))
        dynamics = problem.dynamics
        assert dynamics.control_sizes == (7, 0, 0, 0, 0)
        entering = dynamics.parts(3, problem.rollout(dynamics.controls())[3])
        assert ("carried.0" in entering) == of.startswith("ladder")
        found = problem.gradient(dynamics.controls())
        assert relative(found, end_to_end(controlled, problem)) <= 1e-12
        controlled.detach()


class TestSharedControls:
    @pytest.mark.parametrize("family", ["bert", "bart"])
    def test_their_costate_is_the_sum_of_what_the_stages_contribute(self, build, family):
        controlled = move(attach(model_of(build, family), Subspace(9)))
        problem = problem_of(controlled, batch_of(controlled.model))
        dynamics, u = problem.dynamics, problem.dynamics.controls()
        now = problem.evaluate(u)
        total = torch.zeros(9, dtype=torch.float64)
        for t in range(1, dynamics.horizon):
            shared = u[0].clone().requires_grad_()
            last = dynamics.parts(t, now.states[t])
            lead = now.states[t][: -len(last["shared"])]
            behind = dynamics.step(t, torch.cat([lead, shared]), u[t])
            costate = now.costates[t + 1]
            if t < dynamics.horizon - 1:  # not what w itself, which is handed on, would add
                behind, costate = behind[:-9], costate[:-9]
            (part,) = torch.autograd.grad((costate * behind).sum(), shared)
            assert float(part.norm()) > 0
            total += part
        assert relative([total], [now.gradient[0]]) <= 1e-12
        assert torch.equal(now.costates[1][-9:], now.gradient[0])
        assert not now.costates[1][:-9].any()  # tokens
        controlled.detach()

    @pytest.mark.parametrize(
        ("family", "delta"),
        [("bert", Subspace(5)), ("gpt2", LadderSideTuning(8)), ("bart", Compacter(4)),
         ("mpnet", FullFineTuning())],
        ids=lambda value: value if isinstance(value, str) else value.name,
    )  # fmt: skip
    def test_a_step_is_pure_and_differentiable(self, build, family: str, delta: Delta):
        controlled = move(attach(model_of(build, family), delta))
        # Reverse mode leaves the embedding of padding out, by torch's convention; forward mode not.
        dynamics = TransformerDynamics(controlled, batch_of(controlled.model, pad=0))
        before, during = controlled.state(), snapshot(controlled.model)
        u = dynamics.controls()
        x = dynamics.x0
        for t, u_t in enumerate(u):

            def step(x: Tensor, v: Tensor, t: int = t) -> Tensor:
                return dynamics.step(t, x, v)

            value, du = step(x, u_t), torch.randn_like(u_t)
            with torch.no_grad():
                step(x, u_t + 1)
            assert torch.equal(step(x, u_t), value)
            p = torch.randn_like(value)
            at, along = (u_t,), (du,)
            if x.is_floating_point():
                at, along = (x, u_t), (torch.randn_like(x), du)

            def of(*at: Tensor, x: Tensor = x, step: Callable = step) -> Tensor:
                return step(*at) if len(at) == 2 else step(x, *at)

            _, pushed = jvp(of, at, along)
            _, pull = vjp(of, *at)
            found = sum(((a * b).sum() for a, b in zip(pull(p), along, strict=True)), p.sum() * 0)
            torch.testing.assert_close((p * pushed).sum(), found)
            stacked = vmap(lambda v, x=x, step=step: step(x, v))(torch.stack([u_t, u_t + du]))
            torch.testing.assert_close(stacked[1], step(x, u_t + du))
            if x.is_floating_point():
                both = torch.stack([x, x + along[0]])
                torch.testing.assert_close(vmap(step, (0, None))(both, u_t)[0], value)
            x = value
        assert all(torch.equal(before[k], v) for k, v in controlled.state().items())
        assert_same(during, snapshot(controlled.model))
        controlled.detach()

    def test_they_are_written_and_read(self, build):
        model = build("bert")
        batch, controlled = batch_of(model), move(attach(model, Compacter(4), HeadTuning()))
        dynamics = TransformerDynamics(controlled, batch)
        other = tuple(torch.randn_like(control) for control in dynamics.controls())
        dynamics.load_controls(other)
        assert all(torch.equal(a, b) for a, b in zip(dynamics.controls(), other, strict=True))
        logits = out(controlled, batch)
        states = ControlProblem(dynamics, SquaredErrorCost(logits), dynamics.x0).rollout(other)
        assert relative([states[-1]], [logits]) <= 1e-14
        controlled.detach()

    def test_a_failing_stage_leaves_the_model_as_before(self, build):
        model = model_of(build, "bart")
        batch, controlled = batch_of(model), move(attach(model, Subspace(5)))
        dynamics = TransformerDynamics(controlled, batch)
        u, during, logits = dynamics.controls(), snapshot(model), out(controlled, batch)
        tokens = torch.full((21,), V + 9, dtype=torch.float64)
        with pytest.raises(IndexError):
            dynamics.step(1, torch.cat([tokens, u[0]]), u[1])
        for t in range(1, dynamics.horizon):
            with pytest.raises(InputError, match=r"the state has shape \(3,\), expected .*shared"):
                dynamics.step(t, torch.zeros(3, dtype=torch.float64), u[t])
        assert_same(during, snapshot(model))
        assert torch.equal(out(controlled, batch), logits)
        controlled.detach()
        assert not [name for name in vars(model) if "deltacontrol" in name]


class TestLoss:
    @pytest.mark.parametrize(
        ("family", "kind"),
        [("t5-seq2seq", hf.T5ForConditionalGeneration), ("bart", hf.BartForConditionalGeneration)],
        ids=["t5", "bart"],
    )
    def test_of_an_encoder_decoder_is_its_own(self, family, kind):
        torch.manual_seed(3)
        model = kind(FAMILIES[family].config()).double().eval()
        batch = batch_of(model)
        batch.pop("decoder_input_ids", None)
        labels = torch.randint(3, V, (3, 5))
        labels[0, 3:] = -100
        controlled = move(attach(model, LoRA(rank=2)))
        problem = control_problem(controlled, batch | {"labels": labels})
        u = problem.dynamics.controls()
        loss = controlled(**batch, labels=labels).loss
        torch.testing.assert_close(problem.objective(u), loss, rtol=1e-13, atol=0)
        trained = list(controlled.trainable().values())
        assert relative(problem.gradient(u), gradients(loss, trained)) <= 1e-12

    def test_a_decoder_without_tokens(self):
        model = hf.WhisperForConditionalGeneration(FAMILIES["whisper"].config()).eval()
        controlled = attach(model, LoRA(rank=2))
        batch = batch_of(model) | {"labels": torch.ones(3, 4, dtype=torch.long)}
        with pytest.raises(InputError, match="no 'decoder_input_ids'; give them"):
            control_problem(controlled, batch)
        tokens = torch.ones(3, 4, dtype=torch.long)
        names = control_problem(controlled, batch | {"decoder_input_ids": tokens})
        assert names.dynamics.stage_names[3] == "decoder.input"


class TestSolvers:
    @pytest.mark.slow
    def test_newton_with_shared_controls(self, build):
        controlled = move(attach(build("bert"), Compacter(4, 2), HeadTuning()), 0.1)
        batch = batch_of(controlled.model) | {"labels": torch.tensor([0, 1, 1])}
        self.check(controlled, control_problem(controlled, batch, weight_decay=0.02), 1e-3)

    @pytest.mark.slow
    def test_newton_on_t5(self):
        """With norms in float64, which T5 computes in float32 always, and a smooth activation."""
        config = FAMILIES["t5-seq2seq"].config().to_dict() | {"feed_forward_proj": "gated-gelu"}
        torch.manual_seed(1)
        model = hf.T5ForConditionalGeneration(hf.T5Config(**config)).double().eval()
        for module in model.modules():
            if isinstance(module, T5LayerNorm):
                module.forward = MethodType(root_mean_square, module)
        batch = batch_of(model) | {"labels": torch.randint(3, V, (3, 4))}
        controlled = move(attach(model, Subspace(5)), 0.1)
        self.check(controlled, control_problem(controlled, batch, weight_decay=0.1), 1e-2)

    def check(self, controlled: DeltaModel, problem: ControlProblem, near: float) -> None:
        """Newton's method goes from near an optimum to it, in few steps."""
        start = problem.dynamics.controls()
        first = solve(problem, Shooting(), start, max_steps=300, tol=near)
        solution = solve(problem, NewtonCG(), first.controls, max_steps=8, tol=1e-9)
        assert first.status is Status.CONVERGED, first.message
        assert solution.status is Status.CONVERGED, solution.message
        problem.dynamics.load_controls(solution.controls)
        loss = problem.cost.terminal(problem.dynamics.logits())
        for t, control in enumerate(problem.dynamics.live_controls()):
            loss = loss + problem.cost.running(t, problem.dynamics.x0, control)
        found = gradients(loss, controlled.trainable().values())
        assert float(torch.cat([g.reshape(-1) for g in found]).norm()) <= 2e-9
        controlled.detach()
