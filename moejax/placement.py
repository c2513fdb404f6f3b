"""Placement: where parameters and batches lie between the steps.

`moejax.sharding` says where arrays lie while they are used; in most layouts
parameters rest in the same places, in "fsdp" they rest in parts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from moejax import sharding


class LogicalAxes(nn.LogicallyPartitioned):
  """A parameter with the logical names of its axes, in any program of Flax."""

  # Else a dataclass would compare the arrays.
  __eq__ = nn.LogicallyPartitioned.__eq__

  def unbox(self, apply_constraint: bool = True) -> Any:
    """Takes the names off; where rules are set the value lies as they say."""
    if not apply_constraint or not nn.get_logical_axis_rules():
      return self.value
    return sharding.constrain(self.value, *self.names)

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


def gathered(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Lets fn(params, ...) take parameters as they lie at rest.

  Where a layout splits them at rest ("fsdp") each is gathered where `fn` uses
  it, and again in the backward pass (ZeRO-3, 1910.02054): between the two only
  the parts are kept, and every gradient is summed up in parts. So no more than
  the parameters at work need be whole on a device. Elsewhere they rest where
  they are used, and this is `fn` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  at_rest = dict(nn.get_logical_axis_rules()).get("at_rest")
  if mesh.empty or sharding.num_parts(at_rest, mesh) == 1:
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
    parts = asked(params, lambda shape: _at_rest(shape, at_rest, mesh))
    return jax.checkpoint(run, policy=keep)(parts, *args)

  return from_parts


def _at_rest(
  shape: Sequence[int], over: sharding.Over, mesh: sharding.AnyMesh
) -> jax.sharding.PartitionSpec:
  """Splits the largest axis that divides, so that parts are thick."""
  parts = sharding.num_parts(over, mesh)
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


def shardings(
  boxed_tree: Any, layout: sharding.Layout, mesh: sharding.AnyMesh
) -> Any:
  """Returns the sharding at rest of every leaf of a tree with logical names.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """

  def is_boxed(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  at_rest = dict(layout.rules).get("at_rest")
  if sharding.num_parts(at_rest, mesh) > 1:

    def split(leaf):
      leaf = leaf.value if is_boxed(leaf) else leaf
      return jax.NamedSharding(mesh, _at_rest(leaf.shape, at_rest, mesh))

    return jax.tree.map(split, boxed_tree, is_leaf=is_boxed)
  for leaf in filter(is_boxed, jax.tree.leaves(boxed_tree, is_leaf=is_boxed)):
    spec = nn.logical_to_mesh_axes(leaf.names, layout.rules)
    sharding.check_divides(leaf.names, leaf.value.shape, spec, mesh)
  return nn.logical_to_mesh_sharding(
    nn.get_partition_spec(boxed_tree), mesh, layout.rules
  )


def batch_sharding(
  layout: sharding.Layout, mesh: jax.sharding.Mesh, batch_size: int
) -> jax.sharding.NamedSharding:
  """Returns how a batch lies: its first axis over every data replica.

  Raises:
    ValueError: the rows do not divide over the replicas.
  """
  spec = nn.logical_to_mesh_axes(("batch",), layout.rules)
  sharding.check_divides(("batch",), (batch_size,), spec, mesh)
  return jax.sharding.NamedSharding(mesh, spec)


def device_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns how an array with one entry a device lies."""
  spec = jax.sharding.PartitionSpec(mesh.axis_names)
  return jax.sharding.NamedSharding(mesh, spec)


def whole_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns how an array lies that every device has whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
