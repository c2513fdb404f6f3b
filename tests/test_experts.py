"""Experts: what they compute, how their weights start."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from moejax import experts, losses

E, N, D, F = 3, 4, 3, 6


def inputs(*shape, seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", [*experts.EXPERTS, "deep"])
def test_weights_start_scaled_by_the_fan_in_of_one_expert(name):
  """Whatever the number of experts, and each with its own."""
  module, width = kinds.case(name).make(64), 32
  rngs = {"params": jax.random.key(0)}
  init = jax.jit(
    lambda: kinds.Alone(module).init(rngs, jnp.zeros((64, 1, width)))
  )
  for w in jax.tree.leaves(nn.unbox(init())):
    assert w.dtype == jnp.float32
    if w.ndim > 2:
      np.testing.assert_allclose(np.std(w), w.shape[-2] ** -0.5, rtol=0.05)
      assert len(np.unique(w)) > 0.99 * w.size


@pytest.mark.parametrize("name", sorted(kinds.VARIANTS.keys() - {"nested"}))
def test_weights_are_laid_out_by_expert(name):
  """Those of a mixture within an expert too, by the outer expert alone."""
  module = kinds.case(name).make(E)
  of_kind = {"kinds_0": 2, "kinds_1": 1}
  width = 7
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    kinds.start(module, E, width),
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  ):
    shape = nn.unbox(leaf).shape
    assert shape[0] == of_kind.get(path[0].key, E)
    # flax's own modules do not say how they may be split.
    if "Dense_0" not in str(path):
      want = None if shape[0] == 1 else "expert"
      assert leaf.names[0] == want and len(leaf.names) == len(shape)
      assert "expert" not in leaf.names[1:]
      assert leaf.names.count("embed") == (width in shape[1:])


@pytest.mark.parametrize(
  "hidden, want",
  [(1024, 1_048_576), (4096, 4_194_304), ((1024,) * 4, 4_194_304)],
)
def test_paper_counts(hidden, want):
  """512 -> 1024 -> 512, MoE-1-Wide and MoE-1-Deep, without biases (app. C)."""
  shapes = kinds.start(experts.FeedForward(1, hidden), 1, 512)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == want


@pytest.mark.parametrize("train", [False, True])
def test_a_mixture_as_expert_routes_what_is_in_its_slots(train):
  """Padding is not routed, and every expert draws noise of its own."""
  module = kinds.make_mixtures(E, noisy=True)
  weights = kinds.draw(module, E, D)
  # All experts alike: only noise can make them differ.
  weights = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), weights)
  rows = jnp.broadcast_to(inputs(1, N, D), (E, N, D))
  real = jnp.asarray(np.arange(N)[None] < np.array([[N], [N], [1]]))
  run = kinds.Alone(module).apply
  y, state = jax.jit(
    functools.partial(run, mutable="routing"), static_argnums=3
  )(
    {"params": {"experts": weights}},
    rows,
    real,
    train,
    rngs={"router": jax.random.key(2)},
  )
  found = losses.routings(state)
  assert len(found) == E
  for e, routing in enumerate(found):
    assert int(routing.count.sum()) == kinds.J * int(real[e].sum())
    np.testing.assert_array_equal(routing.mask, real[e : e + 1])
  assert (np.asarray(y)[~np.asarray(real)] == 0).all()
  assert (y[0] == y[1]).all() == (not train)
