"""Rows sorted by expert: no slot is empty, and no row need be dropped.

Where every device has all experts, it sorts the rows of its own groups. On a
mesh that splits experts over n devices with T tokens each, rows move in one of
two forms:

  all-gather  Every device gets all n * T tokens, sorts the rows of its own
              experts, and the weighted sums are scattered back. Runs anywhere;
              a device sends (n - 1) * T rows in each direction, whatever k is.
  all-to-all  Every row goes straight to its place among those of its expert,
              and back; so a device sends k * T * (n - 1) / n rows in each
              direction. `jax.lax.ragged_all_to_all` does not exist on a CPU.

Shapes are static, so an expert's device sets memory aside for as many rows as
could come: all n * k * T of them without a capacity. Those that did not come
are zero and are not computed (see grouped.py).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from moejax import partition, sharding
from moejax import routing as routing_lib
from moejax import slots as slots_lib
from moejax.routing import Assignment
from moejax.slots import ExpertFn, Slots


def ragged(
  expert_fn: ExpertFn,
  weights: Any,
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int | tuple[int, ...],
  capacity: int | None = None,
) -> Float[Array, "G S O"]:
  """Sorts rows by expert: no slot is empty, and without capacity none dropped.

  On a mesh that splits experts tokens move to them. Experts of several kinds,
  which have no one axis to be split along, stay; every device then gathers the
  weights of all and sorts its own groups.

  Raises:
    ValueError: a capacity below 1, or rows of whole numbers.
  """
  total = num_experts if isinstance(num_experts, int) else sum(num_experts)
  slots_lib.check(x, total, capacity)
  axis = None
  # Kinds of experts, and those without weights, have no axis E to split.
  one_axis = {w.shape[0] for w in jax.tree.leaves(weights)} == {num_experts}
  if one_axis and total > 1 and sharding.is_known("group", x):
    axis = None if sharding.is_local(x) else sharding.split_over("expert")

  def on_device(weights, x, assignment, here):
    if capacity is not None:
      assignment = slots_lib.drop(assignment, total, capacity)

    def run(rows, group_sizes):
      return expert_fn(weights, rows, group_sizes=group_sizes)

    if axis is None:
      return _run_sorted(run, x, assignment, total, assignment.expert.size)
    # The most rows that can come to one device.
    groups, edges = assignment.expert.shape
    slots = here.size * (x.shape[1] if capacity is None else capacity)
    buffer_size = jax.lax.axis_size(axis) * groups * min(edges, slots)
    # A CPU cannot send each row to a device of its own.
    move = _all_gather if sharding.platform() == "cpu" else _all_to_all
    return move(run, x, assignment, here, buffer_size, axis)

  expert = None if axis is None else "expert"
  of_weights = jax.tree.map(
    lambda w: (expert, *(None,) * (w.ndim - 1)), weights
  )
  of_group = ("group", None, None)
  of_edges = jax.tree.map(lambda _: ("group", None), assignment)
  in_axes = (of_weights, of_group, of_edges, (expert,))
  all_experts = jnp.arange(total, dtype=jnp.int32)
  return partition.manual(on_device, in_axes, of_group)(
    weights, x, assignment, all_experts
  )


def _run_sorted(run, x, assignment, num_experts, buffer_size):
  """Sorts one device's rows and sums up what came back of them.

  run(rows, group_sizes) gives rows back. Edges that lead to none of the
  num_experts here are unused; buffer_size is no fewer than the used ones.
  """
  G, S, D = x.shape
  one = routing_lib.flatten_groups(assignment, S)
  edges = slots_lib.sort_by_expert(one.expert, num_experts)
  rank = jnp.arange(buffer_size, dtype=jnp.int32)
  slots = Slots(
    jnp.where(one.expert < num_experts, edges.rank, buffer_size),
    jnp.where(
      rank < edges.start[-1], edges.order[:buffer_size], one.expert.size
    ),
  )
  rows = slots_lib.dispatch_gather(x.reshape(G * S, D), slots, one)
  back = run(rows, jnp.diff(edges.start))
  y = slots_lib.combine_gather(back, slots, one, G * S)
  return y.reshape(G, S, -1)


def _all_gather(run, x, assignment, here, buffer_size, axis):
  """Every device takes what is its own from the tokens of all."""
  x, assignment = jax.tree.map(
    lambda a: jax.lax.all_gather(a, axis, tiled=True), (x, assignment)
  )
  expert = assignment.expert - here[0]
  expert = jnp.where((expert >= 0) & (expert < here.size), expert, here.size)
  assignment = assignment._replace(expert=expert)
  y = _run_sorted(run, x, assignment, here.size, buffer_size)
  return jax.lax.psum_scatter(y, axis, tiled=True)


def _all_to_all(run, x, assignment, here, buffer_size, axis):
  """Every row goes to its expert's device and back."""
  num_edges = assignment.expert.size
  num_experts = here.size * jax.lax.axis_size(axis)

  def visit(rows, group_sizes):
    there, back, arrived = _a2a_splits(group_sizes, here, axis)
    sizes = (num_edges, buffer_size)
    rows = _exchange(rows, (there, back), sizes, axis)
    rows = run(rows, arrived)
    return _exchange(rows, (back, there), sizes[::-1], axis)

  return _run_sorted(visit, x, assignment, num_experts, num_edges)


class A2ASplits(NamedTuple):
  """Slices of rows that devices send each other, one per device and expert.

  Attributes:
    start: where each slice begins here.
    size: how many rows it has.
    to: where it begins on the device it goes to.
    coming: how many rows each slice has that comes here.
  """

  start: Int[Array, "slices"]
  size: Int[Array, "slices"]
  to: Int[Array, "slices"]
  coming: Int[Array, "slices"]


def _a2a_splits(group_sizes, here, axis):
  """The splits to the experts and back, and the group sizes of those here.

  Rows lie by expert where they come from, and by expert and then by source
  where they go: all that a device has for one expert is a slice in both places.
  """
  all_sizes = jax.lax.all_gather(group_sizes, axis)
  n, me = all_sizes.shape[0], here[0] // here.size
  # [source, the experts' device, its experts], as all that follow.
  size = all_sizes.reshape(n, n, here.size)
  at_source = (jnp.cumsum(all_sizes, axis=1) - all_sizes).reshape(size.shape)
  total = size.sum(axis=0)
  start = jnp.cumsum(total, axis=1) - total
  at_expert = start[None] + jnp.cumsum(size, axis=0) - size
  go, come = size[me], size[:, me]
  there = A2ASplits(at_source[me], go, at_expert[me], come)
  back = A2ASplits(at_expert[:, me], come, at_source[:, me], go)
  return *jax.tree.map(lambda a: a.reshape(-1), (there, back)), total[me]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(rows, splits, sizes, axis):
  """Sends rows [N, D] by the first of two splits, their gradient by the second.

  `sizes` are the rows before and after.
  """
  # Where no row arrives stays what was there before.
  zeros = jnp.zeros_like(rows, shape=(sizes[1], rows.shape[1]))
  return jax.lax.ragged_all_to_all(rows, zeros, *splits[0], axis_name=axis)


def _exchange_backward(sizes, axis, splits, gradient):
  return _exchange(gradient, splits[::-1], sizes[::-1], axis), None


_exchange.defvjp(
  lambda rows, splits, sizes, axis: (
    _exchange(rows, splits, sizes, axis),
    splits,
  ),
  _exchange_backward,
)
