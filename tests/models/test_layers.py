"""The LSTM against a NumPy loop and plain autodiff; the table of words."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import recurrent

from moejax import sharding
from moejax.models import layers, stack

projections = pytest.mark.parametrize("projected", [None, 3])


def inputs(batch, length, width, hidden, projected=None):
  """Returns x, start, and the weights, as float64 NumPy arrays."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, length, width))
  start = rng.random((batch, length)) < 0.3
  recurs = projected or hidden
  w_in = rng.normal(size=(width, 4 * hidden)) / width**0.5
  w_rec = rng.normal(size=(recurs, 4 * hidden)) / recurs**0.5
  weights = w_in, w_rec, rng.normal(size=4 * hidden)
  if projected:
    weights += (rng.normal(size=(hidden, projected)) / hidden**0.5,)
  return x, start, *weights


def on_device(x, start, *weights):
  x, *weights = map(kinds.to_device, (x, *weights))
  return x, kinds.to_device(start, bool), layers.LSTMWeights(*weights)


def naive(x, start, weights):
  """The whole cell in a scan, differentiated by JAX."""
  w_in, w_rec, bias, w_out = weights

  def step(state, now):
    x, start = now
    y, c = (jnp.where(start[:, None], 0.0, s) for s in state)
    z = x @ w_in + y @ w_rec + bias[None]
    i, f, g, o = jnp.split(z, 4, -1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    y = nn.sigmoid(o) * jnp.tanh(c)
    y = y if w_out is None else y @ w_out
    return (y, c), y

  zero = tuple(jnp.zeros((len(x), n)) for n in (len(w_rec), len(bias) // 4))
  _, y = jax.lax.scan(step, zero, (x.swapaxes(0, 1), start.T))
  return y.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=0)
def gradients(lstm, x, start, weights):
  """Gradients of a weighted sum of all outputs by x and by the weights."""
  shape = (*start.shape, len(weights.w_rec))
  pull = jnp.asarray(np.random.default_rng(9).normal(size=shape), x.dtype)

  def total(x, weights):
    return (lstm(x, start, weights) * pull).astype(jnp.float32).sum()

  return jax.grad(total, (0, 1))(x, weights)


def assert_close(got, want):
  check = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(check, got, want)


@pytest.fixture(params=["default", "on a GPU"])
def lstm(request, monkeypatch):
  """The LSTM by either loop over time, as a function of its own.

  Nothing that was traced for the other is kept for it.
  """
  if request.param == "on a GPU":

    def by_platform(_, loop, dtype):
      return functools.partial(loop, dtype)

    monkeypatch.setattr(layers, "_by_platform", by_platform)
  return lambda x, start, weights: layers.lstm(x, start, weights)


@projections
def test_value_is_the_loops_and_gradients_are_plain_autodiffs(projected, lstm):
  given = inputs(3, 9, 5, 4, projected)
  args = on_device(*given)
  want = recurrent.lstm(*given)
  for fn in lstm, naive:
    np.testing.assert_allclose(fn(*args), want, rtol=1e-5, atol=1e-6)
  assert_close(gradients(lstm, *args), gradients(naive, *args))


@projections
def test_steps_are_the_whole_pass(projected):
  x, start, _ = on_device(*inputs(2, 5, 5, 4))
  start = start.at[:].set(False)
  module = layers.LSTM(projected or 4, projected and 4)
  variables = nn.unbox(module.init(jax.random.key(0), x, start))
  whole = module.apply(variables, x, start)
  state = layers.zero_state(2, projected or 4, 4)
  for t in range(5):
    state = module.apply(variables, x[:, t], state, method="step")
    np.testing.assert_allclose(state.y, whole[:, t], rtol=1e-5, atol=1e-6)


def test_bfloat16_rounds_the_operands_only(lstm):
  x, start, weights = on_device(*inputs(4, 12, 8, 8, 3))
  half = x.astype(jnp.bfloat16)
  got = lstm(half, start, weights)
  want = lstm(x, start, weights)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03)
  narrow = gradients(lstm, half, start, weights)
  assert narrow[0].dtype == jnp.bfloat16
  assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(narrow[1]))
  recurrent.assert_near(narrow, gradients(lstm, x, start, weights), 0.03)


@projections
def test_eight_devices_agree_with_one_and_only_sum_weight_gradients(
  projected, lstm
):
  x, start, weights = on_device(*inputs(16, 18, 8, 8, projected))
  alone = gradients(lstm, x, start, weights)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  rows = sharding.batch_sharding(layout, mesh, len(x))
  args = (
    *jax.device_put((x, start), rows),
    jax.device_put(weights, sharding.whole_sharding(mesh)),
  )
  value = jax.jit(lstm)(*args)
  assert value.sharding.is_equivalent_to(rows, 3)
  assert_close(value, naive(*args))
  compiled = gradients.lower(lstm, *args).compile()
  assert_close(compiled(*args), alone)
  recurrent.assert_sums_after_loops(compiled)


@pytest.mark.parametrize("width, hidden", [(4, None), (3, 4)])
def test_lstm_module_starts_remembering_with_named_axes(width, hidden):
  x, start, _ = on_device(*inputs(2, 3, 5, 4))
  module = layers.LSTM(width, hidden)
  boxed = module.init(jax.random.key(0), x, start)
  axes = nn.get_partition_spec(boxed)["params"]
  want = {
    "w_in": ("embed", "hidden"),
    "w_rec": (None, "hidden"),
    "bias": ("hidden",),
  } | ({"w_out": ("hidden", "embed")} if hidden else {})
  assert {name: tuple(names) for name, names in axes.items()} == want
  params = nn.unbox(boxed)["params"]
  np.testing.assert_array_equal(params["bias"], np.repeat([0, 1, 0, 0], 4))
  assert np.abs(params["w_in"]).max() <= (3 / 5) ** 0.5
  expected = layers.lstm(x, start, layers.LSTMWeights(**params))
  np.testing.assert_array_equal(module.apply(boxed, x, start), expected)


class Double(nn.Module):
  """Stands where a mixture does."""

  def __call__(self, x, *, train, mask, ids):
    return 2 * x


def test_outputs_are_dropped_out_before_the_input_is_added():
  """App. C.1, with dropout that is a factor of 10."""
  x, start, weights = on_device(*inputs(2, 3, 4, 4))
  lstm = layers.LSTM(4).bind({"params": weights._asdict()})
  options = dict(start=start, mask=start, ids=start.astype(int), train=True)
  got = stack.residual([lstm, Double()], x, lambda y: 10 * y, **options)
  want = x + 10 * layers.lstm(x, start, weights)
  want = want + 10 * nn.sigmoid(2 * want)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  got = stack.residual(
    [Double()], x, lambda y: 10 * y, **options, sigmoid=False
  )
  np.testing.assert_allclose(got, 21 * x, rtol=1e-6)


def test_embed_looks_words_up():
  module = layers.Embed(vocab_size=50, width=64)
  ids = jnp.array([[3, 0, 3], [49, 3, 7]])
  boxed = module.init(jax.random.key(0), ids)
  axes = nn.get_partition_spec(boxed)["params"]["table"]
  assert tuple(axes) == ("vocab", "embed")
  params = nn.unbox(boxed)
  table = np.asarray(params["params"]["table"])
  np.testing.assert_array_equal(module.apply(params, ids), table[ids])
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, atol=0.3)
  # What is no word is loud.
  out = module.apply(params, jnp.array([[49, 50]]))
  assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()
