"""The contract of a grouped product, and the smallest input that breaks it.

Inputs are small whole numbers, whose products and sums float32 holds exactly in
any order: results are compared with loops in NumPy to the last bit.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Product = Callable[
  [Float[Array, "N I"], Float[Array, "E I O"], Int[Array, "E"]],
  Float[Array, "N O"],
]


class Case(NamedTuple):
  """An input; y and both gradients are wanted.

  Attributes:
    sizes: the rows of each group.
    N: all rows; those past the last group must give zero.
    I: the width of rows.
    O: the width of y.
    dtype: of rows, matrices and y.
    nan: what is NaN and must leave no trace: "" nothing, "past" the rows past
      the last group, "group" the rows and the matrix of the largest group.
    is_positive: whether sums grow, to where bfloat16 has no whole numbers.
  """

  sizes: tuple[int, ...]
  N: int
  I: int = 3
  O: int = 2
  dtype: str = "float32"
  nan: str = ""
  is_positive: bool = False

  def __str__(self) -> str:
    sizes, many = self.sizes, len(self.sizes) > 8
    told = f"{sizes[:4]}..., {sum(sizes)} in all" if many else f"{sizes}"
    nan = {"": "", "past": ", NaN past the last group"}
    nan["group"] = ", NaN in the largest group"
    return (
      f"E={len(sizes)} sizes={told} N={self.N} I={self.I} O={self.O}"
      f" {self.dtype}{nan[self.nan]}"
    )


def differentiable(
  rows_by_matrix: Callable[..., Array], rows_by_rows: Callable[..., Array]
) -> Product:
  """Makes one product of the three that a library has.

  Args:
    rows_by_matrix: (rows, matrices, group_sizes, transposed) -> rows.
    rows_by_rows: (rows, gradient, group_sizes) -> the gradient of matrices.
  """

  @jax.custom_vjp
  def product(rows, matrices, sizes):
    return rows_by_matrix(rows, matrices, sizes, False)

  def backward(saved, gradient):
    rows, matrices, sizes = saved
    to_rows = rows_by_matrix(gradient, matrices, sizes, True)
    return to_rows, rows_by_rows(rows, gradient, sizes), None

  product.defvjp(lambda *args: (product(*args), args), backward)
  return product


def fault(product: Product, case: Case, twice: bool = False) -> str:
  """Says what is wrong with a product for this input; "" if nothing is.

  Args:
    product: differentiable in rows and matrices.
    case: the input.
    twice: whether to ask for the same bits in a second run.
  """
  rows, matrices, gradient = _draw(case)
  args = [jnp.asarray(a, case.dtype) for a in (rows, matrices, gradient)]
  sizes = jnp.asarray(case.sizes, jnp.int32)
  try:
    runs = [_compiled(product)(*args, sizes) for _ in range(1 + twice)]
    runs = [[np.asarray(a, np.float64) for a in run] for run in runs]
  except Exception as error:  # Whatever a library raises.
    said = str(error).strip().split("\n")[0]
    return f"it raises {type(error).__name__}: {said[:120]}"
  if twice and any(map(_differ, *runs)):
    return "a second run has other bits"
  y, to_rows, to_matrices = runs[0]
  group = np.repeat(np.arange(len(case.sizes) + 1), _with_rest(case))
  mine, is_past = np.arange(case.N), group == len(case.sizes)
  kept, empty = np.arange(len(case.sizes)), np.array(case.sizes) == 0
  if case.nan == "group":
    largest = np.argmax(case.sizes)
    mine, kept = mine[group != largest], kept[kept != largest]
  want = _loops(case, rows, matrices, gradient)
  places = {
    "y past the last group": (y, want[0], np.flatnonzero(is_past)),
    "the gradient of rows past the last group": (
      to_rows,
      want[1],
      np.flatnonzero(is_past),
    ),
    "the gradient of matrices of empty groups": (
      to_matrices,
      want[2],
      np.flatnonzero(empty),
    ),
    "y": (y, want[0], mine),
    "the gradient of rows": (to_rows, want[1], mine),
    "the gradient of matrices": (to_matrices, want[2], kept),
  }
  for name, (got, all_wanted, at) in places.items():
    if got.shape != all_wanted.shape:
      return f"{name} has shape {got.shape}, not {all_wanted.shape}"
    if _differ(got[at], all_wanted[at]):
      wrong = np.argwhere(~(got[at] == all_wanted[at]))[0]
      index = (at[wrong[0]], *wrong[1:])
      return (
        f"{name} is {got[index]:g}, not {all_wanted[index]:g}, at"
        f" {tuple(map(int, index))}"
      )
  return ""


def shrink(
  product: Product, case: Case, twice: bool = False, tries: int = 60
) -> tuple[Case, str]:
  """Returns the smallest input found that the product fails, and how it does.

  Args:
    product: as of `fault`.
    case: one that it fails.
    twice: as of `fault`.
    tries: the most inputs to run; each new shape is compiled.
  """
  said = fault(product, case, twice)
  what = re.compile(" is |:")
  tried = {case}
  while True:
    for smaller in _smaller(case):
      if len(tried) > tries:
        return case, said
      if smaller not in tried:
        tried.add(smaller)
        found = fault(product, smaller, twice)
        # Another fault is another search.
        if what.split(found)[0] == what.split(said)[0]:
          case, said = smaller, found
          break
    else:
      return case, said


def checks(
  num_rows: int, widths: tuple[int, int], many: int, dtypes: tuple[str, ...]
) -> dict[str, list[Case]]:
  """Returns the inputs of the contract by what they ask.

  Args:
    num_rows: N of most of them, 24 or more; to try a kernel, more than a tile.
    widths: I and O of most.
    many: the most groups.
    dtypes: of the rows.
  """
  N, (I, O) = num_rows, widths
  third = N // 3
  split = (third + 1, N - 2 * third - 3, third + 2)
  found = {
    "values": [(split, N), ((N, 0, 0), N), ((0, 0, N), N)],
    "empty groups": [
      ((0, N - 5, 5), N),
      ((third, 0, N - third), N),
    ],
    "rows past the end": [
      ((1, third, 2), N),
      ((third, third, 0), N),
      ((0, 0, 0), N),
    ],
  }
  every = {
    name: [Case(*case, I, O, dtype) for dtype in dtypes for case in cases]
    for name, cases in found.items()
  }
  first = dtypes[0]
  past = [
    Case(case.sizes, N, I, O, case.dtype) for case in every["rows past the end"]
  ]
  every["NaN past the end"] = [case._replace(nan="past") for case in past]
  every["NaN in a group"] = [
    Case(split, N, I, O, first, "group"),
    Case((0, N - 3, 3), N, I, O, first, "group"),
  ]
  every["widths"] = [
    Case(split, N, *pair, first) for pair in ((1, 1), (I + 3, 2 * O + 1))
  ]
  every["widths"].append(Case((third, third, 1), N + 1, I, O, first))
  counts = np.bincount(np.arange(N) ** 2 % many, minlength=many)
  every["many groups"] = [
    Case(tuple(map(int, counts)), N, I, O, first),
    Case((N,), N, I, O, first),
  ]
  # Sums over rows and over widths are past 256.
  many_rows = max(N, 300)
  every["float32 sums"] = [
    Case((many_rows, 0, 0), many_rows, max(I, 300), O, dtype, "", True)
    for dtype in dtypes
  ]
  return every


class GroupedContract:
  """What a grouped product keeps to, in its value and in both gradients.

  Rows are sorted by group; y[n] = rows[n] @ matrices[group of n]. What comes
  of rows past the last group is zero, and so is the gradient of a matrix whose
  group is empty. Sums are made in float32 and rounded once.

  Attributes:
    product: (rows [N, I], matrices [E, I, O], group_sizes [E]) -> y [N, O]. See
      `differentiable` for a library with functions for the gradients.
    num_rows, widths, many, dtypes: as of `checks`.
  """

  product: Any
  num_rows: int = 300
  widths: tuple[int, int] = (128, 130)
  many: int = 256
  dtypes: tuple[str, ...] = ("float32", "bfloat16")

  def test_values(self):
    """They are those of loops, whichever group has the rows."""
    self._check("values")

  def test_empty_groups(self):
    """They change nothing; their matrices get exactly zero."""
    self._check("empty groups")

  def test_rows_past_the_end(self):
    """They give zero: y and gradients are written everywhere."""
    self._check("rows past the end")

  def test_nan_past_the_end(self):
    """What stands there reaches nothing."""
    self._check("NaN past the end")

  def test_nan_in_a_group(self):
    """One that diverges spoils no other."""
    self._check("NaN in a group")

  def test_widths(self):
    """They need be no multiple of anything."""
    self._check("widths")

  def test_many_groups(self):
    """More than there are rows, and one alone."""
    self._check("many groups")

  def test_sums(self):
    """They are made in float32, whatever the rows are, and rounded once."""
    self._check("float32 sums")

  def test_repeats(self):
    """A second run has the same bits."""
    self._check("values", twice=True)

  def _check(self, name, twice=False):
    # As an attribute of a class a function would be a method.
    product = inspect.getattr_static(self, "product")
    product = getattr(product, "__func__", product)
    cases = checks(self.num_rows, self.widths, self.many, self.dtypes)
    for case in cases[name]:
      if fault(product, case, twice):
        case, said = shrink(product, case, twice)
        raise AssertionError(f"{name}: {said}, for {case}")


# -- how it is done -----------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _compiled(product):
  def run(rows, matrices, gradient, sizes):
    y, pull = jax.vjp(lambda *of: product(*of, sizes), rows, matrices)
    return y, *pull(gradient)

  return jax.jit(run)


def _with_rest(case):
  return [*case.sizes, case.N - sum(case.sizes)]


def _draw(case):
  """Whole numbers, few enough for each to be known in bfloat16."""
  random = np.random.default_rng(0)
  low = 1 if case.is_positive else -3
  rows, matrices, gradient = (
    random.integers(low, 4, shape).astype(np.float64)
    for shape in (
      (case.N, case.I),
      (len(case.sizes), case.I, case.O),
      (case.N, case.O),
    )
  )
  if case.nan == "past":
    rows[sum(case.sizes) :] = gradient[sum(case.sizes) :] = np.nan
  if case.nan == "group":
    largest = int(np.argmax(case.sizes))
    start = sum(case.sizes[:largest])
    matrices[largest] = np.nan
    for of_row in (rows, gradient):
      of_row[start : start + case.sizes[largest]] = np.nan
  return rows, matrices, gradient


def _loops(case, rows, matrices, gradient):
  """Returns y and the gradients, rounded once."""
  y, to_rows, to_matrices = map(np.zeros_like, (gradient, rows, matrices))
  start = 0
  for group, size in enumerate(case.sizes):
    at = slice(start, start + size)
    y[at] = rows[at] @ matrices[group]
    to_rows[at] = gradient[at] @ matrices[group].T
    to_matrices[group] = rows[at].T @ gradient[at]
    start += size
  return [
    np.asarray(jnp.asarray(a, case.dtype), np.float64)
    for a in (y, to_rows, to_matrices)
  ]


def _differ(got, want):
  return not np.array_equal(got, want)


def _smaller(case: Case) -> Iterator[Case]:
  """Yields inputs that are simpler in one way, the simplest first."""
  sizes, rest = case.sizes, case.N - sum(case.sizes)

  def of(sizes, rest=rest):
    N = max(1, sum(sizes) + rest)
    return case._replace(sizes=tuple(sizes), N=N)

  half = len(sizes) // 2
  if half > 1:
    yield from (of(sizes[:half]), of(sizes[half:]))
  for name in ("I", "O"):
    width = getattr(case, name)
    for less in {1, width // 2, width - 1}:
      if 0 < less < width:
        yield case._replace(**{name: less})
  if len(sizes) <= 8:
    for g, size in enumerate(sizes):
      if len(sizes) > 1:
        yield of((*sizes[:g], *sizes[g + 1 :]))
      for less in sorted({0, 1, size // 2, size - 1}):
        if 0 <= less < size:
          yield of((*sizes[:g], less, *sizes[g + 1 :]))
  for less in sorted({0, 1, rest // 2, rest - 1}):
    if 0 <= less < rest:
      yield of(sizes, less)
  if case.dtype != "float32":
    yield case._replace(dtype="float32")
