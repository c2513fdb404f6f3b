"""The paper's translation model (sec. 5.3, app. E): a small GNMT with mixtures.

Encoder and decoder are stacks of LSTMs and mixtures; the first LSTM of the
decoder attends to the encoder's states (app. G). GNMT itself (1609.08144), with
which the paper compares, is the same module with a bidirectional layer at the
bottom of the encoder, the wiring "every_layer", and residuals from the third
layer on.
"""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax import named
from moejax.models.attention import Attention, Memory, attentive_lstm
from moejax.models.layers import LSTM, Embed, LSTMState, zero_state
from moejax.models.softmax import Softmax
from moejax.models.stack import residual
from moejax.moe import HierarchicalMoE, MoE
from moejax.router import Router

# Of whole pairs, packed. Target: inputs, targets, segment int32 [B, L]; mask,
# start bool [B, L]. Source: source, source_segment int32 [B, M]; source_start
# bool [B, M]. A segment is the number of a pair in its row, from 1; 0 is
# padding.
Batch = Mapping[str, Array]

WIRINGS = ("recurrent", "every_layer", "parallel")

# One for each LSTM of the decoder.
State = tuple[LSTMState, ...]


class GNMT(nn.Module):
  """Embeddings, encoder, decoder with attention, softmax over the next piece.

  Every layer's output is dropped out, then the layer's input added; mixtures
  go through a sigmoid before that. LSTMs forget where a pair starts, and a
  token of the target attends to the source of its own pair alone. Source and
  target share a vocabulary; their tables and that of the softmax are three.

  Attributes:
    vocab_size: V.
    width: D of the embeddings and of what the last layer of either side gives.
    encoder: LSTMs, bidirectional ones too, and modules called as MoE is.
    decoder: LSTMs, of which one is first, and modules called as MoE is.
    attention: of the decoder's first LSTM to the encoder's states.
    wiring: "recurrent": the LSTM's last output, zero where a pair starts, asks
      for a context that is part of its next input. "every_layer" is GNMT's: at
      that step the context is part of what the LSTMs above read, too.
      "parallel": its outputs ask, all at once, and the context is added to what
      the next layer reads.
    residual_from: number, from 1, of the first layer of either side to whose
      output its input is added: 3 in GNMT.
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
  residual_from: int = 1
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
    named.one_of(self.wiring, WIRINGS, "wiring")
    source = (batch[f"source{name}"] for name in ("", "_segment", "_start"))
    memory = self.encode(*source, train=train)
    drop = functools.partial(self.drop, deterministic=not train)
    x = drop(self.embed["target"](batch["inputs"]).astype(self.dtype))
    start, segment = batch["start"], batch["segment"]
    first, *rest = self.decoder
    if self.wiring == "parallel":
      y = first(x, start)
      context, _ = self.attention(y, segment, memory)
      x = self._join(1, x, drop(y)) + context.astype(x.dtype)
    else:
      _, w_query, _ = self.attention.weights(self.width)
      weights = first.weights(2 * self.width), self.attention.form
      y, context = attentive_lstm(x, start, segment, memory, w_query, *weights)
      x = self._join(1, x, drop(y))
    return residual(
      rest,
      x,
      drop,
      start=start,
      mask=batch["mask"],
      ids=batch["inputs"],
      train=train,
      context=context if self.wiring == "every_layer" else None,
      residual_from=self.residual_from - 1,
    )

  def _join(self, number, x, y):
    """Adds a layer's input x to its output y, where there is a residual."""
    return x + y if number >= self.residual_from else y

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
    """Returns what the decoder reads of the source; arguments as in `Batch`.

    Raises:
      ValueError: the last layer gives more than the width.
    """
    drop = functools.partial(self.drop, deterministic=not train)
    states = residual(
      self.encoder,
      drop(self.embed["source"](source).astype(self.dtype)),
      drop,
      start=source_start,
      mask=source_segment > 0,
      ids=source,
      train=train,
      residual_from=self.residual_from,
    )
    if states.shape[-1] != self.width:
      raise ValueError(
        f"the encoder ends in {states.shape[-1]} entries for a width of"
        f" {self.width}; put an LSTM above the bidirectional one."
      )
    return self.attention.remember(states, source_segment)

  def begin(self, rows: int) -> State:
    """Returns the decoder's state before the first piece, of so many rows."""
    lstms = (layer for layer in self.decoder if isinstance(layer, LSTM))
    return tuple(
      zero_state(rows, lstm.width, 4 * (lstm.hidden or lstm.width))
      for lstm in lstms
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
      The next state; log p of the next piece; the attention weights of the
      source's tokens.
    """
    x = self.embed["target"](ids[:, None])[:, 0].astype(self.dtype)
    first, *rest = self.decoder
    before = iter(state)
    reached = next(before)
    if self.wiring == "parallel":
      reached = first.step(x, reached)
      context, weights = self._attend(reached.y, memory)
      context = context.astype(x.dtype)
      x = self._join(1, x, reached.y.astype(x.dtype)) + context
    else:
      context, weights = self._attend(reached.y, memory)
      context = context.astype(x.dtype)
      reached = first.step(jnp.concatenate([x, context], axis=-1), reached)
      x = self._join(1, x, reached.y.astype(x.dtype))
    after = [reached]
    for number, layer in enumerate(rest, 2):
      if isinstance(layer, LSTM):
        both = [x, context] if self.wiring == "every_layer" else [x]
        state = layer.step(jnp.concatenate(both, axis=-1), next(before))
        after.append(state)
        y = state.y.astype(x.dtype)
      else:
        y = nn.sigmoid(layer(x[:, None], ids=ids[:, None])[:, 0])
      x = self._join(number, x, y)
    logits = self.head.logits(x[:, None])[:, 0, : self.vocab_size]
    return tuple(after), jax.nn.log_softmax(logits), weights

  def _attend(self, y, memory):
    segment = jnp.ones((len(y), 1), jnp.int32)
    context, weights = self.attention(y[:, None], segment, memory)
    return context[:, 0], weights[:, 0]


def for_decoding(model: GNMT) -> GNMT:
  """Returns the same model with mixtures that see every token by itself.

  A token is a group of its own and none is dropped, so that a translation
  depends on nothing else in the batch. The parameters are those of `model`.
  Where experts need slots (`Each`; within groups `Mixed` too) every expert
  works on every token: with many of them a translation is slow and takes much
  memory.

  Raises:
    ValueError: experts choose among the tokens of a batch, in evaluation too.
  """
  every = {
    "group_size": 1,
    "capacity_factor": None,
    "eval_capacity_factor": None,
  }

  def dropless(layer):
    if isinstance(layer, HierarchicalMoE):
      router, fields = layer.primary, {"groups_together": 1}
      # It splits into no groups of its own.
      fields["secondary"] = dropless(layer.secondary).clone(group_size=None)
    elif isinstance(layer, MoE):
      router, fields = layer.router, {}
    else:
      return layer
    if isinstance(router, Router) and not router.is_by_token(train=False):
      raise ValueError(
        f"with the router {type(router).__name__}, which experts read a token"
        " depends on all tokens of a batch, those of the future too: it cannot"
        " translate piece by piece; choose another router."
      )
    return layer.clone(dispatch="auto", **fields, **every)

  return model.clone(
    encoder=tuple(map(dropless, model.encoder)),
    decoder=tuple(map(dropless, model.decoder)),
  )
