"""Everything in training goes through optax; whole runs share what they can."""

import functools

import program
import pytest


@pytest.fixture(autouse=True, scope="module")
def _standard(standard_promotion):
  del standard_promotion


@pytest.fixture(scope="session")
def start_several(environment, small_flags):
  """start_several(workdir, processes, devices, *flags)."""
  return functools.partial(program.start_several, environment, small_flags)
