"""Rows sorted by expert: no slot is empty, and no row need be dropped.

Where every device has all experts, it sorts the rows of its own groups. On a
mesh that splits experts over n devices with T tokens each, rows move in one of
two forms:

  all-gather  Every device gets all n * T tokens, sorts the rows of its own
              experts, and the weighted sums are scattered back. Runs anywhere;
              a device sends (n - 1) * T rows in each direction, whatever k is.
  all-to-all  Every row goes straight to its place among those of its expert,
              and back; so a device sends k * T * (n - 1) / n rows in each
              direction. On a CPU it would send n times as many.

Shapes are static, so an expert's device sets memory aside for as many rows as
could come: all n * k * T of them without a capacity. Those that did not come
are zero and are not computed (see grouped.py).

Two levels (app. B) are the same twice. Rows are sorted by group of experts and
move once for each; within a device they are sorted again, by expert.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from moejax import exchange, partition, sharding
from moejax import routing as routing_lib
from moejax import slots as slots_lib
from moejax.grouped import grouped_sum
from moejax.routing import Assignment, Routing
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
  total = int(np.sum(num_experts))
  slots_lib.check(x, total, capacity)

  def run(weights, rows, group_sizes, **_):
    return expert_fn(weights, rows, group_sizes=group_sizes), (), ()

  return _over_devices(run, weights, x, assignment, num_experts, capacity)[0]


def two_levels(
  decide: Callable[..., Routing],
  expert_fn: ExpertFn,
  weights: tuple[Any, Any],
  x: Float[Array, "G S D"],
  assignment: Assignment,
  num_groups: int,
  num_experts: int,
) -> tuple[
  Float[Array, "G S O"],
  Int[Array, "G A K"],
  Float[Array, "G A K"],
  Float[Array, "G A Q"],
  Float[Array, "G E"],
]:
  """Mixes tokens in groups of experts (eq. 12); nothing is dropped.

  The work is that of the edges, however many experts there are. The axis P in
  front of all weights may be split over devices: rows move to groups as they do
  to experts by `ragged`.

  Args:
    decide: (router weights, rows [N, D], group_sizes [P], number [N],
      mask [N, 1]) -> Routing of rows that are groups by themselves.
    expert_fn: as for `ragged`.
    weights: of the P routers, and of the experts [P, Q, ...].
    x: tokens.
    assignment: which groups each token visits; A edges.
    num_groups: P.
    num_experts: Q, of each group.

  Returns:
    y; of each edge its K experts, counted through all groups, P * Q being none,
    their gates G_i(x)_j, and the logits within its group; the load of each
    token group, as the groups' own routers have it.

  Raises:
    ValueError: rows of whole numbers.
  """
  total = num_groups * num_experts
  slots_lib.check(x, total, None)

  def run(weights, rows, group_sizes, here, origin, num_origins, number):
    of_routers, of_experts = weights
    end = jnp.cumsum(group_sizes)
    rank = jnp.arange(rows.shape[0], dtype=jnp.int32)
    group = slots_lib.num_below(end, rank + 1)[:, None]
    used = (rank < end[-1])[:, None]
    routing = decide(of_routers, rows, group_sizes, number, used)
    expert, gate = routing.assignment.expert, routing.assignment.gate
    used &= expert < num_experts
    # Of this device's experts, and of all.
    experts_here = here.size * num_experts
    mine = jnp.where(used, group * num_experts + expert, experts_here)
    expert = jnp.where(used, here[0] * num_experts + mine - total, 0)

    flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), of_experts)
    y, _, _ = _run_sorted(
      lambda rows, sizes, _: (expert_fn(flat, rows, group_sizes=sizes), (), ()),
      rows[:, None],
      Assignment(mine, gate),
      experts_here,
      mine.size,
    )
    of_origin = jax.nn.one_hot(origin, num_origins, dtype=jnp.float32)
    load = grouped_sum(of_origin, routing.load, group_sizes)
    return y[:, 0], (expert, gate, routing.logits[:, 0]), (load,)

  y, expert, *others = _over_devices(
    run, weights, x, assignment, num_groups, None, num_notes=3, num_sums=1
  )
  # What comes from no device is zero: a sum over them must not count it.
  return y, expert + total, *others


# -- where rows move ----------------------------------------------------------


def _over_devices(
  run, weights, x, assignment, num_experts, capacity, num_notes=0, num_sums=0
):
  """Sorts rows by expert, or group of experts, and moves them there and back.

  run(weights, rows, group_sizes, here=, origin=, num_origins=, number=) works
  on one device's rows: of the experts `here`, and of the group of tokens
  `origin`, counted among the num_origins whose rows can come here; the number
  of a row's edge is the same however groups lie. It returns rows; notes about
  each row [N, ...], which come back to its edge; and sums [experts here, groups
  of tokens, ...], which come back to the groups.

  Returns:
    y; the notes [G, A, ...], zero for edges that were dropped or unused; the
    sums [G, ...] of all experts.
  """
  total = int(np.sum(num_experts))
  axis = None
  # Kinds of experts, and those without weights, have no axis E to split.
  one_axis = {w.shape[0] for w in jax.tree.leaves(weights)} == {num_experts}
  if one_axis and total > 1 and sharding.is_known("group", x):
    axis = None if sharding.is_local(x) else sharding.split_over("expert")

  def on_device(weights, x, assignment, here, group):
    if capacity is not None:
      assignment = slots_lib.drop(assignment, total, capacity)
    groups, edges = assignment.expert.shape
    if axis is not None:
      # Of all tokens whose rows can come here.
      group = jax.lax.all_gather(group, axis, tiled=True)

    def visit(rows, group_sizes, place):
      return run(
        weights,
        rows,
        group_sizes,
        here=here,
        origin=place // edges,
        num_origins=group.size,
        number=group[place // edges] * edges + place % edges,
      )

    if axis is None:
      size = assignment.expert.size
      y, notes, sums = _run_sorted(visit, x, assignment, total, size)
    else:
      # The most rows that can come to one device.
      slots = here.size * (x.shape[1] if capacity is None else capacity)
      buffer_size = group.size * min(edges, slots)
      # A CPU sends every row to all devices, see exchange.py.
      move = _all_gather if sharding.platform() == "cpu" else _all_to_all
      y, notes, sums = move(visit, x, assignment, here, buffer_size, axis)
      sums = [jax.lax.all_to_all(each, axis, 1, 0, tiled=True) for each in sums]
    of_groups = [each.swapaxes(0, 1).reshape(groups, -1) for each in sums]
    return (y, *notes, *of_groups)

  expert = None if axis is None else "expert"
  of_weights = jax.tree.map(
    lambda w: (expert, *(None,) * (w.ndim - 1)), weights
  )
  of_group = ("group", None, None)
  of_edges = jax.tree.map(lambda _: ("group", None), assignment)
  in_axes = (of_weights, of_group, of_edges, (expert,), ("group",))
  out_axes = (of_group,) + (("group",),) * (num_notes + num_sums)
  return partition.manual(on_device, in_axes, out_axes)(
    weights,
    x,
    assignment,
    jnp.arange(total, dtype=jnp.int32),
    jnp.arange(x.shape[0], dtype=jnp.int32),
  )


def _run_sorted(run, x, assignment, num_experts, buffer_size):
  """Sorts one device's rows and sums up what came back of them.

  run(rows, group_sizes, place) gives rows back, notes about each that come to
  its edge, and sums, which it returns as they are. Edge a of group g has place
  g * A + a. Edges that lead to none of the num_experts here are unused;
  buffer_size is no fewer than the used ones.
  """
  G, S, D = x.shape
  one = routing_lib.flatten_groups(assignment, S)
  edges = slots_lib.sort_by_expert(one.expert, num_experts)
  used = jnp.arange(buffer_size, dtype=jnp.int32) < edges.start[-1]
  slots = Slots(
    jnp.where(one.expert < num_experts, edges.rank, buffer_size),
    jnp.where(used, edges.order[:buffer_size], one.expert.size),
  )
  rows = slots_lib.dispatch_gather(x.reshape(G * S, D), slots, one)
  # Among the edges of all groups choices are outermost, if tokens choose.
  A = assignment.expert.shape[1]
  inner = S if assignment.token is None else A
  place = jnp.arange(G * A, dtype=jnp.int32).reshape(G, -1, inner)
  place = slots_lib.take(place.swapaxes(0, 1).reshape(-1), slots.edge)
  back, notes, sums = run(rows, jnp.diff(edges.start), place)
  y = slots_lib.combine_gather(back, slots, one, G * S)

  def of_edges(note):
    note = slots_lib.take(note, slots.slot)
    by_group = note.reshape(-1, G, inner, *note.shape[1:]).swapaxes(0, 1)
    return by_group.reshape(G, A, *note.shape[1:])

  return y.reshape(G, S, -1), tuple(map(of_edges, notes)), sums


def _all_gather(run, x, assignment, here, buffer_size, axis):
  """Every device takes what is its own from the tokens of all."""
  x, assignment = jax.tree.map(
    lambda a: jax.lax.all_gather(a, axis, tiled=True), (x, assignment)
  )
  expert = assignment.expert - here[0]
  expert = jnp.where((expert >= 0) & (expert < here.size), expert, here.size)
  assignment = assignment._replace(expert=expert)
  y, notes, sums = _run_sorted(run, x, assignment, here.size, buffer_size)
  y, notes = jax.tree.map(
    lambda a: jax.lax.psum_scatter(a, axis, tiled=True), (y, notes)
  )
  return y, notes, sums


def _all_to_all(run, x, assignment, here, buffer_size, axis):
  """Every row goes to its expert's device and back."""
  num_edges = assignment.expert.size
  num_experts = here.size * jax.lax.axis_size(axis)

  def visit(rows, group_sizes, place):
    there, back, arrived = _a2a_splits(group_sizes, here, axis)
    sizes = (num_edges, buffer_size)
    place = place + here[0] // here.size * num_edges
    rows, place = (
      _exchange(a, (there, back), sizes, axis) for a in (rows, place[:, None])
    )
    rows, notes, sums = run(rows, arrived, place[:, 0])
    rows, notes = jax.tree.map(
      lambda a: _exchange(a, (back, there), sizes[::-1], axis), (rows, notes)
    )
    return rows, notes, sums

  return _run_sorted(visit, x, assignment, num_experts, num_edges)


def _a2a_splits(group_sizes, here, axis):
  """The splits to the experts and back, and the group sizes of those here.

  Rows lie by expert where they come from, and by expert and then by source
  where they go: all that a device has for one expert is a slice in both places.
  Of each slice a split says where it begins here, how many rows it has, where
  it begins on the device it goes to, and how many rows come here.
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
  there = (at_source[me], go, at_expert[me], come)
  back = (at_expert[:, me], come, at_source[:, me], go)
  return *jax.tree.map(lambda a: a.reshape(-1), (there, back)), total[me]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(rows, splits, sizes, axis):
  """Sends rows [N, D] by the first of two splits, their gradient by the second.

  `sizes` are the rows before and after.
  """
  # Where no row arrives stays what was there before.
  zeros = jnp.zeros_like(rows, shape=(sizes[1], rows.shape[1]))
  return exchange.ragged_all_to_all(rows, zeros, *splits[0], axis)


_exchange.defvjp(
  lambda rows, splits, *args: (_exchange(rows, splits, *args), splits),
  lambda sizes, axis, splits, gradient: (
    _exchange(gradient, splits[::-1], sizes[::-1], axis),
    None,
  ),
)
