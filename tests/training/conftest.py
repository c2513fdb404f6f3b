"""optax raises a float to an integer step count: strict promotion cannot be."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield
