"""Schedule and update rules against closed forms and NumPy loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from moejax import config as config_lib
from moejax import experts, moe, router, sharding
from moejax.training import optim, state
from moejax.training.checkpoint import Checkpoints


@given(
  warmup=st.integers(1, 50),
  hold=st.integers(0, 50),
  t=st.integers(1, 500),
)
def test_schedule_is_the_formula(warmup, hold, t):
  want = 2.0 * min(t / warmup, 1, np.sqrt((warmup + hold) / t))
  got = optim.warmup_rsqrt(2.0, warmup, hold)(t - 1)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_schedule_is_continuous_at_both_joints():
  schedule = optim.warmup_rsqrt(1.0, 2000, 8000)
  rates = np.array([float(schedule(t - 1)) for t in (2000, 2001, 10000, 10001)])
  np.testing.assert_allclose(rates, 1, rtol=1e-4)
  assert float(schedule(0)) == pytest.approx(1 / 2000)
  assert float(schedule(40000 - 1)) == pytest.approx(0.5)


def test_schedule_refuses_no_warmup():
  with pytest.raises(ValueError, match="warmup_steps = 0 and hold_steps = 3"):
    optim.warmup_rsqrt(1.0, 0, 3)


def test_adam_by_hand():
  b1, b2, eps, rate = 0.8, 0.9, 1e-3, 0.1
  tx = optim.adam(lambda count: rate, b1, b2, eps)
  params = {"w": jnp.array([1.0, -2.0])}
  state = tx.init(params)
  w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
  for t in range(1, 4):
    g = np.array([0.3, -0.1]) * t
    updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state)
    params = optax.apply_updates(params, updates)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    w -= rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_clip_is_over_the_whole_tree():
  grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
  # With a step as large as its gradient, what was clipped shows.
  plain = optax.chain(optax.clip_by_global_norm(1.0))
  want, _ = plain.update(grads, plain.init(grads))
  np.testing.assert_allclose(want["a"], [0.6], rtol=1e-6)
  tx = optim.adam(lambda count: 1.0, 0.0, 0.0, 1e8, clip_norm=1.0)
  got, _ = tx.update(grads, tx.init(grads))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g * -1e8, w, rtol=1e-5), got, want
  )


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


# More experts than any matrix has rows: the experts are the largest axis.
E, D, F = 7, 5, 3
SHAPES = {
  "head": {"table": (E, D)},
  "layers_0": {
    "router": {"gate": {"kernel": (D, E)}},
    "experts": {"w_in": (E, D, F), "bias": (E, D)},
  },
  "layers_1": {
    "secondary": {
      "router": {"gate": {"kernel": (2, D, E)}},
      "experts": {"w_out": (2, E, F, D)},
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


def kept(module):
  """The shapes that are kept of each parameter of a layer."""
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((8, D)))
  params = {"layer": variables["params"]}
  tx = optim.factored_adam(lambda count: RATE)
  of_state = jax.tree.leaves_with_path(
    nn.unbox(jax.eval_shape(tx.init, params))
  )
  shapes = {}
  for path, _ in jax.tree.leaves_with_path(nn.unbox(params)):
    name = "/".join(names(path)[1:])
    shapes[name] = [
      leaf.shape
      for at, leaf in of_state
      if "/".join(names(at)).endswith(f"/layer/{name}")
    ]
  return shapes


WITHIN = moe.MoE(router.TopK(E, 2), experts.FeedForward(E, F))
KINDS = experts.Mixed(
  (experts.FeedForward(2, F), experts.Each(4, nn.Dense(D)), experts.Linear(1))
)


@pytest.mark.parametrize(
  "module, want",
  [
    (
      WITHIN,
      {
        "router/gate/kernel": [(D, E), (D, E)],
        "experts/w_in": [(E, D), (E, F)],
        "experts/w_out": [(E, F), (E, D)],
      },
    ),
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
    (
      moe.OneExpert(experts.FeedForward(1, F)),
      {
        "experts/w_in": [(1, D), (1, F)],
        "experts/w_out": [(1, F), (1, D)],
      },
    ),
  ],
)
def test_what_is_kept_of_each_parameter(module, want):
  assert kept(module) == want


B, L, V = 8, 4, 11
CONFIG = {
  "model": {
    "kind": "lstm_lm",
    "width": 8,
    "layers": ("moe",),
    "moe": {
      "num_experts": 8,
      "router": {"kind": "top_k", "k": 2},
      "experts": {"kind": "feed_forward", "hidden": 16},
      "group_size": L,
    },
  },
  "optimizer": {
    "kind": "factored_adam",
    "peak": 1.0,
    "warmup_steps": 10,
    "clip_norm": 1.0,
  },
}


def on_mesh(on):
  """Returns model, update rule, shapes of a batch, layout and mesh."""
  config = ConfigDict(CONFIG)
  layout = sharding.LAYOUTS[on]
  ids = jax.ShapeDtypeStruct((B, L), jnp.int32)
  real = jax.ShapeDtypeStruct((B, L), jnp.bool)
  batch = {"inputs": ids, "targets": ids, "mask": real, "start": real}
  _, tx = config_lib.optimizer(config)
  model = config_lib.model(config, V)
  return model, tx, batch, layout, sharding.make_mesh(layout)


def factors(of):
  """R and C of the matrices of one layer's experts."""
  return [
    optax.tree.get(of.opt_state, name)["layers_0"]["experts"]
    for name in ("rows", "columns")
  ]


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
  of_rows, of_columns = factors(state.abstract_state(*on_mesh(on)))
  spec = jax.sharding.PartitionSpec
  assert of_rows["w_in"].sharding.spec == spec(*rows)
  assert of_columns["w_in"].sharding.spec == spec(*columns)
  # The other way round: units of the hidden layer are its rows.
  if on != "fsdp":
    assert of_rows["w_out"].sharding.spec == spec(*columns)
    assert of_columns["w_out"].sharding.spec == spec(*rows)


def test_factors_move_to_another_mesh_by_a_checkpoint(tmp_path):
  model, tx, batch, layout, mesh = on_mesh("expert")
  update = jax.jit(lambda params, opt_state: tx.update(params, opt_state))
  first = state.create(model, tx, batch, 0, layout, mesh)
  # Gradients like any others.
  _, opt_state = update(first.params, first.opt_state)
  saved = first._replace(opt_state=opt_state, step=first.step + 1)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(saved, 1, {})
  checkpoints.wait()
  want = jax.device_get(update(saved.params, saved.opt_state))
  for on in ("expert_model", "fsdp"):
    target = state.abstract_state(*on_mesh(on))
    restored = checkpoints.latest(target).state
    for leaf in jax.tree.leaves(factors(saved)):
      assert np.abs(leaf).max() > 0
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    places = jax.tree.map(lambda leaf: leaf.sharding, restored)
    assert places == state.shardings(target)
    got = update(restored.params, restored.opt_state)
    jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, 1e-5, 1e-7), got, want
    )
  checkpoints.close()
