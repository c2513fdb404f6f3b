"""Dispatch: send tokens to their experts, run them, bring the outputs home.

Functions with one signature and one meaning,

  y[token] += gate * expert(x[token])    for every edge that wins a slot,

where an expert takes its first `capacity` edges of each group. They differ in
how rows travel, never in what is computed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax import seats as seats_lib
from moejax import sharding
from moejax.routing import Assignment
from moejax.seats import Capacity, Seats

# (weights, rows, real) -> rows. Rows in slots are [E, N, D], and `real` [E, N]
# says which slots are taken; blocks of experts give a tuple of both. Rows
# sorted by expert are [N, D], and `real` [E] says how many each expert has.
ExpertFn = Callable[[Any, Any, Any], Any]

_HOME = (None, "group", None)
_AWAY = ("expert", "group_away", None)


def _take(rows: Float[Array, "N ..."], index: Int[Array, "..."]) -> Array:
  """Rows by index; zeros where it is out of range."""
  return rows.at[index].get(mode="fill", fill_value=0)


def _token_of_slot(seats: Seats, num_tokens: int) -> Int[Array, "N"]:
  empty = seats.edge == seats.slot.size
  return jnp.where(empty, num_tokens, seats.edge % num_tokens)


# Where tokens choose, row s of x feeds the K slots slot[k * S + s], and each
# slot holds at most one row. Both moves and both gradients are then reads by
# index; autodiff would write one of each pair as a scatter-add, slow on a CPU
# and in no fixed order on a GPU. A token's K rows are read one choice after the
# other: on a CPU that takes a tenth of the time of one read and a sum over it.


@jax.custom_vjp
def _copy(x: Float[Array, "S D"], seats: Seats) -> Float[Array, "N D"]:
  """Copies each token into the slots of its edges."""
  return _take(x, _token_of_slot(seats, x.shape[0]))


def _copy_forward(x, seats):
  return _copy(x, seats), (seats, x.shape[0])


def _copy_backward(saved, gradient):
  seats, num_tokens = saved
  slots = seats.slot.reshape(-1, num_tokens)
  return sum(_take(gradient, slot) for slot in slots), None


_copy.defvjp(_copy_forward, _copy_backward)


@jax.custom_vjp
def _sum(
  rows: Float[Array, "N O"], gate: Float[Array, "K S"], seats: Seats
) -> Float[Array, "S O"]:
  """Sums each token's rows, weighted by its gates."""
  slots = seats.slot.reshape(gate.shape)
  return sum(
    one[:, None] * _take(rows, slot)
    for one, slot in zip(gate, slots, strict=True)
  )


def _sum_forward(rows, gate, seats):
  return _sum(rows, gate, seats), (rows, gate, seats)


def _sum_backward(saved, gradient):
  rows, gate, seats = saved
  slots = seats.slot.reshape(gate.shape)
  to_gate = [(_take(rows, slot) * gradient).sum(axis=-1) for slot in slots]
  gate_of_slot = _take(gate.reshape(-1), seats.edge)
  token = _token_of_slot(seats, gate.shape[1])
  to_rows = _take(gradient, token) * gate_of_slot[:, None]
  return to_rows, jnp.stack(to_gate), None


_sum.defvjp(_sum_forward, _sum_backward)


def _send_by_index(
  x: Float[Array, "S D"], seats: Seats, assignment: Assignment
) -> Float[Array, "N D"]:
  if assignment.token is None:
    return _copy(x, seats)
  nobody = jnp.full(1, x.shape[0], assignment.token.dtype)
  return _take(x, jnp.append(assignment.token, nobody)[seats.edge])


def _combine_by_index(
  rows: Float[Array, "N O"],
  seats: Seats,
  assignment: Assignment,
  num_tokens: int,
) -> Float[Array, "S O"]:
  gate = assignment.gate.astype(rows.dtype)
  if assignment.token is None:
    return _sum(rows, gate.reshape(-1, num_tokens), seats)
  of_edge = _take(rows, seats.slot) * gate[:, None]
  y = jnp.zeros((num_tokens, rows.shape[1]), rows.dtype)
  return y.at[assignment.token].add(of_edge, mode="drop")


def _tokens_and_gates(
  seats: Seats, assignment: Assignment, num_tokens: int
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
  token = jnp.arange(assignment.expert.size, dtype=jnp.int32) % num_tokens
  if assignment.token is not None:
    token = assignment.token
  empty = seats.edge == assignment.expert.size
  edge = jnp.where(empty, 0, seats.edge)
  return jnp.where(empty, num_tokens, token[edge]), assignment.gate[edge]


# A move must not round: a matrix unit would take float32 rows as bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


def _send_by_product(
  x: Float[Array, "S D"], seats: Seats, assignment: Assignment
) -> Float[Array, "N D"]:
  token, _ = _tokens_and_gates(seats, assignment, x.shape[0])
  mask = jax.nn.one_hot(token, x.shape[0], dtype=x.dtype)
  return jnp.einsum("NS,SD->ND", mask, x, precision=_EXACT)


def _combine_by_product(
  rows: Float[Array, "N O"],
  seats: Seats,
  assignment: Assignment,
  num_tokens: int,
) -> Float[Array, "S O"]:
  token, gate = _tokens_and_gates(seats, assignment, num_tokens)
  mask = jax.nn.one_hot(token, num_tokens, dtype=rows.dtype)
  weights = mask * gate.astype(rows.dtype)[:, None]
  return jnp.einsum("NS,NO->SO", weights, rows, precision=_EXACT)


_BY_SLOTS = {
  # GShard's moves: one-hot masks of G*N*S entries turn both into matrix
  # products. They cost S/F of the experts' own work, so keep groups small; a
  # matrix unit may still like it better than reading by index.
  "einsum": (_send_by_product, _combine_by_product),
  # Rows move by index: no array is larger than the slots themselves.
  "gather": (_send_by_index, _combine_by_index),
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
  x: Float[Array, "G S D"],
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
    ValueError: a capacity below 1.
  """
  G, S, _ = x.shape
  blocks = seats_lib.blocks_of(capacity, num_experts, S)
  send, combine = _BY_SLOTS[name]
  seats = jax.vmap(lambda e: seats_lib.seat(e, blocks))(assignment.expert)
  ends = np.cumsum([num * slots for num, slots in blocks])[:-1]

  def away(of_slot):
    parts = []
    for part, block in zip(
      jnp.split(of_slot, ends, axis=1), blocks, strict=True
    ):
      part = part.reshape(G, *block, *of_slot.shape[2:]).swapaxes(0, 1)
      rest = (None,) * (part.ndim - 3)
      part = sharding.constrain(part, *_HOME, *rest)
      parts.append(sharding.constrain(part, *_AWAY, *rest))
    return parts

  def home(parts):
    back = []
    for part in parts:
      part = sharding.constrain(part, *_AWAY, None)
      part = sharding.constrain(part, *_HOME, None)
      back.append(part.swapaxes(0, 1).reshape(G, -1, part.shape[-1]))
    rows = jnp.concatenate(back, axis=1)
    return jax.vmap(lambda *args: combine(*args, S))(rows, seats, assignment)

  gate = jax.vmap(_take)(assignment.gate, seats.edge)
  return Trip(
    away(jax.vmap(send)(x, seats, assignment)),
    away(seats.edge < assignment.expert.shape[1]),
    away(gate),
    home,
  )


def _by_slots(
  name: str,
  expert_fn: ExpertFn,
  weights: Any,
  x: Float[Array, "G S D"],
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


def ragged(
  expert_fn: ExpertFn,
  weights: Any,
  x: Float[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  capacity: Capacity = None,
) -> Float[Array, "G S O"]:
  """Sorts rows by expert: no slot is empty, and without capacity none dropped.

  Every device sorts its own groups and needs all experts' weights for it: on a
  mesh that splits experts they are gathered.
  """

  def on_device(weights, x, assignment):
    G, S, D = x.shape
    if capacity is not None:
      blocks = seats_lib.blocks_of(capacity, num_experts, S)
      assignment = seats_lib.drop(assignment, blocks)
    one = seats_lib.merge(assignment, S)
    line = seats_lib.line_up(one.expert, num_experts)
    num_edges = one.expert.size
    rank = jnp.arange(num_edges, dtype=jnp.int32)
    used = line.start[-1]
    seats = Seats(
      jnp.where(one.expert < num_experts, line.place, num_edges),
      jnp.where(rank < used, line.order, num_edges),
    )
    sent = _send_by_index(x.reshape(G * S, D), seats, one)
    back = expert_fn(weights, sent, jnp.diff(line.start))
    return _combine_by_index(back, seats, one, G * S).reshape(G, S, -1)

  of_group = ("group", None, None)
  of_edges = jax.tree.map(lambda _: ("group", None), assignment)
  whole = jax.tree.map(lambda w: (None,) * w.ndim, weights)
  return sharding.manual(on_device, (whole, of_group, of_edges), of_group)(
    weights, x, assignment
  )


DISPATCH = {
  **{name: functools.partial(_by_slots, name) for name in _BY_SLOTS},
  "ragged": ragged,
}


def fastest(capacity: Capacity, needs_slots: bool) -> str:
  """Names what measured fastest (experiments/layer_speed.py): "auto".

  Where experts are split over devices, slots. Else, on a CPU, sorted rows: they
  skip empty slots, and that counts for more than all else there. A TPU moves
  fewer bytes by slots, while these are bounded.

  Args:
    capacity: as for dispatch.
    needs_slots: whether the experts can run on slots alone.
  """
  if needs_slots or sharding.splits_experts():
    return "gather"
  if capacity is None or jax.default_backend() == "cpu":
    return "ragged"
  return "gather"
