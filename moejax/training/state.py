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


# (layout, mesh of it) -> the target there.
InLayout = Callable[[sharding.Layout, sharding.AnyMesh], TrainState]


def abstract_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  layout: sharding.Layout,
  mesh: sharding.AnyMesh,
) -> TrainState:
  """Returns the state's shapes, types and shardings; allocates nothing.

  A checkpoint is restored into it, on whatever mesh it was saved.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """
  with sharding.use(layout, mesh):
    boxed = jax.eval_shape(lambda: _init(model, tx, batch, 0))
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    nn.unbox(boxed),
    sharding.shardings(boxed, layout, mesh),
  )


def check_fits(
  wanted: TrainState,
  in_layout: InLayout,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> None:
  """Refuses what a device cannot hold, whatever activations need besides.

  Args:
    wanted: the target in `layout` on `mesh`.
    in_layout: returns the target in another one.
    layout: what was asked for.
    mesh: that it is laid over.

  Raises:
    ValueError: names the bytes of parameters, gradients and optimiser state on
      a device, those that it has, and the layouts in which they would fit, with
      more devices where these are too few.
  """
  has = device_memory(mesh.local_devices[0])
  needs = with_gradients(wanted)
  if needs <= has:
    return
  layouts = {**sharding.LAYOUTS, layout.name: layout}
  count, fits = _where_it_fits(in_layout, layouts, mesh.size, has)
  names = f"config.layout {' or '.join(map(repr, fits))} would fit"
  if fits and count == mesh.size:
    way_out = names
  else:
    ways = [f"{count}, on which {names}"] if fits else []
    ways.append("a smaller model")
    if _of_experts(wanted.opt_state) > _of_experts(wanted.params):
      ways.append("config.optimizer.kind 'factored_adam'")
    here = f"no layout fits on {mesh.size} device(s)"
    way_out = f"{here}; take {', or '.join(ways)}"
  raise ValueError(
    f"parameters, gradients and optimiser state take {needs:,} bytes of each"
    f" device in layout {layout.name!r}, which has {has:,}; {way_out}."
  )


def _where_it_fits(
  in_layout: InLayout,
  layouts: Mapping[str, sharding.Layout],
  count: int,
  has: int,
) -> tuple[int, list[str]]:
  """Doubles the devices until some layouts fit; says how many, and which.

  None where more devices are of no help.
  """
  before = math.inf
  while True:
    takes = {}
    for name, layout in layouts.items():
      # One that these devices, or the model, do not divide.
      with contextlib.suppress(ValueError):
        there = in_layout(layout, sharding.abstract_mesh(layout, count))
        takes[name] = with_gradients(there)
    least = min(takes.values(), default=math.inf)
    if least <= has or least >= before:
      return count, [name for name in takes if takes[name] <= has]
    before = least
    # Fewer could not do, if all were split.
    count *= 2 ** math.ceil(math.log2(least / has))


def with_gradients(target: TrainState) -> int:
  """Returns what a state and gradients take of one device."""
  return bytes_per_device((target, target.params))


def _of_experts(tree: Any) -> int:
  """Returns what experts take of one device."""
  leaves = jax.tree.leaves_with_path(tree)
  return bytes_per_device(
    [leaf for path, leaf in leaves if "experts" in jax.tree_util.keystr(path)]
  )


def bytes_per_device(tree: Any) -> int:
  """Returns what the arrays of a tree take of one device.

  Args:
    tree: of arrays, or of shapes with their shardings.
  """

  def take(leaf):
    part = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(part) * leaf.dtype.itemsize

  return sum(map(take, jax.tree.leaves(tree)))


def device_memory(device: jax.Device) -> int:
  """Returns the bytes of a device here; a CPU's share of the machine's."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return _machine_memory() // len(jax.local_devices(backend=device.platform))


# What a container may take, by the two versions of Linux's control groups.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def _machine_memory() -> int:
  sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for path in _LIMITS:
    # No such file, or "max" in it.
    with contextlib.suppress(OSError, ValueError):
      sizes.append(int(pathlib.Path(path).read_text()))
  return min(sizes)


def create(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  seed: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Creates the first state.

  Parameters and optimiser state come out of one jitted function in their own
  shardings: no device ever holds a full copy of a split array.
  """
  where = shardings(abstract_state(model, tx, batch, layout, mesh))
  with sharding.use(layout, mesh):
    init = jax.jit(
      lambda: sharding.unbox(_init(model, tx, batch, seed)),
      out_shardings=where,
    )
    return init()


def shardings(state: TrainState) -> TrainState:
  """Returns the sharding of every leaf of a state or target."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def _init(model, tx, batch, seed):
  zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in batch.items()}
  params = model.init(jax.random.key(seed), zeros, method="loss")["params"]
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
