"""Schedule and update rules against closed forms and NumPy loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import experts, moe, router, sharding
from moejax.data import packing
from moejax.models import lstm_lm
from moejax.training import optim, state


@given(
  warmup=st.integers(1, 50),
  hold=st.integers(0, 50),
  t=st.integers(1, 500),
)
def test_schedule_is_the_formula(warmup, hold, t):
  want = 2.0 * min(t / warmup, 1, np.sqrt((warmup + hold) / t))
  got = optim.warmup_rsqrt(2.0, warmup, hold)(t - 1)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"peak": 0.0}, "peak = 0.0"),
    (
      {"warmup_steps": 0, "hold_steps": 3},
      "warmup_steps = 0 and hold_steps = 3",
    ),
    ({"hold_steps": -1}, "hold_steps = -1"),
  ],
)
def test_what_a_schedule_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    optim.warmup_rsqrt(**{"peak": 1.0, "warmup_steps": 1} | options)


@pytest.mark.parametrize("make", [optim.adam, optim.factored_adam])
@pytest.mark.parametrize(
  "options",
  [{"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"clip_norm": 0.0}],
)
def test_what_rules_refuse(make, options):
  (name,) = options
  with pytest.raises(ValueError, match=rf"optimizer\.{name} is .*; give "):
    make(lambda count: 1.0, **options)


B1, B2, EPS, RATE = 0.8, 0.9, 1e-3, 0.1


def factored(gradients):
  """The update of one expert's matrix after its gradients so far (app. D)."""
  rows, columns = (np.zeros(n) for n in gradients[0].shape)
  for g in gradients:
    for i in range(len(rows)):
      rows[i] = B2 * rows[i] + (1 - B2) * np.mean(g[i] ** 2)
    for j in range(len(columns)):
      columns[j] = B2 * columns[j] + (1 - B2) * np.mean(g[:, j] ** 2)
  unbiased = 1 - B2 ** len(gradients)
  update = np.zeros_like(g)
  for i, row in enumerate(rows / unbiased):
    for j, column in enumerate(columns / unbiased):
      if g[i, j]:
        second = row * column / np.mean(rows / unbiased)
        update[i, j] = -RATE * g[i, j] / (np.sqrt(second) + EPS)
  return update


def adam(gradients, b1):
  """The update after the gradients so far."""
  m, v = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
  for g in gradients:
    m, v = b1 * m + (1 - b1) * g, B2 * v + (1 - B2) * g**2
  t = len(gradients)
  return -RATE * (m / (1 - b1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)


@pytest.mark.parametrize("b1", [0.0, B1])
def test_adam_by_hand(b1):
  tx = optim.adam(lambda count: RATE, b1, B2, EPS)
  gradients = [np.array([0.3, -0.1]) * t for t in range(1, 4)]
  current = tx.init({"w": jnp.zeros(2)})
  for t, g in enumerate(gradients, 1):
    updates, current = tx.update({"w": jnp.asarray(g, jnp.float32)}, current)
    np.testing.assert_allclose(updates["w"], adam(gradients[:t], b1), rtol=1e-5)


@pytest.mark.parametrize("make", [optim.adam, optim.factored_adam])
def test_clip_is_over_the_whole_tree(make):
  grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
  # A step is as large as its gradient, so that what was clipped shows.
  tx = make(lambda count: 1.0, 0.0, 0.0, 1e8, clip_norm=1.0)
  got, _ = tx.update(grads, tx.init(grads))
  np.testing.assert_allclose(got["a"] * -1e8, [0.6], rtol=1e-5)
  np.testing.assert_allclose(got["b"] * -1e8, [[0.8]], rtol=1e-5)


# More experts than any matrix has rows: the experts are the largest axis.
E, D, F = 7, 5, 3
SHAPES = {
  "head": {"table": (E, D)},
  "layers": {"w_key": (2, D, F), "norm": {"scale": (2, D)}},
  "layers_0": {
    "router": {"gate": {"kernel": (D, E)}},
    "experts": {"w_in": (E, D, F), "bias": (E, D)},
  },
  "layers_1": {
    "primary": {"gate": {"kernel": (D, 2)}},
    "secondary": {
      "router": {"gate": {"kernel": (2, D, E)}},
      "experts": {"w_out": (2, E, F, D), "bias": (2, E, D)},
    },
  },
}


def draw(step):
  """Gradients; the last expert has some at the second step alone."""
  random = np.random.default_rng(step)

  def one(path, shape):
    g = random.normal(size=shape) * random.normal(size=(*shape[:-1], 1))
    if step != 1 and "experts" in names(path):
      g[(slice(None),) * shape.index(E) + (-1,)] = 0
    return g.astype(np.float32)

  return jax.tree.map_with_path(
    one, SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )


def names(path):
  return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def test_factored_adam_by_loops():
  tx = optim.factored_adam(lambda count: RATE, B1, B2, EPS)
  so_far, current = [], tx.init(draw(0))
  for step in range(3):
    so_far.append(draw(step))
    updates, current = tx.update(so_far[-1], current)

    def check(path, update, *gradients):
      gradients = [np.float64(g) for g in gradients]
      name = names(path)[-1]
      if name in ("w_in", "w_out"):
        want = np.zeros_like(gradients[0])
        for at in np.ndindex(want.shape[:-2]):
          want[at] = factored([g[at] for g in gradients])
      else:
        want = adam(gradients, 0.0 if name == "bias" else B1)
      np.testing.assert_allclose(update, want, 1e-4, 1e-7, err_msg=name)

    jax.tree.map_with_path(check, updates, *so_far)


def orthogonal(m):
  """Five steps of Newton and Schulz."""
  if m.shape[0] > m.shape[1]:
    return orthogonal(m.T).T
  x = m / (np.linalg.norm(m) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x


def muon(gradients):
  """The update of a matrix after its gradients so far (2502.16982)."""
  m = np.zeros_like(gradients[0])
  for g in gradients:
    m = B1 * m + (1 - B1) * g
  t = len(gradients)
  ahead = B1 * m / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t)
  if not g.any():
    return np.zeros_like(g)
  return -RATE * 0.4 * max(m.shape) ** 0.5 * orthogonal(ahead)


def test_muon_by_loops():
  """Each matrix of layers alone; the other parameters have Adam."""
  tx = optim.muon(lambda count: RATE, B1, 0.4, 0.7, B2, EPS)
  so_far, current = [], None
  for step in range(3):
    gradients = {**draw(step), "lstm": {"w_rec": np.ones((D, F), np.float32)}}
    gradients["lstm"]["w_rec"][step] = 2
    so_far.append(gradients)
    current = current or tx.init(gradients)
    updates, current = tx.update(gradients, current)

    def check(path, update, *gradients):
      gradients = [np.float64(g) for g in gradients]
      name, want = names(path)[-1], adam(gradients, 0.7)
      if name.startswith("w_"):
        for at in np.ndindex(want.shape[:-2]):
          want[at] = muon([g[at] for g in gradients])
      np.testing.assert_allclose(update, want, 2e-4, 1e-5, err_msg=name)

    jax.tree.map_with_path(check, updates, *so_far)


def test_what_muon_refuses():
  for options in ({"momentum": 1.0}, {"scale": 0.0}):
    with pytest.raises(ValueError, match=r"momentum is .*\.scale .*; give at"):
      optim.muon(lambda count: RATE, **options)


GROUPS = {
  "experts": optim.Group(rate=3.0, weight_decay=0.5),
  "router": optim.Group(rate=0.0),
  "rest": optim.Group(weight_decay=0.25),
}


EVERY = [optim.adam, optim.factored_adam, optim.muon]


@pytest.mark.parametrize("make", EVERY)
def test_groups_have_rates_and_decays_of_their_own(make):
  """Also within groups of experts; biases do not decay, nor do routers move."""
  plain, tx = (
    make(lambda count: RATE, b2=B2, clip_norm=1.0, groups=groups)
    for groups in ({}, GROUPS)
  )
  params = draw(9)
  (want, _), (got, _) = (
    each.update(draw(0), each.init(params), params) for each in (plain, tx)
  )

  def check(path, got, want, w):
    *scopes, name = names(path)
    if "experts" in scopes:
      want = 3 * (want - RATE * (0 if name == "bias" else 0.5) * w)
    elif {"router", "primary"} & {*scopes}:
      want = np.zeros_like(want)
    else:
      want = want - RATE * (0 if name == "scale" else 0.25) * w
    np.testing.assert_allclose(got, want, 1e-5, 1e-7, err_msg=str(path))

  jax.tree.map_with_path(check, got, want, params)


def test_groups_that_there_are_not():
  tx = optim.adam(lambda count: RATE, groups={"router": optim.Group(2.0)})
  with pytest.raises(ValueError, match="names router, but no parameter .*rest"):
    tx.init({"w": jnp.zeros(2)})
  for groups in ({"expert": optim.Group()}, {"rest": optim.Group(-1.0)}):
    with pytest.raises(ValueError, match="give groups of experts, router, re"):
      optim.adam(lambda count: RATE, groups=groups)


def test_a_group_like_all_others_changes_no_state():
  """So that runs from before go on."""
  tx = optim.adam(lambda count: RATE, groups={"experts": optim.Group()})
  plain = optim.adam(lambda count: RATE)
  states = (jax.tree.structure(each.init(draw(0))) for each in (tx, plain))
  assert next(states) == next(states)


def kept(module):
  """The shapes that are kept of each parameter of a layer."""
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((8, D)))
  params = {"layer": variables["params"]}
  of_state = jax.eval_shape(
    optim.factored_adam(lambda count: RATE).init, params
  )
  shapes = {}
  for path, leaf in jax.tree.leaves_with_path(nn.unbox(of_state)):
    _, layer, name = "/".join(names(path)).partition("/layer/")
    if layer:
      shapes.setdefault(name, []).append(leaf.shape)
  return shapes


WITHIN = moe.MoE(router.TopK(E, 2), experts.FeedForward(E, F))
KINDS = experts.Mixed(
  (experts.FeedForward(2, F), experts.Each(4, nn.Dense(D)), experts.Linear(1))
)


@pytest.mark.parametrize(
  "module, want",
  [
    (
      moe.HierarchicalMoE(router.TopK(2, 2), WITHIN),
      {
        "primary/gate/kernel": [(D, 2), (D, 2)],
        # No expert, but one for each group of experts.
        "secondary/router/gate/kernel": [(2, D, E), (2, D, E)],
        "secondary/experts/w_in": [(2, E, D), (2, E, F)],
        "secondary/experts/w_out": [(2, E, F), (2, E, D)],
      },
    ),
    (
      moe.MoE(router.TopK(E, 2), KINDS),
      {
        "router/gate/kernel": [(D, E), (D, E)],
        "experts/kinds_0/w_in": [(2, D), (2, F)],
        "experts/kinds_0/w_out": [(2, F), (2, D)],
        "experts/kinds_1/expert/kernel": [(4, D), (4, D)],
        "experts/kinds_1/expert/bias": [(4, D)],
        "experts/kinds_2/w": [(1, D), (1, D)],
      },
    ),
    (
      # A mixture is an expert, its router too.
      moe.MoE(router.TopK(2, 2), experts.Each(2, WITHIN)),
      {
        "router/gate/kernel": [(D, 2), (D, 2)],
        "experts/expert/router/gate/kernel": [(2, D), (2, E)],
        "experts/expert/experts/w_in": [(2, E, D), (2, E, F)],
        "experts/expert/experts/w_out": [(2, E, F), (2, E, D)],
      },
    ),
  ],
)
def test_what_is_kept_of_each_parameter(module, want):
  assert kept(module) == want


@pytest.mark.parametrize(
  "on, rows, columns",
  [
    # An axis of one device splits nothing.
    ("expert", ("expert", None), ("expert", "model")),
    ("expert_model", ("expert", None), ("expert", "model")),
    ("fsdp", ("data", None), (None, "data")),
  ],
)
def test_factors_lie_as_their_matrices_do(on, rows, columns):
  layout = sharding.LAYOUTS[on]
  mixture = moe.MoE(router.TopK(8, 2), experts.FeedForward(8, 16), 4)
  batch = packing.batch_shapes(8, 4)
  abstract = state.abstract_state(
    lstm_lm.LSTMLM(11, 8, (mixture,)),
    optim.factored_adam(lambda count: RATE, clip_norm=1.0),
    batch,
    layout,
    sharding.make_mesh(layout),
  )
  of_rows, of_columns = (
    optax.tree.get(abstract.opt_state, name)["layers_0"]["experts"]
    for name in ("rows", "columns")
  )
  spec = jax.sharding.PartitionSpec
  assert of_rows["w_in"].sharding.spec == spec(*rows)
  assert of_columns["w_in"].sharding.spec == spec(*columns)
  # Exchanged: units of the hidden layer are its rows.
  if on != "fsdp":
    assert of_rows["w_out"].sharding.spec == spec(*columns)
    assert of_columns["w_out"].sharding.spec == spec(*rows)


@pytest.mark.parametrize("make", EVERY)
def test_averages_are_outside_of_the_optimizer(make):
  """They take the whole gradient, and change nothing for the rest."""
  average = {"router": {"average_bias": jnp.array([3.0, -4.0])}}
  rest = {"experts": {"w_in": jnp.ones((2, 3, 4))}, "gate": jnp.arange(3.0)}
  tx = make(lambda count: 0.1, clip_norm=0.5)
  alone, _ = tx.update(rest, tx.init(rest), rest)
  got, _ = tx.update(rest | average, tx.init(rest | average), rest | average)
  np.testing.assert_array_equal(
    got.pop("router")["average_bias"], -average["router"]["average_bias"]
  )
  jax.tree.map(np.testing.assert_array_equal, got, alone)
