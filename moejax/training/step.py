"""One step of training, one of evaluation."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from moejax import config_fields, losses, routing, sharding
from moejax.moe import ROUTING
from moejax.training.state import TrainState

Metrics = dict[str, Any]
Batch = Mapping[str, Array]

# The random streams of the models; a stream's key is folded from its index.
_STREAMS = ("dropout", "router", "softmax")

# What the balance losses are taken over.
BALANCE_OVER = ("microbatch", "batch")


def place(
  batch: Mapping[str, np.ndarray], batch_sharding: jax.sharding.Sharding
) -> dict[str, Array]:
  """Makes global arrays of the rows that this process has read."""
  return {
    name: jax.make_array_from_process_local_data(batch_sharding, rows)
    for name, rows in batch.items()
  }


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  aux_weights: Mapping[str, float],
  seed: int | Int[Array, ""],
  microbatches: int = 1,
  aux_scope: str = "batch",
  balance_over: str = "microbatch",
) -> tuple[TrainState, Metrics]:
  """Updates the state by one batch.

  The loss is the mean over the batch's words plus the balance losses
  (docs/decisions.md, 12). With microbatches the gradient is accumulated over
  equal parts of the batch, each with its own groups and random draws.

  Balance losses over "microbatch" are taken of each and averaged: another
  quantity, as CV^2 is not linear. Over "batch" they are those of the groups of
  all together (`routing.stack_microbatches`), and so are the metrics. That
  keeps all routing decisions, and runs the forward pass twice.

  The metrics are numbers, but for "count": the edges to each expert of all of
  the batch, [E], in place of the decisions that every mixture makes (a tuple,
  whose entries are lists where they were `losses.unstacked`).

  Raises:
    ValueError: the microbatches do not divide the rows of the batch, or an
      unknown `balance_over`.
  """
  config_fields.one_of(balance_over, BALANCE_OVER, "balance_over")
  rows = batch["mask"].shape[0]
  if rows % microbatches:
    raise ValueError(
      f"{microbatches} microbatches do not divide the {rows} rows of a"
      " batch; choose a number that does."
    )
  words = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def run(params, index):
    """Returns a microbatch's share of the loss, and its routings."""
    part_key = jax.random.fold_in(key, index)
    # Rows from all over the batch, to lie over the same devices.
    part = {
      name: value.reshape(-1, microbatches, *value.shape[1:])[:, index]
      for name, value in batch.items()
    }
    loss, sown = model.apply(
      {"params": params},
      part,
      train=True,
      rngs={s: jax.random.fold_in(part_key, i) for i, s in enumerate(_STREAMS)},
      mutable=[ROUTING],
      method="loss",
    )
    decisions = nn.unbox(sown.get(ROUTING, {}))
    return loss.sum() / words, losses.unstacked(decisions)

  run = sharding.zero3(run)

  def run_together(params, _):
    """Runs all microbatches, keeping of each only its routings."""

    def add(total, index):
      loss, decisions = jax.checkpoint(run)(params, index)
      return total + loss, decisions

    loss, stacked = jax.lax.scan(add, jnp.float32(0), jnp.arange(microbatches))
    return loss, jax.tree.map(
      routing.stack_microbatches, stacked, is_leaf=losses.is_routing
    )

  together = balance_over == "batch" and microbatches > 1
  parts = 1 if together else microbatches

  def loss_fn(params, index):
    task, decisions = (run_together if together else run)(params, index)
    routings = losses.routings(decisions)
    # A model without mixtures, as a dense twin is, has no balance to lose.
    weights = aux_weights if routings else {}
    auxiliary, _ = losses.auxiliary(routings, weights, aux_scope)
    # Edges are added up over devices once, for the balance and for "count".
    counted = jax.tree.map(
      lambda each: each._replace(count=each.count.sum(axis=0, keepdims=True)),
      decisions,
      is_leaf=losses.is_routing,
    )
    balance = {"auxiliary": auxiliary, **losses.balance(counted)}
    metrics = {"loss": task} | {n: v / parts for n, v in balance.items()}
    metrics["count"] = jax.tree.map(
      lambda each: each.count[0], counted, is_leaf=losses.is_routing
    )
    return task + metrics["auxiliary"], metrics

  grad_fn = functools.partial(jax.grad(loss_fn, has_aux=True), state.params)
  if parts == 1:
    grads, metrics = grad_fn(0)
  else:
    grads, metrics = jax.lax.fori_loop(
      0,
      parts,
      lambda i, total: jax.tree.map(jnp.add, total, grad_fn(i)),
      optax.tree.zeros_like(jax.eval_shape(grad_fn, 0)),
    )
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics |= {
    "grad_norm": optax.tree.norm(grads),
    "param_norm": optax.tree.norm(params),
    "words": words,
  }
  if "source_segment" in batch:
    source = batch["source_segment"] > 0
    metrics["source_words"] = source.sum(dtype=jnp.float32)
  return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(params: Any, batch: Batch, *, model: nn.Module) -> Metrics:
  """Returns sums over the batch's words: of 1, of the loss, of the balance.

  Every metric but `words` is to be divided by the words in the end.
  """

  def run(params):
    return model.apply(
      {"params": params}, batch, train=False, mutable=[ROUTING], method="loss"
    )

  loss, sown = sharding.zero3(run)(params)
  words = batch["mask"].sum().astype(jnp.float32)
  balance = {n: v * words for n, v in losses.balance(sown).items()}
  return {"loss": loss.sum(), "words": words, **balance}
