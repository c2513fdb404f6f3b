"""Named layouts: how arrays lie over the device mesh while they are used.

Only this file and `partition` know the mesh. The rest of moejax speaks of
logical axes ("batch", "group", "expert", ...); a `Layout` is the table that
lays them over the mesh axes (data, expert, model).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

MESH_AXES = ("data", "expert", "model")

# Mesh axes that one array axis is split over.
Over = str | tuple[str, ...] | None
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
  # Experts come last, so that groups that are dispatched leave the last axis.
  "batch": ("data", "model", "expert"),
  "group": ("data", "model", "expert"),
  # Of tokens on one of their expert's devices, and of those that each of its
  # devices has a copy of. By default what is left of "group" without the axes
  # of "expert", and without those of "mlp".
  "group_dispatched": ("data", "model"),
  "group_replicated": ("data",),
  # Of rows that meet a table of words: what is left of "batch" without "vocab".
  "batch_at_vocab": ("data", "model", "expert"),
  "expert": "expert",
  "embed": None,
  "mlp": "model",
  # The four gates of an LSTM are one axis: half of it would be two gates. And
  # few vocabularies divide.
  "hidden": None,
  # Heads of attention, one after the other; and layers that repeat.
  "heads": None,
  "layers": None,
  "vocab": None,
  # Of every parameter between uses: the largest axis that divides.
  "param_shards": None,
}


def rules(**changes: Over) -> tuple[tuple[str, Over], ...]:
  """Returns the rules of a layout: `RULES`, with changes.

  Groups lie as the batch does unless they are said to lie elsewhere.
  """
  table = RULES | changes

  def without(over, axis):
    return tuple(a for a in _axes(over) if a not in _axes(table[axis])) or None

  group = changes.get("group", table["batch"])
  dispatched = without(group, "expert")
  follow = {
    "group": group,
    "group_dispatched": dispatched,
    "group_replicated": without(dispatched, "mlp"),
    "batch_at_vocab": without(table["batch"], "vocab"),
  }
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
    # devices, their optimizer state with them (see `zero3`).
    Layout("fsdp", (-1, 1, 1), rules(param_shards="data")),
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
      are split both between uses and in use.
  """
  devices = jax.devices() if devices is None else devices
  in_order = sorted(devices, key=lambda each: (each.process_index, each.id))
  data, expert, model = abstract_mesh(layout, len(in_order)).axis_sizes
  in_order = np.asarray(in_order).reshape(data, model, expert)
  return jax.sharding.Mesh(in_order.swapaxes(1, 2), MESH_AXES)


def abstract_mesh(layout: Layout, count: int) -> jax.sharding.AbstractMesh:
  """Returns the mesh of so many devices, not at hand; errors as `make_mesh`."""
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
  table = RULES | dict(layout.rules)
  for axis in ("expert", "embed", "mlp", "hidden", "heads", "layers", "vocab"):
    if table["param_shards"] and num_parts(table[axis], mesh) > 1:
      raise ValueError(
        f"layout {layout.name!r} splits parameters over"
        f" {table['param_shards']!r} between uses, and {axis!r} over"
        f" {num_parts(table[axis], mesh)} devices in use; choose one of the"
        " two."
      )
  return mesh


def num_parts(over: Over, mesh: AnyMesh) -> int:
  """Returns how many devices one array axis is split over."""
  return math.prod(mesh.shape[name] for name in _axes(over))


def platform() -> str:
  """Returns what the code being traced will run on: "cpu", "gpu" or "tpu"."""
  return _device().platform


def device_kind() -> str:
  """Returns the kind of the device that `platform` tells of."""
  return _device().device_kind


def _device() -> Any:
  """Returns the device of the mesh in use, or the first one; it may be fake."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0] if device is None else device


# -- while code is traced -----------------------------------------------------


@contextlib.contextmanager
def use(layout: Layout, mesh: AnyMesh) -> Iterator[None]:
  """Makes `constrain` mean this layout on this mesh while code is traced."""
  is_abstract = isinstance(mesh, jax.sharding.AbstractMesh)
  enter = jax.sharding.use_abstract_mesh if is_abstract else jax.set_mesh
  with enter(mesh), nn.logical_axis_rules(layout.rules):
    yield


# How groups lie by the types of the user's arrays, where no rule says it.
_KNOWN = contextvars.ContextVar("known", default={})  # noqa: B039
# Whether the code being traced runs once for each expert.
_IN_EXPERT = contextvars.ContextVar("in_expert", default=False)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)


def known_axes(axes: Mapping[str, Over]) -> contextlib.AbstractContextManager:
  """Says, while code is traced, how logical axes lie that no rule names."""
  return _set(_KNOWN, axes)


def _rules() -> dict[str, Over]:
  """Returns the rules in use, and how groups are known to lie without any."""
  return {**_KNOWN.get(), **dict(nn.get_logical_axis_rules())}


def auto_axes(mesh: AnyMesh) -> tuple[str, ...]:
  """Returns the mesh axes over which the compiler splits arrays.

  Those are not the ones that are manual: within `jax.shard_map` a device has
  its own part of an array, and nothing more is to be said about it.
  """
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in types if kind == AxisType.Auto)


def _is_named(axis: str | None, mesh: AnyMesh) -> bool:
  """Says whether a rule tells how an axis lies on this mesh.

  One that splits it over axes which the mesh has not, or which are manual,
  tells nothing.
  """
  auto, table = auto_axes(mesh), _rules()
  over = _axes(table.get(axis))
  return bool(auto) and axis in table and (not over or bool({*over} & {*auto}))


def spec_of(axes: Sequence[str | None], mesh: AnyMesh) -> PartitionSpec:
  """Returns which axes of the mesh each logical axis is split over."""
  auto, spec = auto_axes(mesh), []
  for over in nn.logical_to_mesh_axes(axes, tuple(_rules().items())):
    over = tuple(name for name in _axes(over) if name in auto)
    spec.append(over if len(over) > 1 else over[0] if over else None)
  return PartitionSpec(*spec)


def constrain(x: Array, *axes: str | None) -> Array:
  """Asks for `x` to lie as its logical axes say; a no-op off the mesh.

  Only what the rules name is asked for: of a layout that is everything, of
  rules of the user's own what they name, and without rules nothing. ValueError
  where an axis does not divide by the devices it is split over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # A layout says of all axes how they lie, of those without a name too.
  is_layout = RULES.keys() <= _rules().keys()
  asked = [_is_named(axis, mesh) or (is_layout and not axis) for axis in axes]
  if not any(asked):
    return x
  spec = spec_of(axes, mesh)
  check_divides(axes, x.shape, spec, mesh)
  free = PartitionSpec.UNCONSTRAINED
  spec = [o if yes else free for o, yes in zip(spec, asked, strict=True)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def vary_alike(*trees: Any) -> tuple[Any, ...]:
  """Lets types of arrays say that they vary over devices as any of them does.

  A no-op but within `jax.shard_map`, whose loops take one type alone, and which
  wants of a backward pass the types of the forward pass.
  """

  def varying(leaf):
    return jax.typeof(leaf).manual_axis_type.varying

  every = frozenset().union(*map(varying, jax.tree.leaves(trees)))

  def cast(leaf):
    missing = tuple(every - varying(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, trees)


def is_local(x: Any) -> bool:
  """Says whether no compiler splits `x`: a device has all that there is.

  So it is without a mesh, and within `jax.shard_map`, for which a device's
  part is the whole.
  """
  # The mesh in use, or else the one that arrays say they lie on.
  mesh = jax.sharding.get_abstract_mesh()
  for leaf in jax.tree.leaves(x):
    if mesh.empty:
      mesh = jax.typeof(leaf).sharding.mesh
  return (
    not auto_axes(mesh)
    or AxisType.Manual in mesh.axis_types
    or (mesh.size == 1 and not _rules())
  )


def is_known(axis: str, x: Any) -> bool:
  """Says whether it is known, while code is traced, how an axis of `x` lies.

  It is not on a mesh of the user's own without a rule for it: there the
  compiler alone decides.
  """
  return _is_named(axis, jax.sharding.get_abstract_mesh()) or is_local(x)


# How a user changes the size of a logical axis.
_SET_BY = {
  "batch": "choose batch_size, and microbatches, so that the rows are",
  "group": "choose group_size, and the batch, so that the number of groups is",
  "group_replicated": (
    "choose a smaller groups_together, so that the groups it leaves are"
  ),
  "expert": "choose num_experts, of each kind of experts,",
}


def check_divides(
  axes: Sequence[str | None],
  shape: Sequence[int],
  spec: PartitionSpec,
  mesh: AnyMesh,
) -> None:
  """Raises ValueError where an axis does not divide by its devices."""
  for axis, size, over in zip(axes, shape, spec, strict=False):
    parts = num_parts(over, mesh)
    if size % parts:
      raise ValueError(
        f"the {axis!r} axis has {size} entries, which do not divide over"
        f" {parts} devices; {_SET_BY.get(axis, 'make it')} a multiple of"
        f" {parts}, or another layout ({', '.join(LAYOUTS)}), or fewer devices."
      )


def split_over(axis: str) -> Over:
  """Returns the mesh axes that a logical axis is split over; None for none."""
  mesh = jax.sharding.get_abstract_mesh()
  (over,) = spec_of((axis,), mesh)
  return over if num_parts(over, mesh) > 1 else None


def num_devices(axis: str) -> int:
  """Returns over how many devices the layout in use splits a logical axis."""
  return num_parts(split_over(axis), jax.sharding.get_abstract_mesh())


def splits(axis: str) -> bool:
  """Says whether the layout in use splits a logical axis over devices."""
  return split_over(axis) is not None


def in_expert() -> bool:
  """Says whether the code being traced is a part of every expert.

  An expert, with all that it is made of, lives whole on one device (sec. 3.1).
  """
  return _IN_EXPERT.get()


def expert_axis(num_experts: int) -> str | None:
  """Returns the logical axis of so many experts; None where they are unsplit.

  That is within an expert, and for a single one: every device has a copy.
  """
  return None if in_expert() or num_experts == 1 else "expert"


def over_experts(
  fn: Callable[..., Any], num_experts: int
) -> Callable[..., Any]:
  """Lifts fn(module, *args) to run once for each expert, on its own device.

  Every variable and argument gets an axis of experts in front, and every rng
  stream is split over it. Within, a group lies where its tokens have
  arrived, and nothing else is split.
  """

  def run(module, *args):
    axis = expert_axis(num_experts)
    mapped = nn.vmap(
      fn,
      variable_axes={True: 0},
      split_rngs={True: True},
      axis_size=num_experts,
      metadata_params={nn.PARTITION_NAME: axis},
      spmd_axis_name=split_over(axis) if axis else None,
    )
    inside = dict(nn.get_logical_axis_rules())
    for name in ("group", "group_dispatched", "expert"):
      inside.pop(name, None)
    if "group_replicated" in inside:
      there = inside["group_replicated"]
      inside |= {"group": there, "group_dispatched": there, "expert": None}
    rules = nn.logical_axis_rules(tuple(inside.items()))
    with _set(_IN_EXPERT, True), known_axes({}), rules:
      return mapped(module, *args)

  return run


# -- where parameters and batches lie between uses -----------------------------


class LogicalAxes(nn.LogicallyPartitioned):
  """A parameter with the logical names of its axes, in any program of Flax."""

  # Else a dataclass would compare the arrays.
  __eq__ = nn.LogicallyPartitioned.__eq__

  def unbox(self, apply_constraint: bool = True) -> Any:
    """Takes the names off; where rules are set the value lies as they say."""
    if not apply_constraint or not nn.get_logical_axis_rules():
      return self.value
    return constrain(self.value, *self.names)

  # The axis of a stack is split over nothing if it has no name.

  def add_axis(self, index: int, params: Mapping[str, Any]) -> "LogicalAxes":
    return super().add_axis(index, {nn.PARTITION_NAME: None, **params})

  def remove_axis(self, index: int, params: Mapping[str, Any]) -> "LogicalAxes":
    return super().remove_axis(index, {nn.PARTITION_NAME: None, **params})

  def to_nnx_metadata(self) -> dict[str, Any]:
    """Says what a variable of nnx is to know.

    By itself nnx would lay it out at once, and fail where no mesh is in use, or
    one without axes of these names.
    """
    return {
      "value": self.unbox(),
      "out_sharding": self.names,
      "sharding_rules": (),
      "eager_sharding": False,
    }


def with_axes(
  init: nn.initializers.Initializer, *names: str | None
) -> nn.initializers.Initializer:
  """Lets an initializer return `LogicalAxes` of these names."""
  return lambda *args: LogicalAxes(init(*args), names)


def unbox(boxed_tree: Any) -> Any:
  """Takes the logical names off.

  Within `use` flax's own would ask for every parameter to lie as it is used,
  whole where it otherwise lies in parts.
  """
  with nn.logical_axis_rules(()):
    return nn.unbox(boxed_tree)


def zero3(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Lets fn(params, ...) take parameters as they lie between uses.

  Where a layout has param_shards ("fsdp") each is gathered where `fn` uses it,
  and again in the backward pass (ZeRO-3, 1910.02054): between the two only the
  parts are kept, and every gradient is summed up in parts. So no more than the
  parameters at work need be whole on a device. Elsewhere this is `fn` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  over = dict(nn.get_logical_axis_rules()).get("param_shards")
  if mesh.empty or num_parts(over, mesh) == 1:
    return fn

  def keep(primitive, *_, **params):
    if primitive.name == "sharding_constraint":
      return any(params["sharding"].spec)
    # Cheaper to do again than to keep.
    again = ("convert_element_type", "reshape", "transpose")
    return primitive.name not in again

  def constrained(params, spec):
    return jax.tree.map(
      lambda w: jax.lax.with_sharding_constraint(w, spec(w.shape)), params
    )

  def run(params, *args):
    return fn(constrained(params, lambda _: PartitionSpec()), *args)

  def from_parts(params, *args):
    # Else XLA gathers all of them before a loop over microbatches.
    params, args = jax.lax.optimization_barrier((params, args))
    parts = constrained(params, lambda shape: _shard_spec(shape, over, mesh))
    return jax.checkpoint(run, policy=keep)(parts, *args)

  return from_parts


def _shard_spec(
  shape: Sequence[int], over: Over, mesh: AnyMesh
) -> PartitionSpec:
  """Splits the largest axis that divides, so that parts are thick."""
  parts = num_parts(over, mesh)
  fit = [size * (size % parts == 0) for size in shape]
  spec = [None] * len(shape)
  if any(fit):
    spec[np.argmax(fit)] = over
  return PartitionSpec(*spec)


def shardings(boxed_tree: Any, layout: Layout, mesh: AnyMesh) -> Any:
  """Returns the sharding between uses of each leaf of a tree of `LogicalAxes`.

  ValueError where an axis does not divide by the devices it is split over.
  """
  over = dict(layout.rules).get("param_shards")

  def is_boxed(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  def of_leaf(leaf):
    shape = (leaf.value if is_boxed(leaf) else leaf).shape
    spec = PartitionSpec()
    if num_parts(over, mesh) > 1:
      spec = _shard_spec(shape, over, mesh)
    elif is_boxed(leaf):
      spec = nn.logical_to_mesh_axes(leaf.names, layout.rules)
      check_divides(leaf.names, shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree.map(of_leaf, boxed_tree, is_leaf=is_boxed)


def batch_sharding(
  layout: Layout, mesh: jax.sharding.Mesh, batch_size: int
) -> NamedSharding:
  """Returns how a batch lies: its first axis over every data replica.

  ValueError where the rows do not divide over the replicas.
  """
  spec = nn.logical_to_mesh_axes(("batch",), layout.rules)
  check_divides(("batch",), (batch_size,), spec, mesh)
  return NamedSharding(mesh, spec)


def device_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns how an array with one entry a device lies."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def whole_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns how an array lies that every device has whole."""
  return NamedSharding(mesh, PartitionSpec())
