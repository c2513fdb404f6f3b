"""The paper's translation model (sec. 5.3, app. E): a small GNMT with mixtures.

Encoder and decoder are stacks of LSTMs and mixtures; the first LSTM of the
decoder attends to the encoder's states (app. G).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax import named
from moejax.models.attention import Attention, Memory, attentive_lstm
from moejax.models.layers import LSTM, Embed, LSTMState, residual
from moejax.models.softmax import Softmax
from moejax.moe import HierarchicalMoE, MoE
from moejax.router import ExpertChoice

# Of whole pairs, packed. Target: inputs, targets, segment int32 [B, L]; mask,
# start bool [B, L]. Source: source, source_segment int32 [B, M]; source_start
# bool [B, M]. A segment is the number of a pair in its row, from 1; 0 is
# padding.
Batch = Mapping[str, Array]

# One for each LSTM of the decoder.
State = tuple[LSTMState, ...]


class GNMT(nn.Module):
  """Embeddings, encoder, decoder with attention, softmax over the next piece.

  Every layer's output is dropped out, then the layer's input added; mixtures
  go through a sigmoid before that. LSTMs forget where a pair starts, and a
  place of the target attends to the source of its own pair alone. Source and
  target share a vocabulary; their tables and that of the softmax are three.

  Attributes:
    vocab_size: V.
    width: D of the embeddings and of every layer.
    encoder: LSTMs, and modules called as MoE is.
    decoder: the same; the first is an LSTM.
    attention: of the decoder's first LSTM to the encoder's states.
    wiring: a name in `WIRINGS`. "recurrent" is GNMT's: the LSTM's last output,
      zero where a pair starts, asks for a context that is part of its next
      input. "parallel": its outputs ask, all at once, and the context is added
      to what the next layer reads.
    dropout: chance of zeroing an output; the rng stream is "dropout".
    dtype: of the activations and of the operands of matrix products. Whatever
      it is, parameters, routers, cells of LSTMs and every softmax are float32.
    vocab_multiple: see `LSTMLM.vocab_multiple`.
  """

  vocab_size: int
  width: int
  encoder: Sequence[nn.Module]
  decoder: Sequence[nn.Module]
  attention: Attention
  wiring: str = "recurrent"
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  vocab_multiple: int = 1

  def setup(self) -> None:
    size = self.vocab_size, self.width
    self.embed = {
      side: Embed(*size, self.vocab_multiple) for side in ("source", "target")
    }
    self.drop = nn.Dropout(self.dropout)
    # In full always: the sampler wants ids by falling frequency, and the rarest
    # pieces, letters and bytes, come first.
    self.head = Softmax(*size, multiple=self.vocab_multiple)

  def __call__(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "B L D"]:
    """Returns the state h from which `head` reads the next piece."""
    source = (batch[f"source{name}"] for name in ("", "_segment", "_start"))
    memory = self.encode(*source, train=train)
    drop = self._dropout(train)
    x = drop(self.embed["target"](batch["inputs"]).astype(self.dtype))
    start = batch["start"]
    wiring = WIRINGS[named.known(self.wiring, WIRINGS, "wiring")]
    x = wiring.run(self, x, start, batch["segment"], memory, drop)
    return residual(
      self.decoder[1:],
      x,
      drop,
      start=start,
      mask=batch["mask"],
      ids=batch["inputs"],
      train=train,
    )

  def loss(self, batch: Batch, *, train: bool = False) -> Float[Array, "B L"]:
    """Returns nats per target piece, 0 at padding."""
    h = self(batch, train=train)
    loss = self.head.loss(h, batch["targets"], train=train)
    return jnp.where(batch["mask"], loss, 0)

  def encode(
    self,
    source: Int[Array, "B M"],
    source_segment: Int[Array, "B M"],
    source_start: Bool[Array, "B M"],
    *,
    train: bool = False,
  ) -> Memory:
    """Returns what the decoder reads of the source; arguments as in `Batch`."""
    drop = self._dropout(train)
    x = drop(self.embed["source"](source).astype(self.dtype))
    states = residual(
      self.encoder,
      x,
      drop,
      start=source_start,
      mask=source_segment > 0,
      ids=source,
      train=train,
    )
    return self.attention.remember(states, source_segment)

  def begin(self, rows: int) -> State:
    """Returns the decoder's state before the first piece, of so many rows."""
    return tuple(
      layer.zero_state(rows)
      for layer in self.decoder
      if isinstance(layer, LSTM)
    )

  def step(
    self, memory: Memory, state: State, ids: Int[Array, "B"]
  ) -> tuple[State, Float[Array, "B V"], Float[Array, "B M"]]:
    """Reads one piece of each row, as `__call__` reads all of them.

    Mixtures drop what their capacity does not hold: see `for_decoding`.

    Args:
      memory: the source, one sentence a row, whose segment is 1.
      state: what the last step returned, or `begin`.
      ids: `<s>`, then the pieces of the translation.

    Returns:
      The next state; log p of the next piece; the weights of the source's
      places in the context.
    """
    x = self.embed["target"](ids[:, None])[:, 0].astype(self.dtype)
    first, *rest = self.decoder
    before = iter(state)
    x, reached, weights = WIRINGS[self.wiring].step(
      self, x, next(before), memory
    )
    after = [reached]
    for layer in rest:
      if isinstance(layer, LSTM):
        after.append(layer.step(x, next(before)))
        x = x + after[-1].y.astype(x.dtype)
      else:
        y = layer(x[:, None], ids=ids[:, None])[:, 0]
        x = x + nn.sigmoid(y)
    logits = self.head.logits(x[:, None])[:, 0, : self.vocab_size]
    return tuple(after), jax.nn.log_softmax(logits), weights

  def _dropout(self, train):
    return functools.partial(self.drop, deterministic=not train)


def for_decoding(model: GNMT) -> GNMT:
  """Returns the same model with mixtures that see every token by itself.

  A token is a group of its own and none is dropped, so that a translation
  depends on nothing else in the batch. The parameters are those of `model`.
  In a mixture of two levels, whose experts have slots, every expert then works
  on every token: with many of them a translation is slow and takes much memory.

  Raises:
    ValueError: experts choose among the tokens of a batch, in evaluation too.
  """
  encoder, decoder = (
    tuple(map(_drop_nothing, layers))
    for layers in (model.encoder, model.decoder)
  )
  return model.clone(encoder=encoder, decoder=decoder)


def _drop_nothing(layer: nn.Module) -> nn.Module:
  every = {
    "group_size": 1,
    "capacity_factor": None,
    "eval_capacity_factor": None,
  }
  if isinstance(layer, HierarchicalMoE):
    _check_alone(layer.primary)
    # It splits into no groups of its own.
    secondary = _drop_nothing(layer.secondary).clone(group_size=None)
    return layer.clone(secondary=secondary, groups_together=1, **every)
  if isinstance(layer, MoE):
    _check_alone(layer.router)
    return layer.clone(dispatch="auto", **every)
  return layer


def _check_alone(router: nn.Module) -> None:
  if isinstance(router, ExpertChoice):
    raise ValueError(
      "with the router expert_choice, which experts read a token depends on all"
      " tokens of a batch, those of the future too: it cannot translate piece"
      " by piece; choose another router."
    )


class _Wiring(NamedTuple):
  """What the decoder's first LSTM, with the attention, makes of embeddings.

  Attributes:
    run: (model, x, start, segment, memory, drop) -> x of the next layer.
    step: (model, x, state, memory) -> the same of one step, the next state, and
      the weights of the source's places.
  """

  run: Callable[..., Array]
  step: Callable[..., Any]


def _recurrent(model, x, start, segment, memory, drop):
  y = attentive_lstm(
    x,
    start,
    segment,
    memory,
    model.attention.weights(model.width).w,
    model.decoder[0].weights(2 * model.width),
    model.attention.form,
  )
  return x + drop(y)


def _recurrent_step(model, x, state, memory):
  context, weights = _attend(model, state.y, memory)
  both = jnp.concatenate([x, context.astype(x.dtype)], axis=-1)
  state = model.decoder[0].step(both, state)
  return x + state.y.astype(x.dtype), state, weights


def _parallel(model, x, start, segment, memory, drop):
  y = model.decoder[0](x, start)
  context, _ = model.attention(y, segment, memory)
  return x + drop(y) + context.astype(x.dtype)


def _parallel_step(model, x, state, memory):
  state = model.decoder[0].step(x, state)
  context, weights = _attend(model, state.y, memory)
  x = x + state.y.astype(x.dtype) + context.astype(x.dtype)
  return x, state, weights


def _attend(model, y, memory):
  segment = jnp.ones((y.shape[0], 1), jnp.int32)
  context, weights = model.attention(y[:, None], segment, memory)
  return context[:, 0], weights[:, 0]


WIRINGS = {
  "recurrent": _Wiring(_recurrent, _recurrent_step),
  "parallel": _Wiring(_parallel, _parallel_step),
}
