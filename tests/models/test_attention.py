"""The LSTM around attention against plain autodiff; precision, devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import recurrent

from moejax import sharding
from moejax.models import attention, layers

B, L, M, D, H, N = 2, 7, 6, 4, 5, 3

# The first row's third pair has no source, its second is longer there; the
# second row's second pair has a source alone. Both end in padding.
SEGMENT = np.array([[1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 0, 0]])
SOURCE = np.array([[1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 0]])
START = np.diff(SEGMENT, axis=1, prepend=-1) != 0


def draw(projected=True, rows=1):
  """Returns x, states, and the weights, in float32."""
  rng = np.random.default_rng(0)
  units = H if projected else D
  shapes = {
    "x": (B * rows, L, D),
    "states": (B * rows, M, D),
    "u": (D, N),
    "w": (D, N),
    "v": (N,),
    "w_in": (2 * D, 4 * units),
    "w_rec": (D, 4 * units),
    "bias": (4 * units,),
  }
  if projected:
    shapes["w_out"] = (units, D)
  return {
    name: kinds.to_device(rng.normal(size=shape))
    for name, shape in shapes.items()
  }


def tiled(ids, given):
  return jnp.asarray(np.tile(ids, (len(given["x"]) // B, 1)))


def attend(form, given, y, segment):
  """Contexts and weights for states y, by the module."""
  weights = {"u": given["u"], "w": given["w"], "v": given["v"][:, None]}
  module = attention.Attention(N, form).bind({"params": weights})
  memory = module.remember(given["states"], tiled(SOURCE, given))
  return module(y, segment, memory), memory


def lstm_weights(given):
  names = layers.LSTMWeights._fields
  return layers.LSTMWeights(*(given.get(name) for name in names))


def run(form, given):
  _, memory = attend(form, given, given["x"], tiled(SEGMENT, given))
  return attention.attentive_lstm(
    given["x"],
    tiled(START, given),
    tiled(SEGMENT, given),
    memory,
    given["w"],
    lstm_weights(given),
    form,
  )


def naive(form, given):
  """One step after the other, differentiated by JAX."""
  segment, start = tiled(SEGMENT, given), tiled(START, given)
  w_in, w_rec, bias, _ = lstm_weights(given)
  y, c = jnp.zeros((2, B, D))
  found = []
  for t in range(L):
    y, c = (jnp.where(start[:, t, None], 0.0, each) for each in (y, c))
    (context, _), _ = attend(form, given, y[:, None], segment[:, t : t + 1])
    both = jnp.concatenate([given["x"][:, t], context[:, 0]], -1)
    z = both @ w_in + y @ w_rec + bias[None]
    c, y, _ = layers.update_cells(z, c)
    found.append((y, context[:, 0]))
  return (jnp.stack(each, 1) for each in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(fn, form, given):
  """Gradients of a weighted sum of all outputs and contexts, and these."""
  pull = np.random.default_rng(9).normal(size=(2, *given["x"].shape))

  def total(given):
    out = jnp.stack(list(fn(form, given))).astype(jnp.float32)
    return (out * jnp.asarray(pull, jnp.float32)).sum(), out

  return jax.grad(total, has_aux=True)(given)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def test_values_and_gradients_are_those_of_plain_steps():
  """Without a projection; with one see the loops of the whole model."""
  given = draw(projected=False)
  slopes, y = gradients(run, "sum", given)
  jax.tree.map(close, (slopes, y), gradients(naive, "sum", given))
  for slope in slopes.values():
    assert np.isfinite(slope).all() and slope.any()
  # Padding, and a pair without a source, leave the source alone.
  assert not slopes["states"][SOURCE == 0].any()


def test_bfloat16_rounds_the_operands_only():
  given = draw()
  half = {name: given[name].astype(jnp.bfloat16) for name in ("x", "states")}
  assert all(a.dtype == jnp.bfloat16 for a in run("product", given | half))
  narrow, y = gradients(run, "product", given | half)
  wide, y_wide = gradients(run, "product", given)
  np.testing.assert_allclose(y, y_wide, atol=0.04)
  recurrent.assert_near(narrow, wide, 0.05)


def test_eight_devices_agree_and_only_sum_weight_gradients():
  given = draw(rows=4)
  want = gradients(run, "sum", given)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  rows = sharding.batch_sharding(layout, mesh, len(given["x"]))
  whole = sharding.whole_sharding(mesh)
  given = {
    name: jax.device_put(a, rows if name in ("x", "states") else whole)
    for name, a in given.items()
  }
  with sharding.use(layout, mesh):
    compiled = gradients.lower(run, "sum", given).compile()
  jax.tree.map(close, compiled(given), want)
  recurrent.assert_sums_after_loops(compiled)


def test_weights_have_named_axes():
  states = jnp.zeros((B, M, D)), jnp.asarray(SOURCE)
  module = attention.Attention(N)
  boxed = module.init(jax.random.key(0), *states, method="remember")
  axes = nn.get_partition_spec(boxed)["params"]
  wide = jax.P("embed", "hidden")
  assert axes == {"u": wide, "w": wide, "v": jax.P("hidden", None)}
