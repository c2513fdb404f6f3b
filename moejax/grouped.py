"""Rows sorted by group, each group with its own weights: what `ragged` needs.

On a TPU or GPU the products are kernels of some library (see kernels.py): for
each, by direction and sizes, the one that was the fastest where it was measured
(measured_products.json), else the first in an order. Elsewhere
`jax.lax.ragged_dot` would multiply every row by every matrix, and so a loop
goes over the groups: one group's rows through all its layers, while they are
still in the cache, and as many rows as there are, to an eighth of the mean.
"""

import functools
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import kernels, sharding
from moejax.kernels import Backend, Sizes
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
  backend: str | None = None,
) -> Float[Array, "N O"]:
  """Multiplies the first group_sizes[0] rows by matrices[0], and so on.

  Args:
    rows: sorted by group; those past the last group may hold anything.
    matrices: one for each group; they are cast to the dtype of rows.
    group_sizes: rows of each group; together no more than N.
    precision: of the products; None is the device's own.
    backend: one of BACKENDS, for the product and its gradients where it has
      them; None is what suits the platform and the sizes.

  Returns:
    The products, zero past the last group. A group without rows leaves its
    matrix a gradient of exactly zero.

  Raises:
    ValueError: a backend of another name, or not of this platform.
  """
  if backend is not None:
    here, known = _platform(), backends_here()
    if backend not in known:
      what = "is not one" if backend not in BACKENDS else f"runs not on {here}"
      raise ValueError(
        f"backend {backend!r} {what}; take {' or '.join(known)}, which {here}"
        " has, or None for what suits the sizes"
      )
  return grouped(_product, matrices, rows, group_sizes, precision, backend)


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
  return _backward(_product, _EXACT, None, saved, values)[0]


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
  backend: str | None = None,
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
    backend: as of `grouped_dot`.
  """
  # Within `jax.shard_map` devices may have the same weights and other rows, or
  # the same rows and other hidden units. The sums over devices of the gradients
  # of what they share then come after the loops.
  weights, rows, group_sizes = sharding.vary_alike(
    jax.tree.map(lambda w: w.astype(rows.dtype), weights), rows, group_sizes
  )
  if rows.shape[0] == 0:
    return fn(_index(weights, 0), rows, jnp.matmul)
  return _grouped(fn, precision, backend, weights, rows, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(fn, precision, backend, weights, rows, group_sizes):
  return _forward(fn, precision, backend, weights, rows, group_sizes)[0]


def _forward(fn, precision, backend, *args):
  run = functools.partial(_by_platform, _whole, _loop, fn, precision, backend)
  y, products = run(*args)
  return y, (*args, products)


def _backward(fn, precision, backend, saved, gradient):
  whole, loop = _whole_backward, _loop_backward
  slopes = _by_platform(whole, loop, fn, precision, backend, *saved, gradient)
  return *slopes, None


def _by_platform(whole, loop, fn, precision, backend, *args):
  loop = functools.partial(loop, fn, precision)
  if backend is not None:
    run = functools.partial(whole, fn, precision, _platform(), backend)
    return (loop if backend == "loop" else run)(*args)
  tpu, cuda = (
    functools.partial(whole, fn, precision, platform, None)
    for platform in ("tpu", "cuda")
  )
  return jax.lax.platform_dependent(*args, tpu=tpu, cuda=cuda, default=loop)


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


def _whole(fn, precision, platform, backend, weights, rows, group_sizes):
  def product(rows, matrices):
    args = rows, matrices, group_sizes
    return _multiply("forward", platform, backend, precision, *args)

  return _record(fn, weights, rows, product)


def _whole_backward(
  fn,
  precision,
  platform,
  backend,
  weights,
  rows,
  group_sizes,
  products,
  gradient,
):
  by_rows, by_matrix = (
    lambda left, right, direction=direction: _multiply(
      direction, platform, backend, precision, left, right, group_sizes
    )
    for direction in ("transposed", "gradient")
  )
  return _pull_back(fn, weights, rows, products, gradient, by_rows, by_matrix)


def _multiply(direction, platform, backend, precision, left, right, sizes):
  (N, I), dtype = left.shape, left.dtype.name
  O = right.shape[1 if direction != "forward" else 2]
  wanted = Sizes(direction, dtype, sizes.size, N, I, O)
  # Kernels do not say over which axes of a mesh they vary, as a `jax.shard_map`
  # of the user's own asks, but with check_vma=False.
  if jax.typeof(left).manual_axis_type.varying:
    backend = "loop"
  chosen = choose(platform, wanted, backend)

  # Under `jax.vmap` one product comes after the other: `jax.lax.ragged_dot` has
  # no rule for matrices that all share, nor the kernels one for groups.
  @jax.custom_batching.sequential_vmap
  def run(left, right, sizes):
    if direction == "gradient":
      return chosen.rows_by_rows(left, right, sizes, precision)
    is_transposed = direction == "transposed"
    return chosen.rows_by_matrix(left, right, sizes, is_transposed, precision)

  return run(left, right, sizes)


def choose(
  platform: str,
  sizes: Sizes,
  backend: str | None = None,
  measured: Collection[Mapping[str, Any]] | None = None,
) -> Backend:
  """Returns the backend of a product; it says so once where one cannot be it.

  Args:
    platform: "cpu", "cuda" or "tpu".
    sizes: of the product, and its direction.
    backend: the one that is asked for; by default the one that was the fastest
      on such a device for sizes of which none is more than twice or less than
      half as large, and else the first of ORDER that can.
    measured: rows as of measured_products.json; by default those of this file.
  """
  if backend is None:
    rows = _measured() if measured is None else measured
    kind = sharding.device_kind()
    same = {"device": kind, "dtype": sizes.dtype, "direction": sizes.direction}
    distances = {}
    for row in rows:
      if same.items() <= row.items():
        ratios = [math.log2(row[n] / getattr(sizes, n)) for n in "ENIO"]
        if max(map(abs, ratios)) <= 1:
          distances[math.hypot(*ratios)] = row["backend"]
    backend = distances[min(distances)] if distances else None
  for name in (*([] if backend is None else [backend]), *ORDER[platform]):
    if not (reason := BACKENDS[name].refuses(sizes)):
      return BACKENDS[name]
    # What a CPU traces for another platform it throws away.
    if platform == _platform():
      _say_once(
        f"{name} cannot multiply {sizes.dtype} E={sizes.E} I={sizes.I}"
        f" O={sizes.O} ({sizes.direction}): {reason}; another backend does"
      )
  raise ValueError(f"no backend of {platform} can multiply {sizes}")


@functools.cache
def _say_once(what):
  warnings.warn(what, stacklevel=2)


@functools.cache
def _measured():
  path = pathlib.Path(__file__).with_name("measured_products.json")
  return json.loads(path.read_text())


def backends_here() -> list[str]:
  """Names the backends that the platform in use has."""
  here = _platform()
  return [name for name, each in BACKENDS.items() if here in each.platforms]


def _platform():
  here = sharding.platform()
  return "cuda" if here == "gpu" else here


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
  # A group's parts are added up in float32, and rounded once.
  wide = jnp.float32 if rows.dtype.itemsize < 4 else rows.dtype

  def body(carry, group, part, first):
    to_weights, to_rows = carry
    of_weights, of_rows = _pull_back(
      fn,
      jax.tree.map(lambda w: w.astype(wide), _index(weights, group)),
      # Rows of other groups must not count here, and zero times NaN is not 0.
      *jax.tree.map(
        lambda a: jnp.where(part.mine, part.take(a), 0),
        (rows, products, gradient),
      ),
      lambda gradient, matrix: dot(gradient, matrix.T.astype(rows.dtype)),
      lambda rows, gradient: dot(rows.T, gradient, preferred_element_type=wide),
    )

    def add(total, slope):
      if not first:
        slope = slope + _index(total, group)
      return jax.lax.dynamic_update_index_in_dim(total, slope, group, 0)

    to_weights = jax.tree.map(add, to_weights, of_weights)
    return to_weights, part.put(to_rows, of_rows)

  sums = jax.tree.map(lambda w: jnp.zeros_like(w, dtype=wide), weights)
  zeros = sums, jnp.zeros_like(rows)
  to_weights, to_rows = _sweep(len(rows), group_sizes, body, zeros)
  return jax.tree.map(lambda w: w.astype(rows.dtype), to_weights), to_rows


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


# -- by name ------------------------------------------------------------------


def _loop_by_matrix(rows, matrices, group_sizes, transposed, precision):
  matrices = matrices.swapaxes(1, 2) if transposed else matrices
  return _loop(_product, precision, matrices, rows, group_sizes)[0]


def _loop_by_rows(rows, gradient, group_sizes, precision):
  shape = (group_sizes.size, rows.shape[1], gradient.shape[1])
  args = jnp.zeros_like(rows, shape=shape), rows, group_sizes, (), gradient
  return _loop_backward(_product, precision, *args)[0]


EVERYWHERE = ("cpu", "cuda", "tpu")
BACKENDS = {
  "loop": Backend(EVERYWHERE, lambda _: "", _loop_by_matrix, _loop_by_rows),
  **kernels.BACKENDS,
}
# What is tried where nothing was measured. On a GPU `ragged_dot` multiplies all
# rows by all matrices, as it does on a CPU; a loop does not.
ORDER = {
  "cpu": ("loop",),
  "cuda": ("triton", "loop"),
  "tpu": ("megablox", "loop"),
}
