"""Dispatch: send tokens to their experts, run them, bring the outputs home.

Functions with one signature and one meaning,

  y[token] += gate * expert(x[token])    for every edge that wins a slot,

where an expert takes its first `capacity` edges of each group. They differ in
how rows travel, never in what is computed. Two exceptions:

* A token with an infinity makes its own y infinite or NaN; by "einsum" NaN. As
  everywhere in arithmetic it also spoils the gradient of its experts' weights.
* Derivatives forward (`jax.jvp`, `jax.linearize`, `jax.hessian`) are those of
  "einsum" alone: the others have backward passes of their own.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from moejax import moves, sharding
from moejax import slots as slots_lib
from moejax.moves import ExpertFn
from moejax.ragged import ragged
from moejax.routing import Assignment
from moejax.slots import Capacity

# Where the slots of each expert and group lie on their way: where their tokens
# are; with one of the devices that share the expert; with all of these.
_WAY = (
  (None, "group"),
  ("expert", "group_dispatched"),
  ("expert", "group_replicated"),
)

_BY_SLOTS = {
  # GShard's moves: one-hot masks of G*N*S entries turn both into matrix
  # products. They cost S/F of the experts' own work, so keep groups small; a
  # matrix unit may still like it better than reading by index.
  "einsum": (moves.send_by_product, moves.combine_by_product),
  # Rows move by index: no array is larger than the slots themselves.
  "gather": (moves.send_by_index, moves.combine_by_index),
}


class Trip(NamedTuple):
  """Tokens that have travelled to their experts, and the way back.

  Attributes:
    rows: the filled slots of each block of experts, [E, G, C, D] each.
    real: which slots are taken, [E, G, C] each.
    gate: the gate of the edge in each slot, [E, G, C] each.
    home: takes the experts' outputs, [E, G, C, O] each, back to [G, S, O].
  """

  rows: list[Float[Array, "E G C D"]]
  real: list[Bool[Array, "E G C"]]
  gate: list[Float[Array, "E G C"]]
  home: Callable[[Sequence[Array]], Array]


def depart(
  name: str,
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  capacity: Capacity = None,
) -> Trip:
  """Fills slots and carries them to their experts.

  On a mesh that splits experts the way there is one all-to-all, and the way
  home another.

  Args:
    name: "einsum" or "gather".
    x: tokens.
    assignment: the edges.
    num_experts: E.
    capacity: slots per expert and group.

  Raises:
    ValueError: a capacity below 1, or rows of whole numbers.
  """
  moves.check_rows(x)
  G, S, _ = x.shape
  blocks = slots_lib.blocks_of(capacity, num_experts, S)
  send, combine = _BY_SLOTS[name]
  seats = jax.vmap(lambda e: slots_lib.seat(e, blocks))(assignment.expert)
  ends = np.cumsum([num * slots for num, slots in blocks])[:-1]

  def away(of_slot):
    parts = []
    for part, block in zip(
      jnp.split(of_slot, ends, axis=1), blocks, strict=True
    ):
      part = part.reshape(G, *block, *of_slot.shape[2:]).swapaxes(0, 1)
      parts.append(_travel(part, _WAY))
    return parts

  def home(parts):
    back = []
    for part in parts:
      part = _travel(part, reversed(_WAY))
      back.append(part.swapaxes(0, 1).reshape(G, -1, part.shape[-1]))
    rows = jnp.concatenate(back, axis=1)
    return jax.vmap(lambda *args: combine(*args, S))(rows, seats, assignment)

  gate = jax.vmap(moves.take)(assignment.gate, seats.edge)
  return Trip(
    away(jax.vmap(send)(x, seats, assignment)),
    away(seats.edge < assignment.expert.shape[1]),
    away(gate),
    home,
  )


def _travel(part: Array, way: Iterable[tuple[str | None, str | None]]) -> Array:
  # A lone expert is on every device already.
  for axes in way if part.shape[0] > 1 else _WAY[:1]:
    part = sharding.constrain(part, *axes, *(None,) * (part.ndim - 2))
  return part


def _by_slots(
  name: str,
  expert_fn: ExpertFn,
  weights: Any,
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  capacity: Capacity = None,
) -> Float[Array, "G S O"]:
  """Gives every expert a fixed number of slots in each group."""
  trip = depart(name, x, assignment, num_experts, capacity)
  rows = tuple(a.reshape(a.shape[0], -1, a.shape[3]) for a in trip.rows)
  real = tuple(a.reshape(a.shape[0], -1) for a in trip.real)
  if isinstance(capacity, int | None):
    back = (expert_fn(weights, rows[0], real[0]),)
  else:
    back = expert_fn(weights, rows, real)
  shapes = [(*a.shape[:3], -1) for a in trip.rows]
  return trip.home([a.reshape(s) for a, s in zip(back, shapes, strict=True)])


DISPATCH = {
  **{name: functools.partial(_by_slots, name) for name in _BY_SLOTS},
  "ragged": ragged,
}


# Up to so many edges, on a CPU, slots are as fast as sorted rows, or faster.
_FEW_EDGES = 4096


def fastest(
  capacity: Capacity, needs_slots: bool, edges: int, known: bool = True
) -> str:
  """Names what measured fastest (layer_speed, auto_dispatch): "auto".

  Without a capacity, sorted rows: slots would have to be S per expert, nearly
  all of them empty, and where experts are split all would travel. With one,
  slots where experts are split: two all-to-alls of a size known beforehand.
  Else, on a CPU, sorted rows: they skip empty slots, and that counts for more
  than all else there, but for few edges, whose products take no longer than the
  loop around them. A TPU moves fewer bytes by slots while they are bounded.

  Args:
    capacity: as for dispatch.
    needs_slots: whether the experts can run on slots alone.
    edges: of all groups.
    known: whether it is known how groups lie, see `sharding.is_known`; else
      sorted rows go forward twice.
  """
  # Within an expert nothing can be sorted: a device has several of them.
  if needs_slots or sharding.in_expert():
    return "gather"
  if capacity is None:
    return "ragged"
  sorts = sharding.platform() == "cpu" and edges > _FEW_EDGES and known
  return "ragged" if sorts and not sharding.splits_experts() else "gather"
