"""Named layouts: how arrays lie over the device mesh while they are used.

Only this file and `placement` know the mesh. The rest of moejax speaks of
logical axes ("batch", "group", "expert", ...); a `Layout` is the table that
lays them over the mesh axes (data, expert, model).
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

# Mesh axes that one array axis is split over.
Over = str | tuple[str, ...] | None
_Fn = Callable[..., Any]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Layout:
  """How logical array axes lie over the mesh axes.

  Attributes:
    name: what reports call it.
    mesh_shape: devices along (data, expert, model); -1 takes what is left.
    rules: pairs of a logical axis and the mesh axis or axes it is split over,
      best made by `rules`.
  """

  name: str
  mesh_shape: tuple[int, int, int]
  rules: tuple[tuple[str, Over], ...]


# Most layouts differ in the shape of their mesh alone: an axis of one device
# splits nothing.
RULES = {
  # Every device is a data replica for the layers around the experts (sec. 3.1).
  # Experts come last, so that on its way to them a group leaves the last axis.
  "batch": ("data", "model", "expert"),
  "group": ("data", "model", "expert"),
  # Of tokens that have been sent to one of their expert's devices, and of those
  # that each of its devices has a copy of. By default what is left of "group"
  # without the axes of "expert", and without those of "mlp".
  "group_sent": ("data", "model"),
  "group_away": ("data",),
  # Of rows that meet a table of words: what is left of "batch" without "vocab".
  "batch_at_vocab": ("data", "model", "expert"),
  "expert": "expert",
  "embed": None,
  "mlp": "model",
  # The four gates of an LSTM are one axis: half of it would be two gates. And
  # few vocabularies divide.
  "hidden": None,
  "vocab": None,
  # No axis of its own: the largest axis that divides, of every parameter.
  "at_rest": None,
}


def rules(**changes: Over) -> tuple[tuple[str, Over], ...]:
  """Returns the rules of a layout: `RULES`, with changes.

  Groups lie as the batch does unless they are said to lie elsewhere.
  """
  table = RULES | changes
  left = changes.get("group", table["batch"])
  meet = [a for a in _axes(table["batch"]) if a not in _axes(table["vocab"])]
  follow = {"group": left, "batch_at_vocab": tuple(meet) or None}
  for name, to in (("group_sent", "expert"), ("group_away", "mlp")):
    left = tuple(axis for axis in _axes(left) if axis not in _axes(table[to]))
    follow[name] = left or None
  return tuple((table | follow | changes).items())


def _axes(over: Over) -> tuple[str, ...]:
  """Returns the mesh axes that one axis is split over."""
  return (over,) if isinstance(over, str) else over or ()


LAYOUTS = {
  layout.name: layout
  for layout in (
    # Pure data parallelism: every device holds every expert.
    Layout("replicated", (-1, 1, 1), rules()),
    # The paper's (sec. 3.1): one copy of each expert over all devices.
    Layout("expert", (1, -1, 1), rules()),
    # Two replicas of the expert set, each split over half the devices.
    Layout("data_expert", (2, -1, 1), rules()),
    # Two devices share an expert: each has half of its hidden units.
    Layout("expert_model", (1, -1, 2), rules()),
    # Data parallelism with one copy of the parameters, which lie split over all
    # devices, their optimiser state with them (see `placement.gathered`).
    Layout("fsdp", (-1, 1, 1), rules(at_rest="data")),
  )
}


def make_mesh(
  layout: Layout, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Arranges the devices (all of them by default) as the layout asks.

  A fixed axis of the layout shrinks to 1 on a single device, so that every
  layout runs from one device up. Devices lie in the order of the batch, those
  of a process together (a TPU may number them otherwise), the last axis being
  that of experts: rows that a process reads are its devices'.

  Raises:
    ValueError: the devices do not divide into the mesh shape, or parameters
      are split where they rest and where they are used.
  """
  devices = jax.devices() if devices is None else devices
  in_order = sorted(devices, key=lambda each: (each.process_index, each.id))
  devices = np.asarray(in_order)
  data, expert, model = abstract_mesh(layout, devices.size).axis_sizes
  devices = devices.reshape(data, model, expert).swapaxes(1, 2)
  return jax.sharding.Mesh(devices, MESH_AXES)


def abstract_mesh(layout: Layout, count: int) -> jax.sharding.AbstractMesh:
  """Returns the mesh of so many devices that need not be there.

  Raises:
    ValueError: as `make_mesh`.
  """
  shape = list(layout.mesh_shape) if count > 1 else [1, 1, 1]
  if -1 in shape:
    known = -math.prod(shape)
    if count % known:
      raise ValueError(
        f"layout {layout.name!r} splits the devices by {known}, which does"
        f" not divide the {count} at hand; choose another layout"
        f" ({', '.join(LAYOUTS)}) or a multiple of {known} devices."
      )
    shape[shape.index(-1)] = count // known
  if math.prod(shape) != count:
    raise ValueError(
      f"layout {layout.name!r} wants {math.prod(shape)} devices as"
      f" {tuple(shape)} over {MESH_AXES}, but there are {count};"
      " put -1 for the axis that may grow."
    )
  mesh = jax.sharding.AbstractMesh(tuple(shape), MESH_AXES)
  _check_gathers_whole(layout, mesh)
  return mesh


def _check_gathers_whole(layout: Layout, mesh: AnyMesh) -> None:
  table = RULES | dict(layout.rules)
  if not table["at_rest"]:
    return
  for axis in ("expert", "embed", "mlp", "hidden", "vocab"):
    parts = num_parts(table[axis], mesh)
    if parts > 1:
      raise ValueError(
        f"layout {layout.name!r} splits parameters over {table['at_rest']!r}"
        f" at rest, which are gathered whole for use, and {axis!r} over {parts}"
        " devices in use; choose one of the two."
      )


def num_parts(over: Over, mesh: AnyMesh) -> int:
  """Returns how many devices one array axis is split over."""
  return math.prod(mesh.shape[name] for name in _axes(over))


def platform() -> str:
  """Returns what the code being traced will run on: "cpu", "gpu" or "tpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


@contextlib.contextmanager
def use(layout: Layout, mesh: AnyMesh) -> Iterator[None]:
  """Makes `constrain` mean this layout on this mesh while code is traced."""
  is_abstract = isinstance(mesh, jax.sharding.AbstractMesh)
  enter = jax.sharding.use_abstract_mesh if is_abstract else jax.set_mesh
  with enter(mesh), nn.logical_axis_rules(layout.rules):
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
  check_divides(axes, x.shape, spec, mesh)
  return jax.lax.with_sharding_constraint(x, spec)


# How a user changes the size of a logical axis.
_SET_BY = {
  "batch": "choose batch_size, and microbatches, so that the rows are",
  "group": "choose group_size, and the batch, so that the number of groups is",
  "group_away": (
    "choose a smaller groups_together, so that the groups it leaves are"
  ),
  "expert": "choose num_experts, of each kind of experts,",
}


def check_divides(
  axes: Sequence[str | None],
  shape: Sequence[int],
  spec: jax.sharding.PartitionSpec,
  mesh: AnyMesh,
) -> None:
  """Says of which logical axis the size and the devices do not go together.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """
  for axis, size, over in zip(axes, shape, spec, strict=False):
    parts = num_parts(over, mesh)
    if size % parts:
      raise ValueError(
        f"the {axis!r} axis has {size} entries, which do not divide over"
        f" {parts} devices; {_SET_BY.get(axis, 'make it')} a multiple of"
        f" {parts}, or another layout ({', '.join(LAYOUTS)}), or fewer devices."
      )


def manual(fn: _Fn, in_axes: Any, out_axes: Any) -> _Fn:
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

  # The kernels that come with JAX do not say over which axes they vary.
  return jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=specs(in_axes),
    out_specs=specs(out_axes),
    check_vma=False,
  )


# Whether the code being traced runs once for each expert.
_IN_EXPERT = contextvars.ContextVar("in_expert", default=False)


def in_expert() -> bool:
  """Says whether the code being traced is a part of every expert.

  An expert, with all that it is made of, lives whole on one device (sec. 3.1).
  """
  return _IN_EXPERT.get()


def expert_axis(num_experts: int) -> str | None:
  """Returns the logical axis of so many experts; None where they are unsplit.

  That is within an expert, and for a lone one: every device keeps a copy.
  """
  return None if in_expert() or num_experts == 1 else "expert"


def splits(axis: str) -> bool:
  """Says whether the layout in use splits a logical axis over devices."""
  mesh = jax.sharding.get_abstract_mesh()
  over = dict(nn.get_logical_axis_rules()).get(axis)
  return not mesh.empty and num_parts(over, mesh) > 1


def splits_experts() -> bool:
  """Says whether the code being traced must keep to its part of the experts."""
  return in_expert() or splits("expert")


def over_experts(fn: _Fn, num_experts: int) -> _Fn:
  """Lifts fn(module, *args) to run once for each expert, on its own device.

  Every variable and argument gets an axis of experts in front, and every rng
  stream is split over it. Within, a group lies where its tokens have travelled
  to, and nothing else is split.
  """

  def run(module, *args):
    rules = dict(nn.get_logical_axis_rules())
    axis = expert_axis(num_experts)
    on_mesh = axis and not jax.sharding.get_abstract_mesh().empty
    mapped = nn.vmap(
      fn,
      variable_axes={True: 0},
      split_rngs={True: True},
      axis_size=num_experts,
      metadata_params={nn.PARTITION_NAME: axis},
      spmd_axis_name=rules.get("expert") if on_mesh else None,
    )
    away = rules.get("group_away")
    away = {"group": away, "group_sent": away, "expert": None}
    token = _IN_EXPERT.set(True)
    try:
      with nn.logical_axis_rules(tuple((rules | away).items())):
        return mapped(module, *args)
    finally:
      _IN_EXPERT.reset(token)

  return run
