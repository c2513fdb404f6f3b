"""What experts specialise in, by hand."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from experiments import specialization, training
from experiments.specialization import Places
from moejax import experts, losses, moe, router

WORDS = ["", "", "", "the", "red", "car", "house", "is", "here"]


class Words:
  """A vocabulary that decodes, without its ends of sentences."""

  def decode(self, ids):
    return [WORDS[i] for i in ids if i > 2]


def places(ids, begins, gates):
  return Places(np.array(ids), np.array(begins), np.array(gates))


def test_information_by_hand():
  labels = np.array([7, 7, 9, 9])
  # An expert of everyone's, one of a single label, and one of nobody's.
  gates = np.array([[1, 0, 0], [1, 0, 0], [1, 0.1, 0], [1, 1, 0]])
  share, bits = specialization.information(labels, gates)
  np.testing.assert_allclose(share, [4 / 6, 2 / 6, 0])
  seven, nine = 2 / 6, 4 / 6
  kl = 0.5 * np.log2(0.5 / seven) + 0.5 * np.log2(0.5 / nine)
  np.testing.assert_allclose(bits, [kl, np.log2(1 / nine), 0])


def test_contexts_are_those_of_the_largest_gates():
  # "the red car is here", "the house is here", and the first once more.
  first, second = [3, 4, 5, 7, 8, 2], [3, 6, 7, 8, 2]
  gates = np.zeros((17, 2))
  gates[[2, 7, 13, 5], 1] = 0.4, 0.9, 0.3, 0.2
  begins = [0] * 6 + [6] * 5 + [11] * 6
  text = places([*first, *second, *first], begins, gates)
  assert list(specialization.contexts(text, 1, Words())) == [
    (0.9, "the **house** is here"),
    (0.4, "the red **car** is here"),
    (0.2, "red car is here **</s>**"),
  ]
  assert not list(specialization.contexts(text, 0, Words()))


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
  begins = np.arange(4000) // 5 * 5
  knows = np.eye(4)[ids - 3]
  about = {
    row["about"]: row
    for row in specialization.knowledge(places(ids, begins, knows))
  }
  assert about["piece"]["bits"] == pytest.approx(2, abs=0.01)
  assert about["piece"]["most"] == pytest.approx(2, abs=0.01)
  assert about["piece"]["shuffled"] < 0.01
  assert about["previous"]["bits"] == 0
  # And one that knows the piece before.
  before = np.eye(4)[np.roll(ids, 1) - 3]
  piece, previous, *_ = specialization.knowledge(places(ids, begins, before))
  assert piece["bits"] < 0.02 and previous["bits"] > 1.5
  luck = np.eye(4)[random.integers(0, 4, 4000)]
  piece, previous, *_ = specialization.knowledge(places(ids, begins, luck))
  assert piece["bits"] == pytest.approx(piece["shuffled"], abs=0.005)
  assert previous["bits"] == pytest.approx(previous["shuffled"], abs=0.01)
