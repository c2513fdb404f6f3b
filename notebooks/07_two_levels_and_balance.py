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
# # Two levels, and strictly balanced gating
#
# Two appendices of the paper. Appendix B: with thousands of experts a router of
# one level is itself large, so experts come in groups, and a token first
# chooses groups, then experts within these. Appendix F: instead of a loss that
# asks for balance, every expert takes exactly its share of a batch.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import moejax
from moejax import routing

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## Two levels (app. B)
#
# Four groups of four experts, and two of each for a token: it visits four of 16
# experts. The tokens are of eight kinds, sorted by kind.

# %%
GROUPS, WITHIN, K = 4, 4, 2
layer = moejax.HierarchicalMoE(
  primary=moejax.TopK(GROUPS, K),
  secondary=moejax.MoE(
    moejax.TopK(WITHIN, K),
    moejax.Identity(WITHIN),
    capacity_factor=None,
    eval_capacity_factor=None,
  ),
  capacity_factor=None,
  eval_capacity_factor=None,
)
kinds, spread = jax.random.normal(jax.random.key(0), (2, 8, 16))
kind = jnp.repeat(jnp.arange(8), 16)
noise = jax.random.normal(jax.random.key(1), (128, 16))
x = (2 * kinds[kind] + 0.5 * noise)[None]
params = nn.unbox(jax.jit(layer.init)(jax.random.key(2), x))["params"]
print(jax.tree.map(jnp.shape, params))

# %%
y, sown = layer.apply({"params": params}, x, mutable=["routing"])
(decided,) = moejax.routings(sown)
print("levels:", decided.primary.logits.shape, "and within groups")
print(
  "experts are identities, and y is x:", bool(jnp.allclose(y, x, atol=1e-5))
)

# %% [markdown]
# A gate is a product: that of the group times that within the group (eq. 12).
# Below, a row for each token and a column for each expert; the lines are
# between groups. *Left*: the gates of the groups, each over its four experts.
# *Right*: the gates of experts, which are zero outside the groups that were
# chosen. Tokens of one kind, sixteen rows, go about the same way.


# %%
def table(assignment, tokens, experts):
  token, expert, gate = (
    assignment.tokens(tokens)[0],
    *(each[0] for each in assignment[:2]),
  )
  return jnp.zeros((tokens, experts)).at[token, expert].add(gate, mode="drop")


groups = table(decided.primary.assignment, 128, GROUPS)
experts = table(routing.edges(decided), 128, GROUPS * WITHIN)
figure, axes = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True)
for axis, gates, title in (
  (axes[0], groups.repeat(WITHIN, axis=1), "gates of groups"),
  (axes[1], experts, "gates of experts"),
):
  image = axis.imshow(
    gates, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
  )
  for edge in range(1, GROUPS):
    axis.axvline(edge * WITHIN - 0.5, color="black", linewidth=0.7)
  for edge in range(1, 8):
    axis.axhline(edge * 16 - 0.5, color="0.8", linewidth=0.5)
  axis.set(title=title, xlabel="expert", xticks=range(0, 16, 4))
axes[0].set(ylabel="token, sorted by kind")
figure.colorbar(image, ax=axes, label="gate")
plt.show()

sums = experts.reshape(128, GROUPS, WITHIN).sum(axis=2)
print(
  "gates within a group sum to that of the group:",
  bool(jnp.allclose(sums, groups, atol=1e-5)),
)

# %% [markdown]
# Balance is asked of all 16 experts at once (eq. 13 and 14). Two hundred steps
# on the two balance losses alone:

# %%
noisy = layer.clone(
  primary=moejax.NoisyTopK(GROUPS, K),
  secondary=layer.secondary.clone(router=moejax.NoisyTopK(WITHIN, K)),
)
WEIGHTS = {"importance": 0.1, "load": 0.1}
optimizer = optax.adam(0.02)


def loss_fn(params, key):
  _, sown = noisy.apply(
    {"params": params}, x, True, rngs={"router": key}, mutable=["routing"]
  )
  (decided,) = moejax.routings(sown)
  return moejax.auxiliary_loss(sown, WEIGHTS)[0], (
    decided.count[0],
    moejax.balance_metrics(sown),
  )


@jax.jit
def train(params):
  def step(state, key):
    params, moments = state
    grads, report = jax.grad(loss_fn, has_aux=True)(params, key)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), report

  keys = jax.random.split(jax.random.key(4), 200)
  return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]


keys = {"params": jax.random.key(2), "router": jax.random.key(3)}
begin = nn.unbox(jax.jit(noisy.init)(keys, x))["params"]
drawn = jax.random.key(5)
begin = jax.tree.map(lambda w: w + jax.random.normal(drawn, w.shape), begin)
counts, reports = train(begin)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for axis, at, title in (
  (left, slice(0, 10), "first"),
  (right, slice(-10, None), "last"),
):
  share = counts[at].mean(axis=0).reshape(GROUPS, WITHIN)
  image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
  for (group, expert), number in np.ndenumerate(share):
    axis.text(expert, group, f"{number:.0f}", ha="center", va="center")
  axis.set(title=f"tokens of each expert, {title} ten steps")
  axis.set(
    xlabel="expert of the group",
    ylabel="group",
    xticks=range(4),
    yticks=range(4),
  )
plt.show()
print(f"CV(load): {reports['cv_load'][0]:.2f} -> {reports['cv_load'][-1]:.2f}")

# %% [markdown]
# ## Strictly balanced gating (app. F)
#
# Here experts choose: of n tokens each of E experts takes the m = k n / E with
# the largest softmax for it (eq. 18). No loss is needed, and no expert can be
# idle. The price: a token is taken k times on average, but perhaps never.

# %%
E = 8
router = {
  "top k": moejax.TopK(E, K),
  "balanced": moejax.Balanced(E, K),
}
keys = {"params": jax.random.key(6)}
gates = nn.unbox(router["balanced"].init(keys, x, train=True))["params"]
found = {
  "top k": router["top k"].apply(
    {"params": {"gate": gates["gate"]}}, x, train=True
  ),
  "balanced": router["balanced"].apply({"params": gates}, x, train=True),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for i, (name, decided) in enumerate(found.items()):
  left.bar(
    np.arange(E) + 0.4 * i - 0.2, decided.count[0], width=0.38, label=name
  )
  token, expert = (
    decided.assignment.tokens(128)[0],
    decided.assignment.expert[0],
  )
  visits = np.bincount(token[expert < E], minlength=128)
  right.bar(
    np.arange(E) + 0.4 * i - 0.2, np.bincount(visits, minlength=E), width=0.38
  )
left.set(xlabel="expert", ylabel="tokens, of 128", xticks=range(E))
right.set(xlabel="experts of a token", ylabel="tokens, of 128", xticks=range(E))
left.legend()
plt.show()
print(
  "m = k n / E =",
  K * 128 // E,
  "and the balanced counts are",
  found["balanced"].count[0],
)

# %% [markdown]
# *Left*: one router, and two ways to choose by it; balanced, all bars are m =
# 32. *Right*: by top k every token visits two experts; balanced, some visit one
# and some four.
#
# ## Thresholds, for inference
#
# Who takes a token depends on all others in the batch, also on those after it.
# At inference nobody may look ahead, so an expert takes every token whose
# softmax is above its threshold T (eq. 19). The thresholds start at 1 / E and
# learn, by the loss "threshold" (eq. 20), to do what the batch did.

# %%
balanced = router["balanced"]


def threshold_loss(params):
  decided = balanced.apply({"params": params}, x, train=True)
  return moejax.losses.threshold(decided)


@jax.jit
def learn(params):
  def step(params, _):
    grads = jax.grad(threshold_loss)(params)
    params = jax.tree.map(lambda w, g: w - 0.03 * g, params, grads)
    return params, balanced.apply({"params": params}, x, train=False).count[0]

  return jax.lax.scan(step, params, length=60)


learned, counts = learn(gates)
figure, axis = plt.subplots(figsize=(7, 3.2))
axis.plot(counts)
axis.axhline(K * 128 / E, color="black", linestyle="--", label="m")
axis.set(xlabel="step", ylabel="tokens above the threshold, by expert", ylim=0)
axis.legend()
plt.show()
print("at first:", counts[0], " at last:", counts[-1])
print(
  "nothing else has learned:",
  bool((learned["gate"]["kernel"] == gates["gate"]["kernel"]).all()),
)

# %% [markdown]
# Every line, an expert's tokens at inference, ends at m. A token is now routed
# by itself: change the others, and its gates stay what they were.

# %%
other = x.at[:, 64:].set(-x[:, 64:])
for name, train in (("training", True), ("inference", False)):
  before, after = (
    table(
      balanced.apply({"params": learned}, each, train=train).assignment, 128, E
    )
    for each in (x, other)
  )
  same = bool(jnp.allclose(before[:64], after[:64], atol=1e-6))
  print(
    f"in {name} the first 64 tokens have",
    "the same gates" if same else "other gates",
  )
