"""Moves: rows of tokens into seats, and back to their tokens as sums.

By index, where no array is larger than the seats, or by products with masks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.routing import Assignment
from moejax.slots import Seats

# (weights, rows, real) -> rows. Rows in slots are [E, N, D], and `real` [E, N]
# says which slots are taken; blocks of experts give a tuple of both. Rows
# sorted by expert are [N, D], and `real` [E] says how many each expert has.
ExpertFn = Callable[[Any, Any, Any], Any]


def take(rows: Float[Array, "N ..."], index: Int[Array, "..."]) -> Array:
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
  return take(x, _token_of_slot(seats, x.shape[0]))


def _copy_forward(x, seats):
  return _copy(x, seats), (seats, x.shape[0])


def _copy_backward(saved, gradient):
  seats, num_tokens = saved
  slots = seats.slot.reshape(-1, num_tokens)
  return sum(take(gradient, slot) for slot in slots), None


_copy.defvjp(_copy_forward, _copy_backward)


@jax.custom_vjp
def _sum(
  rows: Float[Array, "N O"], gate: Float[Array, "K S"], seats: Seats
) -> Float[Array, "S O"]:
  """Sums each token's rows, weighted by its gates."""
  slots = seats.slot.reshape(gate.shape)
  return sum(
    one[:, None] * take(rows, slot)
    for one, slot in zip(gate, slots, strict=True)
  )


def _sum_forward(rows, gate, seats):
  return _sum(rows, gate, seats), (rows, gate, seats)


def _sum_backward(saved, gradient):
  rows, gate, seats = saved
  slots = seats.slot.reshape(gate.shape)
  to_gate = [(take(rows, slot) * gradient).sum(axis=-1) for slot in slots]
  gate_of_slot = take(gate.reshape(-1), seats.edge)
  token = _token_of_slot(seats, gate.shape[1])
  to_rows = take(gradient, token) * gate_of_slot[:, None]
  return to_rows, jnp.stack(to_gate), None


_sum.defvjp(_sum_forward, _sum_backward)


def send_by_index(
  x: Float[Array, "S D"], seats: Seats, assignment: Assignment
) -> Float[Array, "N D"]:
  """Returns the token's row in every slot, zeros in empty ones; by reading."""
  if assignment.token is None:
    return _copy(x, seats)
  nobody = jnp.full(1, x.shape[0], assignment.token.dtype)
  return take(x, jnp.append(assignment.token, nobody)[seats.edge])


def combine_by_index(
  rows: Float[Array, "N O"],
  seats: Seats,
  assignment: Assignment,
  num_tokens: int,
) -> Float[Array, "S O"]:
  """Adds up each token's rows, weighed by their gates (eq. 1), by index.

  A token without a seat gives zeros.
  """
  gate = assignment.gate.astype(rows.dtype)
  if assignment.token is None:
    return _sum(rows, gate.reshape(-1, num_tokens), seats)
  of_edge = take(rows, seats.slot) * gate[:, None]
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


def _product(
  weights: Float[Array, "to from"],
  rows: Float[Array, "from D"],
) -> Float[Array, "to D"]:
  """Multiplies a mask by rows; a row that is not finite reaches its own places.

  In the product itself 0 * NaN would be NaN everywhere. Where such a row
  arrives all is NaN, and no gradient comes back from there.
  """
  finite = jnp.isfinite(rows).all(axis=1)
  clean = jnp.where(finite[:, None], rows, 0)
  y = jnp.einsum("NS,SD->ND", weights, clean, precision=_EXACT)
  spoilt = ((weights != 0) & ~finite[None]).any(axis=1)
  return jnp.where(spoilt[:, None], jnp.nan, y)


def send_by_product(
  x: Float[Array, "S D"], seats: Seats, assignment: Assignment
) -> Float[Array, "N D"]:
  """Returns what `send_by_index` does, by a product with a mask [N, S]."""
  token, _ = _tokens_and_gates(seats, assignment, x.shape[0])
  return _product(jax.nn.one_hot(token, x.shape[0], dtype=x.dtype), x)


def combine_by_product(
  rows: Float[Array, "N O"],
  seats: Seats,
  assignment: Assignment,
  num_tokens: int,
) -> Float[Array, "S O"]:
  """Returns what `combine_by_index` does, by a product with a mask [N, S]."""
  token, gate = _tokens_and_gates(seats, assignment, num_tokens)
  mask = jax.nn.one_hot(token, num_tokens, dtype=bool)
  # By choice, as a gate that is NaN times 0 would be.
  weights = jnp.where(mask, gate.astype(rows.dtype)[:, None], 0)
  return _product(weights.T, rows)


def check_rows(x: Array) -> None:
  """Refuses rows that cannot be weighed by gates.

  Raises:
    ValueError: they are whole numbers, or complex ones.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"the rows are {x.dtype}, which gates between 0 and 1 cannot weigh; give"
      " them as float32 or bfloat16, as the layers do with whole numbers."
    )
