"""Named layouts: the only file that knows what the device mesh looks like.

The rest of moejax speaks of logical axes ("batch", "group", "expert", ...); a
`Layout` is the table that lays them over the mesh axes (data, expert, model).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

MESH_AXES = ("data", "expert", "model")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How logical array axes lie over the mesh axes.

  Attributes:
    name: how configs call it.
    mesh_shape: devices along (data, expert, model); -1 takes what is left.
    rules: pairs of a logical axis and the mesh axis or axes it is split over.
  """

  name: str
  mesh_shape: tuple[int, int, int]
  rules: tuple[tuple[str, str | tuple[str, ...] | None], ...]


# Every device is a data replica for the layers around the experts (sec. 3.1),
# so batch and groups are split over both axes. "group_away" is the group axis
# of tokens that have travelled to their experts.
_SHARED = (
  ("batch", ("data", "expert")),
  ("group", ("data", "expert")),
  ("embed", None),
  ("hidden", "model"),
  ("mlp", "model"),
  ("vocab", "model"),
)

LAYOUTS = {
  layout.name: layout
  for layout in (
    # Pure data parallelism: every device holds every expert.
    Layout(
      "replicated",
      (-1, 1, 1),
      (*_SHARED, ("expert", None), ("group_away", ("data", "expert"))),
    ),
    # The paper's (sec. 3.1): one copy of each expert over all devices.
    Layout(
      "expert",
      (1, -1, 1),
      (*_SHARED, ("expert", "expert"), ("group_away", "data")),
    ),
    # Two replicas of the expert set, each split over half the devices.
    Layout(
      "data_expert",
      (2, -1, 1),
      (*_SHARED, ("expert", "expert"), ("group_away", "data")),
    ),
  )
}


def make_mesh(
  layout: Layout, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Arranges the devices (all of them by default) as the layout asks.

  A fixed axis of the layout shrinks to 1 on a single device, so that every
  layout runs from one device up.

  Raises:
    ValueError: the devices do not divide into the mesh shape.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  shape = list(layout.mesh_shape) if devices.size > 1 else [1, 1, 1]
  if -1 in shape:
    known = -math.prod(shape)
    if devices.size % known:
      raise ValueError(
        f"layout {layout.name!r} splits the devices by {known}, which does"
        f" not divide the {devices.size} at hand; choose another layout"
        f" ({', '.join(LAYOUTS)}) or a multiple of {known} devices."
      )
    shape[shape.index(-1)] = devices.size // known
  if math.prod(shape) != devices.size:
    raise ValueError(
      f"layout {layout.name!r} wants {math.prod(shape)} devices as"
      f" {tuple(shape)} over {MESH_AXES}, but there are {devices.size};"
      " put -1 for the axis that may grow."
    )
  return jax.sharding.Mesh(devices.reshape(shape), MESH_AXES)


@contextlib.contextmanager
def use(layout: Layout, mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Makes `constrain` mean this layout on this mesh while code is traced."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(layout.rules):
    yield


def constrain(x: Array, *axes: str | None) -> Array:
  """Asks for `x` to lie as its logical axes say; a no-op off the mesh.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = nn.logical_to_mesh_axes(axes)
  _check_divides(axes, x.shape, spec, mesh)
  return jax.lax.with_sharding_constraint(x, spec)


# How a user changes the size of a logical axis.
_SET_BY = {
  "batch": "choose batch_size",
  "group": "choose group_size, and the batch, so that the number of groups is",
  "expert": "choose num_experts",
}


def _check_divides(
  axes: Sequence[str | None],
  shape: Sequence[int],
  spec: jax.sharding.PartitionSpec,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> None:
  for axis, size, over in zip(axes, shape, spec, strict=False):
    names = (over,) if isinstance(over, str) else over or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      raise ValueError(
        f"the {axis!r} axis has {size} entries, which do not divide over"
        f" {parts} devices; {_SET_BY.get(axis, 'make it')} a multiple of"
        f" {parts}, or another layout ({', '.join(LAYOUTS)}), or fewer devices."
      )


def manual(
  fn: Callable[..., Any], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
  """`jax.shard_map` in logical axis names; `fn` itself off the mesh.

  Args:
    fn: works on one device's part of its arguments.
    in_axes: a tuple of logical axes per argument.
    out_axes: the same for the result, or a tree of such tuples.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return fn

  def is_axes(axes):
    # Not a named tuple, and not an empty dict.
    return type(axes) is tuple and all(
      axis is None or isinstance(axis, str) for axis in axes
    )

  def specs(tree):
    return jax.tree.map(nn.logical_to_mesh_axes, tree, is_leaf=is_axes)

  in_specs = specs(in_axes)
  used = {name for spec in jax.tree.leaves(in_specs) for name in _names(spec)}

  def on_device(*args):
    # What every device has a copy of is its own from here on, so that its
    # gradient is summed once, over the finished copies.
    def own(x, spec):
      whole = tuple(sorted(used - set(_names(spec))))
      return jax.lax.pcast(x, whole, to="varying") if whole else x

    return fn(*jax.tree.map(own, args, in_specs))

  return jax.shard_map(
    on_device, mesh=mesh, in_specs=in_specs, out_specs=specs(out_axes)
  )


def _names(spec: jax.sharding.PartitionSpec) -> Iterator[str]:
  """Yields the mesh axes of a spec."""
  for over in spec:
    yield from (over,) if isinstance(over, str) else over or ()


# Whether the code being traced runs once for each expert.
_IN_EXPERT = contextvars.ContextVar("in_expert", default=False)


def expert_axis() -> str | None:
  """Returns the logical axis of experts; None for those within an expert.

  An expert, with all that it is made of, lives whole on one device (sec. 3.1).
  """
  return None if _IN_EXPERT.get() else "expert"


def splits_experts() -> bool:
  """Says whether the code being traced must keep to its part of the experts."""
  if _IN_EXPERT.get():
    return True
  mesh = jax.sharding.get_abstract_mesh()
  axis = dict(nn.get_logical_axis_rules()).get("expert")
  return not mesh.empty and axis is not None and mesh.shape[axis] > 1


def over_experts(
  fn: Callable[..., Any], num_experts: int
) -> Callable[..., Any]:
  """Lifts fn(module, *args) to run once for each expert, on its own device.

  Every variable and argument gets an axis of experts in front, and every rng
  stream is split over it. Within, a group lies where its tokens have travelled
  to, and nothing else is split.
  """

  def run(module, *args):
    rules = dict(nn.get_logical_axis_rules())
    # A lone expert has no axis to be split along.
    axis = expert_axis() if num_experts > 1 else None
    on_mesh = axis and not jax.sharding.get_abstract_mesh().empty
    mapped = nn.vmap(
      fn,
      variable_axes={True: 0},
      split_rngs={True: True},
      axis_size=num_experts,
      metadata_params={nn.PARTITION_NAME: axis},
      spmd_axis_name=rules.get("expert") if on_mesh else None,
    )
    away = {"group": rules.get("group_away"), "expert": None}
    token = _IN_EXPERT.set(True)
    try:
      with nn.logical_axis_rules(tuple((rules | away).items())):
        return mapped(module, *args)
    finally:
      _IN_EXPERT.reset(token)

  return run


def shardings(boxed_tree: Any, layout: Layout, mesh: jax.sharding.Mesh) -> Any:
  """Returns the sharding of every leaf of a tree with logical axis names.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """

  def is_boxed(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  for leaf in jax.tree.leaves(boxed_tree, is_leaf=is_boxed):
    if is_boxed(leaf):
      spec = nn.logical_to_mesh_axes(leaf.names, layout.rules)
      _check_divides(leaf.names, leaf.value.shape, spec, mesh)
  return nn.logical_to_mesh_sharding(
    nn.get_partition_spec(boxed_tree), mesh, layout.rules
  )


def batch_sharding(
  layout: Layout, mesh: jax.sharding.Mesh, batch_size: int
) -> jax.sharding.NamedSharding:
  """Returns how a batch lies: its first axis over every data replica.

  Raises:
    ValueError: the rows do not divide over the replicas.
  """
  spec = nn.logical_to_mesh_axes(("batch",), layout.rules)
  _check_divides(("batch",), (batch_size,), spec, mesh)
  return jax.sharding.NamedSharding(mesh, spec)
