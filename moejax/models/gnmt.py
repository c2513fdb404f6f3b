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
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config_fields import Size
from moejax.models import stack
from moejax.models.attention import Attention, Memory, attentive_lstm
from moejax.models.layers import Embed, LSTMState
from moejax.models.lstm_lm import Dropout, DType
from moejax.models.softmax import Predictor, Softmax

# Of whole pairs, packed. Target: inputs, targets, segment int32 [B, L]; mask,
# start bool [B, L]. Source: source, source_segment int32 [B, M]; source_start
# bool [B, M]. A segment is the number of a pair in its row, from 1; 0 is
# padding.
Batch = Mapping[str, Array]

# One for each LSTM of the decoder.
State = tuple[LSTMState, ...]


class GNMT(Predictor):
  """Embeddings, encoder, decoder with attention, softmax over the next piece.

  Every layer's output is dropped out, then the layer's input added. LSTMs
  forget where a pair starts, and a token of the target attends to the source of
  its own pair alone. Source and target share a vocabulary; their tables and
  that of the softmax are three.

  Attributes:
    vocab_size: V.
    width: D of the embeddings and of what the last layer of either side gives.
    encoder: LSTMs, bidirectional ones too, and modules called as MoE is.
    decoder: LSTMs, of which one is first, and modules called as MoE is.
    attention: of the decoder's first LSTM to the encoder's states.
    residual_from: number, from 1, of the first layer of either side to whose
      output its input is added: 3 in GNMT.
    dropout: chance of zeroing an output; the rng stream is "dropout".
    sigmoid: whether mixtures go through a sigmoid, as in the paper.
    dtype: of the activations and of the operands of matrix products. See
      `LSTMLM`.
    vocab_multiple: rows of all tables are filled up to a multiple of it.
  """

  vocab_size: int
  width: Size
  encoder: Sequence[nn.Module]
  decoder: Sequence[nn.Module]
  attention: Attention
  residual_from: Size = 1
  dropout: Dropout = 0.0
  sigmoid: bool = True
  dtype: DType = "float32"
  vocab_multiple: Size = 1

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
    drop = functools.partial(self.drop, deterministic=not train)
    x = drop(self.embed["target"](batch["inputs"]).astype(self.dtype))
    start, segment = batch["start"], batch["segment"]
    first = self.decoder[0]
    if self.attention.wiring == "parallel":
      y = first(x, start)
      context, _ = self.attention(y, segment, memory)
    else:
      _, w_query, _ = self.attention.weights(self.width)
      weights = first.weights(2 * self.width), self.attention.form
      y, context = attentive_lstm(x, start, segment, memory, w_query, *weights)
    mask, ids = batch["mask"], batch["inputs"]
    options = {"start": start, "mask": mask, "ids": ids, "train": train}
    return self._above(x, y, context, drop, **options)

  def _above(self, x, y, context, drop, **options):
    """Runs what is above the decoder's first LSTM, which read x and gave y."""
    context = context.astype(x.dtype)
    x = x + drop(y) if self.residual_from == 1 else drop(y)
    if self.attention.wiring == "parallel":
      x = x + context
    return stack.residual(
      self.decoder[1:],
      x,
      drop,
      context=context if self.attention.wiring == "every_layer" else None,
      residual_from=self.residual_from - 1,
      sigmoid=self.sigmoid,
      **options,
    )

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
    states = stack.residual(
      self.encoder,
      drop(self.embed["source"](source).astype(self.dtype)),
      drop,
      start=source_start,
      mask=source_segment > 0,
      ids=source,
      train=train,
      residual_from=self.residual_from,
      sigmoid=self.sigmoid,
    )
    if states.shape[-1] != self.width:
      raise ValueError(
        f"the encoder ends in {states.shape[-1]} entries for a width of"
        f" {self.width}; put an LSTM above the bidirectional one."
      )
    return self.attention.remember(states, source_segment)

  @nn.nowrap
  def begin(self, rows: int, length: int) -> State:
    """Returns the decoder's state before the first piece; all have room."""
    del length
    return stack.begin(self.decoder, rows)

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
    ids, segment = ids[:, None], jnp.ones((len(ids), 1), jnp.int32)
    run, after = stack.stepping(state, ids)
    x = self.embed["target"](ids).astype(self.dtype)
    if self.attention.wiring == "parallel":
      y = run(self.decoder[0], x)
      context, weights = self.attention(y, segment, memory)
    else:
      last = state[0].y[:, None]
      context, weights = self.attention(last, segment, memory)
      both = jnp.concatenate([x, context.astype(x.dtype)], axis=-1)
      y = run(self.decoder[0], both)
    options = {"ids": ids, "train": False, "run": run}
    x = self._above(x, y, context, lambda y: y, **options)
    return tuple(after), self.head.log_p(x)[:, 0], weights[:, 0]

  @nn.nowrap
  def for_decoding(self) -> "GNMT":
    """Returns the same model with mixtures of `stack.for_decoding`."""
    return self.clone(
      encoder=tuple(map(stack.for_decoding, self.encoder)),
      decoder=tuple(map(stack.for_decoding, self.decoder)),
    )
