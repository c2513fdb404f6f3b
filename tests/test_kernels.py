"""The kernels of a TPU, interpreted, against the products they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import kernels

N, I, O = 300, 128, 256
SIZES = [[130, 0, 170], [0, 100, 28], [0, 0, 0]]
rows_by_matrix = jax.jit(
  functools.partial(kernels.rows_by_matrix, interpret=True),
  static_argnames="transposed",
)
rows_by_rows = jax.jit(functools.partial(kernels.rows_by_rows, interpret=True))


def draw(*shape, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.integers(-3, 4, shape), jnp.float32)


def group_of_row(sizes):
  """The group of each row that has one."""
  return np.repeat(np.arange(len(sizes)), sizes)


# The last two are too narrow for the kernels.
@pytest.mark.parametrize("width, out", [(I, O), (O, I), (3, I), (I, 3)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_by_matrix(sizes, transposed, width, out):
  """Whole numbers, and so to the last bit; zero past the last group."""
  rows, matrices = draw(N, width), draw(len(sizes), width, out, seed=1)
  given = matrices.swapaxes(1, 2) if transposed else matrices
  want = np.zeros((N, out))
  for n, group in enumerate(group_of_row(sizes)):
    want[n] = np.asarray(rows[n]) @ np.asarray(matrices[group])
  got = rows_by_matrix(
    rows,
    given,
    jnp.asarray(sizes, jnp.int32),
    transposed=transposed,
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("width, out", [(I, O), (3, I), (I, 3)])
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_by_rows(sizes, width, out):
  """A group without rows gets exactly zero."""
  rows, gradient = draw(N, width), draw(N, out, seed=1)
  want = np.zeros((len(sizes), width, out))
  for n, group in enumerate(group_of_row(sizes)):
    want[group] += np.outer(rows[n], gradient[n])
  got = rows_by_rows(rows, gradient, jnp.asarray(sizes, jnp.int32))
  np.testing.assert_array_equal(got, want)
