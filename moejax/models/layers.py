"""Layers around the mixture: word embedding and LSTM (app. C.1).

JAX's own derivative of a scanned LSTM adds one step's share at a time to the
gradient of the weights. Here the loop over time holds only what depends on
the step before: the input product comes before it, and the backward loop
emits the gradients of the pre-activations, from which each weight's gradient
is one matrix product over all steps.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax import sharding
from moejax.config_fields import Size


class LSTMState(NamedTuple):
  """What one step of an LSTM leaves for the next: the output y, the cells c."""

  y: Float[Array, "B O"]
  c: Float[Array, "B H"]


class LSTMWeights(NamedTuple):
  """Weights of an LSTM, see `lstm`; "gates" is 4H."""

  w_in: Float[Array, "D gates"]
  w_rec: Float[Array, "O gates"]
  bias: Float[Array, "gates"]
  w_out: Float[Array, "H O"] | None = None


def lstm(
  x: Float[Array, "B L D"], start: Bool[Array, "B L"], weights: LSTMWeights
) -> Float[Array, "B L O"]:
  """Runs an LSTM without peepholes over packed rows, from zero state.

  What the paper does not say of it is in docs/decisions.md, 17.

  With (i, f, g, o) = x_t w_in + y_{t-1} w_rec + bias, four blocks of width H:

    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    m_t = sigmoid(o) tanh(c_t)
    y_t = m_t w_out, or m_t where there is no w_out (1402.1128)

  `start` is True at the first token of each sentence: y_{t-1} and c_{t-1} are
  zero there. Matrix products take operands in the dtype of `x`, which is that
  of y too; the state and every sum are float32: a cell adds up small numbers
  for a whole sentence, and bfloat16 would lose those below 1/256 of its sum.
  Differentiable once, in reverse mode.
  """
  keep = 1 - start.T.astype(jnp.float32)
  return _lstm(x.swapaxes(0, 1), keep[:, :, None], weights).swapaxes(0, 1)


@jax.custom_vjp
def _lstm(x, keep, weights):
  """Runs time-major: x [L B D], keep [L B 1] zero where a sentence starts."""
  return _forward(x, keep, weights)[0]


def _forward(x, keep, weights):
  """Runs, and saves the local derivatives of each step.

  slope is d(c, c, c, m)/d(i, f, g, o), m_by_c is dm_t/dc_t and c_by_c is
  dc_t/dc_{t-1}: taken here, where the gates are at hand, they leave the
  backward loop little more than its matrix products. Without a projection m is
  y, and not saved.
  """
  z = product("LBD,DN->LBN", x, weights.w_in, x.dtype)
  saved = _by_platform(_steps, _steps_on_gpu, x.dtype)(z, keep, weights)
  return saved[1].astype(x.dtype), (x, keep, weights, saved)


def _backward(residuals, dy):
  """Takes dy and dc back in time, then the weights' gradients all at once."""
  x, keep, weights, (slope, y, m, m_by_c, c_by_c) = residuals
  keep_next = jnp.concatenate([keep[1:], jnp.zeros_like(keep[:1])])
  dy = dy.astype(jnp.float32)
  back = _by_platform(_steps_back, _steps_back_on_gpu, x.dtype)
  saved = slope, None if m is None else y, m_by_c, c_by_c
  dz, dy = back(dy, keep_next, saved, weights)

  def weight_gradient(a, dz, w):
    # No reshape to [L*B]: it would gather a batch that is split over devices.
    a, dz = a.astype(x.dtype), dz.astype(x.dtype)
    axes = (0, 1), (0, 1)
    total = jnp.tensordot(a, dz, axes, preferred_element_type=jnp.float32)
    return total.astype(w.dtype)

  y_before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]]) * keep
  gradients = LSTMWeights(
    weight_gradient(x, dz, weights.w_in),
    weight_gradient(y_before, dz, weights.w_rec),
    dz.sum((0, 1)).astype(weights.bias.dtype),
    None if m is None else weight_gradient(m, dy, weights.w_out),
  )
  dx = product("LBN,ND->LBD", dz, weights.w_in.T, x.dtype)
  return dx.astype(x.dtype), None, gradients


_lstm.defvjp(_forward, _backward)


def _by_platform(default, on_gpu, dtype):
  """Chooses a loop over time: of few kernels on a GPU, else of few copies."""
  return functools.partial(
    jax.lax.platform_dependent,
    cuda=functools.partial(on_gpu, dtype),
    default=functools.partial(default, dtype),
  )


def _steps(dtype, z, keep, weights):
  """Returns what `_forward` saves of all steps, out of the input products z."""

  def step(t, carry):
    (y, c), saved = carry
    # Slopes replace the pre-activations they come from. Without the barrier
    # between reading and writing XLA copies the whole array.
    z = jax.lax.optimization_barrier(_at(saved[0], t))
    keep_t = _at(keep, t)
    z = z + product("BO,ON->BN", y * keep_t, weights.w_rec, dtype)
    c_before = c * keep_t
    c, m, factors = update_cells(z + weights.bias[None], c_before)
    y = _project(m, weights.w_out, dtype)
    slope, m_by_c, c_by_c = _slopes(c_before, m, factors, keep_t)
    m = None if weights.w_out is None else m
    return LSTMState(y, c), _put(saved, (slope, y, m, m_by_c, c_by_c), t)

  zero = zero_state(z.shape[1], len(weights.w_rec), len(weights.bias) // 4)
  y, zeros = (jnp.zeros((len(z), *a.shape), a.dtype) for a in zero)
  m = None if weights.w_out is None else zeros
  carry = zero, (z, y, m, zeros, zeros)
  return jax.lax.fori_loop(0, len(z), step, carry)[1]


def _steps_back(dtype, dy, keep_next, saved, weights):
  """Returns dz of all steps, and with a projection what dy becomes in time."""
  slope, y, m_by_c, c_by_c = saved

  def step(step_back, carry):
    (dy_rec, dc), slopes = carry
    t = len(dy) - 1 - step_back
    dy_t = _at(dy, t) + dy_rec * _at(keep_next, t)
    dm = dy_t if y is None else _times_transposed(dy_t, weights.w_out, dtype)
    dc = dc + dm * _at(m_by_c, t)
    # As above: the gradient of a pre-activation replaces its slope.
    slope_t = jax.lax.optimization_barrier(_at(slopes[0], t))
    dz = jnp.concatenate([dc, dc, dc, dm], -1) * slope_t
    dy_rec = _times_transposed(dz, weights.w_rec, dtype)
    slopes = _put(slopes, (dz, None if y is None else dy_t), t)
    return LSTMState(dy_rec, dc * _at(c_by_c, t)), slopes

  slopes = slope, None if y is None else jnp.zeros_like(y)
  zero = zero_state(dy.shape[1], len(weights.w_rec), len(weights.bias) // 4)
  return jax.lax.fori_loop(0, len(dy), step, (zero, slopes))[1]


# A GPU is told of each kernel of each step, which takes it longer than most of
# them run. So a step writes nothing into the arrays of all steps, which would
# be a kernel for each: a round of a few steps writes for all of them.
_UNROLL = 8


def _steps_on_gpu(dtype, z, keep, weights):
  def step(state, steps):
    z_t, keep_t = steps
    # The product reads y as it is; what it must not see goes from the result.
    z_rec = product("BO,ON->BN", state.y, weights.w_rec, dtype) * keep_t
    z_t = z_t + z_rec + weights.bias[None]
    c, m, (*gates, _) = update_cells(z_t, state.c * keep_t)
    y = _project(m, weights.w_out, dtype)
    return LSTMState(y, c), (gates, c, m, None if m is y else y)

  zero = zero_state(z.shape[1], len(weights.w_rec), len(weights.bias) // 4)
  _, made = jax.lax.scan(step, zero, (z, keep), unroll=_UNROLL)
  gates, c, m, y = made
  c_before = jnp.concatenate([jnp.zeros_like(c[:1]), c[:-1]]) * keep
  slope, m_by_c, c_by_c = _slopes(c_before, m, (*gates, jnp.tanh(c)), keep)
  y, m = (m, None) if y is None else (y, m)
  return slope, y, m, m_by_c, c_by_c


def _steps_back_on_gpu(dtype, dy, keep_next, saved, weights):
  slope, y, m_by_c, c_by_c = saved

  def step(carry, steps):
    dz, dc = carry
    dy_t, keep_t, slope_t, m_by_c_t, c_by_c_t = steps
    dy_rec = product("BN,NO->BO", dz, weights.w_rec.T, dtype)
    dy_t = dm = dy_t + dy_rec * keep_t
    if y is not None:
      dm = product("BO,OH->BH", dy_t, weights.w_out.T, dtype)
    dc = dc + dm * m_by_c_t
    dz = jnp.concatenate([dc, dc, dc, dm], -1) * slope_t
    return (dz, dc * c_by_c_t), (dz, None if y is None else dy_t)

  zero = jnp.zeros_like(slope[0]), jnp.zeros_like(c_by_c[0])
  steps = dy, keep_next, slope, m_by_c, c_by_c
  return jax.lax.scan(step, zero, steps, reverse=True, unroll=_UNROLL)[1]


def _slopes(c_before, m, factors, keep):
  """Returns slope, m_by_c and c_by_c, see `_forward`."""
  i, f, g, o, tanh_c = factors
  di, df = g * i * (1 - i), c_before * f * (1 - f)
  dg, do = i * (1 - g * g), m * (1 - o)
  slope = jnp.concatenate([di, df, dg, do], -1)
  return slope, o * (1 - tanh_c * tanh_c), f * keep


def zero_state(rows: int, width: int, units: int) -> LSTMState:
  """Returns the state before the first token."""
  y, c = (jnp.zeros((rows, size), jnp.float32) for size in (width, units))
  return LSTMState(y, c)


def update_cells(
  z: Float[Array, "B gates"], c: Float[Array, "B H"]
) -> tuple[Float[Array, "B H"], Float[Array, "B H"], tuple[Array, ...]]:
  """Returns c_t, m_t and their factors, from pre-activations and c_{t-1}."""
  i, f, g, o = jnp.split(z, 4, -1)
  i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
  c = f * c + i * g
  tanh_c = jnp.tanh(c)
  return c, o * tanh_c, (i, f, g, o, tanh_c)


def product(
  subscripts: str, a: Array, b: Array, dtype: DTypeLike
) -> Float[Array, "..."]:
  """Is einsum of operands in `dtype`, with sums in float32."""
  a, b = a.astype(dtype), b.astype(dtype)
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _project(m, w_out, dtype):
  return m if w_out is None else product("BH,HO->BO", m, w_out, dtype)


def _times_transposed(a, w, dtype):
  """Is a w^T as (w a^T)^T, for which a CPU copies a in place of w."""
  # The barrier keeps XLA from making the one of the other.
  return jax.lax.optimization_barrier(product("MN,NB->MB", w, a.T, dtype)).T


def _at(array, t):
  return jax.lax.dynamic_index_in_dim(array, t, keepdims=False)


def _put(arrays, values, t):
  """Replaces step t of every array [L ...]."""
  return jax.tree.map(
    lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, t, 0), arrays, values
  )


# Of variance 1 / fan-in: sums of unit variance for unit inputs.
_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
# Of variance 1 / width: a word starts as a vector of length one, short enough
# for the few updates that a rare word sees to turn it around.
_UNIT_ROWS = nn.initializers.variance_scaling(1.0, "fan_out", "uniform")


def forget_one(key, shape, dtype):
  """Zero biases, but one for the forget gates: at first the cells remember."""
  del key
  width = shape[0] // 4
  return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)


def declare(
  module: nn.Module,
  name: str,
  axes: tuple[str | None, ...],
  shape: tuple[int, ...],
  init: nn.initializers.Initializer = _FAN_IN,
) -> Float[Array, "..."]:
  """Declares a float32 parameter of a module, whose axes have logical names."""
  init = sharding.with_axes(init, *axes)
  return module.param(name, init, shape, jnp.float32)


class LSTM(nn.Module):
  """One LSTM layer over packed rows (app. C.1).

  Attributes:
    width: O of the output.
    hidden: units H, projected to `width`; None has `width` units and no
      projection.
  """

  width: int
  hidden: Size | None = None

  @nn.compact
  def weights(self, inputs: int) -> LSTMWeights:
    """Declares the weights for inputs of so many entries."""
    width, units = self.width, self.hidden or self.width
    w_in = declare(self, "w_in", ("embed", "hidden"), (inputs, 4 * units))
    w_rec = declare(self, "w_rec", (None, "hidden"), (width, 4 * units))
    bias = declare(self, "bias", ("hidden",), (4 * units,), forget_one)
    w_out = None
    if self.hidden is not None:
      w_out = declare(self, "w_out", ("hidden", "embed"), (units, width))
    return LSTMWeights(w_in, w_rec, bias, w_out)

  def __call__(
    self, x: Float[Array, "B L D"], start: Bool[Array, "B L"]
  ) -> Float[Array, "B L O"]:
    """Runs the layer; `start` is True at the first token of each sentence."""
    return lstm(x, start, self.weights(x.shape[-1]))

  def step(self, x: Float[Array, "B D"], state: LSTMState) -> LSTMState:
    """Takes one step of the loop in `lstm`."""
    weights = self.weights(x.shape[-1])
    z = product("BD,DN->BN", x, weights.w_in, x.dtype)
    z = z + product("BO,ON->BN", state.y, weights.w_rec, x.dtype)
    c, m, _ = update_cells(z + weights.bias[None], state.c)
    return LSTMState(_project(m, weights.w_out, x.dtype), c)


class BidirectionalLSTM(nn.Module):
  """Two LSTMs, one from each end of a sentence (1609.08144, sec. 3.2).

  Attributes:
    forward: reads from the first token of a sentence to its last.
    backward: from the last to the first.
  """

  forward: LSTM
  backward: LSTM

  def __call__(
    self, x: Float[Array, "B L D"], start: Bool[Array, "B L"]
  ) -> Float[Array, "B L both"]:
    """Puts what both give side by side; `start` as for `LSTM`, and at padding.

    Padding that does not start anything would come before the last sentence of
    a row for the one that reads backward.
    """
    # A row that is turned around starts a sentence where one ended.
    end = jnp.concatenate([start[:, 1:], jnp.ones_like(start[:, :1])], axis=1)
    back = self.backward(jnp.flip(x, 1), jnp.flip(end, 1))
    return jnp.concatenate([self.forward(x, start), jnp.flip(back, 1)], axis=-1)


def table_rows(vocab_size: int, multiple: int) -> int:
  """Returns the rows of a table of words: the words, up to a multiple."""
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
    multiple: the number of the table's rows is a multiple of it.
  """

  vocab_size: int
  width: int
  multiple: int = 1

  @nn.compact
  def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Looks words up; an id past the table's end gives NaN."""
    shape = (table_rows(self.vocab_size, self.multiple), self.width)
    table = declare(self, "table", ("vocab", "embed"), shape, _UNIT_ROWS)
    return look_up(table, ids)
