"""What experts specialise in, by hand."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from experiments import specialization, training
from moejax import experts, losses, moe, router
from moejax.analysis.measures import Decisions


def decisions(ids, expert):
  """One expert for each piece, of sentences of five."""
  every = np.arange(ids.size)
  ones = np.ones(ids.size, np.float32)
  return Decisions(
    4, ids, every % 5, ones, every, expert, ones, ones == 0, 0 * every
  )


def test_gates_of_two_levels_are_those_of_what_comes_out():
  """Of 3 groups of 4 experts, over two groups of tokens that are together."""
  dropless = {"capacity_factor": None, "eval_capacity_factor": None}
  inner = moe.MoE(router.TopK(4, 2), experts.Linear(4), **dropless)
  groups = {"group_size": 8, "groups_together": 2, "dispatch": "gather"}
  layer = moe.HierarchicalMoE(router.TopK(3, 2), inner, **groups, **dropless)
  x = jax.random.normal(jax.random.key(0), (4, 8, 5))
  mask = jnp.arange(32).reshape(4, 8) % 5 > 0
  params = kinds.random_params(layer, x)
  y, sown = layer.apply({"params": params}, x, mask=mask, mutable=["routing"])
  (routing,) = losses.routings(sown)
  gates = training.gates(routing)
  assert gates.shape == (32, 12)
  real = np.count_nonzero(gates, axis=1)
  np.testing.assert_array_equal(real, 4 * np.ravel(mask))
  np.testing.assert_allclose(gates.sum(axis=1), np.ravel(mask), rtol=1e-6)
  np.testing.assert_allclose(
    gates.reshape(2, 16, 12).sum(axis=1), routing.importance, rtol=1e-5
  )
  w = params["secondary"]["experts"]["w"].reshape(12, 5, 5)
  want = np.einsum("te,td,edf->tf", gates, x.reshape(-1, 5), w)
  np.testing.assert_allclose(y.reshape(-1, 5), want, rtol=1e-4, atol=1e-5)


def test_experts_that_know_the_piece_and_those_that_know_nothing():
  random = np.random.default_rng(0)
  ids = random.integers(3, 7, 4000)
  about = {
    row["about"]: row
    for row in specialization.knowledge(decisions(ids, ids - 3))
  }
  assert about["piece"]["bits"] == pytest.approx(2, abs=0.01)
  assert about["piece"]["most"] == pytest.approx(2, abs=0.01)
  assert about["piece"]["shuffled"] < 0.01
  assert about["previous"]["bits"] == 0
  # And one that knows the piece before.
  before = np.roll(ids, 1) - 3
  piece, previous, *_ = specialization.knowledge(decisions(ids, before))
  assert piece["bits"] < 0.02 and previous["bits"] > 1.5
  luck = random.integers(0, 4, 4000)
  piece, previous, *_ = specialization.knowledge(decisions(ids, luck))
  assert piece["bits"] == pytest.approx(piece["shuffled"], abs=0.005)
  assert previous["bits"] == pytest.approx(previous["shuffled"], abs=0.01)
