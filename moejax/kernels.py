"""Products of sorted rows with one matrix per group, on a TPU.

`jax.lax.ragged_dot`, as libtpu 0.0.52 compiles it for v5e, expands to a product
of every row with every matrix. The kernels that come with JAX (megablox) do
not; widths that are no multiple of a vector's lanes are left to the former.
"""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows, then the two axes of a matrix, of a tile.
_TILE_ROWS = 128
_TILE_AXIS = 512
_LANES = 128


def _kernel(name: str, left, right, group_sizes, widths, precision, interpret):
  """Calls a kernel that comes with JAX, whose own derivative is not needed."""
  # Read where it is used: a CPU traces it, and then throws it away.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

  tiles = (_TILE_ROWS, *(min(_TILE_AXIS, width) for width in widths))
  exact = contextlib.nullcontext()
  if precision is not None:
    # It takes no precision, but that of all that is traced here.
    exact = jax.default_matmul_precision(precision.name.lower())
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    exact,
  ):
    return {"gmm": gmm, "tgmm": tgmm}[name](
      left, right, group_sizes, left.dtype, tiles, interpret=interpret
    )


def _whole_tiles(rows):
  return jnp.pad(rows, ((0, -rows.shape[0] % _TILE_ROWS), (0, 0)))


def rows_by_matrix(
  rows: Float[Array, "N I"],
  matrices: Float[Array, "E M O"],
  group_sizes: Int[Array, "E"],
  transposed: bool = False,
  interpret: bool = False,
  precision: jax.lax.Precision | None = None,
) -> Float[Array, "N out"]:
  """Multiplies each group's rows by its matrix, or by its transpose."""
  if transposed:
    matrices = matrices.swapaxes(1, 2)
  widths = matrices.shape[1:]

  # Under `jax.vmap` one product comes after the other: `jax.lax.ragged_dot` has
  # no rule for matrices that all share, nor the kernels one for groups.
  @jax.custom_batching.sequential_vmap
  def run(rows, matrices, group_sizes):
    if any(width % _LANES for width in widths):
      return jax.lax.ragged_dot(rows, matrices, group_sizes, precision)
    args = _whole_tiles(rows), matrices, group_sizes
    y = _kernel("gmm", *args, widths, precision, interpret)[: len(rows)]
    # It leaves whatever was in memory past the last group.
    past = jnp.arange(len(rows)) >= group_sizes.sum()
    return jnp.where(past[:, None], 0, y)

  return run(rows, matrices, group_sizes)


def rows_by_rows(
  rows: Float[Array, "N I"],
  gradient: Float[Array, "N O"],
  group_sizes: Int[Array, "E"],
  interpret: bool = False,
  precision: jax.lax.Precision | None = None,
) -> Float[Array, "E I O"]:
  """Sums the outer products of each group's rows: a matrix's gradient."""
  widths = (rows.shape[1], gradient.shape[1])

  @jax.custom_batching.sequential_vmap
  def run(rows, gradient, group_sizes):
    if any(width % _LANES for width in widths):
      dims = jax.lax.RaggedDotDimensionNumbers(
        (((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
      )
      return jax.lax.ragged_dot_general(
        rows, gradient, group_sizes, dims, precision
      )
    left, right = _whole_tiles(rows).T, _whole_tiles(gradient)
    args = left, right, group_sizes, widths
    found = _kernel("tgmm", *args, precision, interpret)
    # Nor does it write the gradient of a group without rows.
    return jnp.where((group_sizes == 0)[:, None, None], 0, found)

  return run(rows, gradient, group_sizes)
