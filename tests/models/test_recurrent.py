"""The recurrent mixture against loops; segments, packing, layouts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import recurrent
import reference_losses

from moejax import experts, losses, moe, router, sharding
from moejax.models import layers
from moejax.models.recurrent import RecurrentMoE

B, L, D, U, E, K = 8, 6, 4, 5, 8, 2
AUX = {"importance": 0.3, "load": 0.2}
# Sentences of every length; a row of one alone, and padding of NaN.
SEGMENT = np.array([[1, 1, 2, 3, 3, 3], [1] * 6, [1, 1, 1, 0, 0, 0]])[
  np.arange(B) % 3
]
MASK = jnp.asarray(SEGMENT > 0)
START = jnp.asarray(np.diff(SEGMENT, axis=1, prepend=-1) != 0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)
PULL = (
  np.random.default_rng(1).normal(size=(B, L, U)) * (SEGMENT > 0)[..., None]
)


def make(
  segment=None, dispatch="auto", size=B, choose=router.NoisyTopK, **drop
):
  drop = {"capacity_factor": None, "eval_capacity_factor": None} | drop
  gate = choose(E, K)
  cells = experts.Linear(E, 4 * U)
  mixture = moe.MoE(gate, cells, size, dispatch=dispatch, **drop)
  return RecurrentMoE(U, mixture, segment)


@functools.cache
def parameters(seed=0):
  init = functools.partial(make().init, jax.random.key(0), train=False)
  return recurrent.random_weights(init, seed, X, START)


def total(model, params, x):
  """A weighted sum of the outputs and the balance losses; y, the routing."""
  y, sown = model.apply(
    {"params": params},
    x,
    START,
    train=True,
    mask=MASK,
    rngs={"router": jax.random.key(3)},
    mutable=["routing"],
  )
  aux, _ = losses.auxiliary(sown, AUX)
  (routing,) = losses.routings(sown)
  task = jnp.where(MASK[..., None], y * jnp.float32(PULL), 0).sum()
  return task + aux, (y, routing)


def step(model, params, x):
  run = sharding.zero3(functools.partial(total, model))
  return jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)


run = jax.jit(step, static_argnums=0)


def test_masked_outputs_are_drawn_at_each_step():
  """By its number: whatever the segments are."""
  params = parameters()

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(model, train):
    return model.apply(
      {"params": params},
      X,
      START,
      train=train,
      rngs={"router": jax.random.key(3), "dropout": jax.random.key(4)},
    )

  plain, masked, in_parts = (
    make(segment, masked_outputs=chance)
    for segment, chance in ((None, 0.0), (None, 0.5), (2, 0.5))
  )
  y = [run(model, True) for model in (plain, masked, in_parts)]
  np.testing.assert_allclose(y[1], y[2], atol=1e-6)
  differs = np.abs(y[1] - y[0]).max(axis=(0, 2)) > 1e-3
  assert differs.all()
  np.testing.assert_array_equal(run(masked, False), run(plain, False))


def by_row(of_tokens, groups):
  """Of a routing [G * L, S, E], those of each step one after the other."""
  of_tokens = np.asarray(of_tokens).reshape(groups, L, -1, E)
  return of_tokens.swapaxes(1, 2).reshape(B, L, E)


@pytest.mark.parametrize(
  "segment, dispatch, size",
  [(None, "ragged", B), (3, "gather", 4)],
)
def test_value_balance_and_gradient_are_those_of_the_loops(
  segment, dispatch, size
):
  """The gradient along one direction of input and weights, under noise."""
  model, params = make(segment, dispatch, size), parameters()
  x = np.where(SEGMENT[..., None] > 0, X, np.nan)
  (value, (y, routing)), slopes = run(model, params, x)
  noisy = by_row(routing.logits, B // size)
  arrays = START, MASK

  def loops(by, noise):
    moved, at = jax.tree.map(
      lambda a, b: a + by * b,
      kinds.in_float64((params, X)),
      kinds.in_float64((parameters(seed=1), X[::-1])),
    )
    return recurrent.mixed_lstm(moved, K, at, *map(np.asarray, arrays), noise)

  def score(found):
    sums = {"importance": found.importance, "load": found.load}
    aux = (w * reference_losses.cv_squared(sums[n]) for n, w in AUX.items())
    return (found.y * PULL).sum() + sum(aux)

  # The noise that was drawn follows from the logits, one step at a time.
  noise = np.zeros((B, L, E))
  for t in range(L):
    found = loops(0, noise)
    here = (noisy - found.logits) / np.where(
      MASK[..., None], found.noise_std, 1
    )
    noise[:, t] = np.where(MASK[:, t, None], here[:, t], 0)
  drawn = noise[SEGMENT > 0]
  # Every step, row and expert has its own.
  assert np.unique(drawn.round(4)).size > 0.95 * drawn.size
  assert abs(drawn.mean()) < 0.2 and 0.8 < drawn.std() < 1.2
  found = loops(0, noise)
  real = np.asarray(MASK)
  np.testing.assert_allclose(y[real], found.y[real], rtol=2e-4, atol=1e-5)
  for name in ("importance", "load"):
    sums = np.asarray(getattr(routing, name)).sum(0)
    np.testing.assert_allclose(sums, getattr(found, name), rtol=2e-4, atol=1e-5)
  assert routing.count.shape == (L * B // size, E)
  assert int(routing.count.sum()) == K * real.sum()
  np.testing.assert_allclose(value, score(found), rtol=1e-4)
  along = (score(loops(1e-6, noise)) - score(loops(-1e-6, noise))) / 2e-6
  direction = parameters(seed=1), jnp.where(MASK[..., None], X[::-1], 0.0)
  got = jax.tree.map(lambda a, b: float((a * b).sum()), slopes, direction)
  np.testing.assert_allclose(sum(jax.tree.leaves(got)), along, rtol=2e-3)
  assert all(slope.any() for slope in jax.tree.leaves(slopes))


def test_noise_and_drops_do_not_depend_on_segments():
  """What the backward pass runs again is what was run."""
  tight = functools.partial(make, dispatch="gather", capacity_factor=0.5)
  # All rows want the first expert.
  params = jax.tree.map(lambda a: a, parameters())
  gate = params["mixture"]["router"]["gate"]
  gate["kernel"] = gate["kernel"].at[:D, 0].set(3)
  want = run(tight(None), params, jnp.abs(X))
  assert want[0][1][1].dropped.sum() > 0
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(check, run(tight(3), params, jnp.abs(X)), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_single_expert_is_an_lstm(dtype):
  mixture = moe.MoE(router.Single(), experts.Linear(1, 4 * U))
  model = RecurrentMoE(U, mixture, 2)
  x = jnp.asarray(X, dtype)
  run = functools.partial(model.init_with_output, train=False)
  got, variables = nn.unbox(jax.jit(run)(jax.random.key(0), x, START))
  w = variables["params"]["mixture"]["experts"]["w"][0]
  bias = variables["params"]["bias"]
  np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], U))
  want = layers.lstm(x, START, layers.LSTMWeights(w[:D], w[D:], bias))
  assert got.dtype == dtype
  rtol = 1e-5 if dtype == jnp.float32 else 0.05
  recurrent.assert_near(got.astype(jnp.float32), want.astype(jnp.float32), rtol)


def test_segments_keep_less_memory():
  """Of 64 steps; what is saved of each is most of the program's memory."""
  x = jax.ShapeDtypeStruct((B, 64, D), jnp.float32)
  start = jax.ShapeDtypeStruct((B, 64), bool)

  def slopes(model, params, x, start):
    def loss(params):
      return (model.apply({"params": params}, x, start, train=False) ** 2).sum()

    return jax.grad(loss)(params)

  def temporary(segment):
    model = make(segment, "gather", capacity_factor=1.0)
    args = model, parameters(), x, start
    program = jax.jit(slopes, static_argnums=0).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temporary(8) < 0.5 * temporary(None)


def test_segments_divide_the_row():
  with pytest.raises(ValueError, match="segments of 4 .* rows of 6; choose"):
    make(4).init(jax.random.key(0), X, START, train=False)


# In a layout that splits experts rows move at every step.
@pytest.mark.parametrize(
  "name, dispatch",
  [
    ("expert", "ragged"),
    ("data_expert", "einsum"),
    ("expert_model", "gather"),
    ("fsdp", "gather"),
  ],
)
def test_eight_devices_agree_with_one(name, dispatch):
  """Each with a row, which is a group: value, balance, noise and gradient."""
  model, params = make(3, dispatch, size=1), parameters()
  want = run(make(3, size=1, dispatch="gather"), params, X)
  layout = sharding.LAYOUTS[name]
  mesh = sharding.make_mesh(layout)
  init = functools.partial(model.init, jax.random.key(0), train=False)
  boxed = jax.eval_shape(init, X, START)["params"]
  places = sharding.shardings(boxed, layout, mesh)
  rows = sharding.batch_sharding(layout, mesh, B)
  on_mesh = jax.jit(
    functools.partial(step, model), out_shardings=(None, (places, rows))
  )
  given = jax.device_put(params, places), jax.device_put(X, rows)
  with sharding.use(layout, mesh):
    compiled = on_mesh.lower(*given).compile()
    got = compiled(*given)
  recurrent.assert_near(got[1], want[1], 1e-3)
  np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-4)
  y, y_alone = (np.asarray(each[0][1][0])[MASK] for each in (got, want))
  np.testing.assert_allclose(y, y_alone, atol=1e-4)
  by_slots = dispatch != "ragged" and "expert" in name
  assert ("all-to-all" in compiled.as_text()) == by_slots
