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
# # The layer by hand
#
# The sparsely-gated mixture of experts of Shazeer et al. (2017), piece by
# piece, on arrays small enough to check by eye: six tokens, four experts, two
# experts per token. Equation numbers are the paper's.
#
# A **router** turns tokens into one value, the `Routing`. **Dispatch** and the
# **losses** only read it:
#
# | section | piece | paper |
# |---|---|---|
# | 1 | gates | eq. 2, 3, 5 |
# | 2 | noise, and the load it makes smooth | eq. 4, 8-10 |
# | 3 | capacity: who gets a slot | - |
# | 4 | dispatch and combine | eq. 1 |
# | 5 | the whole layer, and the balance losses | eq. 6, 7, 11 |

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from moejax import dispatch, experts, gating, losses, moe, router, slots

np.set_printoptions(precision=3, suppress=True)
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})

# %% [markdown]
# ## 1. Gates
#
# Gating needs only the logits, $[G, S, E]$: $G$ groups of $S$ tokens, scored
# for $E$ experts. Here one group, and every logit is the logarithm of a small
# whole number, so that softmax becomes plain fractions. Token 0 has the odds 4
# : 2 : 1 : 1. Most tokens like expert 0.

# %%
odds = jnp.array(
  [
    [4.0, 2, 1, 1],
    [6, 1, 2, 1],
    [1, 4, 1, 2],
    [5, 1, 1, 3],
    [2, 1, 6, 1],
    [6, 2, 1, 1],
  ]
)
logits = jnp.log(odds)[None]
G, S, E = logits.shape
K = 2
G, S, E

# %% [markdown]
# `softmax` (eq. 2) gives every expert a share. `top_k` (eq. 3 and 5) keeps the
# two largest logits and takes the softmax over these alone, so token 0 splits 4
# : 2 between experts 0 and 1: gates 2/3 and 1/3.
#
# The gates come as an `Assignment`, a list of edges from tokens to experts.
# This puts them into a table.

# %%
chosen = {
  "softmax (eq. 2)": gating.softmax(logits),
  "top 2 (eq. 3, 5)": gating.top_k(logits, K),
}
tables = {}
for name, routing in chosen.items():
  edges = routing.assignment
  where = (edges.tokens(S)[0], edges.expert[0])
  tables[name] = jnp.zeros((S, E)).at[where].add(edges.gate[0])

dense, sparse = tables.values()
print("token 0, softmax:", dense[0])
print("token 0, top 2:  ", sparse[0])
print("softmax is odds / their sum:", jnp.allclose(dense[0], odds[0] / 8))
print("top 2 is 4/6 and 2/6:", jnp.allclose(sparse[0, :2], odds[0, :2] / 6))
print("every row sums to one:", jnp.allclose(sparse.sum(axis=1), 1))

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
for axis, (name, table) in zip(axes, tables.items(), strict=True):
  image = axis.imshow(table, cmap="Blues", vmin=0, vmax=1)
  for (token, expert), gate in np.ndenumerate(table):
    color = "white" if gate > 0.6 else "black"
    axis.text(
      expert, token, f"{gate:.3g}", ha="center", va="center", color=color
    )
  axis.set(title=name, xlabel="expert", xticks=range(E))
axes[0].set(ylabel="token", yticks=range(S))
figure.colorbar(image, ax=axes, label="gate")
plt.show()

# %% [markdown]
# The **importance** of an expert is the sum of its gates over the tokens (eq.
# 6), a column sum of the right-hand table. Its **count** is how many tokens
# chose it. Expert 0 is far ahead in both.

# %%
routing = chosen["top 2 (eq. 3, 5)"]
print("importance:", routing.importance[0])
print("count:     ", routing.count[0])
print("column sums:", jnp.allclose(routing.importance[0], sparse.sum(axis=0)))

# %% [markdown]
# ## 2. Noise, and the smooth load
#
# A router starts from zero weights, so all logits are equal. Without noise the
# tie goes to the lowest experts, for every token. With noise (eq. 4) chance
# alone chooses, and each expert gets its even share $K S / E$: 3 of these 6
# tokens, within luck, and 3000 of 6000 quite closely.
#
# At the start the noise has the standard deviation $\mathrm{Softplus}(0)$,
# about 0.69.

# %%
std = jax.nn.softplus(0.0)
for tokens in (6, 6000):
  zeros = jnp.zeros((1, tokens, E))
  tied = gating.top_k(zeros, K)
  noisy = gating.noisy_top_k(
    zeros, jnp.full_like(zeros, std), K, jax.random.key(0)
  )
  print(f"{tokens} tokens, without noise:", tied.count[0])
  print(f"{tokens} tokens, with noise:   ", noisy.count[0])

# %% [markdown]
# A count jumps; it has no gradient. Its smooth stand-in is the **load** (eq.
# 8-10): the chance that the token would choose the expert again if the noise of
# that one expert were drawn anew, and all other noise stayed as it is. Summed
# over the tokens, that is one number per expert.
#
# Take one draw of the noise and test this literally: draw one expert's noise
# ten thousand times, choose the top two each time, and count.

# %%
noise_std = jnp.full_like(logits, std)
one = gating.noisy_top_k(logits, noise_std, K, jax.random.key(1))
noise = std * jax.random.normal(jax.random.key(2), (10_000, S))

print("expert  load (eq. 10)  counted")
for expert in range(E):
  redrawn = jnp.repeat(one.logits, len(noise), axis=0)
  redrawn = redrawn.at[:, :, expert].set(logits[:, :, expert] + noise)
  counted = gating.top_k(redrawn, K).count[:, expert].mean()
  print(f"{expert:6}  {one.load[0, expert]:13.3f}  {counted:7.3f}")

# %% [markdown]
# Now draw all the noise anew each time. On average load and count agree, so the
# load is an unbiased stand-in; and since only part of the chance is left in it,
# it strays less from one draw to the next.

# %%
keys = jax.random.split(jax.random.key(3), 10_000)
draws = jax.vmap(lambda key: gating.noisy_top_k(logits, noise_std, K, key))(
  keys
)
print("mean count:", draws.count.mean(axis=0)[0])
print("mean load: ", draws.load.mean(axis=0)[0])

figure, axis = plt.subplots(figsize=(6.5, 3.5))
bars = {"count": (draws.count, -0.2), "load (eq. 10)": (draws.load, 0.2)}
for name, (value, shift) in bars.items():
  axis.bar(
    np.arange(E) + shift,
    value.mean(axis=0)[0],
    yerr=value.std(axis=0)[0],
    width=0.38,
    capsize=4,
    label=name,
  )
axis.set(
  xlabel="expert",
  ylabel=f"tokens, of {S}",
  xticks=range(E),
  title="Mean of 10,000 draws; whiskers: standard deviation of one",
)
axis.legend()
plt.show()


# %% [markdown]
# And the load has a gradient where the count has none. To raise the load of
# expert 0, raise its own logits (first column) and lower those of its rivals.


# %%
def of_expert_0(logits, what):
  routing = gating.noisy_top_k(logits, noise_std, K, jax.random.key(1))
  return getattr(routing, what)[0, 0]


print("gradient of the count is zero:")
print(not jax.grad(of_expert_0)(logits, "count").any())
print("gradient of the load, token x expert:")
print(jax.grad(of_expert_0)(logits, "load")[0])

# %% [markdown]
# ## 3. Capacity: who gets a slot
#
# Back to the gates without noise. An `Assignment` lists its edges best first:
# all first choices, in the order of the tokens, before all second choices.

# %%
edges = routing.assignment
print("token: ", edges.tokens(S)[0])
print("expert:", edges.expert[0])
print("gate:  ", edges.gate[0])
print("first choices first:", (edges.gate[0, :S] > 0.5).all())

# %% [markdown]
# Arrays have fixed shapes, so each expert gets a fixed number of **slots**, its
# capacity: a factor times the mean load $K S / E = 3$, rounded up. `None` gives
# every edge a slot. (Small groups get at least 4 slots unless `minimum` says
# otherwise, so that they drop nothing by bad luck.)

# %%
for factor in (0.5, 1.0, 1.25, None):
  capacity = slots.capacity(K * S, S, E, factor, minimum=1)
  print("factor", factor, "->", capacity, "slots per expert")

# %% [markdown]
# One rule decides: *an expert takes its first $C$ edges*. To see who gets a
# slot, let each token carry its own number and look at what reaches the
# experts. With a slot for all, their rows show each expert's queue. With $C =
# 2$, too few on purpose, they show those who got a slot.

# %%
C = slots.capacity(K * S, S, E, 0.5, minimum=1)
# Counted from 1 here, as an empty slot carries 0.
numbers = jnp.arange(1.0, S + 1).reshape(1, S, 1)
seen = {}


def look(capacity, rows, mask):
  seen[capacity] = rows[..., 0].astype(int) - 1
  return rows


for capacity in (S, C):
  dispatch.DISPATCH["gather"](look, capacity, numbers, edges, E, capacity)
  print(f"{capacity} slots: the token in each, a row per expert (-1: empty)")
  print(seen[capacity])
print("the first C of each queue:", (seen[S][:, :C] == seen[C]).all())

# %%
first_choice = edges.expert[0, :S]
figure, axis = plt.subplots(figsize=(7.5, 3.6))
for (expert, rank), token in np.ndenumerate(seen[S]):
  if token >= 0:
    color = "C0" if first_choice[token] == expert else "C1"
    axis.text(
      rank,
      expert,
      f"token {token}",
      ha="center",
      va="center",
      color="white" if rank < C else color,
      bbox={
        "boxstyle": "round,pad=0.5",
        "facecolor": color if rank < C else "white",
        "edgecolor": color,
        "linestyle": "-" if rank < C else "--",
      },
    )
axis.axvline(C - 0.5, color="black")
axis.text(C - 0.55, -0.7, f"slots (C = {C})", ha="right", va="center")
axis.text(C - 0.45, -0.7, "dropped", ha="left", va="center")
axis.plot([], [], "s", color="C0", label="first choice")
axis.plot([], [], "s", color="C1", label="second choice")
axis.legend(loc="lower right")
axis.set(
  xlabel="rank in the queue",
  ylabel="expert",
  xticks=range(S - 1),
  yticks=range(E),
  xlim=(-0.6, S - 1.4),
  ylim=(E - 0.4, -1.1),
)
plt.show()

# %% [markdown]
# Expert 0 drops tokens 3, 5 and 4. Token 4 comes behind token 5, because expert
# 0 is its second choice. Expert 1 drops token 5, too: nothing of it is left.
#
# The number dropped is the count less the capacity:

# %%
print("dropped per expert:", jnp.maximum(routing.count[0] - C, 0))

# %% [markdown]
# ## 4. Dispatch and combine
#
# Dispatch computes $y = \sum_e G(x)_e E_e(x)$ (eq. 1) over the edges that have
# a slot. `gather` moves rows by index, `einsum` multiplies by one-hot masks;
# they compute the same. Let every expert be the identity. Then $y$ is $x$ times
# the gates that are left:
#
# * tokens 0, 1 and 2 lost nothing and come back unchanged,
# * tokens 3 and 4 come back times the gate that is left, 3/8 and 3/4,
# * token 5 comes back as zero (a residual connection around the layer keeps
#   it).

# %%
x = jnp.array([[1.0, 8], [2, 8], [3, 8], [4, 8], [5, 8], [6, 8]])[None]
linear = experts.Linear(E)
identity = {"w": jnp.tile(jnp.eye(2), (E, 1, 1))}
y = {
  name: move(linear.run, identity, x, edges, E, C)
  for name, move in dispatch.DISPATCH.items()
}
print("x and y side by side:")
print(np.hstack([x[0], y["gather"][0]]))
print("gather == einsum:", jnp.allclose(y["gather"], y["einsum"]))
print("0, 1, 2 unchanged:", jnp.allclose(y["gather"][0, :3], x[0, :3]))
print("3 and 4 in part:", jnp.allclose(y["gather"][0, 3, 0], 4 * 3 / 8))
print("5 is zero:", not y["gather"][0, 5].any())

# %%
everyone = dispatch.DISPATCH["gather"](linear.run, identity, x, edges, E, S)
print("with a slot for all, y == x:", jnp.allclose(everyone, x))

# %% [markdown]
# ## 5. The whole layer, and the balance losses
#
# Nothing so far keeps expert 0 from being everyone's favorite, and favorites
# grow: the more tokens an expert sees, the better it gets. Two losses push
# back, $w\, CV(\mathrm{importance})^2$ (eq. 7) and $w\, CV(\mathrm{load})^2$
# (eq. 11), where $CV^2$ is the variance over the squared mean. Four experts
# with values 3, 1, 1, 1 have mean 3/2 and variance 3/4, so $CV^2 = 1/3$; an
# even split has 0.

# %%
print(losses.cv_squared(jnp.array([3.0, 1, 1, 1])), "is 1/3")
print(losses.cv_squared(jnp.array([2.0, 2, 2, 2])), "is 0")
print("our six tokens, importance (eq. 7):", losses.importance(routing))

# %% [markdown]
# `MoE` puts the pieces together: a router, experts, a capacity factor. It
# leaves its `Routing` in the collection `"routing"`; what imbalance costs is up
# to the trainer. Here are 256 tokens of width 4 and 8 experts.

# %%
layer = moe.MoE(
  router.NoisyTopK(num_experts=8, k=2),
  experts.FeedForward(num_experts=8, hidden=16),
  capacity_factor=1.25,
)
x = 1 + jax.random.normal(jax.random.key(4), (8, 32, 4))
rngs = {"params": jax.random.key(5), "router": jax.random.key(6)}
params = nn.unbox(layer.init(rngs, x, train=True))["params"]
print(jax.tree.map(jnp.shape, params))

y, state = layer.apply(
  {"params": params},
  x,
  train=True,
  rngs={"router": jax.random.key(6)},
  mutable=["routing"],
)
weights = {"importance": 0.1, "load": 0.1}
total, unweighted = losses.auxiliary(state["routing"], weights)
(routing,) = losses.routings(state["routing"])
print("y:", y.shape, " tokens per expert:", routing.count[0])
print("to add to the loss of the model:", total)
print(
  "0.1 of each:",
  jnp.allclose(total, 0.1 * (unweighted["importance"] + unweighted["load"])),
)

# %% [markdown]
# Zero weights are balanced from the start. So unbalance the router: random
# weights, and tokens whose mean is not zero, make some experts popular with
# nearly everyone. Then take a hundred gradient steps on the two balance losses
# and nothing else.

# %%
kernel = params["router"]["gate"]["kernel"]
params["router"]["gate"]["kernel"] = jax.random.normal(
  jax.random.key(7), kernel.shape
)
optimizer = optax.adam(0.02)


@jax.jit
def step(params, state, key):
  def loss(params):
    _, left = layer.apply(
      {"params": params},
      x,
      train=True,
      rngs={"router": key},
      mutable=["routing"],
    )
    total, _ = losses.auxiliary(left["routing"], weights)
    return total, left["routing"]

  gradient, sown = jax.grad(loss, has_aux=True)(params)
  updates, state = optimizer.update(gradient, state)
  return optax.apply_updates(params, updates), state, sown


state = optimizer.init(params)
history = []
for number in range(100):
  key = jax.random.fold_in(jax.random.key(8), number)
  params, state, sown = step(params, state, key)
  history.append(sown)
reports = [losses.balance(sown) for sown in history]
for name in reports[0]:
  print(f"{name:20} {reports[0][name]:6.3f} -> {reports[-1][name]:6.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
left.plot([r["cv_importance"] for r in reports], label="CV(importance)")
left.plot([r["cv_load"] for r in reports], label="CV(load)")
left.set(xlabel="step", ylabel="coefficient of variation", ylim=0)
left.legend()

capacity = slots.capacity(2 * 256, 256, 8, layer.capacity_factor)
for index, shift, name in ((0, -0.2, "before"), (-1, 0.2, "after")):
  (routing,) = losses.routings(history[index])
  right.bar(np.arange(8) + shift, routing.count[0], width=0.38, label=name)
right.axhline(capacity, color="black", linestyle="--", label="capacity")
right.axhline(2 * 256 / 8, color="gray", linestyle=":", label="even")
right.set(xlabel="expert", ylabel="count (tokens)", xticks=range(8))
right.legend()
plt.show()

# %% [markdown]
# Above the dashed line tokens are dropped; afterwards hardly any are.
#
# The same layer runs unchanged on many devices: `moejax.sharding.LAYOUTS` says
# which arrays are split over which, and `tests/test_sharding.py` shows all
# layouts to agree on eight of them.
