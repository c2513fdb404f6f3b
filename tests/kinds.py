"""Every entry of EXPERTS beside its loops, and what tests of experts share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import reference

from moejax import experts, moe, router
from moejax.testing import Alone

F = 3
Q, J = 3, 2  # experts within an expert, and how many of them a row visits


class Case(NamedTuple):
  """E -> module, and (weights, E) -> the loops (e, row) -> row.

  slots_only says whether they cannot run on sorted rows.
  """

  make: Callable
  loops: Callable
  slots_only: bool = False


class Affine(nn.Module):
  """x W + b: somebody's module that knows nothing of mixtures."""

  @nn.compact
  def __call__(self, rows):
    dense = nn.Dense(rows.shape[-1], dtype=rows.dtype)
    return dense(rows)


def affine(weights, num_experts):
  dense = weights["expert"]["Dense_0"]
  return lambda e, row: row @ dense["kernel"][e] + dense["bias"][e]


def two_kinds(num_experts):
  """Half of them wide, half of them narrow; a single one is wide."""
  wide = num_experts - num_experts // 2
  return [(wide, F + 1), (num_experts - wide, F - 1)][: min(num_experts, 2)]


def make_mixed(num_experts):
  """Mixed experts."""
  pairs = two_kinds(num_experts)
  return experts.Mixed(
    tuple(experts.FeedForward(n, width) for n, width in pairs)
  )


def mixed(weights, num_experts):
  return reference.mixed_experts(
    [
      (n, reference.feed_forward(weights[f"kinds_{i}"]))
      for i, (n, _) in enumerate(two_kinds(num_experts))
    ]
  )


def make_nested(num_experts):
  """Any kinds may be mixed, mixed ones too: here three."""
  inner = experts.Mixed((experts.Linear(1), experts.FeedForward(1, F)))
  return experts.Mixed((experts.Identity(num_experts - 2), inner))


def nested(weights, num_experts):
  inner = weights["kinds_1"]
  kinds = [
    (num_experts - 2, lambda e, row: row),
    (1, reference.linear(inner["kinds_0"])),
    (1, reference.feed_forward(inner["kinds_1"])),
  ]
  return reference.mixed_experts(kinds)


def make_mixtures(num_experts, noisy=False):
  """Mixtures as experts."""
  choose = router.NoisyTopK if noisy else router.TopK
  layer = moe.MoE(
    choose(Q, J),
    experts.FeedForward(Q, F),
    capacity_factor=None,
    eval_capacity_factor=None,
    dispatch="einsum",
  )
  return experts.Each(num_experts, layer)


def mixtures(weights, num_experts):
  kernel = weights["expert"]["router"]["gate"]["kernel"]
  inner = weights["expert"]["experts"]

  def expert(e, row):
    gates = reference.top_k((row @ kernel[e])[None], J).gates
    of_expert = {name: w[e] for name, w in inner.items()}
    loops = reference.feed_forward(of_expert)
    return reference.mixture(row[None], gates, loops)[0]

  return expert


CASES = {
  "feed_forward": Case(
    lambda E: experts.FeedForward(E, F),
    lambda weights, E: reference.feed_forward(weights),
  ),
  "linear": Case(experts.Linear, lambda weights, E: reference.linear(weights)),
  "identity": Case(experts.Identity, lambda weights, E: lambda e, row: row),
  "each": Case(lambda E: experts.Each(E, Affine()), affine, slots_only=True),
  "mixed": Case(make_mixed, mixed),
}
VARIANTS = CASES | {
  "deep": Case(
    lambda E: experts.FeedForward(E, (F, F + 1, F - 1)),
    lambda weights, E: reference.feed_forward(weights),
  ),
  "gated": Case(
    lambda E: experts.FeedForward(E, F, nn.silu, gated=True),
    lambda weights, E: reference.feed_forward(weights, silu),
  ),
  "gated and deep": Case(
    lambda E: experts.FeedForward(E, (F, F - 1), gated=True),
    lambda weights, E: reference.feed_forward(weights),
  ),
  "nested": Case(make_nested, nested),
  "mixtures": Case(make_mixtures, mixtures, slots_only=True),
}


def silu(a):
  return a / (1 + np.exp(-a))


def case(name):
  return VARIANTS[name]


@functools.cache
def start(module, num_experts, width):
  """The experts' variables at the start, in boxes; only their shapes."""
  rows = jnp.zeros((num_experts, 1, width))
  rngs = {"params": jax.random.key(0)}
  made = jax.eval_shape(lambda: Alone(module).init(rngs, rows))
  return made.get("params", {}).get("experts", {})


def to_device(values, dtype=jnp.float32):
  """`jnp.asarray`, which compiles a conversion for each shape, without it."""
  return jax.device_put(np.asarray(values, dtype))


def draw(module, num_experts, width, seed=0) -> Any:
  """Random weights."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: to_device(random.normal(size=w.shape), w.dtype),
    nn.unbox(start(module, num_experts, width)),
  )


def random_params(module, *args, **options):
  """Draws parameters: from zeros a router has no gradient."""
  init = functools.partial(module.init, jax.random.key(0), *args, **options)
  random = np.random.default_rng(5)
  return jax.tree.map(
    lambda w: to_device(random.normal(size=w.shape), w.dtype),
    nn.unbox(jax.eval_shape(init))["params"],
  )


def in_float64(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def finite_differences(score, tree):
  """The gradient of score(tree), as a tree."""
  leaves, structure = jax.tree.flatten(in_float64(tree))

  def of_leaves(flat):
    return score(structure.unflatten(list(flat.values())))

  flat = {str(i): leaf for i, leaf in enumerate(leaves)}
  return structure.unflatten(list(reference.gradient(of_leaves, flat).values()))


def same_gradient(got, want, rtol=1e-3, atol=1e-3, exact=True):
  """Whether gradients agree; what changes nothing has one of exactly zero.

  That is not to be had where terms cancel: then leave out `exact`.
  """

  def check(got, want):
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    assert not exact or (got[want == 0] == 0).all()

  jax.tree.map(check, got, want)
