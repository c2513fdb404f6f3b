"""Layers around the mixture: word embedding and LSTM (app. C.1).

JAX's own derivative of a scanned LSTM adds one step's share at a time to the
gradient of the weights. Here the loop over time holds only what depends on
the step before: the input product comes before it, and the backward loop
emits the gradients of the pre-activations, from which each weight's gradient
is one matrix product over all steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax import sharding


class LSTMState(NamedTuple):
  """What one step of an LSTM leaves for the next.

  Attributes:
    y: output, which is what recurs.
    c: cells.
  """

  y: Float[Array, "B O"]
  c: Float[Array, "B H"]


class LSTMWeights(NamedTuple):
  """Weights of an LSTM, as the arguments of `lstm`."""

  w_in: Float[Array, "D gates"]
  w_rec: Float[Array, "O gates"]
  bias: Float[Array, "gates"]
  w_out: Float[Array, "H O"] | None


def lstm(
  x: Float[Array, "B L D"],
  start: Bool[Array, "B L"],
  w_in: Float[Array, "D gates"],
  w_rec: Float[Array, "O gates"],
  bias: Float[Array, "gates"],
  w_out: Float[Array, "H O"] | None = None,
) -> Float[Array, "B L O"]:
  """Runs an LSTM without peepholes over packed rows, from zero state.

  With (i, f, g, o) = x_t w_in + y_{t-1} w_rec + bias, four blocks of width H
  each ("gates" is 4H):

    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    m_t = sigmoid(o) tanh(c_t)
    y_t = m_t w_out, or m_t where there is no w_out

  Matrix products take operands in the dtype of `x`; the state and every sum
  are float32: a cell adds up small numbers for a whole sentence, and bfloat16
  would lose those below 1/256 of its sum. Differentiable once, in reverse mode.

  Args:
    x: inputs.
    start: True at the first token of each sentence: y_{t-1} and c_{t-1} are
      zero there.
    w_in: input weights.
    w_rec: recurrent weights.
    bias: biases.
    w_out: projection of the units (1402.1128); it is what recurs.

  Returns:
    y, in the dtype of `x`.

  Raises:
    ValueError: the weights do not hold four gates per unit.
  """
  units, gates = (w_rec if w_out is None else w_out).shape[0], w_rec.shape[1]
  if gates != 4 * units:
    raise ValueError(
      f"w_rec has {gates} columns for {units} units; an LSTM has four gates"
      f" per unit, so give it {4 * units} columns."
    )
  keep = 1 - start.T.astype(jnp.float32)
  y = _lstm(x.swapaxes(0, 1), keep[:, :, None], w_in, w_rec, bias, w_out)
  return y.swapaxes(0, 1)


@jax.custom_vjp
def _lstm(x, keep, w_in, w_rec, bias, w_out):
  """Runs time-major: x [L B D], keep [L B 1] zero where a sentence starts."""

  def step(state, inputs):
    y, c = state
    z, keep = inputs
    z = z + _dot(y * keep, w_rec, x.dtype) + bias[None]
    c, m = update_cells(z, c * keep)
    y = _project(m, w_out, x.dtype)
    return (y, c), y

  zero = _zero_state(x, w_rec)
  _, y = jax.lax.scan(step, zero, (_dot(x, w_in, x.dtype), keep))
  return y.astype(x.dtype)


def _forward(x, keep, w_in, w_rec, bias, w_out):
  """Is `_lstm`, saving the local derivatives of each step.

  slope is d(c, c, c, m)/d(i, f, g, o): what each pre-activation does to the
  state it acts through. m_by_c is dm_t/dc_t and c_by_c is dc_t/dc_{t-1}.
  Taken here, where the gates are at hand, they leave the backward loop little
  more than its matrix products. Without a projection m is y, and not saved.
  """

  def step(t, carry):
    y, c, slope, ys, ms, m_by_c, c_by_c = carry
    # The slopes replace the pre-activations they come from. The barrier ends
    # the reading before the writing; without it XLA copies the whole array.
    z = jax.lax.optimization_barrier(_at(slope, t))
    keep_t = _at(keep, t)
    z = z + _dot(y * keep_t, w_rec, x.dtype) + bias[None]
    i, f, g, o = _gates(z)
    c_before = c * keep_t
    c = f * c_before + i * g
    tanh_c = jnp.tanh(c)
    m = o * tanh_c
    y = _project(m, w_out, x.dtype)
    slope_t = (
      g * i * (1 - i),
      c_before * f * (1 - f),
      i * (1 - g * g),
      m * (1 - o),
    )
    return (
      y,
      c,
      _put(slope, t, jnp.concatenate(slope_t, -1)),
      _put(ys, t, y),
      None if w_out is None else _put(ms, t, m),
      _put(m_by_c, t, o * (1 - tanh_c * tanh_c)),
      _put(c_by_c, t, f * keep_t),
    )

  length = x.shape[0]
  y, c = _zero_state(x, w_rec)
  ys, zeros = (jnp.zeros((length, *a.shape), a.dtype) for a in (y, c))
  ms = None if w_out is None else zeros
  carry = y, c, _dot(x, w_in, x.dtype), ys, ms, zeros, zeros
  carry = jax.lax.fori_loop(0, length, step, carry)
  _, _, slope, y, m, m_by_c, c_by_c = carry
  saved = x, keep, w_in, w_rec, bias, w_out, y, m, slope, m_by_c, c_by_c
  return y.astype(x.dtype), saved


def _backward(saved, dy):
  """Takes dy and dc back in time, then the weights' gradients all at once."""
  x, keep, w_in, w_rec, bias, w_out, y, m, slope, m_by_c, c_by_c = saved
  length = x.shape[0]
  keep_next = jnp.concatenate([keep[1:], jnp.zeros_like(keep[:1])])
  dy = dy.astype(jnp.float32)

  def step(step_back, carry):
    dy_rec, dc, dz, dys = carry
    t = length - 1 - step_back
    dy_t = _at(dy, t) + dy_rec * _at(keep_next, t)
    dm = dy_t if w_out is None else _dot_back(dy_t, w_out, x.dtype)
    dc = dc + dm * _at(m_by_c, t)
    slope_t = jax.lax.optimization_barrier(_at(dz, t))
    dz_t = jnp.concatenate([dc, dc, dc, dm], -1) * slope_t
    dy_rec = _dot_back(dz_t, w_rec, x.dtype)
    dys = None if w_out is None else _put(dys, t, dy_t)
    return dy_rec, dc * _at(c_by_c, t), _put(dz, t, dz_t), dys

  dys = None if w_out is None else jnp.zeros_like(y)
  carry = *_zero_state(x, w_rec), slope, dys
  _, _, dz, dys = jax.lax.fori_loop(0, length, step, carry)

  y_before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]]) * keep
  dw_out = None
  if w_out is not None:
    dw_out = _sum_outer(m, dys, x.dtype).astype(w_out.dtype)
  return (
    _dot(dz, w_in.T, x.dtype).astype(x.dtype),
    None,
    _sum_outer(x, dz, x.dtype).astype(w_in.dtype),
    _sum_outer(y_before, dz, x.dtype).astype(w_rec.dtype),
    dz.sum((0, 1)).astype(bias.dtype),
    dw_out,
  )


_lstm.defvjp(_forward, _backward)


def _zero_state(x, w_rec):
  """Returns y and c before the first step."""
  width, gates = w_rec.shape
  return tuple(
    jnp.zeros((x.shape[1], size), jnp.float32) for size in (width, gates // 4)
  )


def update_cells(
  z: Float[Array, "B gates"], c: Float[Array, "B H"]
) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
  """Returns c_t and m_t of `lstm` from the pre-activations and c_{t-1}."""
  i, f, g, o = _gates(z)
  c = f * c + i * g
  return c, o * jnp.tanh(c)


def product(
  subscripts: str, a: Array, b: Array, dtype: DTypeLike
) -> Float[Array, "..."]:
  """Is einsum of operands in `dtype`, with sums in float32."""
  return jnp.einsum(
    subscripts,
    a.astype(dtype),
    b.astype(dtype),
    preferred_element_type=jnp.float32,
  )


def _project(m, w_out, dtype):
  return m if w_out is None else _dot(m, w_out, dtype)


def _gates(z):
  i, f, g, o = jnp.split(z, 4, -1)
  return nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)


def _dot(a, b, dtype):
  """Multiplies in `dtype`, sums in float32."""
  a, b = a.astype(dtype), b.astype(dtype)
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _dot_back(a, w, dtype):
  """Is _dot(a, w.T) as (w a^T)^T, for which a CPU copies a in place of w."""
  # The barrier keeps XLA from making the one of the other.
  return jax.lax.optimization_barrier(_dot(w, a.T, dtype)).T


def _sum_outer(a, b, dtype):
  """Contracts length and batch: [L B M], [L B N] -> [M N]."""
  # No reshape to [L*B]: it would gather a batch that is split over devices.
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((0, 1), (0, 1)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _at(array, t):
  return jax.lax.dynamic_index_in_dim(array, t, keepdims=False)


def _put(array, t, value):
  return jax.lax.dynamic_update_index_in_dim(array, value, t, 0)


# Uniform of variance 1 / fan-in: gates of unit variance for unit inputs.
_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")

# Uniform of variance 1 / width: a word starts as a vector of length one, short
# enough for the few updates that a rare word sees to turn it around.
_UNIT_ROWS = nn.initializers.variance_scaling(1.0, "fan_out", "uniform")


def _forget_one(key, shape, dtype):
  """Zero biases, but one for the forget gates: at first the cells remember."""
  del key
  width = shape[0] // 4
  return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)


class LSTM(nn.Module):
  """One LSTM layer over packed rows (app. C.1).

  Attributes:
    width: O of the output.
    hidden: units H, projected to `width`; None has `width` units and no
      projection.
  """

  width: int
  hidden: int | None = None

  @property
  def units(self) -> int:
    """H, the number of cells."""
    return self.width if self.hidden is None else self.hidden

  @nn.compact
  def weights(self, inputs: int) -> LSTMWeights:
    """Declares the weights for inputs of so many entries."""
    gates = 4 * self.units

    def param(name, init, axes, shape):
      init = sharding.with_axes(init, *axes)
      return self.param(name, init, shape, jnp.float32)

    w_in = param("w_in", _FAN_IN, ("embed", "hidden"), (inputs, gates))
    w_rec = param("w_rec", _FAN_IN, (None, "hidden"), (self.width, gates))
    bias = param("bias", _forget_one, ("hidden",), (gates,))
    w_out = None
    if self.hidden is not None:
      shape = (self.units, self.width)
      w_out = param("w_out", _FAN_IN, ("hidden", "embed"), shape)
    return LSTMWeights(w_in, w_rec, bias, w_out)

  def __call__(
    self, x: Float[Array, "B L D"], start: Bool[Array, "B L"]
  ) -> Float[Array, "B L O"]:
    """Runs the layer; `start` is True at the first token of each sentence."""
    return lstm(x, start, *self.weights(x.shape[-1]))

  def step(self, x: Float[Array, "B D"], state: LSTMState) -> LSTMState:
    """Takes one step of the loop in `lstm`."""
    w_in, w_rec, bias, w_out = self.weights(x.shape[-1])
    z = _dot(x, w_in, x.dtype) + _dot(state.y, w_rec, x.dtype) + bias[None]
    c, m = update_cells(z, state.c)
    return LSTMState(_project(m, w_out, x.dtype), c)

  def zero_state(self, rows: int) -> LSTMState:
    """Returns the state before the first token, of so many rows."""
    return LSTMState(
      jnp.zeros((rows, self.width), jnp.float32),
      jnp.zeros((rows, self.units), jnp.float32),
    )


def residual(
  layers: Sequence[nn.Module],
  x: Float[Array, "B L D"],
  drop: Callable[[Array], Array],
  *,
  start: Bool[Array, "B L"],
  mask: Bool[Array, "B L"],
  ids: Int[Array, "B L"],
  train: bool,
) -> Float[Array, "B L D"]:
  """Runs layers of one width, each as x + drop(layer(x)) (app. C.1, E).

  Layers are LSTMs, which forget where a sentence starts, and modules called
  as MoE is. These go through a sigmoid before dropout, so that a token all of
  whose experts were full adds the constant 0.5.
  """
  for layer in layers:
    if isinstance(layer, LSTM):
      y = layer(x, start)
    else:
      y = nn.sigmoid(layer(x, train=train, mask=mask, ids=ids))
    x = x + drop(y)
  return x


def table_rows(vocab_size: int, multiple: int) -> int:
  """Returns the rows of a table of words: no fewer, and a multiple of it."""
  return -(-vocab_size // multiple) * multiple


def look_up(
  table: Float[Array, "rows D"], ids: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
  """Returns rows of a table; an id past its end gives NaN.

  Where the table is split over devices, ids go to all of them and rows come
  back as sums, of which all terms but one are zero: a table is never gathered.
  """
  if not sharding.splits("vocab"):
    return jnp.take(table, ids, axis=0)
  ids = sharding.constrain(ids, "batch_at_vocab", None)
  rows = jnp.take(table, ids, axis=0)
  rows = sharding.constrain(rows, "batch_at_vocab", None, None)
  return sharding.constrain(rows, "batch", None, None)


class Embed(nn.Module):
  """A table of word vectors (app. C.1).

  Attributes:
    vocab_size: words, V.
    width: entries of a word's vector, D.
    multiple: of which the table's rows are one, see `LSTMLM.vocab_multiple`.
  """

  vocab_size: int
  width: int
  multiple: int = 1

  @nn.compact
  def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Looks words up; an id past the table's end gives NaN."""
    init = sharding.with_axes(_UNIT_ROWS, "vocab", "embed")
    shape = (table_rows(self.vocab_size, self.multiple), self.width)
    return look_up(self.param("table", init, shape, jnp.float32), ids)
