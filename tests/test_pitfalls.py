"""What popular code does otherwise is told from the paper by these tests."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gatings import KEY, K, agree, decide, draw, noise_of

from experiments import pitfalls
from moejax import losses

RIGHT = pitfalls.VARIANTS["as in the paper"].gate
GATES = {n: v.gate for n, v in pitfalls.VARIANTS.items() if v.gate != RIGHT}


@pytest.mark.parametrize("name", ["right", *GATES])
def test_the_loops_tell_every_gate_from_the_papers(name):
  """In the place of the right gate each fails the comparison of test_gating."""
  logits, noise_std, mask = draw(3, masked=True)
  got = GATES.get(name, RIGHT)(logits, noise_std, K, KEY, mask)
  noise = noise_of(got, logits, noise_std)
  want = decide("noisy_top_k", logits, noise, noise_std, mask)
  fails = contextlib.nullcontext()
  if name in GATES:
    fails = pytest.raises(AssertionError)
  with fails:
    agree(got, want)


def test_a_root_has_no_gradient_at_perfect_balance():
  even, uneven = jnp.ones(8), jnp.arange(8.0)
  assert jnp.isnan(jax.grad(pitfalls.std_over_mean)(even)).all()
  np.testing.assert_array_equal(jax.grad(losses.cv_squared)(even), 0)
  np.testing.assert_allclose(
    pitfalls.std_over_mean(uneven), losses.cv_squared(uneven), rtol=1e-5
  )
