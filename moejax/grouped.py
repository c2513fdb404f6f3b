"""Rows sorted by group, each group with its own weights: what `ragged` needs.

On a TPU the products are kernels (see kernels.py). Elsewhere
`jax.lax.ragged_dot` would multiply every row by every matrix, and so a loop
goes over the groups: one group's rows through all its layers, while they are
still in the cache, and as many rows as there are, to an eighth of the mean.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import kernels, partition
from moejax.slots import num_below

# A group's rows go together in the least of these sizes that holds them, in
# eighths of the mean group. Shapes are static, so each size is a loop.
_EIGHTHS = (4, 6, 7, 8, 9, 10, 12, 16)
# Sums of what other matrix units would round.
_EXACT = jax.lax.Precision.HIGHEST
# Below this many rows a smaller product is no faster.
_LEAST_ROWS = 8

Dot = Callable[[Array, Array], Array]
# (weights of a group, its rows, dot) -> rows
RowFn = Callable[[Any, Array, Dot], Array]


def grouped_dot(
  rows: Float[Array, "N I"],
  matrices: Float[Array, "E I O"],
  group_sizes: Int[Array, "E"],
  precision: jax.lax.Precision | None = None,
) -> Float[Array, "N O"]:
  """Multiplies the first group_sizes[0] rows by matrices[0], and so on."""
  return grouped(_product, matrices, rows, group_sizes, precision)


def _product(matrix, rows, dot):
  return dot(rows, matrix)


@jax.custom_vjp
def grouped_sum(
  rows: Float[Array, "N I"],
  values: Float[Array, "N O"],
  group_sizes: Int[Array, "E"],
) -> Float[Array, "E I O"]:
  """Sums the outer products rows x values of each group, without rounding.

  Its gradient reaches the values alone.
  """
  # It is what reaches the matrices backward through `grouped_dot`.
  shape = (group_sizes.size, rows.shape[1], values.shape[1])
  saved = (jnp.zeros_like(values, shape=shape), rows, group_sizes, ())
  return _backward(_product, _EXACT, saved, values)[0]


grouped_sum.defvjp(
  lambda *args: (grouped_sum(*args), args),
  lambda saved, slope: (
    None,
    grouped_dot(saved[0], slope, saved[2], _EXACT),
    None,
  ),
)


def grouped(
  fn: RowFn,
  weights: Any,
  rows: Float[Array, "N I"],
  group_sizes: Int[Array, "E"],
  precision: jax.lax.Precision | None = None,
) -> Float[Array, "N O"]:
  """Applies fn(weights, rows, dot) to the rows of each group.

  The backward pass keeps the products and computes all else again. A group
  without rows leaves its weights a gradient of exactly zero.

  Args:
    fn: works row by row; multiplies by dot(rows, matrix) and nothing else, and
      in the same order always.
    weights: a tree of matrices [E, I, O].
    rows: zero past the last group.
    group_sizes: the first group_sizes[0] rows are of group 0, and so on.
    precision: of the products; None is the device's own.
  """
  # Within `jax.shard_map` weights are the same on all devices and rows are not.
  # The sum over devices of the weights' gradient then comes after the loops.
  weights, group_sizes = partition.vary_as(
    rows, (jax.tree.map(lambda w: w.astype(rows.dtype), weights), group_sizes)
  )
  if rows.shape[0] == 0:
    return fn(_index(weights, 0), rows, jnp.matmul)
  return _grouped(fn, precision, weights, rows, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(fn, precision, weights, rows, group_sizes):
  return _forward(fn, precision, weights, rows, group_sizes)[0]


def _forward(fn, precision, *args):
  y, products = jax.lax.platform_dependent(
    *args,
    tpu=functools.partial(_whole, fn, precision),
    default=functools.partial(_loop, fn, precision),
  )
  return y, (*args, products)


def _backward(fn, precision, saved, gradient):
  slopes = jax.lax.platform_dependent(
    *saved,
    gradient,
    tpu=functools.partial(_whole_backward, fn, precision),
    default=functools.partial(_loop_backward, fn, precision),
  )
  return *slopes, None


_grouped.defvjp(_forward, _backward)


# fn works row by row and multiplies by `dot` alone, so the backward pass needs
# no more than its products: the rest is cheap, and computed again from them.


def _record(fn, weights, rows, product: Dot):
  """Runs fn; returns its result and the products that it was made of."""
  products = []

  def dot(rows, matrix):
    products.append(product(rows, matrix))
    return products[-1]

  y = fn(weights, rows, dot)
  # What is made by the last product is no input of anything.
  return y, tuple(products[:-1] if products and y is products[-1] else products)


def _pull_back(fn, weights, rows, products, gradient, by_rows, by_matrix):
  """Returns the gradients of weights and rows, by the products of `_record`.

  by_rows(gradient, matrix) is the gradient of the rows of a product, and
  by_matrix(rows, gradient) that of its matrix.
  """

  @jax.custom_vjp
  def known(rows, matrix, product):
    return product

  def backward(saved, gradient):
    rows, matrix = saved
    return by_rows(gradient, matrix), by_matrix(rows, gradient), None

  known.defvjp(lambda *args: (args[2], args[:2]), backward)
  left = iter(products)

  def dot(rows, matrix):
    product = next(left, None)
    if product is None:
      product = jnp.zeros_like(rows, shape=(len(rows), matrix.shape[-1]))
    return known(rows, matrix, product)

  _, pull = jax.vjp(lambda weights, rows: fn(weights, rows, dot), weights, rows)
  return pull(gradient)


# -- all groups at once -------------------------------------------------------


def _whole(fn, precision, weights, rows, group_sizes):
  options = {"group_sizes": group_sizes, "precision": precision}
  product = functools.partial(kernels.rows_by_matrix, **options)
  return _record(fn, weights, rows, product)


def _whole_backward(
  fn, precision, weights, rows, group_sizes, products, gradient
):
  options = {"group_sizes": group_sizes, "precision": precision}
  by_rows = functools.partial(
    kernels.rows_by_matrix, transposed=True, **options
  )
  by_matrix = functools.partial(kernels.rows_by_rows, **options)
  return _pull_back(fn, weights, rows, products, gradient, by_rows, by_matrix)


# -- one group after the other ------------------------------------------------


def _loop(fn, precision, weights, rows, group_sizes):
  dot = functools.partial(jnp.matmul, precision=precision)

  def body(carry, group, part, first):
    of_part = _record(fn, _index(weights, group), part.take(rows), dot)
    return jax.tree.map(part.put, carry, of_part)

  shapes = jax.eval_shape(
    lambda: _record(fn, _index(weights, 0), rows[:1], dot)
  )
  empty = jax.tree.map(
    lambda a: jnp.zeros_like(rows, shape=(len(rows), a.shape[1])), shapes
  )
  return _sweep(len(rows), group_sizes, body, empty)


def _loop_backward(
  fn, precision, weights, rows, group_sizes, products, gradient
):
  dot = functools.partial(jnp.matmul, precision=precision)

  def body(carry, group, part, first):
    to_weights, to_rows = carry
    of_weights, of_rows = _pull_back(
      fn,
      _index(weights, group),
      part.take(rows),
      [part.take(product) for product in products],
      # Rows of other groups must not count here.
      jnp.where(part.mine, part.take(gradient), 0),
      lambda gradient, matrix: dot(gradient, matrix.T),
      lambda rows, gradient: dot(rows.T, gradient),
    )

    def add(total, slope):
      if not first:
        slope = slope + _index(total, group)
      return jax.lax.dynamic_update_index_in_dim(total, slope, group, 0)

    to_weights = jax.tree.map(add, to_weights, of_weights)
    return to_weights, part.put(to_rows, of_rows)

  zeros = jax.tree.map(jnp.zeros_like, (weights, rows))
  return _sweep(len(rows), group_sizes, body, zeros)


def _index(weights, group):
  return jax.tree.map(
    lambda w: jax.lax.dynamic_index_in_dim(w, group, keepdims=False), weights
  )


class _Part(NamedTuple):
  """Rows of one group, `mine`, and others that fill a static size M up."""

  at: Array
  mine: Array

  @classmethod
  def make(cls, start, end, size, num_rows) -> "_Part":
    # One that would reach past the last row begins before its group.
    at = jnp.minimum(start, num_rows - size)
    index = at + jnp.arange(size, dtype=jnp.int32)
    return cls(at, ((index >= start) & (index < end))[:, None])

  def take(self, rows: Float[Array, "N I"]) -> Float[Array, "M I"]:
    return jax.lax.dynamic_slice_in_dim(rows, self.at, len(self.mine))

  def put(
    self, rows: Float[Array, "N I"], part: Float[Array, "M I"]
  ) -> Float[Array, "N I"]:
    """Writes the group's own rows."""
    part = jnp.where(self.mine, part, self.take(rows))
    return jax.lax.dynamic_update_slice_in_dim(rows, part, self.at, 0)


def _sweep(num_rows, group_sizes, body, carry):
  """Calls carry = body(carry, group, part, first) for every part of a group.

  `first`, whether it is its group's first part, is static. The first part is
  what no whole number of the largest size holds: groups whose first parts have
  the same static size go in one loop. The full parts that are left go in
  another.
  """
  blocks = num_rows / (8 * group_sizes.size * _LEAST_ROWS)
  sizes = {_LEAST_ROWS * max(1, math.ceil(i * blocks)) for i in _EIGHTHS}
  sizes = sorted({min(size, num_rows) for size in sizes})
  full = jnp.maximum(group_sizes - 1, 0) // sizes[-1]
  rest = group_sizes - full * sizes[-1]
  start = jnp.cumsum(group_sizes) - group_sizes
  # Which size each group's first part takes; groups without rows stand last.
  kind = sum((rest > size).astype(jnp.int32) for size in sizes[:-1])
  kind = jnp.where(rest > 0, kind, len(sizes))
  order = jnp.argsort(kind).astype(jnp.int32)
  steps = jnp.arange(len(sizes) + 1, dtype=jnp.int32)
  bounds = num_below(kind[order], steps)
  for i, size in enumerate(sizes):

    def one(at, carry, size=size):
      group = order[at]
      end = start[group] + rest[group]
      part = _Part.make(start[group], end, size, num_rows)
      return body(carry, group, part, True)

    carry = jax.lax.fori_loop(bounds[i], bounds[i + 1], one, carry)
  total = jnp.cumsum(full)

  def more(at, carry):
    group = num_below(total, at + 1)
    before = at - (total[group] - full[group])
    begin = start[group] + rest[group] + before * size
    part = _Part.make(begin, begin + size, size, num_rows)
    return body(carry, group, part, False)

  return jax.lax.fori_loop(jnp.int32(0), total[-1], more, carry)
