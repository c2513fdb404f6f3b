"""Gating that draws: noise, its smooth load, second choices by chance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gatings import CASES, KEY, E, K, S, agree, case, draw, noise_of

from moejax import gating


def test_load_of_every_expert_has_gradient_through_the_threshold():
  # Moving another expert's logit moves the threshold that this one must beat.
  logits, noise_std, _ = draw(3)

  @jax.jit
  @jax.jacobian
  def slopes(logits):
    return gating.noisy_top_k(logits, noise_std, K, KEY).load[0]

  for e, slope in enumerate(np.asarray(slopes(logits))[:, 0]):
    assert (slope[:, e] > 0).any()
    others = np.delete(slope, e, axis=1)
    assert (others < 0).any()
    # What raises one expert's chance lowers no other threshold: they balance.
    np.testing.assert_allclose(slope.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_is_the_expected_count(k):
  """Mean load over noise = frequency of choice, by noise of our own too."""
  draws, tokens = 20000, 2
  random = np.random.default_rng(k)
  logits = random.normal(size=(tokens, E)).astype("float32")
  noise_std = random.uniform(0.3, 1.2, (tokens, E)).astype("float32")

  # One token per group: the load of a group is P(x, i) of one token.
  def per_group(a):
    return jnp.asarray(np.repeat(a[None], draws, 0).reshape(-1, 1, E))

  run = jax.jit(gating.noisy_top_k, static_argnames="k")
  got = run(per_group(logits), per_group(noise_std), k=k, rng=KEY)
  load = np.asarray(got.load, np.float64).reshape(draws, tokens, E)
  count = np.asarray(got.count, np.float64).reshape(draws, tokens, E)
  ours = logits + noise_std * random.normal(size=(draws, tokens, E))
  rank = np.argsort(np.argsort(-ours, axis=-1), axis=-1)
  often = load.mean(0)
  error = np.sqrt((load.var(0) + often * (1 - often)) / draws)
  for other in (count, rank < k):
    assert (np.abs(often - other.mean(0)) < 4.5 * error).all()
  total = load.sum(-1)
  error = total.std(0) / np.sqrt(draws)
  assert (np.abs(total.mean(0) - k) < 4.5 * error).all()
  # An estimate, not a count: one draw's sum is not k.
  assert (total.std(0) > 0.05).all()
  noise = noise_of(got, per_group(logits), per_group(noise_std))
  assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size)
  assert abs(noise.var() - 1) < 4.5 * np.sqrt(2 / noise.size)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def load_slopes(logits, noise_std):
  """The gradient of some sum of loads."""
  got = CASES["noisy_top_k"].run(logits, noise_std, None, K)
  return (got.load * jnp.arange(E, dtype=jnp.float32)[None]).sum()


def test_without_noise_load_is_the_count():
  logits, noise_std, mask = draw(5, masked=True)
  quiet = jnp.zeros_like(noise_std)
  got = case("noisy_top_k").run(logits, quiet, mask, K)
  want = case("top_k").run(logits, quiet, mask, K)
  np.testing.assert_array_equal(got.load, want.count)
  np.testing.assert_array_equal(got.count, want.count)
  jax.tree.map(np.testing.assert_array_equal, got.assignment, want.assignment)
  assert (np.asarray(load_slopes(logits, quiet)) == 0).all()


def test_less_noise_makes_load_a_count():
  logits, noise_std, _ = draw(6)
  got = case("noisy_top_k").run(logits, noise_std * 1e-5, None, K)
  np.testing.assert_allclose(got.load, got.count, atol=1e-4)


@pytest.mark.parametrize("noise_std", [1e-6, 1e-12, 1e-20, 1e-30, 1e-38])
def test_gradient_is_finite_however_small_the_noise(noise_std):
  """Softplus(-45) is 3e-20: what noise_epsilon = 0 allows.

  Its square underflows: 0 * inf in the gradient of the quotient.
  """
  logits, _, _ = draw(6)
  slopes = load_slopes(logits, jnp.full_like(logits, noise_std))
  assert np.isfinite(np.asarray(slopes)).all()


def test_all_experts_leave_no_room_for_noise():
  logits, noise_std, mask = draw(8, masked=True)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(logits):
    got = gating.noisy_top_k(logits, noise_std, E, KEY, mask)
    return got.load.sum(), got

  slope, got = run(logits)
  np.testing.assert_array_equal(
    got.load, np.repeat(np.asarray(mask).sum(1)[:, None], E, axis=1)
  )
  np.testing.assert_array_equal(got.logits, logits)
  assert (np.asarray(slope) == 0).all()


def drawn(sample, groups, shape):
  """What each group draws: by its own index, wherever it lies."""
  keys = [jax.random.fold_in(KEY, group) for group in range(groups)]
  return np.stack([sample(key, shape) for key in keys])


def test_noise_depends_on_the_group_alone():
  logits, noise_std = jnp.zeros((6, S, E)), jnp.ones((6, S, E))
  run = case("noisy_top_k").run
  six = run(logits, noise_std, None, K).logits
  two = run(logits[:2], noise_std[:2], None, K).logits
  np.testing.assert_array_equal(six[:2], two)
  np.testing.assert_allclose(
    six, drawn(jax.random.normal, 6, (S, E)), rtol=1e-5
  )
  # And no two numbers of it are the same.
  assert len(np.unique(six)) == six.size
  other = gating.noisy_top_k(logits, noise_std, K, jax.random.key(8)).logits
  assert not np.isin(np.asarray(other), np.asarray(six)).any()


def test_second_choices_are_left_out_by_chance():
  """As often as min(1, 2 g2) says; nothing else changes."""
  draws = 20000
  token = np.log([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0001], [0.98, 0.01, 0.01]])
  logits = jnp.tile(jnp.asarray(token, jnp.float32), (draws, 1, 1))
  got = jax.jit(gating.gshard_top_2)(logits, KEY)
  every = jax.jit(gating.gshard_top_2)(logits)
  expert, gate = got.assignment.expert, got.assignment.gate
  used = np.asarray(expert) < 3
  assert used[:, :3].all()
  for field in ("expert", "gate"):
    np.testing.assert_array_equal(
      np.asarray(getattr(got.assignment, field))[used],
      np.asarray(getattr(every.assignment, field))[used],
    )
  assert (np.asarray(gate)[~used] == 0).all()
  np.testing.assert_array_equal(got.count.sum(-1), used.sum(-1))
  np.testing.assert_allclose(got.importance.sum(-1), gate.sum(-1), rtol=1e-5)
  often = np.minimum(1, 2 * np.array([0.2 / 0.9, 0.5, 0.01 / 0.99]))
  error = np.sqrt(often * (1 - often) / draws)
  seen = used[:, 3:].mean(0)
  assert (np.abs(seen - often) <= 4.5 * error).all()
  # Tokens do not share their luck.
  both = (used[:, 3] & used[:, 5]).mean()
  assert abs(both - often[0] * often[2]) < 4.5 * np.sqrt(often[2] / draws)


def test_chance_matches_the_paper_and_depends_on_the_group_alone():
  logits, _, mask = draw(27, True, (6, S, E))
  run = jax.jit(gating.gshard_top_2)
  six, two = run(logits, KEY, mask), run(logits[:2], KEY, mask[:2])
  np.testing.assert_array_equal(six.count[:2], two.count)
  draws = drawn(jax.random.uniform, 6, (S,))
  agree(
    six,
    [
      reference.gshard_top_2(np.float64(logits[g]), draws[g], mask[g])
      for g in range(6)
    ],
  )
  other = run(logits, jax.random.key(8), mask)
  assert (np.asarray(other.count) != np.asarray(six.count)).any()
  # Some are used and some are not, or this shows nothing.
  real, second = np.asarray(mask), np.asarray(six.assignment.expert)[:, S:]
  assert 0 < (second[real] < E).sum() < real.sum()
