"""Schedule and update rule against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.training import optim


@given(
  warmup=st.integers(1, 50),
  hold=st.integers(0, 50),
  t=st.integers(1, 500),
)
def test_schedule_is_the_formula(warmup, hold, t):
  want = 2.0 * min(t / warmup, 1, np.sqrt((warmup + hold) / t))
  got = optim.warmup_rsqrt(2.0, warmup, hold)(t - 1)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_schedule_is_continuous_at_both_joints():
  schedule = optim.warmup_rsqrt(1.0, 2000, 8000)
  rates = np.array([float(schedule(t - 1)) for t in (2000, 2001, 10000, 10001)])
  np.testing.assert_allclose(rates, 1, rtol=1e-4)
  assert float(schedule(0)) == pytest.approx(1 / 2000)
  assert float(schedule(40000 - 1)) == pytest.approx(0.5)


def test_schedule_refuses_no_warmup():
  with pytest.raises(ValueError, match="warmup_steps = 0 and hold_steps = 3"):
    optim.warmup_rsqrt(1.0, 0, 3)


def test_adam_by_hand():
  b1, b2, eps, rate = 0.8, 0.9, 1e-3, 0.1
  tx = optim.adam(lambda count: rate, b1, b2, eps)
  params = {"w": jnp.array([1.0, -2.0])}
  state = tx.init(params)
  w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
  for t in range(1, 4):
    g = np.array([0.3, -0.1]) * t
    updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state)
    params = optax.apply_updates(params, updates)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    w -= rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_clip_is_over_the_whole_tree():
  grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
  # With a step as large as its gradient, what was clipped shows.
  plain = optax.chain(optax.clip_by_global_norm(1.0))
  want, _ = plain.update(grads, plain.init(grads))
  np.testing.assert_allclose(want["a"], [0.6], rtol=1e-6)
  tx = optim.adam(lambda count: 1.0, 0.0, 0.0, 1e8, clip_norm=1.0)
  got, _ = tx.update(grads, tx.init(grads))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g * -1e8, w, rtol=1e-5), got, want
  )
