"""Grouped products by library: what each can do, and how it keeps a contract.

A grouped product multiplies rows sorted by group by the matrix of their group.
There are three: `rows @ matrix`, `rows @ matrix.T` ("transposed"), and the sum
of the outer products of a group's rows, which is its matrix's gradient. Rows
past the last group may hold anything; what comes of them is zero, and so is
the gradient of a group without rows. `moejax.testing.GroupedContract` tests
it, and docs/grouped_products.md says what libraries leave to be mended here.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The products: forward, and the gradients of rows and of matrices.
DIRECTIONS = ("forward", "transposed", "gradient")
# Megablox: rows, then the two axes of a matrix, of a tile.
_TILE_ROWS = 128
_TILE_AXIS = 512
# Mosaic's kernel writes one branch for each group.
_MOST_GROUPS = 64


class Sizes(NamedTuple):
  """What is multiplied: E matrices, and N rows of widths I and O."""

  direction: str  # One of DIRECTIONS.
  dtype: str  # Of the rows.
  E: int
  N: int
  I: int
  O: int


class Backend(NamedTuple):
  """Grouped products of one library.

  Where `refuses` is silent they keep the contract.
  """

  platforms: tuple[str, ...]  # Of "cpu", "cuda" and "tpu".
  # Why it cannot multiply; "" where it can.
  refuses: Callable[[Sizes], str]
  # (rows, matrices, group_sizes, transposed, precision) -> rows
  rows_by_matrix: Callable[..., jax.Array]
  # (rows, gradient, group_sizes, precision) -> matrices
  rows_by_rows: Callable[..., jax.Array]


def _only(*dtypes: str) -> Callable[[Sizes], str]:
  known = " and ".join(dtypes)
  return lambda sizes: (
    "" if sizes.dtype in dtypes else f"it multiplies {known} alone"
  )


def _zero_past(y, group_sizes):
  past = jnp.arange(len(y), dtype=jnp.int32) >= group_sizes.sum()
  return jnp.where(past[:, None], 0, y)


# -- what XLA makes of it: rows times all matrices, on most platforms ----------


def _ragged_by_matrix(rows, matrices, group_sizes, transposed, precision):
  if transposed:
    matrices = matrices.swapaxes(1, 2)
  # Not every platform says what rows past the last group do.
  rows = _zero_past(rows, group_sizes)
  return jax.lax.ragged_dot(rows, matrices, group_sizes, precision)


def _ragged_by_rows(rows, gradient, group_sizes, precision):
  dims = jax.lax.RaggedDotDimensionNumbers(
    (((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
  )
  rows, gradient = (_zero_past(a, group_sizes) for a in (rows, gradient))
  return jax.lax.ragged_dot_general(
    rows, gradient, group_sizes, dims, precision
  )


# -- megablox, which comes with JAX --------------------------------------------


def _megablox(name, left, right, group_sizes, widths, precision, **options):
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
      left, right, group_sizes, left.dtype, tiles, **options
    )


def _whole_tiles(rows):
  return jnp.pad(rows, ((0, -rows.shape[0] % _TILE_ROWS), (0, 0)))


def _megablox_by_matrix(
  rows, matrices, group_sizes, transposed=False, precision=None, interpret=False
):
  """JAX's kernel for a TPU, which takes whole tiles of rows.

  It leaves whatever was in memory past the last group.
  """
  widths = matrices.shape[1:][:: -1 if transposed else 1]
  args = _whole_tiles(rows), matrices, group_sizes.astype(jnp.int32), widths
  options = {"transpose_rhs": transposed, "interpret": interpret}
  y = _megablox("gmm", *args, precision, **options)
  return _zero_past(y[: len(rows)], group_sizes)


def _megablox_by_rows(
  rows, gradient, group_sizes, precision=None, interpret=False
):
  """The gradient of `_megablox_by_matrix`."""
  widths = rows.shape[1], gradient.shape[1]
  left, right = _whole_tiles(rows).T, _whole_tiles(gradient)
  args = left, right, group_sizes.astype(jnp.int32), widths, precision
  return _megablox("tgmm", *args, interpret=interpret)


# -- Mosaic's example for Hopper, which comes with JAX -------------------------

_MOSAIC = {"block_m": 128, "block_n": 128, "block_k": 64}


def _mosaic_refuses(sizes):
  if sizes.direction == "gradient":
    return "NaN of one group reaches other groups' gradients"
  if sizes.E > _MOST_GROUPS:
    return f"its kernel has a branch for each group, {_MOST_GROUPS} at most"
  for name in ("I", "O"):
    if getattr(sizes, name) % _MOSAIC["block_n"]:
      return f"{name} is no multiple of {_MOSAIC['block_n']}"
  return _only("bfloat16", "float16")(sizes)


def _mosaic_by_matrix(rows, matrices, group_sizes, transposed=False, _=None):
  """The kernel leaves whatever was in memory past the last group."""
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

  (N, I), O = rows.shape, matrices.shape[1 if transposed else 2]
  # It drops a cost estimate too: see triton.py.
  with jax.named_scope(f"grouped_dot_N{N}_I{I}_O{O}"):
    y = ragged_dot_mgpu.ragged_dot(
      rows,
      matrices,
      group_sizes=group_sizes.astype(jnp.int32),
      transpose_rhs=transposed,
      max_concurrent_steps=4,
      grid_block_n=1,
      **_MOSAIC,
    )
  return _zero_past(y, group_sizes)


# -- ours, by way of Triton ----------------------------------------------------


def _triton_refuses(sizes):
  try:
    from moejax import triton  # noqa: F401
  except ImportError as error:
    return f"this JAX does not compile for Triton ({error})"
  return _only("bfloat16", "float16", "float32")(sizes)


def _triton(name):
  def run(*args, **options):
    from moejax import triton

    return getattr(triton, name)(*args, **options)

  return run


BACKENDS = {
  "megablox": Backend(
    ("tpu",),
    _only("bfloat16", "float32"),
    _megablox_by_matrix,
    _megablox_by_rows,
  ),
  "triton": Backend(
    ("cuda",),
    _triton_refuses,
    _triton("rows_by_matrix"),
    _triton("rows_by_rows"),
  ),
  "mosaic": Backend(("cuda",), _mosaic_refuses, _mosaic_by_matrix, None),
  "ragged_dot": Backend(
    ("cpu", "cuda", "tpu"), lambda _: "", _ragged_by_matrix, _ragged_by_rows
  ),
}
