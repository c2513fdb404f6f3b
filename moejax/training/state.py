"""What training changes, created straight into its sharding."""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moejax import sharding

# What a container may take, by the two versions of Linux's control groups.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


class TrainState(NamedTuple):
  """Holds no random key: each step's is folded from the seed and the step."""

  step: Int[Array, ""]
  params: Any
  opt_state: Any


def _init(model, tx, batch, seed):
  zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in batch.items()}
  params = model.init(jax.random.key(seed), zeros, method="loss")["params"]
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  layout: sharding.Layout,
  mesh: sharding.AnyMesh,
) -> TrainState:
  """Returns the state's shapes, types and shardings; allocates nothing.

  A checkpoint is restored into it, on whatever mesh it was saved. ValueError
  where an axis does not divide by the devices it is split over.
  """
  with sharding.use(layout, mesh):
    boxed = jax.eval_shape(lambda: _init(model, tx, batch, 0))
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
    nn.unbox(boxed),
    sharding.shardings(boxed, layout, mesh),
  )


def create(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  seed: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Creates the first state, by one program, in its own shardings.

  So no device ever holds a full copy of a split array.
  """
  abstract = abstract_state(model, tx, batch, layout, mesh)

  def init():
    return sharding.unbox(_init(model, tx, batch, seed))

  with sharding.use(layout, mesh):
    return jax.jit(init, out_shardings=shardings(abstract))()


def with_optimizer(
  state: TrainState,
  tx: optax.GradientTransformation,
  abstract: TrainState,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns a state whose optimizer has its first state, as laid out there."""
  with sharding.use(layout, mesh):
    begin = jax.jit(tx.init, out_shardings=shardings(abstract).opt_state)
    return state._replace(opt_state=begin(state.params))


def shardings(state: TrainState) -> TrainState:
  """Returns the sharding of every leaf of a state, abstract or not."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def bytes_per_device(tree: Any) -> int:
  """Returns what a tree of arrays, abstract or not, takes of one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def with_gradients(abstract: TrainState) -> int:
  """Returns the bytes that a state and gradients take of one device."""
  return bytes_per_device((abstract, abstract.params))


def device_memory(device: jax.Device) -> int:
  """Returns the bytes of a device here; a CPU's share of the machine's."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for path in _LIMITS:
    # No such file, or "max" in it.
    with contextlib.suppress(OSError, ValueError):
      sizes.append(int(pathlib.Path(path).read_text()))
  return min(sizes) // len(jax.local_devices(backend=device.platform))
