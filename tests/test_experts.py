"""Experts: what they compute, how their weights start."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from moejax import experts, losses

E, N, D, F = 3, 4, 3, 6
NAMES = pytest.mark.parametrize(
  "name", list(dict.fromkeys([*experts.EXPERTS, *kinds.VARIANTS]))
)
SORTED = pytest.mark.parametrize(
  "name", [n for n, case in kinds.VARIANTS.items() if not case.slots_only]
)


def inputs(*shape, seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnames=("module", "train", "mutable"))
def run(
  module, weights, rows, taken=None, train=False, rngs=None, mutable=False
):
  """Runs experts in the scope of a layer; `taken` is a mask or group sizes."""
  variables = {"params": {"experts": weights}}
  sizes = {}
  if rows.ndim == 2:
    sizes["group_sizes"], taken = taken, None
  return kinds.Alone(module).apply(
    variables, rows, taken, train, rngs=rngs, mutable=mutable, **sizes
  )


def every_row(name, weights, rows):
  """The loops' outputs of rows [experts, N, D]."""
  loops = kinds.case(name).loops(kinds.in_float64(weights), E)
  return np.array([[loops(e, r) for r in np.asarray(of)] for e, of in rows])


def agree(name, rows, taken, owner):
  """Whether value and gradient of the rows at `owner` are those of the loops.

  `owner` lists (place, expert) of each real row.
  """
  case = kinds.case(name)
  module = case.make(E)
  at = {"rows": rows, "weights": kinds.draw(module, E, D)}
  out = np.random.default_rng(3).normal(size=rows.shape)
  mask = np.zeros(rows.shape[:-1])
  for place, _ in owner:
    mask[place] = 1
  out = out * mask[..., None]

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def score(at):
    y = run(module, at["weights"], at["rows"], taken)
    return (y * jnp.asarray(out, y.dtype)).sum(), y

  def loops(at):
    y = np.zeros(rows.shape)
    expert = case.loops(at["weights"], E)
    for place, e in owner:
      y[place] = expert(e, at["rows"][place])
    return y

  (_, y), slopes = score(at)
  want = loops(kinds.in_float64(at))
  np.testing.assert_allclose(y * mask[..., None], want, rtol=1e-4, atol=1e-4)
  kinds.same_gradient(
    slopes, kinds.finite_differences(lambda at: (loops(at) * out).sum(), at)
  )
  return y, slopes


@NAMES
def test_matches_the_paper_in_slots(name):
  """The last expert got nothing, and its slots do nothing."""
  real = np.arange(N)[None] < np.array([[N], [2], [0]])
  owner = [((e, n), e) for e in range(E) for n in range(N) if real[e, n]]
  rows = jnp.where(real[..., None], inputs(E, N, D), 0)
  agree(name, rows, jnp.asarray(real), owner)


@SORTED
def test_matches_the_paper_on_sorted_rows(name):
  """One expert got nothing, and some rows are of none."""
  sizes, unused = [4, 0, 3], 2
  owner = [
    ((i,), e) for i, e in enumerate(np.repeat(np.arange(E), sizes).tolist())
  ]
  rows = jnp.pad(inputs(sum(sizes), D), ((0, unused), (0, 0)))
  agree(name, rows, jnp.asarray(sizes, jnp.int32), owner)


@pytest.mark.parametrize("name", [*experts.EXPERTS, "deep"])
def test_weights_start_scaled_by_the_fan_in_of_one_expert(name):
  """Whatever the number of experts, and each with its own."""
  module, width = kinds.case(name).make(64), 32
  rngs = {"params": jax.random.key(0)}
  init = jax.jit(
    lambda: kinds.Alone(module).init(rngs, jnp.zeros((64, 1, width)))
  )
  for w in jax.tree.leaves(nn.unbox(init())):
    assert w.dtype == jnp.float32
    if w.ndim > 2:
      np.testing.assert_allclose(np.std(w), w.shape[-2] ** -0.5, rtol=0.05)
      assert len(np.unique(w)) > 0.99 * w.size


@NAMES
def test_weights_are_laid_out_by_expert(name):
  """Those of a mixture within an expert too, by the outer expert alone."""
  module = kinds.case(name).make(E)
  of_kind = {"kinds_0": 2, "kinds_1": 1}
  width = 7
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    kinds.start(module, E, width),
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  ):
    shape = nn.unbox(leaf).shape
    assert shape[0] == of_kind.get(path[0].key, E)
    # flax's own modules do not say how they may be split.
    if "Dense_0" not in str(path):
      want = None if shape[0] == 1 else "expert"
      assert leaf.names[0] == want and len(leaf.names) == len(shape)
      assert "expert" not in leaf.names[1:]
      assert leaf.names.count("embed") == (width in shape[1:])


@NAMES
def test_rows_keep_their_dtype(name):
  module = kinds.case(name).make(E)
  weights = kinds.draw(module, E, D)
  rows = inputs(E, N, D)
  got = run(module, weights, rows.astype(jnp.bfloat16))
  assert got.dtype == jnp.bfloat16
  want = every_row(name, weights, enumerate(rows))
  scale = np.abs(want).max()
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05 * scale)


def count_weights(module, width):
  shapes = jax.tree.leaves(kinds.start(module, 1, width))
  return sum(leaf.size for leaf in shapes)


@pytest.mark.parametrize(
  "hidden, want",
  [(1024, 1_048_576), (4096, 4_194_304), ((1024,) * 4, 4_194_304)],
)
def test_paper_counts(hidden, want):
  """512 -> 1024 -> 512, MoE-1-Wide and MoE-1-Deep, without biases (app. C)."""
  assert count_weights(experts.FeedForward(1, hidden), 512) == want


@pytest.mark.parametrize("train", [False, True])
def test_a_mixture_as_expert_routes_what_is_in_its_slots(train):
  """Padding is not routed, and every expert draws noise of its own."""
  module = kinds.make_mixtures(E, noisy=True)
  weights = kinds.draw(module, E, D)
  # All experts alike: only noise can make them differ.
  weights = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), weights)
  rows = jnp.broadcast_to(inputs(1, N, D), (E, N, D))
  real = jnp.asarray(np.arange(N)[None] < np.array([[N], [N], [1]]))
  y, state = run(
    module,
    weights,
    rows,
    real,
    train,
    rngs={"router": jax.random.key(2)},
    mutable="routing",
  )
  found = losses.routings(state)
  assert len(found) == E
  for e, routing in enumerate(found):
    assert int(routing.count.sum()) == kinds.J * int(real[e].sum())
    np.testing.assert_array_equal(routing.mask, real[e : e + 1])
  assert (np.asarray(y)[~np.asarray(real)] == 0).all()
  assert (y[0] == y[1]).all() == (not train)
  if not train:
    want = every_row("mixtures", weights, enumerate(rows))
    want *= np.asarray(real)[..., None]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sort", [False, True])
def test_kinds_may_be_mixed_themselves(sort):
  """Any kinds, and the numbers of experts add up."""
  module = experts.Mixed(
    (
      experts.Identity(2),
      experts.Mixed((experts.Linear(1), experts.FeedForward(2, F))),
    )
  )
  assert module.num_experts == 5
  weights = kinds.draw(module, 5, D)
  rows = inputs(5, N, D)
  if sort:
    y = run(
      module, weights, rows.reshape(-1, D), jnp.full(5, N, jnp.int32)
    ).reshape(rows.shape)
  else:
    y = run(module, weights, rows)
  inner = weights["kinds_1"]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(y[:2], rows[:2])
  close(y[2], rows[2] @ inner["kinds_0"]["w"][0])
  w = inner["kinds_1"]
  for i in range(2):
    close(y[3 + i], jax.nn.relu(rows[3 + i] @ w["w_in"][i]) @ w["w_out"][i])
