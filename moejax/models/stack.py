"""How a model's layers stand on each other (app. C.1, E)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.models.layers import (
  LSTM,
  BidirectionalLSTM,
  LSTMState,
  zero_state,
)
from moejax.models.recurrent import RecurrentMoE
from moejax.moe import HierarchicalMoE, MoE
from moejax.router import Router

# Layers with a state; of those that decode, all read forward.
_RECURRENT = (LSTM, RecurrentMoE)


def residual(
  layers: Sequence[nn.Module],
  x: Float[Array, "B L D"],
  drop: Callable[[Array], Array],
  *,
  ids: Int[Array, "B L"],
  train: bool,
  start: Bool[Array, "B L"] | None = None,
  mask: Bool[Array, "B L"] | None = None,
  run: Callable[[nn.Module, Array], Array] | None = None,
  context: Float[Array, "B L _"] | None = None,
  residual_from: int = 1,
  sigmoid: bool = True,
) -> Float[Array, "B L O"]:
  """Runs layers, each as x + drop(layer(x)) (app. C.1, E).

  Layers are LSTMs of all kinds, which forget where a sentence starts, and
  modules called as MoE is. See docs/decisions.md, 18, 19, 27.

  Args:
    layers: one after the other.
    x: what the first of them reads.
    drop: drops out a layer's output.
    ids: the tokens' ids in the vocabulary.
    train: as for MoE.
    start: the first token of each sentence.
    mask: real tokens.
    run: runs a recurrent layer in place of its `__call__`; see `stepping`.
    context: what every recurrent layer reads beside its input.
    residual_from: number, from 1, of the first layer to whose output its input
      is added.
    sigmoid: whether mixtures go through a sigmoid before dropout, as in the
      paper: a token all of whose experts were full then adds the constant 0.5.

  Raises:
    ValueError: an input is to be added to an output of another width.
  """

  def whole(layer, x):
    if isinstance(layer, RecurrentMoE):
      return layer(x, start, train=train, mask=mask, ids=ids)
    return layer(x, start)

  run = run or whole
  for number, layer in enumerate(layers, 1):
    if isinstance(layer, BidirectionalLSTM):
      y = layer(x, start | ~mask)
    elif isinstance(layer, _RECURRENT):
      both = [x] if context is None else [x, context]
      y = run(layer, jnp.concatenate(both, axis=-1))
    else:
      y = layer(x, train=train, mask=mask, ids=ids)
      y = nn.sigmoid(y) if sigmoid else y
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


def begin(layers: Sequence[nn.Module], rows: int) -> tuple[LSTMState, ...]:
  """Returns the states of a stack before the first token of so many rows."""
  return tuple(
    zero_state(rows, layer.width, getattr(layer, "hidden", None) or layer.width)
    for layer in layers
    if isinstance(layer, _RECURRENT)
  )


def stepping(
  state: tuple[LSTMState, ...], ids: Int[Array, "B 1"]
) -> tuple[Callable[[nn.Module, Array], Array], list[LSTMState]]:
  """Returns `run` of `residual` for one token of each row.

  Beside it is a list, which holds the next states once all layers have run.
  """
  before, after = iter(state), []

  def run(layer, x):
    more = (ids[:, 0],) if isinstance(layer, RecurrentMoE) else ()
    after.append(layer.step(x[:, 0], next(before), *more))
    return after[-1].y[:, None].astype(x.dtype)

  return run, after


def for_decoding(layer: nn.Module) -> nn.Module:
  """Returns the same layer with mixtures that see every token by itself.

  A token is a group of its own and none is dropped, so that what is decoded
  depends on nothing else in the batch. The parameters stay. Where experts need
  slots (`Each`; within groups `Mixed` too) every expert works on every token:
  with many of them decoding is slow and takes much memory.

  Raises:
    ValueError: experts choose among the tokens of a batch, in evaluation too.
  """
  if isinstance(layer, RecurrentMoE):
    return layer.clone(mixture=for_decoding(layer.mixture))
  fields = {}
  if isinstance(layer, HierarchicalMoE):
    router, fields = layer.primary, {"groups_together": 1}
    # It splits into no groups of its own.
    secondary = for_decoding(layer.secondary)
    fields["secondary"] = secondary.clone(group_size=None)
  elif isinstance(layer, MoE):
    # As few groups as rows of a device divide into no parts.
    router, fields = layer.router, {"exchange_parts": 1}
  else:
    return layer
  if isinstance(router, Router) and not router.is_by_token(train=False):
    raise ValueError(
      f"with the router {type(router).__name__}, which experts read a token"
      " depends on all tokens of a batch, those of the future too: it cannot"
      " decode token by token; choose another router."
    )
  return layer.clone(
    group_size=1,
    capacity_factor=None,
    eval_capacity_factor=None,
    dispatch="auto",
    **fields,
  )
