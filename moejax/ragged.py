"""Rows sorted by expert: no slot is empty, and no row need be dropped.

Where every device has all experts, it sorts the rows of its own groups. On a
mesh that splits experts T tokens a device travel over its n devices, in one of
two ways:

  all-gather  Every device gets all n * T tokens, sorts the rows of its own
              experts, and the weighted sums are scattered home. Runs anywhere;
              a device sends (n - 1) * T rows each way, whatever k is.
  all-to-all  Every row goes straight to its place in the line of its expert,
              and back; so a device sends k * T * (n - 1) / n rows each way.
              `jax.lax.ragged_all_to_all` does not exist on a CPU.

Shapes are static, so an expert's device sets memory aside for as many rows as
could come: all n * k * T of them without a capacity. Those that did not come
are zero and are not computed (see grouped.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from moejax import moves, sharding
from moejax import routing as routing_lib
from moejax import slots as slots_lib
from moejax.moves import ExpertFn
from moejax.routing import Assignment
from moejax.slots import Block, Capacity, Seats

# Of the mesh, one or several.
Axis = str | tuple[str, ...]


def ragged(
  expert_fn: ExpertFn,
  weights: Any,
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  capacity: Capacity = None,
) -> Float[Array, "G S O"]:
  """Sorts rows by expert: no slot is empty, and without capacity none dropped.

  On a mesh that splits experts tokens travel to them. Experts of several kinds,
  which have no one axis to be split along, stay; every device then gathers the
  weights of all and sorts its own groups.

  Raises:
    ValueError: a capacity below 1, or rows of whole numbers.
  """
  moves.check_rows(x)
  axis = None
  if sharding.is_known("group", x) and not sharding.is_local(x):
    axis = _split_over(weights, num_experts)
  blocks = slots_lib.blocks_of(capacity, num_experts, x.shape[1])

  def on_device(weights, x, assignment, here):
    if capacity is not None:
      assignment = slots_lib.drop(assignment, blocks)
    run = functools.partial(expert_fn, weights)
    if axis is None:
      num_edges = assignment.expert.size
      return _in_line(run, x, assignment, num_experts, num_edges)
    room = _room(blocks, jax.lax.axis_size(axis), assignment)
    # A CPU cannot send rows each its own way.
    travel = _all_gather if sharding.platform() == "cpu" else _all_to_all
    return travel(run, x, assignment, here, room, axis)

  expert = None if axis is None else "expert"
  of_weights = jax.tree.map(
    lambda w: (expert, *(None,) * (w.ndim - 1)), weights
  )
  of_group = ("group", None, None)
  of_edges = jax.tree.map(lambda _: ("group", None), assignment)
  in_axes = (of_weights, of_group, of_edges, (expert,))
  all_experts = jnp.arange(num_experts, dtype=jnp.int32)
  return sharding.manual(on_device, in_axes, of_group)(
    weights, x, assignment, all_experts
  )


def _split_over(weights: Any, num_experts: int) -> Axis | None:
  """The mesh axis that these experts are split over, if they are."""
  first = {w.shape[0] for w in jax.tree.leaves(weights)}
  if first != {num_experts} or num_experts == 1:
    return None
  return sharding.split_over("expert")


def _room(
  blocks: Sequence[Block], num_devices: int, assignment: Assignment
) -> int:
  """The most rows that can come to one device."""
  slots = np.concatenate([np.full(num, slots) for num, slots in blocks])
  per_group = int(slots.reshape(num_devices, -1).sum(axis=1).max())
  groups, edges = assignment.expert.shape
  return num_devices * groups * min(edges, per_group)


def _in_line(
  visit: Callable[[Array, Array], Array],
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  room: int,
) -> Float[Array, "G S O"]:
  """Sorts one device's rows and sums up what came back of them.

  Args:
    visit: (rows, how many of them each expert has) -> rows.
    x: tokens.
    assignment: the edges; those that lead to no expert here are unused.
    num_experts: of those here.
    room: rows to set aside, no fewer than used edges.
  """
  G, S, D = x.shape
  one = routing_lib.flatten_groups(assignment, S)
  line = slots_lib.line_up(one.expert, num_experts)
  rank = jnp.arange(room, dtype=jnp.int32)
  seats = Seats(
    jnp.where(one.expert < num_experts, line.place, room),
    jnp.where(rank < line.start[-1], line.order[:room], one.expert.size),
  )
  rows = moves.send_by_index(x.reshape(G * S, D), seats, one)
  back = visit(rows, jnp.diff(line.start))
  y = moves.combine_by_index(back, seats, one, G * S)
  return y.reshape(G, S, -1)


def _all_gather(
  run: Callable[[Array, Array], Array],
  x: Num[Array, "G S D"],
  assignment: Assignment,
  here: Int[Array, "mine"],
  room: int,
  axis: Axis,
) -> Float[Array, "G S O"]:
  """Every device takes what is its own from the tokens of all."""
  x, assignment = jax.tree.map(
    lambda a: jax.lax.all_gather(a, axis, tiled=True), (x, assignment)
  )
  expert = assignment.expert - here[0]
  expert = jnp.where((expert >= 0) & (expert < here.size), expert, here.size)
  y = _in_line(run, x, assignment._replace(expert=expert), here.size, room)
  return jax.lax.psum_scatter(y, axis, tiled=True)


def _all_to_all(
  run: Callable[[Array, Array], Array],
  x: Num[Array, "G S D"],
  assignment: Assignment,
  here: Int[Array, "mine"],
  room: int,
  axis: Axis,
) -> Float[Array, "G S O"]:
  """Every row goes to its expert's line and back to its own place."""
  num_edges = assignment.expert.size
  num_experts = here.size * jax.lax.axis_size(axis)

  def visit(rows, sizes):
    there, back, arrived = _ways(sizes, here, axis)
    rows = _exchange(rows, (there, back), (num_edges, room), axis)
    rows = run(rows, arrived)
    return _exchange(rows, (back, there), (room, num_edges), axis)

  return _in_line(visit, x, assignment, num_experts, num_edges)


class Way(NamedTuple):
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


def _ways(
  sizes: Int[Array, "E"], here: Int[Array, "mine"], axis: Axis
) -> tuple[Way, Way, Int[Array, "mine"]]:
  """The ways to the experts and home, and how many rows each of ours gets.

  Rows lie by expert at home, and by expert and then by home at their experts':
  all that a device has for one expert is a slice in both places.
  """
  all_sizes = jax.lax.all_gather(sizes, axis)
  n, me = all_sizes.shape[0], here[0] // here.size
  # [home, the experts' device, its experts], as all that follow.
  size = all_sizes.reshape(n, n, here.size)
  at_home = (jnp.cumsum(all_sizes, axis=1) - all_sizes).reshape(size.shape)
  total = size.sum(axis=0)
  start = jnp.cumsum(total, axis=1) - total
  away = start[None] + jnp.cumsum(size, axis=0) - size
  go, come = size[me], size[:, me]
  there = Way(at_home[me], go, away[me], come)
  back = Way(away[:, me], come, at_home[:, me], go)
  there, back = (Way(*(a.reshape(-1) for a in way)) for way in (there, back))
  return there, back, total[me]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(
  rows: Float[Array, "N D"],
  ways: tuple[Way, Way],
  room: tuple[int, int],
  axis: Axis,
) -> Float[Array, "M D"]:
  """Sends rows the first of two ways; their gradient takes the second.

  Args:
    rows: in line.
    ways: there and back.
    room: rows before and after.
    axis: the mesh axis to travel over.
  """
  # Where no row arrives stays what was there before.
  zeros = jnp.zeros_like(rows, shape=(room[1], rows.shape[1]))
  return jax.lax.ragged_all_to_all(rows, zeros, *ways[0], axis_name=axis)


def _exchange_forward(rows, ways, room, axis):
  return _exchange(rows, ways, room, axis), ways


def _exchange_backward(room, axis, ways, gradient):
  return _exchange(gradient, ways[::-1], room[::-1], axis), None


_exchange.defvjp(_exchange_forward, _exchange_backward)
