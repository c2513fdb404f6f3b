"""The paper's language model (sec. 5.1, app. C.1): LSTM, MoE, LSTM."""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated

import flax.linen as nn
from jaxtyping import Array, Float, Int

from moejax.config_fields import Names, Range, Size
from moejax.models import stack
from moejax.models.layers import Embed, LSTMState
from moejax.models.softmax import Predictor, Softmax
from moejax.moe import ROUTING

# inputs, targets int32 [B, L]; mask, start bool [B, L]: see data/packing.py.
Batch = Mapping[str, Array]

Dropout = Annotated[float, Range(0, 1)]
DType = Annotated[str, Names(("float32", "bfloat16"))]


class LSTMLM(Predictor):
  """Embedding, layers of one width, softmax over the next word.

  How layers are joined and dropped out says `models.stack.residual`.

  Attributes:
    vocab_size: V.
    width: D of the embedding and of every layer.
    layers: LSTMs, recurrent mixtures, and modules called as MoE is.
    dropout: chance of zeroing an output; the rng stream is "dropout".
    num_samples: classes of the sampled softmax; 0 is the full one.
    sigmoid: whether mixtures go through a sigmoid, as in the paper.
    dtype: of the activations and of the operands of matrix products. Whatever
      it is, parameters, routers, cells of LSTMs and the softmax are float32.
    vocab_multiple: rows of embedding and softmax are filled up to a multiple of
      it, so that a layout may split "vocab" over as many devices.
  """

  vocab_size: int
  width: Size
  layers: Sequence[nn.Module]
  dropout: Dropout = 0.0
  num_samples: Annotated[int, Range(0)] = 0
  sigmoid: bool = True
  dtype: DType = "float32"
  vocab_multiple: Size = 1

  def setup(self) -> None:
    size = self.vocab_size, self.width
    self.embed = Embed(*size, self.vocab_multiple)
    self.drop = nn.Dropout(self.dropout)
    self.head = Softmax(*size, self.num_samples, self.vocab_multiple)

  def __call__(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "B L D"]:
    """Returns the state h from which `head` reads the next word."""
    drop = functools.partial(self.drop, deterministic=not train)
    ids, start, mask = (batch[name] for name in ("inputs", "start", "mask"))
    x = drop(self.embed(ids).astype(self.dtype))
    return stack.residual(
      self.layers,
      x,
      drop,
      ids=ids,
      train=train,
      start=start,
      mask=mask,
      sigmoid=self.sigmoid,
    )

  @nn.nowrap
  def for_decoding(self) -> "LSTMLM":
    """Returns the same model with mixtures of `stack.for_decoding`."""
    return self.clone(layers=tuple(map(stack.for_decoding, self.layers)))

  @nn.nowrap
  def begin(self, rows: int, length: int) -> tuple[LSTMState, ...]:
    """Returns the state before the first token; any length has room in it."""
    del length
    return stack.begin(self.layers, rows)

  def read(
    self, state: tuple[LSTMState, ...], ids: Int[Array, "B L"]
  ) -> tuple[tuple[LSTMState, ...], Float[Array, "B L V"]]:
    """Reads on; returns the next state, and log p of each token's next word.

    Mixtures drop what their capacity does not hold: see `for_decoding`.
    """

    def step(self, state, ids):
      ids = ids[:, None]
      x = self.embed(ids).astype(self.dtype)
      run, after = stack.stepping(state, ids)
      h = stack.residual(
        self.layers,
        x,
        lambda y: y,
        ids=ids,
        train=False,
        run=run,
        sigmoid=self.sigmoid,
      )
      return tuple(after), h[:, 0]

    scan = nn.scan(
      step,
      variable_broadcast="params",
      variable_axes={ROUTING: 0},
      split_rngs={},
      in_axes=1,
      out_axes=1,
    )
    state, h = scan(self, state, ids)
    return state, self.head.log_p(h)
