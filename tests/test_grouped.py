"""Rows sorted by group, each group with its own weights, against loops."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from hypothesis import strategies as st

from moejax import grouped

N, I, O, E = 96, 3, 2, 3


@st.composite
def group_sizes(draw):
  """Any sizes that N rows allow, empty groups and rows of none included."""
  cuts = draw(st.lists(st.integers(0, N), min_size=E, max_size=E))
  return np.diff([0, *sorted(cuts)]).tolist()


# Nothing, one group with everything, each of the tiles to its last row and one
# beyond, and sizes that take the largest tile more than once.
EXAMPLES = [
  [0, 0, 0],
  [N, 0, 0],
  [0, 0, N],
  [0, N, 0],
  [17, 25, 33],
  [40, 48, 8],
  [49, 47, 0],
  [65, 0, 31],
  [1, 95, 0],
]


def draw(sizes, num_rows=N):
  """Draws rows, matrices, and what multiplies y in the score."""
  random = np.random.default_rng(0)
  rows, matrices, out = (
    random.normal(size=shape).astype("float32")
    for shape in ((num_rows, I), (len(sizes), I, O), (num_rows, O))
  )
  for of_row in (rows, out):
    of_row[sum(sizes) :] = 0
  return jnp.asarray(rows), jnp.asarray(matrices), jnp.asarray(out)


def loops(rows, matrices, sizes, out):
  """y, and the gradient of sum(y * out)."""
  rows, matrices, out = (
    np.asarray(a, np.float64) for a in (rows, matrices, out)
  )
  y, to_rows, to_matrices = out * 0, rows * 0, matrices * 0
  n = 0
  for group, size in enumerate(sizes):
    for _ in range(size):
      y[n] = rows[n] @ matrices[group]
      to_rows[n] = matrices[group] @ out[n]
      to_matrices[group] += np.outer(rows[n], out[n])
      n += 1
  return y, to_rows, to_matrices


def score(rows, matrices, sizes, out):
  y = grouped.grouped_dot(rows, matrices, sizes)
  return (y * out).sum(), y


def compiled():
  return jax.jit(jax.value_and_grad(score, (0, 1), has_aux=True))


COMPILED = compiled()


def run(sizes, rows, matrices, out, fn=COMPILED):
  """Returns y and the gradient."""
  group_sizes = jnp.asarray(sizes, jnp.int32)
  (_, y), slopes = fn(rows, matrices, group_sizes, out)
  return y, *slopes


def agree(sizes, got, want, rows, tolerance=1e-5):
  for a, b in zip(got, want, strict=True):
    scale = np.abs(b).max(initial=1e-9)
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, rtol=0, atol=tolerance * scale
    )
  y, to_rows, to_matrices = got
  empty = np.asarray(sizes) == 0
  assert (np.asarray(to_matrices)[empty] == 0).all()
  assert (np.asarray(y)[sum(sizes) :] == 0).all()
  assert y.dtype == to_rows.dtype == rows.dtype


@hypothesis.given(sizes=group_sizes())
def test_matches_the_loops(sizes):
  rows, matrices, out = draw(sizes)
  got = run(sizes, rows, matrices, out)
  agree(sizes, got, loops(rows, matrices, sizes, out), rows)


@pytest.mark.parametrize(
  "sizes, num_rows",
  [([0, 1, 0, 0, 1], 2), ([5], 5), ([0], 3), ([300, 0], 300), ([0, 0, 0], 0)],
)
def test_matches_the_loops_whatever_the_shape(sizes, num_rows):
  """Fewer rows than groups, one group, rows of none, many rows, none."""
  rows, matrices, out = draw(sizes, num_rows)
  got = run(sizes, rows, matrices, out)
  agree(sizes, got, loops(rows, matrices, sizes, out), rows)


@pytest.fixture
def at_once(tpu, monkeypatch):
  """All groups at once, as on a TPU, by a product that a CPU has too."""
  if tpu:
    monkeypatch.setitem(grouped.ORDER, "tpu", ("ragged_dot",))
    on_tpu = lambda *args, tpu, **_: tpu(*args)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)


@pytest.mark.parametrize("tpu", [False, True])
def test_products_and_sums_at_the_edges(tpu, at_once):
  """Sums are what matrices get backward, and their gradient what rows give."""
  fn = compiled()

  @jax.jit
  def sums(rows, matrices, sizes, out):
    def score(out):
      found = grouped.grouped_sum(rows, out, sizes)
      return (found * matrices).sum(), found

    return jax.value_and_grad(score, has_aux=True)(out)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  for sizes in EXAMPLES:
    rows, matrices, out = draw(sizes)
    want = loops(rows, matrices, sizes, out)
    agree(sizes, run(sizes, rows, matrices, out, fn), want, rows)
    (_, found), slope = sums(rows, matrices, jnp.asarray(sizes), out)
    close(found, want[2])
    close(slope, want[0])


def test_what_other_groups_hold_leaves_no_trace():
  """Neither in an empty group nor in those that stand beside it."""
  sizes = [20, 0, 30]
  rows, matrices, out = draw(sizes)
  want = run(sizes, rows, matrices, out)
  junk = rows.at[20:50].mul(1e30)
  y, to_rows, to_matrices = run(sizes, junk, matrices, out)
  np.testing.assert_array_equal(y[:20], want[0][:20])
  np.testing.assert_array_equal(to_rows, want[1])
  np.testing.assert_array_equal(to_matrices[:2], want[2][:2])
  assert (np.asarray(to_matrices[1]) == 0).all()
  assert np.abs(to_matrices[2]).max() > 1e29


def test_bfloat16_rows_stay_bfloat16_and_matrices_float32():
  sizes = [70, 0, 20]
  rows, matrices, out = draw(sizes)
  want = loops(rows, matrices, sizes, out)
  rows, out = rows.astype(jnp.bfloat16), out.astype(jnp.bfloat16)
  got = run(sizes, rows, matrices, out)
  assert got[2].dtype == jnp.float32
  agree(sizes, got, want, rows, tolerance=0.02)


# Functions of weights and rows, and the same of one row in NumPy. They end in a
# product, end otherwise, and have none.
FUNCTIONS = {
  "a product": (
    lambda w, rows, dot: dot(jax.nn.relu(dot(rows, w["a"])), w["b"]),
    lambda w, row: np.maximum(row @ w["a"], 0) @ w["b"],
  ),
  "two products": (
    lambda w, rows, dot: rows + jnp.cos(dot(rows, w["c"]) * dot(rows, w["d"])),
    lambda w, row: row + np.cos((row @ w["c"]) * (row @ w["d"])),
  ),
  "nothing": (lambda w, rows, dot: jnp.sin(rows), lambda w, row: np.sin(row)),
}


@pytest.mark.parametrize("tpu", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_function_of_a_row(name, tpu, at_once):
  fn, of_row = FUNCTIONS[name]
  sizes, num_rows = [9, 0, 10], 21
  rows, _, _ = draw(sizes, num_rows)
  random = np.random.default_rng(1)
  shapes = {"a": (I, O), "b": (O, I), "c": (I, I), "d": (I, I)}
  weights = {
    key: jnp.asarray(random.normal(size=(E, *shape)), jnp.float32)
    for key, shape in shapes.items()
  }
  out = random.normal(size=(num_rows, I))
  out[sum(sizes) :] = 0

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def score(at):
    y = grouped.grouped(
      fn, at["weights"], at["rows"], jnp.asarray(sizes, jnp.int32)
    )
    return (y * jnp.asarray(out, y.dtype)).sum(), y

  def want(at):
    group = np.repeat(np.arange(E), sizes)
    return [
      of_row({key: w[g] for key, w in at["weights"].items()}, row)
      for g, row in zip(group, at["rows"], strict=False)
    ]

  at = {"rows": rows, "weights": weights}
  (_, y), slopes = score(at)
  used = sum(sizes)
  np.testing.assert_allclose(
    y[:used], want(kinds.in_float64(at)), rtol=1e-4, atol=1e-4
  )
  kinds.same_gradient(
    slopes,
    kinds.finite_differences(lambda at: (want(at) * out[:used]).sum(), at),
  )
