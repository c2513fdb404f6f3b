"""One process among none: what is agreed with nobody, and what is refused."""

import os

import jax
import numpy as np
import pytest

from moejax import sharding
from moejax.training import processes, rendezvous


def test_alone_nobody_is_asked():
  assert not processes.several()
  assert processes.first()
  assert processes.any_of_us(True) and not processes.any_of_us(False)
  processes.check_same("whatever", "config")
  assert processes.first_then_others(lambda: 7) == 7


@pytest.mark.parametrize("error", [OSError("no room"), ValueError("no")])
def test_what_the_first_raises_is_raised(error):
  def fail():
    raise error

  with pytest.raises(type(error), match=str(error)):
    processes.first_does(fail)


@pytest.mark.parametrize("layout", sharding.LAYOUTS)
def test_a_vote_has_an_entry_a_device(layout):
  mesh = sharding.make_mesh(sharding.LAYOUTS[layout])
  for here in (False, True):
    votes = processes.vote(here, mesh)
    assert votes.shape == (jax.device_count(),)
    assert {shard.data.shape for shard in votes.addressable_shards} == {(1,)}
    np.testing.assert_array_equal(votes, int(here))


@pytest.mark.parametrize(
  "given, environment, message",
  [
    (("a:1", 2, None), {}, "--process_id is missing.*JAX_PROCESS_ID"),
    ((None, None, 0), {}, "--coordinator_address is missing"),
    ((None, 2, 0), {}, "--coordinator_address is missing"),
    (("localhost", 2, 0), {}, "coordinator_address is 'localhost'; give"),
    (("localhost:x", 2, 0), {}, "is 'localhost:x'; .* localhost:12345"),
    (("a:1", 2, 2), {}, "process_id=2, but the 2 .* from 0 to 1"),
    (("a:1", 2, -1), {}, "process_id=-1, but"),
    ((None, None, None), {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID is 'x'"),
    (("a:1", 2, None), {"JAX_PROCESS_ID": "3"}, "process_id=3, but"),
  ],
)
def test_what_does_not_fit_is_refused(monkeypatch, given, environment, message):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message):
    processes.join(*given)


@pytest.mark.parametrize(
  "environment, want",
  [
    ({}, None),
    # Eight on a machine, which see all its devices.
    ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, None),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, []),
    ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_GPUS_PER_TASK": "1"}, []),
    ({"JAX_LOCAL_DEVICE_IDS": "3", "SLURM_GPUS_PER_TASK": "1"}, None),
  ],
)
def test_devices_that_slurm_gave_to_a_process_are_its_own(
  monkeypatch, environment, want
):
  """JAX would take one of them."""
  for name in [n for n in os.environ if n.startswith("SLURM_")]:
    monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  given = {}
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **options: given.update(options)
  )
  monkeypatch.setattr(rendezvous, "meet", lambda *args: None)
  processes.join("localhost:1", 2, 0)
  assert given["local_device_ids"] == want


def test_nothing_given_is_alone(monkeypatch):
  for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    monkeypatch.delenv(f"JAX_{name}", raising=False)
  monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
  processes.join()
  assert not jax.distributed.is_initialized()


def test_an_error_of_jax_alone_is_an_error():
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match="peer"),
    processes.ends_with_the_others(lambda: "step 3"),
  ):
    raise jax.errors.JaxRuntimeError("peer")
