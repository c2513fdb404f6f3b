"""Backends keep the contract of grouped products, and wrong ones do not."""

import functools
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology

from moejax import grouped, kernels, testing, triton
from moejax.kernels import Sizes
from moejax.planning import work
from moejax.testing.grouped import Case, checks, differentiable, fault, shrink

pytestmark = pytest.mark.usefixtures("few_sizes")


class TestLoop(testing.GroupedContract):
  product = grouped.grouped_dot
  num_rows, widths, many = 96, (5, 3), 64


class TestRaggedDot(testing.GroupedContract):
  product = functools.partial(grouped.grouped_dot, backend="ragged_dot")
  num_rows, widths, many = 24, (5, 3), 32
  test_nan_in_a_group = None  # every row meets every matrix


def interpreted(name, **options):
  """The product of a kernel that a CPU runs slowly."""
  both = kernels.BACKENDS[name][2:]
  return differentiable(
    *(functools.partial(fn, interpret=True, **options) for fn in both)
  )


class TestTriton(testing.GroupedContract):
  # Tiles of 16 rows, 16 columns and 32 entries that are summed over.
  product = interpreted("triton", tile=(16, 16, 64))
  num_rows, widths, many, dtypes = 40, (33, 18), 8, ("bfloat16",)


class TestMegablox(testing.GroupedContract):
  # A tile has 128 rows.
  product = interpreted("megablox")
  num_rows, widths, many, dtypes = 140, (6, 5), 8, ("bfloat16",)


# -- wrong in one way each ----------------------------------------------------


def right(end=None, gradient=None, rest=False, total=jnp.float32):
  """A product by indices; `end` and `gradient` spoil what it returns."""

  def groups(rows, sizes):
    place = jnp.arange(len(rows), dtype=jnp.int32)
    group = (jnp.cumsum(sizes)[None] <= place[:, None]).sum(axis=1)
    if rest:
      group = jnp.minimum(group, len(sizes) - 1)
    return group, (group < len(sizes))[:, None]

  def dot(rows, matrices):
    # In parts, of which the sum is rounded as `total` is.
    y, step = 0, -(-rows.shape[1] // 4)
    for k in range(0, rows.shape[1], step):
      left, right = (a[:, k : k + step] for a in (rows, matrices))
      part = jnp.einsum(
        "ni,nio->no", *(a.astype("float32") for a in (left, right))
      )
      y = (y + part).astype(total).astype(jnp.float32)
    return y.astype(rows.dtype)

  def by_matrix(rows, matrices, sizes, transposed):
    if transposed:
      matrices = matrices.swapaxes(1, 2)
    group, mine = groups(rows, sizes)
    y = dot(jnp.where(mine, rows, 0), matrices[group % len(sizes)])
    y = jnp.where(mine, y, 0)
    return y if end is None else end(y, rows, sizes, transposed)

  def by_rows(rows, values, sizes):
    group, mine = groups(rows, sizes)
    outer = jnp.where(
      mine[..., None],
      rows[:, :, None].astype("float32") * values[:, None].astype("float32"),
      0,
    )
    found = jnp.zeros((len(sizes), *outer.shape[1:])).at[group].add(outer)
    found = found.astype(rows.dtype)
    return found if gradient is None else gradient(found, rows, values, sizes)

  return by_matrix, by_rows


def past(y, sizes):
  return (jnp.arange(len(y)) >= sizes.sum())[:, None]


def sizes_moved(fns):
  """The second group begins a row too early."""

  def moved(sizes):
    some = (sizes[0] > 0) & (jnp.arange(len(sizes)) < 2)
    return sizes + jnp.where(
      some, jnp.array([-1, 1])[jnp.arange(len(sizes)) % 2], 0
    )

  by_matrix, by_rows = fns
  return (
    lambda rows, matrices, sizes, t: by_matrix(rows, matrices, moved(sizes), t),
    by_rows,
  )


def with_state(fns):
  """Every call adds another number."""
  calls = iter(range(10**6))
  by_matrix, by_rows = fns

  def run(rows, *args):
    count = jax.ShapeDtypeStruct((), jnp.float32)
    y = by_matrix(rows, *args)
    n = jax.experimental.io_callback(lambda: np.float32(next(calls)), count)
    return y + (n > 1).astype(y.dtype) * 0.5

  return run, by_rows


WRONG = {
  "y past the end is not written": (
    "rows past the end",
    right(end=lambda y, _, s, t: jnp.where(past(y, s) & (not t), 7, y)),
  ),
  "the gradient of rows past the end is that of the last group": (
    "rows past the end",
    right(end=lambda y, _, s, t: jnp.where(past(y, s) & t, 7, y)),
  ),
  "garbage in empty groups": (
    "empty groups",
    right(gradient=lambda w, x, d, s: w + (s == 0)[:, None, None] * 0.5),
  ),
  "a boundary is off by one": ("values", sizes_moved(right())),
  "transposed twice": (
    "values",
    (
      lambda x, w, s, t: right()[0](
        x, w.reshape(len(w), *w.shape[:0:-1]).swapaxes(1, 2) if t else w, s, t
      ),
      right()[1],
    ),
  ),
  "the last tile is dropped": (
    "values",
    right(
      end=lambda y, *_: jnp.where(
        (jnp.arange(len(y)) < len(y) // 16 * 16)[:, None], y, 0
      )
    ),
  ),
  "sums in bfloat16": ("float32 sums", right(total=jnp.bfloat16)),
  "NaN past the end times zero": (
    "NaN past the end",
    right(gradient=lambda w, x, d, s: w + 0 * x.sum() * d.sum()),
  ),
  "NaN of a group times zero": (
    "NaN in a group",
    right(end=lambda y, x, s, t: y + 0 * jnp.where(past(y, s), 0, x).sum()),
  ),
  "sizes that do not add up to N": ("rows past the end", right(rest=True)),
  "no more than 16 groups": (
    "many groups",
    right(gradient=lambda w, *_: w * (jnp.arange(len(w)) < 16)[:, None, None]),
  ),
  "widths to a multiple of 4": (
    "widths",
    right(
      end=lambda y, *_: (
        y * (jnp.arange(y.shape[1]) < max(4, y.shape[1] & ~3))[None]
      )
    ),
  ),
}
KIT = checks(24, (4, 5), 20, ("float32", "bfloat16"))


@pytest.fixture
def loose():
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def test_what_is_right_passes_all_checks(loose):
  product = differentiable(*right())
  faults = [fault(product, case) for cases in KIT.values() for case in cases]
  assert not any(faults)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_one_way_is_found(name, loose):
  check, fns = WRONG[name]
  product = differentiable(*fns)
  assert any(fault(product, case) for case in KIT[check])


def test_a_run_with_other_bits_is_found(loose):
  product = differentiable(*with_state(right()))
  case = Case((3, 2), 5)
  assert fault(product, case, twice=True) == "a second run has other bits"


def test_the_smallest_input_is_told(loose):
  class Broken(testing.GroupedContract):
    product = differentiable(*WRONG["garbage in empty groups"][1])
    num_rows, widths, many, dtypes = 24, (4, 5), 20, ("float32",)

  with pytest.raises(AssertionError) as info:
    Broken().test_empty_groups()
  said = "empty groups is 0.5, not 0, at (0, 0, 0), for E=1 sizes=(0,) N=1 I=1"
  assert said in str(info.value)
  # Of two faults the search stays with the one that it began with.
  product = differentiable(
    *right(end=lambda y, _, s, t: jnp.where(past(y, s), 7, y) + 1)
  )
  case, said = shrink(product, Case((2, 3), 9, 4, 5))
  assert said.startswith("y past the last group is 8") and case.N == 1


# -- which backend ------------------------------------------------------------

BIG = Sizes("forward", "bfloat16", 8, 16384, 4096, 14336)
NAMES = {id(backend): name for name, backend in grouped.BACKENDS.items()}


def chosen(*args, **options):
  return NAMES[id(grouped.choose(*args, **options))]


def test_what_was_measured_near_by_decides():
  kind = jax.devices()[0].device_kind
  row = {"device": kind, **BIG._asdict(), "backend": "ragged_dot"}
  far = row | {"N": 40_000, "backend": "mosaic"}
  near = row | {"N": 20_000, "backend": "loop"}
  for platform, own in (("cuda", "triton"), ("tpu", "megablox")):
    pick = functools.partial(chosen, platform)
    assert pick(BIG) == pick(BIG, measured=[far]) == own
    assert pick(BIG, measured=[far, near]) == "loop"
    assert pick(BIG, measured=[far, near, row]) == "ragged_dot"
    for other in ({"direction": "gradient"}, {"dtype": "float32"}):
      assert pick(BIG._replace(**other), measured=[row]) == own
    assert pick(BIG, measured=[row | {"device": "another"}]) == own


def test_the_table_is_one_of_backends():
  path = pathlib.Path(grouped.__file__).with_name("measured_products.json")
  for row in json.loads(path.read_text()):
    assert row["backend"] in grouped.BACKENDS
    assert row["direction"] in kernels.DIRECTIONS
    assert min(row[name] for name in "ENIO") > 0


def test_what_a_kernel_cannot_do_another_does(monkeypatch):
  monkeypatch.setattr(grouped, "_platform", lambda: "cuda")
  grouped._say_once.cache_clear()
  pick = functools.partial(chosen, "cuda", backend="mosaic")
  assert pick(BIG) == "mosaic"
  for change, why in (
    ({"direction": "gradient"}, "NaN of one group reaches"),
    ({"E": 65}, "64 at most"),
    ({"I": 100}, "I is no multiple of 128"),
    ({"dtype": "float32"}, "bfloat16 and float16 alone"),
  ):
    with pytest.warns(UserWarning, match=f"mosaic cannot .*{why}"):
      assert pick(BIG._replace(**change)) == "triton"
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      pick(BIG._replace(**change))  # said once
  grouped._say_once.cache_clear()
  with pytest.warns(UserWarning, match="triton cannot multiply float64"):
    assert chosen("cuda", BIG._replace(dtype="float64")) == "loop"


@pytest.mark.parametrize(
  "name, said",
  [
    ("triton", "'triton' runs not on cpu; take loop or ragged_dot, which cpu"),
    ("tritan", "'tritan' is not one; take loop or ragged_dot, which cpu has"),
  ],
)
def test_a_backend_that_is_not_here(name, said):
  args = jnp.ones((2, 3)), jnp.ones((1, 3, 2)), jnp.ones(1, jnp.int32)
  with pytest.raises(ValueError, match=said):
    grouped.grouped_dot(*args, backend=name)


def test_a_named_backend_multiplies():
  args = jnp.ones((4, 3)), jnp.ones((1, 3, 2)), jnp.full(1, 3, jnp.int32)
  for name in ("loop", "ragged_dot"):
    run = jax.jit(functools.partial(grouped.grouped_dot, backend=name))
    text = run.lower(*args).as_text()
    assert ("while" in text) == (name == "loop")
    np.testing.assert_array_equal(run(*args), [[3, 3]] * 3 + [[0, 0]])


# -- compiled for a GPU that is not there -------------------------------------


@pytest.mark.parametrize("direction", kernels.DIRECTIONS)
def test_kernels_compile_for_an_h100_and_tell_their_work(direction):
  where = jax.sharding.SingleDeviceSharding(topology.gpus("h100:1").devices[0])
  E, N, I, O = 5, 1000, 200, 72

  def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  sizes = of(E, dtype=jnp.int32)
  if direction == "gradient":
    fn, args = triton.rows_by_rows, (of(N, I), of(N, O), sizes)
  else:
    fn, args = triton.rows_by_matrix, (of(N, I), of(E, I, O), sizes)
    if direction == "transposed":
      fn = functools.partial(fn, transposed=True)
      args = of(N, O), *args[1:]
  text = jax.jit(fn).lower(*args).compile().as_text()
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
  found = list(work.instructions(text))
  assert sum(each.flops for each in found) == 2 * N * I * O
  assert " while(" not in text
