"""Functions that run on each device's part of their arguments.

Where a layout is in use its rules say what a part is. On a mesh of somebody
else's program the types of arrays say it (Explicit axes), or the compiler
chooses it (Auto axes).
"""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import sharding

_Fn = Callable[..., Any]


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
    if sharding.is_local(args):
      return fn(*args)
    in_leaves, (out_leaves, out_tree) = (
      jax.tree.leaves(in_axes, is_leaf=is_axes),
      jax.tree.flatten(out_axes, is_leaf=is_axes),
    )
    names = {axes[0] for axes in (*in_leaves, *out_leaves)} - {None}
    if not all(sharding.is_known(name, args) for name in names):
      by_group, out_by_group = (
        [axes[0] is not None for axes in side]
        for side in (in_leaves, out_leaves)
      )
      out = _as_compiled(fn, by_group, out_by_group)(*args)
      return out_tree.unflatten(out)
    mesh = jax.sharding.get_abstract_mesh()
    in_specs, out_specs = jax.tree.map(
      lambda axes: sharding.spec_of(axes, mesh),
      (in_axes, out_axes),
      is_leaf=is_axes,
    )
    # The kernels that come with JAX do not say over which axes they vary.
    return jax.shard_map(
      fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*args)

  return run


# Compiled, once for each type, it takes also what lies on no mesh.
_reshard = jax.jit(jax.sharding.reshard, static_argnums=1)


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
    # The mesh in use, or of the array's type.
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    explicit = next((m for m in meshes if AxisType.Explicit in m.axis_types), 0)
    if explicit:
      spec = jax.typeof(x).sharding.spec
      # By the first axis alone, and in whole groups.
      fits = num_groups % sharding.num_parts(spec[0], explicit) == 0
      fits = fits and not any(spec[1:-1])
      repeated = num_groups > 0 and not fits
    else:
      unknown = not (sharding.is_known("group", x) or sharding.in_expert())
      repeated = num_groups == 1 and unknown
    if repeated:
      warnings.warn(
        f"the groups of tokens, {num_groups}, do not divide over the devices:"
        " those that share the tokens each do the work of all. Split the first"
        " axis of x alone, and give the layer a group_size by which the number"
        " of groups is a multiple of the devices.",
        stacklevel=1,
      )
    if not explicit:
      return fn(module, x, *args)[:2]
    # What Auto axes beside the Explicit ones split no type says.
    sole = fits and not sharding.auto_axes(explicit)
    known = {"group": spec[0]} if sole else {}
    kinds = zip(explicit.axis_names, explicit.axis_types, strict=True)
    auto = explicit.update_axis_types(
      {name: AxisType.Auto for name, kind in kinds if kind == AxisType.Explicit}
    )

    def reshard(leaf, *spec):
      return jax.sharding.reshard(
        leaf, NamedSharding(explicit, PartitionSpec(*spec))
      )

    def to_auto(leaf):
      """Takes from its type how an array lies; it stays where it is."""
      if AxisType.Explicit not in jax.typeof(leaf).sharding.mesh.axis_types:
        return leaf
      return jax.sharding.reshard(leaf, PartitionSpec())

    def onto_mesh(leaf):
      """Puts what lies on no mesh on this one: its gradient will be there."""
      is_array = isinstance(leaf, jax.Array)
      if not (is_array and jax.typeof(leaf).sharding.mesh.empty):
        return leaf
      return _reshard(leaf, NamedSharding(explicit, PartitionSpec()))

    def transform(core):
      def inner(scope_fn, repack_fn, variables, rngs, *args):
        variables, args = jax.tree.map(onto_mesh, (variables, args))
        with sharding.known_axes(known), jax.sharding.use_abstract_mesh(auto):
          variables, rngs, args = jax.tree.map(to_auto, (variables, rngs, args))
          scope = scope_fn(variables, rngs)
          y, report, axes = core(scope, *args)
          variables = repack_fn(scope)
        y = jax.tree.map(lambda leaf: reshard(leaf, *spec), y)
        report = jax.tree.map(
          lambda leaf, axes: reshard(leaf, *map(known.get, axes)), report, axes
        )
        return (y, report), jax.tree.map(reshard, variables)

      return flax.core.lift.pack(inner, (True,), (True,), (True,), "auto")

    lifted = nn.transforms.decorator_lift_transform(transform, fn)
    return lifted(module, x, *args)

  return run


def _as_compiled(fn: _Fn, by_group: list[bool], out_by_group: list[bool]):
  """Lets fn(*args) work on the parts that the compiler chooses.

  It splits the first axis of those arrays that are `by_group`, among the leaves
  of the arguments and of the result: one axis is common to all of them.

  The backward pass runs `fn` again: what it would keep has no shape that is
  the same for any number of devices.
  """

  def run(*args):
    leaves, tree = jax.tree.flatten(args)
    is_float = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]

    def flat(*leaves):
      return tuple(jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves))))

    def slopes(*leaves_and_gradient):
      primals = leaves_and_gradient[: len(leaves)]
      gradient = leaves_and_gradient[len(leaves) :]
      found = jax.vjp(flat, *primals)[1](gradient)
      return tuple(itertools.compress(found, is_float))

    of_floats = list(itertools.compress(by_group, is_float))
    whole = [False] * len(out_by_group)
    forward = _partitioned(flat, by_group, out_by_group, whole)
    # What every device has whole gets the sum of all gradients.
    backward = _partitioned(
      slopes, by_group + out_by_group, of_floats, [not b for b in of_floats]
    )

    def pull(leaves, gradient):
      found = iter(backward(*leaves, *gradient))
      return tuple(next(found) if yes else None for yes in is_float)

    differentiable = jax.custom_vjp(lambda *leaves: forward(*leaves))
    differentiable.defvjp(lambda *leaves: (forward(*leaves), leaves), pull)
    return differentiable(*leaves)

  return run


def _partitioned(
  fn: _Fn, by_group: list[bool], out_by_group: list[bool], sums: list[bool]
):
  """Runs `fn` on parts of groups; of results named in `sums` adds them up."""
  in_use = jax.sharding.get_abstract_mesh()
  run = custom_partitioning.custom_partitioning(fn)

  def partition(mesh, args, results):
    arg = next(itertools.compress(args, by_group))
    if mesh.empty:
      # Nothing that came into the program said on which mesh it lies.
      devices = np.asarray(arg.sharding._device_assignment)
      devices = devices.reshape(in_use.axis_sizes)
      mesh = jax.sharding.Mesh(devices, in_use.axis_names)

    def split(over):
      return NamedSharding(mesh, PartitionSpec(over or None))

    # The mesh axes that the compiler has split the groups over.
    over = next(
      over
      for count in range(len(mesh.axis_names) + 1)
      for over in itertools.permutations(mesh.axis_names, count)
      if split(over).is_equivalent_to(arg.sharding, 1)
    )

    def on_device(*args):
      return tuple(
        jax.lax.psum(part, over) if over and add else part
        for part, add in zip(fn(*args), sums, strict=True)
      )

    lies = [
      tuple(split(over if yes else ()) for yes in side)
      for side in (out_by_group, by_group)
    ]
    return mesh, on_device, *lies

  def rule(mesh, args, results):
    """Names the axes: "g" is the groups, every other one is of its own."""
    numbers = itertools.count()

    def factors(split, array):
      own = [f"a{next(numbers)}" for _ in range(array.rank - split)]
      return " ".join(["g"] * split + own)

    sides = [
      ", ".join(map(factors, splits, types))
      for splits, types in ((by_group, args), (out_by_group, results))
    ]
    whole = tuple(f"a{i}" for i in range(next(numbers)))
    return " -> ".join(sides), {"need_replication_factors": whole}

  run.def_partition(partition=partition, sharding_rule=rule)
  return jax.custom_batching.sequential_vmap(run)
