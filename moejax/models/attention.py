"""Attention of a translation's tokens to those of its source (app. G).

The recurrent wiring, in which the first LSTM of the decoder reads what its own
last output asked for, is a loop over time around an attention. As in
`models.layers`, the weights' gradients are one product each over all steps: in
the loop they would be added up, and over several devices also exchanged, at
every step.
"""

import functools
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config_fields import Names, Size
from moejax.models import layers
from moejax.models.layers import LSTMState, LSTMWeights, declare, product


class Memory(NamedTuple):
  """What a decoder reads of the source.

  Attributes:
    states: of the encoder.
    keys: what the scores need of the states, made once.
    scale: V, a copy for each row: the gradient of V itself would be exchanged
      over devices at every step of the decoder.
    segment: number of the pair, from 1, of each token; 0 at padding.
  """

  states: Float[Array, "B M D"]
  keys: Float[Array, "B M keys"]
  scale: Float[Array, "B keys"]
  segment: Int[Array, "B M"]


def _product_scores(query, keys, scale, dtype):
  """All of them in one product (eq. 22)."""
  query = jnp.tanh(query) * scale[:, None]
  return product("BLn,BMn->BLM", query, keys, dtype)


def _sum_scores(query, keys, scale, dtype):
  """One token of the target at a time: L M n numbers are too many (eq. 21)."""

  @jax.checkpoint
  def at_step(query):
    units = jnp.tanh(keys + query[:, None])
    return product("BMn,Bn->BM", units, scale, dtype)

  return jax.lax.map(at_step, query.swapaxes(0, 1)).swapaxes(0, 1)


# An attention function in two parts: x U -> keys, which are made once, and
# (y W, keys, V, dtype) -> A(x, y) of each query.
FORMS = {
  "product": (jnp.tanh, _product_scores),
  "sum": (lambda keys: keys, _sum_scores),
}
WIRINGS = ("recurrent", "every_layer", "parallel")


class Attention(nn.Module):
  """Attention of a decoder's first LSTM to states of its width (app. G).

  Attributes:
    width: n of eq. 21 and 22.
    form: "product", eq. 22; "sum", eq. 21.
    wiring: who reads the contexts: the LSTM itself ("recurrent"), the LSTMs
      above it, too ("every_layer", GNMT's), or the next layer ("parallel"). In
      the first two its last output, zero where a pair starts, asks for a
      context that is part of its next input; in the last its outputs ask, all
      at once, and the contexts are added to what the next layer reads.
  """

  width: Size = 512
  form: Annotated[str, Names(FORMS)] = "product"
  wiring: Annotated[str, Names(WIRINGS)] = "recurrent"

  @nn.compact
  def weights(self, inputs: int) -> tuple[Array, Array, Array]:
    """Declares U and W [D n] and V [n] of eq. 21 and 22; D is `inputs`."""
    u, w = (
      declare(self, name, ("embed", "hidden"), (inputs, self.width))
      for name in "uw"
    )
    return u, w, declare(self, "v", ("hidden", None), (self.width, 1))[:, 0]

  def remember(
    self, states: Float[Array, "B M D"], segment: Int[Array, "B M"]
  ) -> Memory:
    """Returns what there is to attend to: states x of eq. 21 and 22."""
    keys_of, _ = FORMS[self.form]
    u, _, v = self.weights(states.shape[-1])
    keys = keys_of(product("BMD,Dn->BMn", states, u, states.dtype))
    scale = jnp.broadcast_to(v[None], (len(states), self.width))
    return Memory(states, keys, scale, segment)

  def __call__(
    self, y: Float[Array, "B L D"], segment: Int[Array, "B L"], memory: Memory
  ) -> tuple[Float[Array, "B L D"], Float[Array, "B L M"]]:
    """Attends for all states y of the decoder at once; see `attend`."""
    _, w, _ = self.weights(y.shape[-1])
    query = product("BLD,Dn->BLn", y, w, memory.states.dtype)
    return attend(query, segment, memory, self.form)


def attend(
  query: Float[Array, "B L keys"],
  segment: Int[Array, "B L"],
  memory: Memory,
  form: str,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L M"]]:
  """Takes the mean of the states of a token's own pair, weighed by softmax.

  Scores and softmax are float32; products take operands in the dtype of the
  states. The query is y W of eq. 21 and 22; segments are as in `Memory`.

  Returns:
    The contexts, and the weights of the states in them. Where a pair has no
    source, as at padding, both are zero.
  """
  dtype = memory.states.dtype
  own = segment[:, :, None] == memory.segment[:, None]
  own &= segment[:, :, None] > 0
  _, scores_of = FORMS[form]
  scores = scores_of(query, memory.keys, memory.scale, dtype)
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
) -> tuple[Float[Array, "B L O"], Float[Array, "B L _"]]:
  """Runs an LSTM that reads, beside x, what its last output attends to.

  The first layer of GNMT's decoder: with C the context that y_{t-1} W asks for
  (W is `w_query`), the input of step t is (x_t, C), of whose width the weights
  are. For all else see `models.layers.lstm`.

  Returns:
    y, and C of every step.
  """
  x = x.swapaxes(0, 1)
  from_x, from_context = jnp.split(lstm.w_in, [x.shape[-1]])
  gates = jnp.concatenate([from_context, lstm.w_rec])
  weights = {"query": w_query, "gates": gates}
  if lstm.w_out is not None:
    weights["out"] = lstm.w_out
  offsets = {
    name: jnp.zeros((*x.shape[:2], w.shape[1]), jnp.float32)
    for name, w in weights.items()
  }
  offsets["gates"] = product("LBD,DN->LBN", x, from_x, x.dtype)
  offsets["gates"] += lstm.bias[None, None]
  keep = 1 - start.T.astype(jnp.float32)
  steps = keep[:, :, None], segment.T
  out = _loop(form, x.dtype, steps, memory, offsets, weights)
  y, context = (each.astype(x.dtype).swapaxes(0, 1) for each in out)
  return y, context


def _run(form, dtype, steps, memory, offsets, weights):
  """Runs time-major; returns (y, C), and each step's left operands.

  The product with each of the `weights` gets the offset of its name added, of
  which all have a leading axis L.
  """

  def step(state, now):
    (keep, segment), offset = now
    operands = {}

    def dot(name, a):
      operands[name] = a.astype(dtype)
      return product("BM,MN->BN", a, weights[name], dtype) + offset[name]

    y, c = state.y * keep, state.c * keep
    query = dot("query", y)[:, None]
    context, _ = attend(query, segment[:, None], memory, form)
    z = dot("gates", jnp.concatenate([context[:, 0], y], axis=-1))
    c, m, _ = layers.update_cells(z, c)
    y = dot("out", m) if "out" in weights else m
    return LSTMState(y, c), ((y, context[:, 0]), operands)

  _, rows, gates = offsets["gates"].shape
  zero = layers.zero_state(rows, len(weights["query"]), gates // 4)
  return jax.lax.scan(step, zero, (steps, offsets))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(*arguments):
  return _run(*arguments)[0]


def _forward(form, dtype, steps, memory, offsets, weights):
  """Leaves the weights out of what the loop itself differentiates."""
  out, pull, operands = jax.vjp(
    lambda *given: _run(form, dtype, steps, *given, weights),
    memory,
    offsets,
    has_aux=True,
  )
  return out, (pull, operands)


def _backward(form, dtype, saved, d_out):
  """The gradient of a product's offset is that of the product."""
  pull, operands = saved
  d_memory, d_offsets = pull(d_out)
  d_weights = {
    name: product("LBM,LBN->MN", a, d_offsets[name], dtype)
    for name, a in operands.items()
  }
  return None, d_memory, d_offsets, d_weights


_loop.defvjp(_forward, _backward)
