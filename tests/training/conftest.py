"""Everything in training goes through optax."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _standard(standard_promotion):
  del standard_promotion
