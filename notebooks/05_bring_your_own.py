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
# # Bring your own router, experts and loss
#
# Each takes about twenty lines. `moejax.testing` has a contract for each: a
# class of tests that yours inherits, in value, gradient and properties. A
# contract finds what is easily got wrong, as padding that is counted, or a
# gradient of 0/0.

# %%
import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import moejax
from moejax import routing, testing
from moejax.experts import Experts, expert_dot
from moejax.grouped import grouped

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})

# %% [markdown]
# ## A router
#
# Top-p gating: a token visits experts, best first, until their softmax adds up
# to p. A token the router is sure of visits one, others more. A router turns
# tokens into a `Routing`; `from_token_choice` and `make_routing` write edges
# and their sums. Expert E marks an edge without use, and the gates of the
# chosen sum to 1.


# %%
class TopP(moejax.Router):
  p: float = 0.7
  max_k: int = 4

  def decide(self, x, train, mask, ids):
    logits = self.logits(x)
    share, expert = jax.lax.top_k(jax.nn.softmax(logits), self.max_k)
    used = jnp.cumsum(share, axis=-1) - share < self.p
    if mask is not None:
      used &= mask[..., None]
    gate = jnp.where(used, share, 0)
    gate /= jnp.maximum(gate.sum(axis=-1, keepdims=True), 1e-9)
    assignment = routing.from_token_choice(
      jnp.where(used, expert, self.num_experts), gate
    )
    return routing.make_routing(assignment, logits, mask)


class TestTopP(testing.RouterContract):
  router = TopP(num_experts=6)


# %% [markdown]
# In a file of tests that class is all there is to write: pytest finds its
# methods. A notebook calls them by itself.


# %%
def check(contract):
  for name in dir(contract):
    if name.startswith("test_"):
      test = getattr(contract(), name)
      try:
        test()
        print(f"passed  {name:24} {test.__doc__.splitlines()[0]}")
      except AssertionError as error:
        print(f"BROKEN  {name:24} {str(error).strip().splitlines()[0]}")


check(TestTopP)

# %% [markdown]
# What does a contract find? Forget the two lines about the mask, a usual
# mistake, and padding is routed. The tests that see it say so.


# %%
class Forgetful(TopP):
  def decide(self, x, train, mask, ids):
    return super().decide(x, train, None, ids)


class TestForgetful(testing.RouterContract):
  router = Forgetful(num_experts=6)


check(TestForgetful)

# %% [markdown]
# ## Experts
#
# Experts declare their weights in `__call__`, with the axis of experts in
# front, and map rows in `run`: in slots [E, N, D], or sorted by expert, [N, D]
# with `group_sizes`. Written with a product `dot` that is given, both are one
# function. These experts multiply two linear maps of a row with each other.


# %%
class Bilinear(Experts):
  num_experts: int

  @nn.compact
  def __call__(self, width):
    names = ("left", "right", "out")
    return {n: self.matrix(n, (width, width), "embed", None) for n in names}

  @nn.nowrap
  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    def multiply(weights, rows, dot):
      product = dot(rows, weights["left"]) * dot(rows, weights["right"])
      return dot(product, weights["out"])

    if rows.ndim == 2:
      return grouped(multiply, weights, rows, group_sizes)
    return multiply(weights, rows, expert_dot)


class TestBilinear(testing.ExpertsContract):
  experts = Bilinear(num_experts=3)


check(TestBilinear)

# %% [markdown]
# ## A balance loss
#
# How far is the importance of the experts from even? Here by its entropy: log E
# less the entropy of their shares, which is 0 when they are equal. A first try:


# %%
def entropy_loss(routing):
  importance = routing.importance.sum(axis=0)  # of all groups together
  share = importance / importance.sum()
  return jnp.log(len(share)) + (share * jnp.log(share)).sum()


class TestEntropyLoss(testing.LossContract):
  loss = entropy_loss


check(TestEntropyLoss)

# %% [markdown]
# A batch of nothing but padding divides 0 by 0, and so does an expert without
# tokens: 0 log 0 is NaN, and one NaN ends a training. `entr` knows its limit at
# 0, and a small number keeps the gradient finite.


# %%
def entropy_loss(routing):
  importance = routing.importance.sum(axis=0) + 1e-6
  share = importance / importance.sum()
  return jnp.log(len(share)) - jax.scipy.special.entr(share).sum()


class TestEntropyLoss(testing.LossContract):
  loss = entropy_loss


check(TestEntropyLoss)

# %% [markdown]
# ## All three in a layer
#
# Tokens come from four kinds, and of each kind another product of its features
# is wanted. The first twelve features of a token are noise to multiply, the
# last four say its kind; the kinds are not equally frequent.


# %%
def draw(key, size=512):
  of_kind, of_features = jax.random.split(key)
  chances = jnp.log(jnp.array([0.55, 0.25, 0.15, 0.05]))
  kind = jax.random.categorical(of_kind, chances, shape=(size,))
  features = jax.random.normal(of_features, (size, 12))
  x = jnp.concatenate([features, 2 * jax.nn.one_hot(kind, 4)], axis=1)
  rolled = jax.vmap(jnp.roll)(features, kind + 1)
  return x, features * rolled, kind


class Model(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    layer = moejax.MoE(TopP(6), Bilinear(6), capacity_factor=None)
    return nn.Dense(12)(layer(x[None], train)[0])


model, optimizer = Model(), optax.adam(1e-2)
x, _, _ = draw(jax.random.key(0))
start = nn.unbox(jax.jit(model.init)(jax.random.key(1), x))["params"]


@jax.jit
def train(weight):
  def loss_fn(params, key):
    x, want, _ = draw(key)
    y, sown = model.apply({"params": params}, x, True, mutable=["routing"])
    (decided,) = moejax.routings(sown)
    loss = ((y - want) ** 2).mean()
    return loss + weight * entropy_loss(decided), (loss, decided.count[0])

  def step(state, key):
    params, moments = state
    grads, report = jax.grad(loss_fn, has_aux=True)(params, key)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), report

  keys = jax.random.split(jax.random.key(2), 400)
  state, report = jax.lax.scan(step, (start, optimizer.init(start)), keys)
  return state[0], report


found = {f"weight {weight}": train(weight) for weight in (0.0, 0.1)}

# %% [markdown]
# *Left*: the layer learns its task, and the loss does not disturb it. *Right*:
# how many tokens each expert takes at the end. Frequent kinds keep their
# experts busy; the loss gives more to those that would have least.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for i, (name, (_, (loss, count))) in enumerate(found.items()):
  left.plot(np.convolve(loss, np.ones(20) / 20, "valid"), label=name)
  end = np.sort(count[-50:].mean(axis=0))[::-1]
  right.bar(np.arange(6) + 0.4 * i - 0.2, end, width=0.38, label=name)
left.set(xlabel="step", ylabel="squared error", ylim=0)
right.set(xlabel="expert, the busiest first", ylabel="tokens, of 512")
right.legend()
plt.show()

# %% [markdown]
# Does the router know the kinds? A row for each kind, a column for each expert,
# and the mean gate of its tokens. The kinds go to different experts, though
# nobody told the router of kinds; the two rarest share one.

# %%
params, _ = found["weight 0.1"]
x, _, kind = draw(jax.random.key(3), 4096)
_, sown = model.apply({"params": params}, x, mutable=["routing"])
(decided,) = moejax.routings(sown)
edges = decided.assignment
token, expert, gate = edges.tokens(len(x))[0], edges.expert[0], edges.gate[0]
table = jnp.zeros((4, 6)).at[kind[token], expert].add(gate, mode="drop")
table /= jnp.bincount(kind, length=4)[:, None]

figure, axis = plt.subplots(figsize=(5, 2.8))
image = axis.imshow(table, cmap="Blues", vmin=0, vmax=1)
axis.set(xlabel="expert", ylabel="kind", yticks=range(4))
figure.colorbar(image, label="mean gate")
plt.show()
visited = np.bincount(token[expert < 6], minlength=len(x))
print(
  "experts of a token:",
  dict(sorted(collections.Counter(visited.tolist()).items())),
)
print(
  "all gates of a token sum to 1:",
  bool(jnp.allclose(table.sum(axis=1), 1, atol=1e-3)),
)

# %% [markdown]
# `docs/contributing.md` shows where each of these goes in the library: its name
# into a dict, and a config can ask for it.
