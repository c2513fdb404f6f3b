"""Grouped products for CUDA: kernels that Pallas compiles by way of Triton.

One program makes one tile of the result. It reads no row of another group, so
whatever stands there leaves no trace; it adds tiles up in order, in float32;
and it writes every entry, so no pass over the result follows. The name of a
kernel tells its sizes: Triton drops `cost_estimate`, and a plan reads the name
instead (planning/work.py).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

# Of a tile: rows or the first axis of a matrix, columns, and bytes of the axis
# that is summed over.
_TILE = (128, 128, 128)
# Triton multiplies no smaller tiles.
_LEAST = 16
_PARAMS = {"num_warps": 8, "num_stages": 3}


def _call(kernel, shape, dtype, programs, sizes, interpret, *args):
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(shape, dtype),
    # One axis: others may not have more than 65,535 programs.
    grid=(programs,),
    in_specs=[pl.no_block_spec] * len(args),
    out_specs=pl.no_block_spec,
    compiler_params=plt.CompilerParams(**_PARAMS),
    interpret=interpret,
    name="grouped_dot_N{}_I{}_O{}".format(*sizes),
  )(*args)


def _load(ref, axes, at, masks, group=()):
  """Loads a tile from `at` on: zeros where a mask, if any, is False."""
  mask = None
  for axis, each in enumerate(masks):
    if each is not None:
      each = jnp.expand_dims(each, 1 - axis)
      mask = each if mask is None else mask & each
  slices = [pl.ds(first, size) for first, size in zip(at, axes, strict=True)]
  other = None if mask is None else 0.0
  return plt.load(ref.at[*group, *slices], mask=mask, other=other)


def _dot(left, right, precision):
  return jnp.dot(
    left, right, precision=precision, preferred_element_type=jnp.float32
  )


def _span(first, size, end):
  """Says of so many entries, from `first` on, which are before the end."""
  return first + jnp.arange(size, dtype=jnp.int32) < end


def rows_by_matrix(
  rows: Float[Array, "N I"],
  matrices: Float[Array, "E M O"],
  group_sizes: Int[Array, "E"],
  transposed: bool = False,
  precision: jax.lax.Precision | None = None,
  interpret: bool = False,
  tile: tuple[int, int, int] = _TILE,
) -> Float[Array, "N out"]:
  """Multiplies each group's rows by its matrix, or by its transpose.

  Args:
    rows: sorted by group; those past the last group may hold anything.
    matrices: of the groups, [E, I, O]; transposed, [E, O, I].
    group_sizes: rows of each group.
    transposed: whether a matrix is multiplied by its second axis.
    precision: of products of float32; None allows TensorFloat-32.
    interpret: runs on any platform, slowly.
    tile: rows, columns, and bytes along the axis that is summed over.

  Returns:
    The products, in the dtype of rows; zero past the last group.
  """
  (N, I), E = rows.shape, group_sizes.size
  O = matrices.shape[1 if transposed else 2]
  tile_rows = tile[0]
  width = min(tile[1], max(_LEAST, pl.next_power_of_2(O)))
  depth = max(_LEAST, tile[2] // rows.dtype.itemsize)
  depth = min(depth, max(_LEAST, pl.next_power_of_2(I)))
  columns, steps = pl.cdiv(O, width), pl.cdiv(I, depth)

  # Of each tile its group, first row and end. Rows past the last group are a
  # group of their own, E, of zeros; a tile too many has no rows.
  sizes = group_sizes.astype(jnp.int32)
  sizes = jnp.append(sizes, N - sizes.sum())
  ends, tiles = jnp.cumsum(sizes), pl.cdiv(sizes, tile_rows)
  after = jnp.cumsum(tiles)
  most = pl.cdiv(N, tile_rows) + E + 1
  number = jnp.arange(most, dtype=jnp.int32)
  group = (after[None] <= number[:, None]).sum(axis=1, dtype=jnp.int32)
  at = jnp.minimum(group, E)
  first = ends[at] - sizes[at] + (number - after[at] + tiles[at]) * tile_rows
  end = jnp.where(group > E, first, ends[at])

  def kernel(group_ref, first_ref, end_ref, rows_ref, matrix_ref, out_ref):
    number, column = pl.program_id(0) // columns, pl.program_id(0) % columns
    group, first, end = group_ref[number], first_ref[number], end_ref[number]
    column *= width
    mine, inside = _span(first, tile_rows, end), _span(column, width, O)
    across = inside if O % width else None

    def step(i, total):
      deep = _span(i * depth, depth, I) if I % depth else None
      part = (first, i * depth), (mine, deep)
      left = _load(rows_ref, (tile_rows, depth), *part)
      at, axes, masks = (i * depth, column), (depth, width), (deep, across)
      if transposed:
        at, axes, masks = at[::-1], axes[::-1], masks[::-1]
      right = _load(matrix_ref, axes, at, masks, (group,))
      right = right.T if transposed else right
      return total + _dot(left, right, precision)

    def store(total):
      plt.store(
        out_ref.at[pl.ds(first, tile_rows), pl.ds(column, width)],
        total.astype(out_ref.dtype),
        mask=mine[:, None] & inside[None],
      )

    zeros = jnp.zeros((tile_rows, width), jnp.float32)
    is_past = group == E
    pl.when((first < end) & is_past)(lambda: store(zeros))
    pl.when((first < end) & ~is_past)(
      lambda: store(jax.lax.fori_loop(0, steps, step, zeros))
    )

  args = at, first, end, rows, matrices
  programs = most * columns
  return _call(
    kernel, (N, O), rows.dtype, programs, (N, I, O), interpret, *args
  )


def rows_by_rows(
  rows: Float[Array, "N I"],
  gradient: Float[Array, "N O"],
  group_sizes: Int[Array, "E"],
  precision: jax.lax.Precision | None = None,
  interpret: bool = False,
  tile: tuple[int, int, int] = _TILE,
) -> Float[Array, "E I O"]:
  """Sums the outer products of each group's rows: its matrix's gradient.

  Args:
    rows: sorted by group; those past the last group may hold anything.
    gradient: as `rows`.
    group_sizes: rows of each group.
    precision: of products of float32; None allows TensorFloat-32.
    interpret: runs on any platform, slowly.
    tile: entries of I, of O, and bytes of rows.

  Returns:
    The sums, in the dtype of rows; exactly zero for a group without rows.
  """
  (N, I), O, E = rows.shape, gradient.shape[1], group_sizes.size
  high, width = (
    min(most, max(_LEAST, pl.next_power_of_2(size)))
    for most, size in zip(tile, (I, O), strict=False)
  )
  depth = max(_LEAST, tile[2] // rows.dtype.itemsize)
  lines, columns = pl.cdiv(I, high), pl.cdiv(O, width)
  ends = jnp.cumsum(group_sizes.astype(jnp.int32))
  firsts = ends - group_sizes.astype(jnp.int32)

  def kernel(first_ref, end_ref, rows_ref, gradient_ref, out_ref):
    number = pl.program_id(0)
    group = number // (lines * columns)
    line = number // columns % lines * high
    column = number % columns * width
    first, end = first_ref[group], end_ref[group]
    down, across = _span(line, high, I), _span(column, width, O)

    def step(i, total):
      at = first + i * depth
      mine = _span(at, depth, end)
      masks = (mine, down if I % high else None)
      left = _load(rows_ref, (depth, high), (at, line), masks)
      masks = (mine, across if O % width else None)
      right = _load(gradient_ref, (depth, width), (at, column), masks)
      return total + _dot(left.T, right, precision)

    # Of whatever type of whole numbers, with 64 bits too.
    steps = (end - first + depth - 1) // depth
    zeros = jnp.zeros((high, width), jnp.float32)
    total = jax.lax.fori_loop(0, steps, step, zeros)
    plt.store(
      out_ref.at[group, pl.ds(line, high), pl.ds(column, width)],
      total.astype(out_ref.dtype),
      mask=down[:, None] & across[None],
    )

  args = firsts, ends, rows, gradient
  programs = E * lines * columns
  shape = (E, I, O)
  return _call(kernel, shape, rows.dtype, programs, (N, I, O), interpret, *args)
