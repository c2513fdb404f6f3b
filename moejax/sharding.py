"""Named layouts: how arrays lie over the device mesh while they are used.

Only this file knows the mesh. The rest of moejax speaks of
logical axes ("batch", "group", "expert", ...); a `Layout` is the table that
lays them over the mesh axes (data, expert, model).
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import custom_partitioning
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
  "vocab": None,
  # No axis of its own: the largest axis that divides, of every parameter.
  "param_shards": None,
}


def rules(**changes: Over) -> tuple[tuple[str, Over], ...]:
  """Returns the rules of a layout: `RULES`, with changes.

  Groups lie as the batch does unless they are said to lie elsewhere.
  """
  table = RULES | changes
  left = changes.get("group", table["batch"])
  meet = [a for a in _axes(table["batch"]) if a not in _axes(table["vocab"])]
  follow = {"group": left, "batch_at_vocab": tuple(meet) or None}
  for name, to in (("group_dispatched", "expert"), ("group_replicated", "mlp")):
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
    # devices, their optimiser state with them (see `zero3`).
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
  if not table["param_shards"]:
    return
  for axis in ("expert", "embed", "mlp", "hidden", "vocab"):
    parts = num_parts(table[axis], mesh)
    if parts > 1:
      raise ValueError(
        f"layout {layout.name!r} splits parameters over {table['param_shards']!r}"
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

  Only what the rules name is asked for: of a layout that is everything, of
  rules of the user's own what they name, and without rules nothing.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # A layout says of all axes how they lie, of those without a name too.
  is_layout = RULES.keys() <= _rules().keys()
  asked = [_is_named(axis, mesh) or (is_layout and not axis) for axis in axes]
  if not any(asked):
    return x
  spec = _spec(axes, mesh)
  check_divides(axes, x.shape, spec, mesh)
  free = jax.sharding.PartitionSpec.UNCONSTRAINED
  spec = [o if yes else free for o, yes in zip(spec, asked, strict=True)]
  return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def _rules() -> dict[str, Over]:
  """Returns the rules in use, and how groups are known to lie without any."""
  return {**_KNOWN.get(), **dict(nn.get_logical_axis_rules())}


def _is_named(axis: str | None, mesh: AnyMesh) -> bool:
  """Says whether a rule tells how an axis lies on this mesh.

  One that splits it over axes which the mesh has not, or which are manual,
  tells nothing.
  """
  auto, table = _auto_axes(mesh), _rules()
  if not auto or axis not in table:
    return False
  over = _axes(table[axis])
  return not over or any(name in auto for name in over)


def _auto_axes(mesh: AnyMesh) -> tuple[str, ...]:
  """Returns the mesh axes over which the compiler splits arrays.

  Those are not the ones that are manual: within `jax.shard_map` a device has
  its own part of an array, and nothing more is to be said about it.
  """
  auto = jax.sharding.AxisType.Auto
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in types if kind == auto)


def _spec(
  axes: Sequence[str | None], mesh: AnyMesh
) -> jax.sharding.PartitionSpec:
  """Returns which axes of the mesh each logical axis is split over."""
  auto, spec = _auto_axes(mesh), []
  for over in nn.logical_to_mesh_axes(axes, tuple(_rules().items())):
    over = tuple(name for name in _axes(over) if name in auto)
    spec.append(over if len(over) > 1 else over[0] if over else None)
  return jax.sharding.PartitionSpec(*spec)


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

  On a mesh without rules for these axes each device works on the part that the
  compiler gives it of the first axes that have a name, and has all else whole.

  Args:
    fn: works on one device's part of its arguments.
    in_axes: a tuple of logical axes per argument.
    out_axes: the same for the result, or a tree of such tuples.
  """

  def is_axes(axes):
    # Not a named tuple, and not an empty dict.
    return type(axes) is tuple and all(
      axis is None or isinstance(axis, str) for axis in axes
    )

  def run(*args):
    if is_local(args):
      return fn(*args)
    in_leaves, out_leaves = (
      jax.tree.leaves(axes, is_leaf=is_axes) for axes in (in_axes, out_axes)
    )
    names = {axes[0] for axes in (*in_leaves, *out_leaves)} - {None}
    if not all(is_known(name, args) for name in names):
      return _as_compiled(fn, in_leaves, out_leaves)(*args)
    mesh = jax.sharding.get_abstract_mesh()

    def specs(tree):
      return jax.tree.map(
        lambda axes: _spec(axes, mesh),
        tree,
        is_leaf=is_axes,
      )

    # The kernels that come with JAX do not say over which axes they vary.
    return jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=specs(in_axes),
      out_specs=specs(out_axes),
      check_vma=False,
    )(*args)

  return run


def _mesh_of(args: Any) -> AnyMesh:
  """Returns the mesh in use, or else the one that arrays say they lie on."""
  mesh = jax.sharding.get_abstract_mesh()
  for leaf in jax.tree.leaves(args):
    if mesh.empty:
      mesh = jax.typeof(leaf).sharding.mesh
  return mesh


def is_local(x: Any) -> bool:
  """Says whether no compiler splits `x`: a device has all that there is.

  So it is without a mesh, and within `jax.shard_map`, for which a device's
  part is the whole.
  """
  mesh = _mesh_of(x)
  return (
    not _auto_axes(mesh)
    or jax.sharding.AxisType.Manual in mesh.axis_types
    or (mesh.size == 1 and not _rules())
  )


def vary_as(x: Array, tree: Any) -> Any:
  """Lets the types of arrays say that they vary over devices as `x` does.

  A no-op but within `jax.shard_map`, whose loops take one type alone.
  """
  varying = jax.typeof(x).manual_axis_type.varying

  def cast(leaf):
    missing = tuple(varying - jax.typeof(leaf).manual_axis_type.varying)
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, tree)


def is_known(axis: str, x: Any) -> bool:
  """Says whether it is known, while code is traced, how an axis of `x` lies.

  It is not on a mesh of the user's own without a rule for it: there the
  compiler alone decides.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return _is_named(axis, mesh) or is_local(x)


def lift_to_compiler(fn: _Fn, num_groups: int = 0) -> _Fn:
  """Lifts fn(module, x, *args) to see Auto axes where a mesh has Explicit ones.

  Where the type of `x` says that its first axis alone is split, it is known how
  the groups of tokens lie, if they can be split so. Else, as on a mesh of Auto
  axes, the compiler decides.

  Args:
    fn: returns (y, report, logical axes of the report).
    num_groups: G; 0 where there are none. It warns of groups that cannot be
      split over devices which, as far as it is known, share the tokens.

  Returns:
    A function that returns y, which lies as `x` does, and the report, which
    lies as its axes say.
  """

  def run(module, x, *args):
    explicit = _explicit_mesh(x)
    if explicit is None:
      if num_groups == 1 and not is_known("group", x) and not in_expert():
        _warn_of_groups(num_groups)
      return fn(module, x, *args)[:2]
    spec = jax.typeof(x).sharding.spec
    # By the first axis alone, and in whole groups; and what Auto axes beside
    # the Explicit ones split no type says.
    fits = num_groups % num_parts(spec[0], explicit) == 0
    fits = fits and not any(spec[1:-1])
    known = {"group": spec[0]} if fits and not _auto_axes(explicit) else {}
    if num_groups and not fits:
      _warn_of_groups(num_groups)

    def transform(core):
      def inner(scope_fn, repack_fn, variables, rngs, *args):
        token = _KNOWN.set(known)
        try:
          with jax.sharding.use_abstract_mesh(_as_auto(explicit)):
            variables, rngs, args = _to_auto((variables, rngs, args))
            scope = scope_fn(variables, rngs)
            y, report, axes = core(scope, *args)
            variables = repack_fn(scope)
        finally:
          _KNOWN.reset(token)

        def lies(axes):
          return [known.get(axis) for axis in axes]

        y = _to_explicit(y, lambda leaf: spec, explicit)
        report = jax.tree.map(
          lambda leaf, axes: _to_explicit(leaf, lambda _: lies(axes), explicit),
          report,
          axes,
        )
        return (y, report), _to_explicit(variables, lambda leaf: (), explicit)

      return flax.core.lift.pack(inner, (True,), (True,), (True,), "auto")

    lifted = nn.transforms.decorator_lift_transform(transform, fn)
    return lifted(module, x, *args)

  return run


def _warn_of_groups(num_groups: int) -> None:
  warnings.warn(
    f"the groups of tokens, {num_groups}, do not divide over the devices: those"
    " that share the tokens each do the work of all. Split the first axis of x"
    " alone, and give the layer a group_size by which the number of groups is a"
    " multiple of the devices.",
    stacklevel=2,
  )


def _explicit_mesh(x: Array) -> AnyMesh | None:
  """Returns the mesh, in use or of an array's type, if it has Explicit axes."""
  explicit = jax.sharding.AxisType.Explicit
  meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
  return next((mesh for mesh in meshes if explicit in mesh.axis_types), None)


def _as_auto(mesh: AnyMesh) -> AnyMesh:
  kinds = jax.sharding.AxisType
  return mesh.update_axis_types(
    {
      name: kinds.Auto
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind == kinds.Explicit
    }
  )


def _to_auto(tree: Any) -> Any:
  """Takes from types how arrays lie; they stay where they are."""

  def cast(leaf):
    types = jax.typeof(leaf).sharding.mesh.axis_types
    if jax.sharding.AxisType.Explicit not in types:
      return leaf
    return jax.sharding.reshard(leaf, jax.sharding.PartitionSpec())

  return jax.tree.map(cast, tree)


def _to_explicit(
  tree: Any, spec: Callable[[Array], Sequence[Over]], mesh: AnyMesh
) -> Any:
  def cast(leaf):
    lies = jax.sharding.PartitionSpec(*spec(leaf))
    return jax.sharding.reshard(leaf, jax.sharding.NamedSharding(mesh, lies))

  return jax.tree.map(cast, tree)


def _as_compiled(
  fn: _Fn,
  in_axes: Sequence[tuple[str | None, ...]],
  out_axes: Sequence[tuple[str | None, ...]],
) -> _Fn:
  """Lets fn(*args) work on the parts that the compiler chooses.

  It splits the first axis of those arrays where this has a name: one axis, the
  groups, is common to all of them.

  The backward pass runs `fn` again: what it would keep has no shape that is
  the same for any number of devices.

  Args:
    fn: works on one device's groups.
    in_axes: of each array among the arguments, in the order of their leaves.
    out_axes: of each array in the result.
  """

  def pieces(axes):
    return [each[0] is not None for each in axes]

  in_use = jax.sharding.get_abstract_mesh()

  def partitioned(fn, by_group, out_by_group, sums):
    """Runs `fn` on parts; of the results named in `sums` returns the sums."""
    run = custom_partitioning.custom_partitioning(fn)

    def partition(mesh, args, results):
      del results
      arg = next(itertools.compress(args, by_group))
      if mesh.empty:
        # Nothing that came into the program said on which mesh it lies.
        devices = np.asarray(arg.sharding._device_assignment)
        devices = devices.reshape(in_use.axis_sizes)
        mesh = jax.sharding.Mesh(devices, in_use.axis_names)

      def by(over):
        spec = jax.sharding.PartitionSpec(over or None)
        return jax.sharding.NamedSharding(mesh, spec)

      names = mesh.axis_names
      over = next(
        over
        for count in range(len(names) + 1)
        for over in itertools.permutations(names, count)
        if by(over).is_equivalent_to(arg.sharding, 1)
      )

      def lies(split):
        return by(over if split else ())

      def on_device(*args):
        parts = fn(*args)
        return tuple(
          jax.lax.psum(part, over) if over and add else part
          for part, add in zip(parts, sums, strict=True)
        )

      return (
        mesh,
        on_device,
        tuple(map(lies, out_by_group)),
        tuple(map(lies, by_group)),
      )

    def rule(mesh, args, results):
      del mesh
      numbers = itertools.count()

      def factors(split, rank):
        names = [f"a{next(numbers)}" for _ in range(rank)]
        return " ".join(["g", *names[1:]] if split else names)

      sides = [
        ", ".join(map(factors, splits, (t.rank for t in types)))
        for splits, types in ((by_group, args), (out_by_group, results))
      ]
      whole = tuple(f"a{i}" for i in range(next(numbers)))
      whole = tuple(name for name in whole if name in " ".join(sides).split())
      return " -> ".join(sides), {"need_replication_factors": whole}

    run.def_partition(partition=partition, sharding_rule=rule)
    return jax.custom_batching.sequential_vmap(run)

  def run(*args):
    leaves, tree = jax.tree.flatten(args)
    is_float = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]
    by_group, out_by_group = pieces(in_axes), pieces(out_axes)

    def flat(*leaves):
      return tuple(jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves))))

    def slopes(*leaves_and_gradient):
      leaves = leaves_and_gradient[: len(is_float)]
      gradient = leaves_and_gradient[len(is_float) :]

      def of_floats(*floats):
        left = iter(floats)
        return flat(
          *(
            next(left) if yes else leaf
            for yes, leaf in zip(is_float, leaves, strict=True)
          )
        )

      floats = list(itertools.compress(leaves, is_float))
      return jax.vjp(of_floats, *floats)[1](gradient)

    no_sums = [False] * len(out_by_group)
    forward = partitioned(flat, by_group, out_by_group, no_sums)
    of_floats = list(itertools.compress(by_group, is_float))
    backward = partitioned(
      slopes, by_group + out_by_group, of_floats, [not b for b in of_floats]
    )

    @jax.custom_vjp
    def differentiable(*leaves):
      return forward(*leaves)

    def pull(leaves, gradient):
      found = iter(backward(*leaves, *gradient))
      return tuple(next(found) if yes else None for yes in is_float)

    differentiable.defvjp(lambda *leaves: (forward(*leaves), leaves), pull)
    out = differentiable(*leaves)
    return out if len(out) > 1 else out[0]

  return run


# What is said anew within an expert.
_OF_GROUPS = ("group", "group_dispatched", "expert")

# How groups lie by the types of the user's arrays, where no rule says it.
_KNOWN = contextvars.ContextVar("known", default={})  # noqa: B039

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


def split_over(axis: str) -> Over:
  """Returns the mesh axes that a logical axis is split over; None for none."""
  mesh = jax.sharding.get_abstract_mesh()
  (over,) = _spec((axis,), mesh)
  return over if num_parts(over, mesh) > 1 else None


def splits(axis: str) -> bool:
  """Says whether the layout in use splits a logical axis over devices."""
  return split_over(axis) is not None


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
    mapped = nn.vmap(
      fn,
      variable_axes={True: 0},
      split_rngs={True: True},
      axis_size=num_experts,
      metadata_params={nn.PARTITION_NAME: axis},
      spmd_axis_name=split_over(axis) if axis else None,
    )
    if away := {
      n: over for n, over in rules.items() if n == "group_replicated"
    }:
      away = dict.fromkeys(
        ("group", "group_dispatched"), away["group_replicated"]
      )
      away["expert"] = None
    inside = {
      n: over for n, over in rules.items() if n not in _OF_GROUPS
    } | away
    tokens = _IN_EXPERT.set(True), _KNOWN.set({})
    try:
      with nn.logical_axis_rules(tuple(inside.items())):
        return mapped(module, *args)
    finally:
      _IN_EXPERT.reset(tokens[0])
      _KNOWN.reset(tokens[1])

  return run


# -- where parameters and batches lie between the steps ------------------------


class LogicalAxes(nn.LogicallyPartitioned):
  """A parameter with the logical names of its axes, in any program of Flax."""

  # Else a dataclass would compare the arrays.
  __eq__ = nn.LogicallyPartitioned.__eq__

  def unbox(self, apply_constraint: bool = True) -> Any:
    """Takes the names off; where rules are set the value lies as they say."""
    if not apply_constraint or not nn.get_logical_axis_rules():
      return self.value
    return constrain(self.value, *self.names)

  def add_axis(self, index: int, params: Mapping[str, Any]) -> "LogicalAxes":
    """Adds the axis of a stack; it is split over nothing if it has no name."""
    return super().add_axis(index, {nn.PARTITION_NAME: None, **params})

  def remove_axis(self, index: int, params: Mapping[str, Any]) -> "LogicalAxes":
    """Undoes `add_axis`."""
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


# Cheaper to do again than to keep.
_CASTS = ("convert_element_type", "reshape", "transpose")


def zero3(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Lets fn(params, ...) take parameters as they lie at rest.

  Where a layout splits them at rest ("fsdp") each is gathered where `fn` uses
  it, and again in the backward pass (ZeRO-3, 1910.02054): between the two only
  the parts are kept, and every gradient is summed up in parts. So no more than
  the parameters at work need be whole on a device. Elsewhere they rest where
  they are used, and this is `fn` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  param_shards = dict(nn.get_logical_axis_rules()).get("param_shards")
  if mesh.empty or num_parts(param_shards, mesh) == 1:
    return fn

  def keep(primitive, *_, **params):
    if primitive.name == "sharding_constraint":
      return any(params["sharding"].spec)
    return primitive.name not in _CASTS

  def asked(params, spec):
    return jax.tree.map(
      lambda w: jax.lax.with_sharding_constraint(w, spec(w.shape)), params
    )

  def run(params, *args):
    whole = asked(params, lambda _: jax.sharding.PartitionSpec())
    return fn(whole, *args)

  def from_parts(params, *args):
    # Else XLA gathers all of them before a loop over microbatches.
    params, args = jax.lax.optimization_barrier((params, args))
    parts = asked(params, lambda shape: _at_rest(shape, param_shards, mesh))
    return jax.checkpoint(run, policy=keep)(parts, *args)

  return from_parts


def _at_rest(
  shape: Sequence[int], over: Over, mesh: AnyMesh
) -> jax.sharding.PartitionSpec:
  """Splits the largest axis that divides, so that parts are thick."""
  parts = num_parts(over, mesh)
  fit = [size * (size % parts == 0) for size in shape]
  spec = [None] * len(shape)
  if any(fit):
    spec[np.argmax(fit)] = over
  return jax.sharding.PartitionSpec(*spec)


def unbox(boxed_tree: Any) -> Any:
  """Takes the logical names off.

  Within `use` flax's own would ask for every parameter to lie as it is used,
  whole where it only rests in parts.
  """
  with nn.logical_axis_rules(()):
    return nn.unbox(boxed_tree)


def shardings(boxed_tree: Any, layout: Layout, mesh: AnyMesh) -> Any:
  """Returns the sharding at rest of every leaf of a tree with logical names.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """

  def is_boxed(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  param_shards = dict(layout.rules).get("param_shards")
  if num_parts(param_shards, mesh) > 1:

    def split(leaf):
      leaf = leaf.value if is_boxed(leaf) else leaf
      return jax.sharding.NamedSharding(
        mesh, _at_rest(leaf.shape, param_shards, mesh)
      )

    return jax.tree.map(split, boxed_tree, is_leaf=is_boxed)
  for leaf in filter(is_boxed, jax.tree.leaves(boxed_tree, is_leaf=is_boxed)):
    spec = nn.logical_to_mesh_axes(leaf.names, layout.rules)
    check_divides(leaf.names, leaf.value.shape, spec, mesh)
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
  check_divides(("batch",), (batch_size,), spec, mesh)
  return jax.sharding.NamedSharding(mesh, spec)


def device_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns how an array with one entry a device lies."""
  spec = jax.sharding.PartitionSpec(mesh.axis_names)
  return jax.sharding.NamedSharding(mesh, spec)


def whole_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns how an array lies that every device has whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
