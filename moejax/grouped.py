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
from jaxtyping import Array, Bool, Float, Int

from moejax import kernels, sharding
from moejax.slots import num_below

# A group's rows go together in the least of these sizes that holds them, in
# eighths of the mean group. Shapes are static, so each size is a loop.
_EIGHTHS = (4, 6, 7, 8, 9, 10, 12, 16)
# Below this many rows a smaller product is no faster.
_LEAST_ROWS = 8

Dot = Callable[[Array, Array], Array]
# (weights of a group, its rows, dot) -> rows
RowFn = Callable[[Any, Array, Dot], Array]


def grouped_dot(
  rows: Float[Array, "N I"],
  matrices: Float[Array, "E I O"],
  group_sizes: Int[Array, "E"],
) -> Float[Array, "N O"]:
  """Multiplies the first group_sizes[0] rows by matrices[0], and so on."""
  return grouped(
    lambda matrix, rows, dot: dot(rows, matrix), matrices, rows, group_sizes
  )


def grouped(
  fn: RowFn,
  weights: Any,
  rows: Float[Array, "N I"],
  group_sizes: Int[Array, "E"],
) -> Float[Array, "N O"]:
  """Applies fn(weights, rows, dot) to the rows of each group, in line.

  The backward pass keeps the products and computes all else again. A group
  without rows leaves its weights a gradient of exactly zero.

  Args:
    fn: works row by row; multiplies by dot(rows, matrix) and nothing else, and
      in the same order always.
    weights: a tree of matrices [E, I, O].
    rows: zero past the last group.
    group_sizes: the first group_sizes[0] rows are of group 0, and so on.
  """
  # Within `jax.shard_map` weights are the same on all devices and rows are not.
  # The sum over devices of the weights' gradient then comes after the loops.
  weights, group_sizes = sharding.vary_as(
    rows, (jax.tree.map(lambda w: w.astype(rows.dtype), weights), group_sizes)
  )
  if rows.shape[0] == 0:
    return fn(jax.tree.map(lambda w: w[0], weights), rows, jnp.matmul)
  return _grouped(fn, weights, rows, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(fn, weights, rows, group_sizes):
  return _forward(fn, weights, rows, group_sizes)[0]


def _forward(fn, weights, rows, group_sizes):
  y, products = jax.lax.platform_dependent(
    weights,
    rows,
    group_sizes,
    tpu=functools.partial(_whole, fn),
    default=functools.partial(_loop, fn),
  )
  return y, (weights, rows, group_sizes, products)


def _backward(fn, saved, gradient):
  slopes = jax.lax.platform_dependent(
    *saved,
    gradient,
    tpu=functools.partial(_whole_backward, fn),
    default=functools.partial(_loop_backward, fn),
  )
  return *slopes, None


_grouped.defvjp(_forward, _backward)


def _record(fn, weights, rows, product: Dot):
  """Runs fn; returns its result and the products that it was made of."""
  products = []

  def dot(rows, matrix):
    products.append(product(rows, matrix))
    return products[-1]

  y = fn(weights, rows, dot)
  # What is made by the last product is no input of anything.
  return y, tuple(products[:-1] if products and y is products[-1] else products)


def _replay(fn, products, by_rows, by_matrix):
  """Returns fn of weights and rows, whose products are known already.

  Args:
    fn: as for `grouped`.
    products: what `_record` returned.
    by_rows: (gradient, matrix) -> gradient of the rows.
    by_matrix: (rows, gradient) -> gradient of the matrix.
  """

  @jax.custom_vjp
  def known(rows, matrix, product):
    return product

  def backward(saved, gradient):
    rows, matrix = saved
    return by_rows(gradient, matrix), by_matrix(rows, gradient), None

  known.defvjp(
    lambda rows, matrix, product: (product, (rows, matrix)), backward
  )

  def run(weights, rows):
    left = iter(products)

    def dot(rows, matrix):
      shape = (rows.shape[0], matrix.shape[-1])
      product = next(left, None)
      if product is None:
        product = jnp.zeros_like(rows, shape=shape)
      return known(rows, matrix, product)

    return fn(weights, rows, dot)

  return run


# -- all groups at once -------------------------------------------------------


def _whole(fn, weights, rows, group_sizes):
  def product(rows, matrices):
    return kernels.rows_by_matrix(rows, matrices, group_sizes)

  return _record(fn, weights, rows, product)


def _whole_backward(fn, weights, rows, group_sizes, products, gradient):
  run = _replay(
    fn,
    products,
    lambda gradient, matrices: kernels.rows_by_matrix(
      gradient, matrices, group_sizes, transposed=True
    ),
    lambda rows, gradient: kernels.rows_by_rows(rows, gradient, group_sizes),
  )
  return jax.vjp(run, weights, rows)[1](gradient)


# -- one group after the other ------------------------------------------------


def _loop(fn, weights, rows, group_sizes):
  plan = _plan(rows.shape[0], group_sizes)

  def of_part(group, part):
    return _record(fn, _index(weights, group), part.take(rows), jnp.matmul)

  def body(carry, group, part, first):
    del first
    return jax.tree.map(part.put, carry, of_part(group, part))

  part = _Part(0, 0, plan.sizes[0], rows.shape[0])
  shapes = jax.eval_shape(lambda: of_part(0, part))
  empty = jax.tree.map(
    lambda a: jnp.zeros_like(rows, shape=(rows.shape[0], a.shape[1])), shapes
  )
  return plan.sweep(body, empty)


def _loop_backward(fn, weights, rows, group_sizes, products, gradient):
  plan = _plan(rows.shape[0], group_sizes)

  def body(carry, group, part, first):
    to_weights, to_rows = carry
    run = _replay(
      fn,
      [part.take(product) for product in products],
      lambda gradient, matrix: jnp.matmul(gradient, matrix.T),
      lambda rows, gradient: jnp.matmul(rows.T, gradient),
    )
    pullback = jax.vjp(run, _index(weights, group), part.take(rows))[1]
    # Rows of other groups must not count here.
    mine = jnp.where(part.mine(), part.take(gradient), 0)
    of_weights, of_rows = pullback(mine)

    def add(total, slope):
      if not first:
        slope = slope + _index(total, group)
      return jax.lax.dynamic_update_index_in_dim(total, slope, group, 0)

    to_weights = jax.tree.map(add, to_weights, of_weights)
    return to_weights, part.put(to_rows, of_rows)

  return plan.sweep(body, jax.tree.map(jnp.zeros_like, (weights, rows)))


def _index(weights, group):
  return jax.tree.map(
    lambda w: jax.lax.dynamic_index_in_dim(w, group, keepdims=False), weights
  )


class _Part(NamedTuple):
  """Some rows of one group, and others that fill a static size up.

  Attributes:
    start: the group's first row here.
    end: past its last row here.
    size: how many rows to take, static.
    num_rows: of the whole, static.
  """

  start: Int[Array, ""] | int
  end: Int[Array, ""] | int
  size: int
  num_rows: int

  def _at(self):
    # A part that would reach past the last row begins before its group.
    return jnp.minimum(self.start, self.num_rows - self.size)

  def mine(self) -> Bool[Array, "N 1"]:
    index = self._at() + jnp.arange(self.size, dtype=jnp.int32)
    return ((index >= self.start) & (index < self.end))[:, None]

  def take(self, rows: Float[Array, "N I"]) -> Float[Array, "M I"]:
    return jax.lax.dynamic_slice_in_dim(rows, self._at(), self.size)

  def put(
    self, rows: Float[Array, "N I"], part: Float[Array, "M I"]
  ) -> Float[Array, "N I"]:
    """Writes the group's own rows."""
    part = jnp.where(self.mine(), part, self.take(rows))
    return jax.lax.dynamic_update_slice_in_dim(rows, part, self._at(), 0)


class _Plan(NamedTuple):
  """In which order and sizes to take the groups.

  Attributes:
    num_rows: of the whole, static.
    sizes: the static sizes, rising.
    start: of each group, in rows.
    rest: rows of a group that no whole number of the largest size holds.
    full: how many of the largest size a group takes besides.
    order: the groups, those of one size together.
    bounds: where each size begins in the order.
  """

  num_rows: int
  sizes: list[int]
  start: Int[Array, "E"]
  rest: Int[Array, "E"]
  full: Int[Array, "E"]
  order: Int[Array, "E"]
  bounds: Int[Array, "sizes"]

  def sweep(self, body: Callable[..., Any], carry: Any) -> Any:
    """Calls carry = body(carry, group, part, first) for every part.

    `first`, whether it is its group's first part, is static.
    """
    for i, size in enumerate(self.sizes):

      def one(at, carry, size=size):
        group = self.order[at]
        start = self.start[group]
        end = start + self.rest[group]
        return body(carry, group, _Part(start, end, size, self.num_rows), True)

      carry = jax.lax.fori_loop(self.bounds[i], self.bounds[i + 1], one, carry)
    size, total = self.sizes[-1], jnp.cumsum(self.full)

    def more(at, carry):
      group = num_below(total, at + 1)
      before = at - (total[group] - self.full[group])
      start = self.start[group] + self.rest[group] + before * size
      part = _Part(start, start + size, size, self.num_rows)
      return body(carry, group, part, False)

    return jax.lax.fori_loop(jnp.int32(0), total[-1], more, carry)


def _plan(num_rows: int, group_sizes: Int[Array, "E"]) -> _Plan:
  blocks = num_rows / (8 * group_sizes.size * _LEAST_ROWS)
  sizes = {_LEAST_ROWS * max(1, math.ceil(i * blocks)) for i in _EIGHTHS}
  sizes = sorted({min(size, num_rows) for size in sizes})
  full = jnp.maximum(group_sizes - 1, 0) // sizes[-1]
  rest = group_sizes - full * sizes[-1]
  kind = sum((rest > size).astype(jnp.int32) for size in sizes[:-1])
  # Groups without rows stand behind all others.
  kind = jnp.where(rest > 0, kind, len(sizes))
  order = jnp.argsort(kind).astype(jnp.int32)
  steps = jnp.arange(len(sizes) + 1, dtype=jnp.int32)
  bounds = num_below(kind[order], steps)
  start = jnp.cumsum(group_sizes) - group_sizes
  return _Plan(num_rows, sizes, start, rest, full, order, bounds)
