"""Attention of a translation's places to those of its source (app. G).

The recurrent wiring, in which the first LSTM of the decoder reads what its own
last output asked for, is a loop over time around an attention. As in
`models.layers`, the weights' gradients are one product each over all steps: in
the loop they would be added up, and over several devices also exchanged, at
every step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax import named, sharding
from moejax.models.layers import LSTMWeights, product, update_cells


class Memory(NamedTuple):
  """What a decoder reads of the source.

  Attributes:
    states: of the encoder.
    keys: what the scores need of the states, made once.
    scale: V, a copy for each row: the gradient of V itself would be exchanged
      over devices at every step of the decoder.
    segment: number of the pair, from 1, of each place; 0 at padding.
  """

  states: Float[Array, "B M D"]
  keys: Float[Array, "B M keys"]
  scale: Float[Array, "B keys"]
  segment: Int[Array, "B M"]


class AttentionWeights(NamedTuple):
  """U, W and V of eq. 21 and 22."""

  u: Float[Array, "D keys"]
  w: Float[Array, "D keys"]
  v: Float[Array, "keys"]


class Attention(nn.Module):
  """Attention between states of one width (app. G).

  Attributes:
    width: n of eq. 21 and 22.
    form: "product", eq. 22; "sum", eq. 21.
  """

  width: int = 512
  form: str = "product"

  @nn.compact
  def weights(self, inputs: int) -> AttentionWeights:
    """Declares the weights for states of so many entries."""

    def param(name, axes, *shape):
      init = sharding.with_axes(_FAN_IN, *axes)
      return self.param(name, init, shape, jnp.float32)

    u = param("u", ("embed", "hidden"), inputs, self.width)
    w = param("w", ("embed", "hidden"), inputs, self.width)
    v = param("v", ("hidden", None), self.width, 1)
    return AttentionWeights(u, w, v[:, 0])

  def remember(
    self, states: Float[Array, "B M D"], segment: Int[Array, "B M"]
  ) -> Memory:
    """Returns what there is to attend to.

    Args:
      states: of the encoder, x of eq. 21 and 22.
      segment: see `Memory`.

    Raises:
      ValueError: there is no such form.
    """
    form = FORMS[named.known(self.form, FORMS, "form")]
    u, _, v = self.weights(states.shape[-1])
    keys = form.keys(product("BMD,Dn->BMn", states, u, states.dtype))
    scale = jnp.broadcast_to(v[None], (states.shape[0], self.width))
    return Memory(states, keys, scale, segment)

  def __call__(
    self,
    y: Float[Array, "B L D"],
    segment: Int[Array, "B L"],
    memory: Memory,
  ) -> tuple[Float[Array, "B L D"], Float[Array, "B L M"]]:
    """Attends for all states y of the decoder at once; see `attend`."""
    w = self.weights(y.shape[-1]).w
    query = product("BLD,Dn->BLn", y, w, memory.states.dtype)
    return attend(query, segment, memory, self.form)


def attend(
  query: Float[Array, "B L keys"],
  segment: Int[Array, "B L"],
  memory: Memory,
  form: str,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L M"]]:
  """Takes the mean of the states of a place's own pair, weighed by softmax.

  Scores and softmax are float32; products take operands in the dtype of the
  states.

  Args:
    query: y W of eq. 21 and 22.
    segment: number of the pair of each place; 0 at padding.
    memory: the source.
    form: a name in `FORMS`.

  Returns:
    The contexts, and the weights of the states in them. Where a pair has no
    source, as at padding, both are zero.
  """
  dtype = memory.states.dtype
  own = segment[:, :, None] == memory.segment[:, None]
  own &= segment[:, :, None] > 0
  scores = FORMS[form].scores(query, memory.keys, memory.scale, dtype)
  # Not -inf: where there is no source the softmax would be NaN.
  weights = jax.nn.softmax(jnp.where(own, scores, -1e30))
  weights = jnp.where(own, weights, 0)
  return product("BLM,BMD->BLD", weights, memory.states, dtype), weights


def attentive_lstm(
  x: Float[Array, "B L D"],
  start: Bool[Array, "B L"],
  segment: Int[Array, "B L"],
  memory: Memory,
  w_query: Float[Array, "O keys"],
  lstm: LSTMWeights,
  form: str,
) -> Float[Array, "B L O"]:
  """Runs an LSTM that reads, beside x, what its last output attends to.

  The first layer of GNMT's decoder: with C the context that y_{t-1} asks for,
  the input of step t is (x_t, C). For all else see `models.layers.lstm`.

  Args:
    x: inputs.
    start: True at the first token of each sentence, where y_{t-1} is zero.
    segment: number of the pair of each token; 0 at padding.
    memory: the source.
    w_query: W of eq. 21 and 22.
    lstm: weights for inputs of the width of x and of the states together.
    form: a name in `FORMS`.

  Returns:
    y, in the dtype of `x`.
  """
  from_x, from_context = jnp.split(lstm.w_in, [x.shape[-1]])
  weights = {
    "query": w_query,
    "gates": jnp.concatenate([from_context, lstm.w_rec]),
    "out": lstm.w_out,
  }
  x = x.swapaxes(0, 1)
  z = product("LBD,DN->LBN", x, from_x, x.dtype) + lstm.bias[None, None]
  steps = x.shape[:2]
  offsets = {
    "query": jnp.zeros((*steps, w_query.shape[1]), jnp.float32),
    "gates": z,
    "out": jnp.zeros((*steps, lstm.w_rec.shape[0]), jnp.float32),
  }
  if lstm.w_out is None:
    del weights["out"], offsets["out"]
  keep = 1 - start.T.astype(jnp.float32)
  rows = keep[:, :, None], segment.T
  y = _scan(form, x.dtype, rows, memory, offsets, weights)
  return y.astype(x.dtype).swapaxes(0, 1)


def _run(form, dtype, rows, memory, offsets, weights):
  """Runs time-major; returns y [L B O], and each step's left operands.

  What a product with one of the `weights` gives is added to the offset of its
  name, of which all have a leading axis L.
  """

  def step(state, now):
    y, c = state
    (keep, segment), offset = now
    fed = {}

    def dot(name, a):
      fed[name] = a.astype(dtype)
      return product("BM,MN->BN", a, weights[name], dtype) + offset[name]

    y, c = y * keep, c * keep
    query = dot("query", y)[:, None]
    context, _ = attend(query, segment[:, None], memory, form)
    z = dot("gates", jnp.concatenate([context[:, 0], y], axis=-1))
    c, m = update_cells(z, c)
    y = dot("out", m) if "out" in weights else m
    return (y, c), (y, fed)

  _, batch, gates = offsets["gates"].shape
  widths = weights["query"].shape[0], gates // 4
  zero = tuple(jnp.zeros((batch, width), jnp.float32) for width in widths)
  return jax.lax.scan(step, zero, (rows, offsets))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(form, dtype, rows, memory, offsets, weights):
  return _run(form, dtype, rows, memory, offsets, weights)[0]


def _forward(form, dtype, rows, memory, offsets, weights):
  """Leaves the weights out of what the loop itself differentiates."""

  def run(memory, offsets):
    return _run(form, dtype, rows, memory, offsets, weights)

  y, pull, fed = jax.vjp(run, memory, offsets, has_aux=True)
  return y, (pull, fed)


def _backward(form, dtype, saved, dy):
  """The gradient of a product's offset is that of the product."""
  pull, fed = saved
  d_memory, d_offsets = pull(dy)
  d_weights = {
    name: product("LBM,LBN->MN", a, d_offsets[name], dtype)
    for name, a in fed.items()
  }
  return None, d_memory, d_offsets, d_weights


_scan.defvjp(_forward, _backward)


class _Form(NamedTuple):
  """An attention function, in what is made once and what each query needs.

  Attributes:
    keys: x U -> keys.
    scores: (y W, keys, V, dtype) -> A(x, y).
  """

  keys: Callable[[Array], Array]
  scores: Callable[[Array, Array, Array, DTypeLike], Array]


def _product_scores(query, keys, scale, dtype):
  """All of them in one product (eq. 22)."""
  query = jnp.tanh(query) * scale[:, None]
  return product("BLn,BMn->BLM", query, keys, dtype)


def _sum_scores(query, keys, scale, dtype):
  """One place of the target at a time: L M n numbers are too many (eq. 21)."""

  @jax.checkpoint
  def at_step(query):
    units = jnp.tanh(keys + query[:, None])
    return product("BMn,Bn->BM", units, scale, dtype)

  return jax.lax.map(at_step, query.swapaxes(0, 1)).swapaxes(0, 1)


# Uniform of variance 1 / fan-in: sums of unit variance for unit inputs.
_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")

FORMS = {
  "product": _Form(jnp.tanh, _product_scores),
  "sum": _Form(lambda keys: keys, _sum_scores),
}
