"""Dispatch: send tokens to their experts, run them, combine the outputs.

Functions with one signature and one meaning,

  y[token] += gate * expert(x[token])    for every edge that has a slot,

where an expert takes its first `capacity` edges of each group. They differ in
how rows move, never in what is computed. Two exceptions:

* A token with an infinity makes its own y infinite or NaN; by "einsum" NaN. As
  everywhere in arithmetic it also spoils the gradient of its experts' weights.
* Derivatives forward (`jax.jvp`, `jax.linearize`, `jax.hessian`) are those of
  "einsum" alone: the others have backward passes of their own.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from moejax import sharding
from moejax import slots as slots_lib
from moejax.ragged import ragged
from moejax.routing import Assignment
from moejax.slots import ExpertFn

# The axes of slots [E, G, C, ...] in turn: where their tokens are; on one
# of the devices that share the expert; on all of these.
_RESHARD = (
  (None, "group"),
  ("expert", "group_dispatched"),
  ("expert", "group_replicated"),
)

_BY_SLOTS = {
  # GShard's moves: one-hot masks of G*N*S entries turn both into matrix
  # products. They cost S/F of the experts' own work, so keep groups small; a
  # matrix unit may still like it better than reading by index.
  "einsum": (slots_lib.dispatch_einsum, slots_lib.combine_einsum),
  # Rows move by index: no array is larger than the slots themselves.
  "gather": (slots_lib.dispatch_gather, slots_lib.combine_gather),
}


class Dispatched(NamedTuple):
  """Tokens in the slots of their experts; each list has an array per kind.

  Attributes:
    rows: [E, G, C, D]; zeros in empty slots.
    mask: which slots are taken, [E, G, C].
    gate: of the edge in each slot, [E, G, C].
    token: the same.
    combine: takes the experts' outputs, [E, G, C, O] each, back to [G, S, O].
  """

  rows: list[Float[Array, "E G C D"]]
  mask: list[Bool[Array, "E G C"]]
  gate: list[Float[Array, "E G C"]]
  token: list[Int[Array, "E G C"]]
  combine: Callable[[Sequence[Array]], Array]


def dispatch(
  name: str,
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int | tuple[int, ...],
  capacity: int | None = None,
) -> Dispatched:
  """Fills slots and carries them to their experts.

  On a mesh that splits experts dispatch is one all-to-all, and combine another.

  Args:
    name: "einsum" or "gather".
    x: tokens.
    assignment: the edges.
    num_experts: E, or that of each kind in turn: each is split by itself.
    capacity: slots per expert and group; None is one for every token.

  Raises:
    ValueError: a capacity below 1, or rows of whole numbers.
  """
  kinds = np.atleast_1d(num_experts).tolist()
  *ends, total = itertools.accumulate(kinds)
  slots_lib.check(x, total, capacity)
  G, S, _ = x.shape
  C = S if capacity is None else capacity
  move, combine = _BY_SLOTS[name]
  slots = jax.vmap(lambda e: slots_lib.assign_slots(e, total, C))(
    assignment.expert
  )

  def reshard(part, steps):
    # A single expert is on every device already.
    for axes in steps if part.shape[0] > 1 else _RESHARD[:1]:
      part = sharding.constrain(part, *axes, *(None,) * (part.ndim - 2))
    return part

  def to_experts(of_slot):
    by_expert = of_slot.reshape(G, total, C, *of_slot.shape[2:]).swapaxes(0, 1)
    return [reshard(part, _RESHARD) for part in jnp.split(by_expert, ends)]

  def back(parts):
    rows = [reshard(part, _RESHARD[::-1]).swapaxes(0, 1) for part in parts]
    rows = jnp.concatenate(rows, axis=1).reshape(G, total * C, -1)
    return jax.vmap(lambda *args: combine(*args, S))(rows, slots, assignment)

  read = jax.vmap(slots_lib.take)
  return Dispatched(
    to_experts(jax.vmap(move)(x, slots, assignment)),
    to_experts(slots.edge < assignment.expert.shape[1]),
    to_experts(read(assignment.gate, slots.edge)),
    to_experts(read(assignment.tokens(S), slots.edge)),
    back,
  )


def _by_slots(
  name: str,
  expert_fn: ExpertFn,
  weights: Any,
  x: Num[Array, "G S D"],
  assignment: Assignment,
  num_experts: int | tuple[int, ...],
  capacity: int | None = None,
) -> Float[Array, "G S O"]:
  """Gives every expert a fixed number of slots in each group."""
  sent = dispatch(name, x, assignment, num_experts, capacity)
  rows = tuple(a.reshape(a.shape[0], -1, a.shape[3]) for a in sent.rows)
  mask = tuple(a.reshape(a.shape[0], -1) for a in sent.mask)
  if np.ndim(num_experts) == 0:
    back = (expert_fn(weights, rows[0], mask[0]),)
  else:
    back = expert_fn(weights, rows, mask)
  shapes = [(*a.shape, -1) for a in sent.mask]
  return sent.combine([a.reshape(s) for a, s in zip(back, shapes, strict=True)])


DISPATCH = {
  "einsum": functools.partial(_by_slots, "einsum"),
  "gather": functools.partial(_by_slots, "gather"),
  "ragged": ragged,
}

# Up to so many edges, on a CPU, slots are as fast as sorted rows, or faster.
_FEW_EDGES = 4096


def fastest(
  capacity: int | None, needs_slots: bool, edges: int, known: bool = True
) -> str:
  """Names what measured fastest (layer_speed, auto_dispatch): "auto".

  Without a capacity, sorted rows: slots would have to be S per expert, nearly
  all of them empty, and where experts are split all would move. With one, slots
  where experts are split: two all-to-alls of a size known beforehand. Else, on
  a CPU, sorted rows: they skip empty slots, and that counts for more than all
  else there, but for few edges, whose products take no longer than the loop
  around them. A TPU moves fewer bytes by slots while they are bounded.

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
  split = sharding.splits("expert")
  return "ragged" if sorts and not split else "gather"
