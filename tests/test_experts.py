"""Experts: what they compute, and how their weights start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from moejax import experts

E, N, D, F = 3, 4, 5, 6

CASES = {
  "feed_forward": (lambda E: experts.FeedForward(E, F), reference.feed_forward),
  "linear": (experts.Linear, reference.linear),
}


def case(name):
  if name not in CASES:
    pytest.fail(
      f"experts.EXPERTS[{name!r}] has no reference: write it into"
      " tests/reference.py and a line into CASES of tests/test_experts.py"
    )
  return CASES[name]


def init(module, width=D):
  return module.init(jax.random.key(0), width)["params"]


@pytest.mark.parametrize("name", experts.EXPERTS)
def test_matches_the_paper(name):
  make, loops = case(name)
  weights = nn.unbox(init(make(E)))
  rows = jax.random.normal(jax.random.key(1), (E, N, D))
  expert = loops({k: np.asarray(w, np.float64) for k, w in weights.items()})
  want = [
    [expert(e, row) for row in np.asarray(rows[e], np.float64)]
    for e in range(E)
  ]
  np.testing.assert_allclose(
    make(E).run(weights, rows), want, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("name", experts.EXPERTS)
def test_weights_start_scaled_by_the_fan_in_of_one_expert(name):
  """Whatever the number of experts, and each with its own."""
  make, _ = case(name)
  for num_experts in (8, 64):
    for w in nn.unbox(init(make(num_experts), width=32)).values():
      assert w.shape[0] == num_experts and w.dtype == jnp.float32
      np.testing.assert_allclose(np.std(w), w.shape[1] ** -0.5, rtol=0.05)
      assert len(np.unique(w)) > 0.99 * w.size


@pytest.mark.parametrize("name", experts.EXPERTS)
def test_weights_are_laid_out_by_expert(name):
  make, _ = case(name)
  for leaf in init(make(E)).values():
    assert leaf.names[0] == "expert"
    assert leaf.names.count("embed") == 1


@pytest.mark.parametrize("name", experts.EXPERTS)
def test_rows_keep_their_dtype(name):
  make, _ = case(name)
  weights = nn.unbox(init(make(E)))
  rows = jax.random.normal(jax.random.key(1), (E, N, D))
  got = make(E).run(weights, rows.astype(jnp.bfloat16))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    got.astype(jnp.float32), make(E).run(weights, rows), atol=0.1
  )


def test_activation_may_be_chosen():
  module = experts.FeedForward(E, F, activation=jnp.tanh)
  weights = nn.unbox(init(module))
  rows = jax.random.normal(jax.random.key(1), (E, N, D))
  np.testing.assert_allclose(
    module.run(weights, rows)[1],
    jnp.tanh(rows[1] @ weights["w_in"][1]) @ weights["w_out"][1],
    rtol=1e-5,
    atol=1e-6,
  )


def test_paper_counts():
  """512 -> 1024 -> 512 holds 1,048,576 weights, without biases (sec. 5.1)."""
  shapes = jax.eval_shape(lambda: init(experts.FeedForward(1, 1024), 512))
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == 1_048_576
