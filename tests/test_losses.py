"""Balance losses against the paper's loops, and how layers add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from moejax import gating, losses

G, S, E, K = 3, 6, 4, 2


@jax.jit
def decide(logits, seed, mask=None):
  noise_std = jnp.ones_like(logits)
  return gating.noisy_top_k(logits, noise_std, K, jax.random.key(seed), mask)


def decision(seed=0, mask=None):
  random = np.random.default_rng(seed)
  logits = jnp.asarray(random.normal(size=(G, S, E)), jnp.float32)
  return decide(logits, seed, mask)


WANT = {
  "importance": lambda r: reference.cv_squared(
    np.asarray(r.importance, np.float64).sum(0)
  ),
  "load": lambda r: reference.cv_squared(np.asarray(r.load, np.float64).sum(0)),
}


@pytest.mark.parametrize("name", losses.LOSSES)
def test_matches_the_paper_over_the_whole_batch(name):
  if name not in WANT:
    pytest.fail(
      f"losses.LOSSES[{name!r}] has no reference: write it into"
      " tests/reference.py and a line into WANT of tests/test_losses.py"
    )
  for seed in range(5):
    routing = decision(seed)
    got = losses.LOSSES[name](routing)
    np.testing.assert_allclose(got, WANT[name](routing), rtol=1e-5)
    vectors = np.asarray(getattr(routing, name), np.float64)
    per_group = np.mean([reference.cv_squared(v) for v in vectors])
    assert abs(per_group - float(got)) > 0.01 * per_group


@pytest.mark.parametrize(
  "x, want",
  [
    ([1.0, 2.0, 3.0], 2 / 3 / 4),
    ([0.0, 0.0, 8.0, 0.0], 3.0),
    ([5.0, 5.0, 5.0], 0.0),
    ([0.0, 0.0], 0.0),
    ([7.0], 0.0),
  ],
)
def test_cv_squared_of_a_population(x, want):
  np.testing.assert_allclose(losses.cv_squared(jnp.asarray(x)), want, atol=1e-6)
  np.testing.assert_allclose(reference.cv_squared(x), want, atol=1e-12)


@pytest.mark.parametrize("x", [[5.0, 5.0, 5.0], [0.0, 0.0], [1.0, 2.0, 4.0]])
def test_gradient_of_cv_squared(x):
  """Finite, zero at perfect balance, right elsewhere."""
  got = jax.grad(losses.cv_squared)(jnp.asarray(x))
  if len(set(x)) == 1:
    assert (np.asarray(got) == 0).all()
    return
  want = reference.gradient(lambda at: reference.cv_squared(at["x"]), {"x": x})
  np.testing.assert_allclose(got, want["x"], rtol=1e-4)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_gradient_pushes_towards_balance(name):
  """One step down the slope makes the loss smaller."""
  random = np.random.default_rng(1)
  logits = jnp.asarray(random.normal(size=(G, S, E)), jnp.float32)

  @jax.jit
  def loss(logits):
    return losses.LOSSES[name](decide(logits, 1))

  value, slope = jax.value_and_grad(loss)(logits)
  assert loss(logits - 0.1 * slope) < value


def test_auxiliary_adds_layers_and_weighs():
  first, second = decision(0), decision(1)
  sown = {
    "a": {"moe": {"routing": (first,)}},
    "b": {"routing": (second,)},
  }
  assert [id(r) for r in losses.routings(sown)] == [id(first), id(second)]
  total, values = losses.auxiliary(sown, {"importance": 0.1, "load": 0.3})
  by_hand = {name: WANT[name](first) + WANT[name](second) for name in WANT}
  assert set(values) == {"importance", "load"}
  for name, value in values.items():
    np.testing.assert_allclose(value, by_hand[name], rtol=1e-5)
  np.testing.assert_allclose(
    total, 0.1 * by_hand["importance"] + 0.3 * by_hand["load"], rtol=1e-5
  )


def test_a_layer_called_twice_counts_twice():
  first, second = decision(0), decision(1)
  total, _ = losses.auxiliary({"routing": (first, second)}, {"load": 1.0})
  np.testing.assert_allclose(
    total, WANT["load"](first) + WANT["load"](second), rtol=1e-5
  )


def test_without_layers_or_weights_nothing_is_lost():
  total, values = losses.auxiliary({}, {"load": 0.1})
  assert total == 0 and values["load"] == 0
  assert losses.auxiliary(decision(), {}) == (0, {})
  assert losses.balance({}) == {}


def test_unknown_loss_names_the_nearest():
  with pytest.raises(ValueError, match="'laod'.*nearest is 'load'.*importance"):
    losses.auxiliary(decision(), {"importance": 0.1, "laod": 0.1})


def test_balance_reports_what_table_6_does():
  first = decision(0)._replace(dropped=jnp.asarray([[1.0, 0, 2, 0]] * G))
  second = decision(1)
  got = losses.balance({"a": (first,), "b": (second,)})
  want = []
  for routing, dropped in ((first, 3 * G), (second, 0)):
    load = np.asarray(routing.load, np.float64).sum(0)
    want.append(
      {
        "cv_importance": np.sqrt(WANT["importance"](routing)),
        "cv_load": np.sqrt(WANT["load"](routing)),
        "max_over_mean_load": load.max() / load.mean(),
        "dropped_fraction": dropped / (G * S * K),
      }
    )
  assert set(got) == set(want[0])
  for name, value in got.items():
    np.testing.assert_allclose(
      value, (want[0][name] + want[1][name]) / 2, rtol=1e-5
    )


def test_balance_of_nothing_but_padding_is_finite():
  got = losses.balance(decision(0, mask=jnp.zeros((G, S), bool)))
  assert all(np.isfinite(value) for value in got.values())
  assert got["dropped_fraction"] == 0
