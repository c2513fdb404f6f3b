"""Everything in training goes through optax; whole runs share what they can."""

import functools

import program
import pytest


@pytest.fixture(autouse=True, scope="module")
def _standard(standard_promotion):
  del standard_promotion


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  return program.plain_environment(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def start(environment, small_flags):
  """start(workdir, *flags): `moejax train` in a process of its own."""
  return functools.partial(program.start, environment, small_flags)


@pytest.fixture(scope="session")
def start_several(environment, small_flags):
  """start_several(workdir, processes, devices, *flags)."""
  return functools.partial(program.start_several, environment, small_flags)


@pytest.fixture(scope="session")
def whole(start, tmp_path_factory):
  """A run that nothing disturbed: its workdir and what it printed."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  (output,) = program.end_well(start(workdir))
  return workdir, output
