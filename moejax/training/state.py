"""What training changes, created straight into its sharding."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moejax import sharding


class TrainState(NamedTuple):
  """Holds no random key: each step's is folded from the seed and the step."""

  step: Int[Array, ""]
  params: Any
  opt_state: Any


# (layout, mesh of it) -> the abstract state there.
InLayout = Callable[[sharding.Layout, sharding.AnyMesh], TrainState]


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


def check_fits(
  abstract: TrainState,
  in_layout: InLayout,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> None:
  """Refuses a state that a device cannot hold, activations left aside.

  The ValueError names the bytes that it takes with gradients, those that the
  device has, and the layouts that would fit, with more devices if need be.
  """
  has = device_memory(mesh.local_devices[0])
  needs = with_gradients(abstract)
  if needs <= has:
    return
  # Double the devices until some layouts fit, or until it is of no help.
  layouts = {**sharding.LAYOUTS, layout.name: layout}
  count, least, before = mesh.size, math.inf, math.inf
  while True:
    takes = {}
    for name, other in layouts.items():
      # One that these devices, or the model, do not divide.
      with contextlib.suppress(ValueError):
        there = in_layout(other, sharding.abstract_mesh(other, count))
        takes[name] = with_gradients(there)
    least = min(takes.values(), default=math.inf)
    if least <= has or least >= before:
      break
    before = least
    # Fewer could not do, if all were split.
    count *= 2 ** math.ceil(math.log2(least / has))
  fits = " or ".join(repr(name) for name in takes if takes[name] <= has)
  if fits and count == mesh.size:
    advice = f"config.layout {fits} would fit"
  else:
    ways = [f"{count}, on which config.layout {fits} would fit"] if fits else []
    ways.append("a smaller model")
    if _of_experts(abstract.opt_state) > _of_experts(abstract.params):
      ways.append("config.optimizer.kind 'factored_adam'")
    here = f"no layout fits on {mesh.size} device(s)"
    advice = f"{here}; take {', or '.join(ways)}"
  raise ValueError(
    f"parameters, gradients and optimizer state take {needs:,} bytes of each"
    f" device in layout {layout.name!r}, which has {has:,}; {advice}."
  )


def with_gradients(abstract: TrainState) -> int:
  """Returns the bytes that a state and gradients take of one device."""
  return bytes_per_device((abstract, abstract.params))


def _of_experts(tree: Any) -> int:
  leaves = jax.tree.leaves_with_path(tree)
  return bytes_per_device(
    [leaf for path, leaf in leaves if "experts" in jax.tree_util.keystr(path)]
  )


def bytes_per_device(tree: Any) -> int:
  """Returns what a tree of arrays, abstract or not, takes of one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


# What a container may take, by the two versions of Linux's control groups.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


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


def shardings(state: TrainState) -> TrainState:
  """Returns the sharding of every leaf of a state, abstract or not."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def _init(model, tx, batch, seed):
  zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in batch.items()}
  params = model.init(jax.random.key(seed), zeros, method="loss")["params"]
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
