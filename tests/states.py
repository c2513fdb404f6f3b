"""Small states to save, and checkpoints of them."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.training import state
from moejax.training.checkpoint import Checkpoints


def on(devices):
  mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
  return NamedSharding(mesh, PartitionSpec("x"))


def make(step, devices=8):
  def put(array):
    return jax.device_put(array, on(devices))

  return state.TrainState(
    jnp.int32(step),
    {"w": put(jnp.arange(16.0) * step)},
    ({"m": put(jnp.arange(8.0) - step)},),
  )


def target(devices=8):
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
    make(0, devices),
  )


def save(checkpoints, step, perplexity=None):
  checkpoints.save(make(step), step, {"data": {"at": step}}, perplexity)


def fill(directory, steps, keep=2):
  """Saves steps of (step, perplexity)."""
  checkpoints = Checkpoints(directory, keep)
  for step, perplexity in steps:
    save(checkpoints, step, perplexity)
  checkpoints.close()
  return Checkpoints(directory, keep)


def assert_is(restored, step):
  assert restored.progress == {"data": {"at": step}}
  jax.tree.map(np.testing.assert_array_equal, restored.state, make(step))


@contextlib.contextmanager
def files_of_at_most(size):
  """What the end of a disk does, at a place of our choice."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
