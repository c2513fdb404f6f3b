"""Evaluation: perplexity per word, `</S>` counted, by the full softmax."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

from moejax import sharding
from moejax.data import text
from moejax.training import step


def place(
  batch: Mapping[str, np.ndarray],
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> dict[str, Array]:
  """Makes global arrays of the rows that this process has read."""
  where = sharding.batch_sharding(layout, mesh)
  return {
    name: jax.make_array_from_process_local_data(where, rows)
    for name, rows in batch.items()
  }


def evaluator(
  model: nn.Module,
  batch_size: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> Callable[[Any, text.PackedRows], dict[str, float]]:
  """Returns a function (params, rows) -> loss (nats), perplexity, words.

  It is compiled once and counts every word of the rows once.
  """
  eval_fn = jax.jit(functools.partial(step.eval_step, model=model))

  def evaluate(params, rows):
    loss, words = 0.0, 0.0
    batches = text.eval_batches(
      rows, batch_size, jax.process_index(), jax.process_count()
    )
    with sharding.use(layout, mesh):
      for batch in batches:
        part = jax.device_get(eval_fn(params, place(batch, layout, mesh)))
        loss += float(part["loss"])
        words += float(part["words"])
    mean = loss / words
    return {"loss": mean, "perplexity": exp(mean), "words": words}

  return evaluate


def exp(loss: float) -> float:
  """exp, and infinity where it overflows."""
  return math.exp(loss) if loss < 700 else math.inf
