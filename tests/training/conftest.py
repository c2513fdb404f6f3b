"""Everything in training goes through optax; whole runs share what they can."""

import functools

import program
import pytest


@pytest.fixture(autouse=True, scope="module")
def _standard(standard_promotion):
  del standard_promotion


@pytest.fixture(scope="session")
def environment():
  return program.plain_environment()


@pytest.fixture(scope="session")
def start(environment, small_flags):
  """start(workdir, *flags): `moejax train` in a process of its own."""
  return functools.partial(program.start, environment, small_flags)


@pytest.fixture(scope="session")
def start_several(environment, small_flags):
  """start_several(workdir, processes, devices, *flags)."""
  return functools.partial(program.start_several, environment, small_flags)


@pytest.fixture(scope="session")
def whole(start, shared):
  """A run that nothing disturbed: its workdir and what it printed."""

  def train(folder):
    (output,) = program.end_well(start(folder / "run"))
    (folder / "output.txt").write_text(output)

  folder = shared("whole", train)
  return folder / "run", (folder / "output.txt").read_text()
