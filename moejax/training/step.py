"""One step of training, one of evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from moejax import losses
from moejax.moe import ROUTING
from moejax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]
Batch = Mapping[str, Array]

# The random streams of the models, in a fixed order: a stream's key is folded
# from its place.
_STREAMS = ("dropout", "router", "softmax")


def place(
  batch: Mapping[str, np.ndarray], where: jax.sharding.Sharding
) -> dict[str, Array]:
  """Makes global arrays of the rows that this process has read."""
  return {
    name: jax.make_array_from_process_local_data(where, rows)
    for name, rows in batch.items()
  }


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  aux_weights: Mapping[str, float],
  seed: int,
  microbatches: int = 1,
  aux_scope: str = "batch",
) -> tuple[TrainState, Metrics]:
  """Updates the state by one batch.

  The loss is the mean over the batch's words plus the balance losses. With
  microbatches the gradient is accumulated over equal parts of the batch: the
  task's is the same as without, up to rounding; balance losses are taken per
  microbatch and averaged.

  Raises:
    ValueError: the microbatches do not divide the rows of the batch.
  """
  rows = batch["mask"].shape[0]
  if rows % microbatches:
    raise ValueError(
      f"{microbatches} microbatches do not divide the {rows} rows of a"
      " batch; choose a number that does."
    )
  words = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def loss_fn(params, part, index):
    part_key = jax.random.fold_in(key, index)
    rngs = {s: jax.random.fold_in(part_key, i) for i, s in enumerate(_STREAMS)}
    loss, sown = model.apply(
      {"params": params},
      part,
      train=True,
      rngs=rngs,
      mutable=[ROUTING],
      method="loss",
    )
    task = loss.sum() / words
    auxiliary, _ = losses.auxiliary(sown, aux_weights, aux_scope)
    metrics = {"loss": task, "auxiliary": auxiliary / microbatches}
    balance = losses.balance(sown)
    metrics |= {name: v / microbatches for name, v in balance.items()}
    return metrics["loss"] + metrics["auxiliary"], metrics

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if microbatches == 1:
    grads, metrics = grad_fn(state.params, batch, 0)
  else:
    grads, metrics = _accumulate(grad_fn, state.params, batch, microbatches)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics |= {
    "grad_norm": optax.tree.norm(grads),
    "param_norm": optax.tree.norm(params),
    "words": words,
  }
  return TrainState(state.step + 1, params, opt_state), metrics


def _accumulate(
  grad_fn: Callable[[Any, Batch, Array], Any],
  params: Any,
  batch: Batch,
  microbatches: int,
) -> Any:
  """Adds up what `grad_fn` returns for each part of the batch."""

  def of_part(index):
    # Every microbatch takes rows from all over the batch, so that it lies over
    # the same devices as the batch.
    part = {
      name: value.reshape(-1, microbatches, *value.shape[1:])[:, index]
      for name, value in batch.items()
    }
    return grad_fn(params, part, index)

  def add(total, index):
    return jax.tree.map(jnp.add, total, of_part(index)), None

  shapes = jax.eval_shape(of_part, 0)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return jax.lax.scan(add, zeros, jnp.arange(microbatches))[0]


def eval_step(params: Any, batch: Batch, *, model: nn.Module) -> Metrics:
  """Returns sums over the batch's words: of 1, of the loss, of the balance.

  Every metric but `words` is to be divided by the words in the end.
  """
  loss, sown = model.apply(
    {"params": params}, batch, train=False, mutable=[ROUTING], method="loss"
  )
  words = batch["mask"].sum().astype(jnp.float32)
  balance = {n: v * words for n, v in losses.balance(sown).items()}
  return {"loss": loss.sum(), "words": words, **balance}
