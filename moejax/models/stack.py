"""How a model's layers stand on each other (app. C.1, E)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.models.layers import LSTM, BidirectionalLSTM
from moejax.models.recurrent import RecurrentMoE


def residual(
  layers: Sequence[nn.Module],
  x: Float[Array, "B L D"],
  drop: Callable[[Array], Array],
  *,
  ids: Int[Array, "B L"],
  train: bool,
  start: Bool[Array, "B L"] | None = None,
  mask: Bool[Array, "B L"] | None = None,
  run: Callable[[LSTM, Array], Array] | None = None,
  context: Float[Array, "B L _"] | None = None,
  residual_from: int = 1,
) -> Float[Array, "B L O"]:
  """Runs layers, each as x + drop(layer(x)) (app. C.1, E).

  Layers are LSTMs of all kinds, which forget where a sentence starts, and
  modules called as MoE is. These go through a sigmoid before dropout, so that a
  token all of whose experts were full adds the constant 0.5. See
  docs/decisions.md, 18, 19, 27.

  Args:
    layers: one after the other.
    x: what the first of them reads.
    drop: drops out a layer's output.
    ids: the tokens' ids in the vocabulary.
    train: as for MoE.
    start: the first token of each sentence.
    mask: real tokens.
    run: runs an `LSTM` in place of its `__call__`, as where there is one step.
    context: what every `LSTM` reads beside its input.
    residual_from: number, from 1, of the first layer to whose output its input
      is added.

  Raises:
    ValueError: an input is to be added to an output of another width.
  """
  run = run or (lambda lstm, x: lstm(x, start))
  for number, layer in enumerate(layers, 1):
    if isinstance(layer, BidirectionalLSTM):
      y = layer(x, start | ~mask)
    elif isinstance(layer, LSTM):
      both = [x] if context is None else [x, context]
      y = run(layer, jnp.concatenate(both, axis=-1))
    elif isinstance(layer, RecurrentMoE):
      y = layer(x, start, train=train, mask=mask, ids=ids)
    else:
      y = nn.sigmoid(layer(x, train=train, mask=mask, ids=ids))
    y = drop(y)
    if number < residual_from:
      x = y
    elif y.shape == x.shape:
      x = x + y
    else:
      raise ValueError(
        f"layer {number} makes {y.shape[-1]} entries of {x.shape[-1]}, so its"
        " input cannot be added to its output; let residual_from be"
        f" {number + 1} or more, or choose layers of one width."
      )
  return x
