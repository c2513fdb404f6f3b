"""Attention against loops; the LSTM around it against plain autodiff."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent

from moejax import sharding
from moejax.models import attention, layers

B, L, M, D, H, N = 2, 7, 6, 4, 5, 3
forms = pytest.mark.parametrize("form", attention.FORMS)
projections = pytest.mark.parametrize("projected", [True, False])

# The first row's third pair has no source, its second is longer there; the
# second row's second pair has a source alone. Both end in padding.
SEGMENT = np.array([[1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 0, 0]])
SOURCE = np.array([[1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 0]])
START = np.diff(SEGMENT, axis=1, prepend=-1) != 0


def draw(projected=True, seed=0, rows=1):
  """Returns x, states, and the weights, as float64 NumPy arrays."""
  rng = np.random.default_rng(seed)
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
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def on_device(values):
  return {name: jnp.asarray(a, jnp.float32) for name, a in values.items()}


def module(form, given):
  """An `Attention` with its weights."""
  weights = {name: jnp.asarray(given[name]) for name in "uw"}
  weights["v"] = jnp.asarray(given["v"])[:, None]
  return attention.Attention(N, form).bind({"params": weights})


def memory_of(form, given, source=SOURCE):
  source = jnp.asarray(np.tile(source, (len(given["states"]) // B, 1)))
  return module(form, given).remember(given["states"], source)


@forms
def test_contexts_and_weights_are_those_of_the_loops(form):
  given = draw()
  want = [
    [
      recurrent.look(
        form,
        given["x"][b, t],
        SEGMENT[b, t],
        given["states"][b],
        SOURCE[b],
        *(given[name] for name in "uwv"),
      )
      for t in range(L)
    ]
    for b in range(B)
  ]
  device = on_device(given)
  got = module(form, device)(
    device["x"], jnp.asarray(SEGMENT), memory_of(form, device)
  )
  for index, array in enumerate(got):
    expected = np.array([[at[index] for at in row] for row in want])
    np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
    assert not array[0, 5:].any() and not array[1, 5:].any()


@forms
def test_a_place_without_a_source_has_no_gradient(form):
  device = on_device(draw())

  def total(given):
    context, _ = module(form, given)(
      given["x"], jnp.asarray(SEGMENT), memory_of(form, given)
    )
    return (context**2).sum()

  names = ("x", "states", "u", "w", "v")
  slopes = jax.grad(total)({name: device[name] for name in names})
  for name, slope in slopes.items():
    assert np.isfinite(slope).all() and slope.any(), name
  assert not slopes["x"][SEGMENT == 0].any()
  assert not slopes["x"][0, 5].any()
  assert not slopes["states"][SOURCE == 0].any()
  assert slopes["states"][SOURCE == 1].any(axis=1).all()


def run(form, given, dtype=jnp.float32):
  rows = len(given["x"]) // B
  given = given | {n: given[n].astype(dtype) for n in ("x", "states")}
  return attention.attentive_lstm(
    given["x"],
    jnp.asarray(np.tile(START, (rows, 1))),
    jnp.asarray(np.tile(SEGMENT, (rows, 1))),
    memory_of(form, given),
    given["w"],
    layers.LSTMWeights(
      given["w_in"], given["w_rec"], given["bias"], given.get("w_out")
    ),
    form,
  )


def naive(form, given):
  """One step of the LSTM's own function after the other."""
  rows = len(given["x"]) // B
  segment, start = (
    jnp.asarray(np.tile(a, (rows, 1))) for a in (SEGMENT, START)
  )
  memory = memory_of(form, given)
  weights = [given[n] for n in ("w_in", "w_rec", "bias")]
  if "w_out" in given:
    weights.append(given["w_out"])
  outputs, contexts = [], []
  y = jnp.zeros_like(given["x"][:, 0])
  for t in range(L):
    y = jnp.where(start[:, t, None], 0.0, y)
    at = slice(t, t + 1)
    context, _ = module(form, given)(y[:, None], segment[:, at], memory)
    contexts.append(context)
    # From the start again, as far as the contexts are known.
    x = given["x"][:, : t + 1]
    both = jnp.concatenate([x, jnp.concatenate(contexts, 1)], -1)
    y = layers.lstm(both, start[:, : t + 1], *weights)[:, -1]
    outputs.append(y)
  return jnp.stack(outputs, 1)


def gradients(fn, form, given, dtype=None):
  pull = np.random.default_rng(9).normal(size=given["x"].shape)

  def total(given):
    y = fn(form, given) if dtype is None else fn(form, given, dtype)
    return (y.astype(jnp.float32) * jnp.asarray(pull, jnp.float32)).sum(), y

  return jax.grad(total, has_aux=True)(given)


@forms
@projections
def test_values_and_gradients_are_those_of_plain_steps(form, projected):
  given = on_device(draw(projected))
  compiled = jax.jit(
    lambda given: [gradients(fn, form, given) for fn in (run, naive)]
  )
  (got, y), (want, y_want) = compiled(given)
  np.testing.assert_allclose(y, y_want, rtol=1e-5, atol=1e-6)
  for name, slope in got.items():
    np.testing.assert_allclose(
      slope, want[name], rtol=1e-4, atol=1e-5, err_msg=name
    )
    assert slope.any(), name


@forms
def test_bfloat16_rounds_the_operands_only(form):
  given = on_device(draw())
  wide, y_wide = jax.jit(lambda given: gradients(run, form, given))(given)
  narrow, y = jax.jit(lambda given: gradients(run, form, given, jnp.bfloat16))(
    given
  )
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), y_wide, atol=0.04)
  for name, a in narrow.items():
    far = np.abs(a - wide[name]).max() / np.abs(wide[name]).max()
    assert far < 0.05, name


@forms
def test_eight_devices_agree_and_only_sum_weight_gradients(form):
  given = on_device(draw(rows=4))
  alone, y_alone = jax.jit(lambda given: gradients(run, form, given))(given)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  batch = sharding.batch_sharding(layout, mesh, len(given["x"]))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  given = {
    name: jax.device_put(a, batch if name in ("x", "states") else everywhere)
    for name, a in given.items()
  }
  with sharding.use(layout, mesh):
    whole = jax.jit(lambda given: gradients(run, form, given))
    compiled = whole.lower(given).compile()
  slopes, y = compiled(given)
  np.testing.assert_allclose(y, y_alone, rtol=1e-5, atol=1e-6)
  for name, a in slopes.items():
    np.testing.assert_allclose(
      a, alone[name], rtol=1e-4, atol=1e-5, err_msg=name
    )
  loops, entry = compiled.as_text().split("\nENTRY")
  assert "while(" in entry
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in loops + entry
  assert "all-reduce(" in entry
  assert "all-reduce(" not in loops


def test_weights_have_named_axes():
  states = jnp.zeros((B, M, D))
  boxed = attention.Attention(N).init(
    jax.random.key(0), states, jnp.asarray(SOURCE), method="remember"
  )
  axes = nn.get_partition_spec(boxed)["params"]
  assert tuple(axes["u"]) == tuple(axes["w"]) == ("embed", "hidden")
  assert tuple(axes["v"]) == ("hidden", None)


def test_an_unknown_form_names_the_known():
  with pytest.raises(ValueError, match="'prodct'.*'product', 'sum'"):
    attention.Attention(N, "prodct").init(
      jax.random.key(0),
      jnp.zeros((B, M, D)),
      jnp.asarray(SOURCE),
      method="remember",
    )
