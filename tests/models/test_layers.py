"""The LSTM against a NumPy loop, flax's cell and plain autodiff; the table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent

from moejax import sharding
from moejax.models import layers

NAMES = ("x", "w_in", "w_rec", "bias", "w_out")
projections = pytest.mark.parametrize("projected", [None, 3])


def inputs(batch, length, width, hidden, projected=None, seed=0):
  """Returns x, start, and the weights, as float64 NumPy arrays."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, length, width))
  start = rng.random((batch, length)) < 0.3
  recurrent = projected or hidden
  w_in = rng.normal(size=(width, 4 * hidden)) / width**0.5
  w_rec = rng.normal(size=(recurrent, 4 * hidden)) / recurrent**0.5
  weights = w_in, w_rec, rng.normal(size=4 * hidden)
  if projected:
    weights += (rng.normal(size=(hidden, projected)) / hidden**0.5,)
  return x, start, *weights


def on_device(x, start, *weights):
  return tuple(
    jnp.asarray(a, bool if a is start else jnp.float32)
    for a in (x, start, *weights)
  )


def naive(x, start, w_in, w_rec, bias, w_out=None):
  """The whole cell in a scan, differentiated by JAX."""

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


def gradients(lstm, x, start, *weights):
  """Gradients of a weighted sum of all outputs, by the name of the input."""
  shape = (*start.shape, len(weights[1]))
  pull = jnp.asarray(np.random.default_rng(9).normal(size=shape), x.dtype)

  def total(*args):
    return (lstm(*args) * pull).astype(jnp.float32).sum()

  places = (0, *range(2, 2 + len(weights)))
  values = jax.jit(jax.grad(total, places))(x, start, *weights)
  return dict(zip(NAMES[: len(places)], values, strict=True))


@projections
def test_value_is_the_loops(projected):
  args = inputs(3, 6, 5, 4, projected)
  got = layers.lstm(*on_device(*args))
  np.testing.assert_allclose(got, recurrent.lstm(*args), rtol=1e-5, atol=1e-6)


@projections
def test_gradients_are_the_loops_finite_differences(projected):
  args = inputs(2, 5, 3, 4, projected)
  got = gradients(layers.lstm, *on_device(*args))
  pull = np.random.default_rng(9).normal(size=(2, 5, projected or 4))
  for index in (0, *range(2, len(args))):
    name = NAMES[max(index - 1, 0)]
    expected = np.zeros_like(args[index])
    for at in np.ndindex(expected.shape):
      ends = []
      for by in (1e-6, -1e-6):
        moved = [a.copy() for a in args]
        moved[index][at] += by
        ends.append((recurrent.lstm(*moved) * pull).sum())
      expected[at] = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(
      got[name], expected, rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("projected", [None, 12])
def test_gradients_are_those_of_plain_autodiff(projected):
  args = on_device(*inputs(8, 20, 16, 24, projected))
  got = gradients(layers.lstm, *args)
  expected = gradients(naive, *args)
  for name, a in got.items():
    b = expected[name]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


@projections
def test_a_packed_row_is_its_sentences_one_by_one(projected):
  x, _, *weights = inputs(1, 9, 5, 4, projected)
  start = np.zeros((1, 9), bool)
  start[0, [0, 4, 5]] = True
  whole = layers.lstm(*on_device(x, start, *weights))
  parts = [
    layers.lstm(*on_device(x[:, a:b], start[:, a:b], *weights))
    for a, b in ((0, 4), (4, 5), (5, 9))
  ]
  np.testing.assert_allclose(whole, np.concatenate(parts, 1), atol=1e-6)


def test_no_gradient_crosses_a_sentence_start():
  x, _, *weights = on_device(*inputs(2, 6, 5, 4))
  start = jnp.zeros((2, 6), bool).at[0, 3].set(True)

  def late(x):
    return layers.lstm(x, start, *weights)[:, 3:].sum()

  moved = np.abs(jax.grad(late)(x)[:, :3]).max((1, 2))
  assert moved[0] == 0
  assert moved[1] > 0


def test_an_output_depends_on_no_later_input():
  x, start, *weights = on_device(*inputs(2, 6, 5, 4))

  def early(x):
    return layers.lstm(x, start, *weights)[:, :4].sum()

  gradient = jax.grad(early)(x)
  assert np.all(gradient[:, 4:] == 0)
  assert np.all(gradient[:, 3] != 0)


def test_flax_computes_the_same():
  x, _, w_in, w_rec, bias = on_device(*inputs(3, 7, 5, 4))
  gates = zip(
    "ifgo",
    *(jnp.split(w, 4, -1) for w in (w_in, w_rec, bias)),
    strict=True,
  )
  params = {}
  for gate, from_x, from_y, offset in gates:
    params[f"i{gate}"] = {"kernel": from_x}
    params[f"h{gate}"] = {"kernel": from_y, "bias": offset}
  with jax.numpy_rank_promotion("allow"):
    module = nn.RNN(nn.OptimizedLSTMCell(4, parent=None))
    expected = module.apply({"params": {"cell": params}}, x)
  got = layers.lstm(x, jnp.zeros((3, 7), bool), w_in, w_rec, bias)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@projections
def test_bfloat16_rounds_the_operands_only(projected):
  x, start, *weights = on_device(*inputs(4, 12, 8, 8, projected))
  half = x.astype(jnp.bfloat16)
  got = layers.lstm(half, start, *weights)
  assert got.dtype == jnp.bfloat16
  expected = layers.lstm(x, start, *weights)
  np.testing.assert_allclose(
    got.astype(jnp.float32), expected, atol=0.03, rtol=0
  )
  wide = gradients(layers.lstm, x, start, *weights)
  narrow = gradients(layers.lstm, half, start, *weights)
  types = [str(g.dtype) for g in narrow.values()]
  assert types == ["bfloat16"] + len(weights) * ["float32"]
  for name, a in narrow.items():
    b = wide[name]
    far = np.abs(a.astype(jnp.float32) - b).max() / np.abs(b).max()
    assert far < 0.03, name


@projections
def test_eight_devices_agree_with_one_and_only_sum_weight_gradients(projected):
  args = on_device(*inputs(16, 6, 8, 8, projected))
  alone = gradients(layers.lstm, *args)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  batch = sharding.batch_sharding(layout, mesh, args[0].shape[0])
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  places = (batch, batch, *(everywhere,) * len(args[2:]))
  args = tuple(jax.device_put(a, s) for a, s in zip(args, places, strict=True))
  value = jax.jit(layers.lstm)(*args)
  assert value.sharding.is_equivalent_to(batch, 3)
  np.testing.assert_allclose(value, naive(*args), rtol=1e-5, atol=1e-6)

  whole = jax.jit(lambda *args: gradients(layers.lstm, *args))
  compiled = whole.lower(*args).compile()
  for name, a in compiled(*args).items():
    b = alone[name]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
  loops, entry = compiled.as_text().split("\nENTRY")
  assert "while(" in entry
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in loops + entry
  assert "all-reduce(" in entry
  assert "all-reduce(" not in loops


def test_three_gates_are_refused():
  x, start, w_in, w_rec, bias = on_device(*inputs(1, 2, 3, 4))
  with pytest.raises(ValueError, match="12 columns for 4 units.* 16 columns"):
    layers.lstm(x, start, w_in[:, :12], w_rec[:, :12], bias[:12])


def test_a_projection_of_other_units_is_refused():
  args = on_device(*inputs(1, 2, 3, 4, 3))
  with pytest.raises(ValueError, match="16 columns for 5 units.* 20 columns"):
    layers.lstm(*args[:5], jnp.zeros((5, 3)))


def test_lstm_module_starts_remembering_with_named_axes():
  x, start, *_ = on_device(*inputs(2, 3, 5, 4))
  module = layers.LSTM(width=4)
  boxed = module.init(jax.random.key(0), x, start)
  axes = nn.get_partition_spec(boxed)["params"]
  assert tuple(axes["w_in"]) == ("embed", "hidden")
  assert tuple(axes["w_rec"]) == (None, "hidden")
  assert tuple(axes["bias"]) == ("hidden",)
  params = nn.unbox(boxed)["params"]
  np.testing.assert_array_equal(params["bias"], np.repeat([0, 1, 0, 0], 4))
  assert np.abs(params["w_in"]).max() <= (3 / 5) ** 0.5
  expected = layers.lstm(
    x, start, params["w_in"], params["w_rec"], params["bias"]
  )
  np.testing.assert_array_equal(module.apply(boxed, x, start), expected)


def test_lstm_module_projects_its_hidden_units():
  x, start, *_ = on_device(*inputs(2, 3, 5, 4))
  module = layers.LSTM(width=3, hidden=4)
  boxed = module.init(jax.random.key(0), x, start)
  axes = nn.get_partition_spec(boxed)["params"]
  assert tuple(axes["w_out"]) == ("hidden", "embed")
  params = nn.unbox(boxed)["params"]
  weights = [params[name] for name in ("w_in", "w_rec", "bias", "w_out")]
  assert [w.shape for w in weights] == [(5, 16), (3, 16), (16,), (4, 3)]
  expected = layers.lstm(x, start, *weights)
  np.testing.assert_array_equal(module.apply(boxed, x, start), expected)


def test_embed_looks_up_and_sums_the_gradients_of_repeats():
  module = layers.Embed(vocab_size=50, width=64)
  ids = jnp.array([[3, 0, 3], [49, 3, 7]])
  boxed = module.init(jax.random.key(0), ids)
  axes = nn.get_partition_spec(boxed)["params"]["table"]
  assert tuple(axes) == ("vocab", "embed")
  params = nn.unbox(boxed)
  table = np.asarray(params["params"]["table"])
  np.testing.assert_array_equal(module.apply(params, ids), table[ids])
  lengths = np.linalg.norm(table, axis=1)
  np.testing.assert_allclose(lengths, 1, atol=0.3)

  pull = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)

  def total(params):
    return (module.apply(params, ids) * pull).sum()

  expected = np.zeros_like(table)
  np.add.at(expected, np.asarray(ids), pull)
  gradient = jax.grad(total)(params)["params"]["table"]
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_an_id_outside_the_vocabulary_is_loud():
  module = layers.Embed(vocab_size=5, width=2)
  ids = jnp.array([[4, 5]])
  out, _ = module.init_with_output(jax.random.key(0), ids)
  assert np.isfinite(out[0, 0]).all()
  assert np.isnan(out[0, 1]).all()
