"""Evaluation: perplexity per word or piece, ends counted, full softmax."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from moejax import sharding
from moejax.data import batches as batches_lib
from moejax.data.packing import Rows
from moejax.training import step

# (params, rows) -> means over their words.
Evaluator = Callable[[Any, Rows], dict[str, float]]


def evaluator(
  model: nn.Module,
  batch_size: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> Evaluator:
  """Returns a function (params, rows) -> loss (nats), perplexity, words, ...

  It is compiled once and counts every word of the rows once. What the routing
  reports (`losses.balance`) is the mean over words of each batch's. All else is
  the same for any batch_size where groups have a `group_size`: rows follow each
  other, so a group holds the same ones.

  Args:
    model: the model.
    batch_size: rows at once, over all devices. The full softmax of one time
      step has a number for each of them and each word of the vocabulary.
    layout: where arrays lie.
    mesh: of the devices.

  Raises:
    ValueError: the rows do not divide over the devices.
    FloatingPointError: when called, the loss is not a finite number.
  """
  eval_fn = jax.jit(functools.partial(step.eval_step, model=model))
  where = sharding.batch_sharding(layout, mesh, batch_size)

  def evaluate(params, rows):
    sums: collections.Counter[str] = collections.Counter()
    batches = batches_lib.eval_batches(
      rows, batch_size, jax.process_index(), jax.process_count()
    )
    with sharding.use(layout, mesh):
      for batch in batches:
        part = jax.device_get(eval_fn(params, step.place(batch, where)))
        sums.update({name: float(value) for name, value in part.items()})
    words = sums.pop("words")
    means = {name: value / words for name, value in sums.items()}
    if not math.isfinite(means["loss"]):
      raise FloatingPointError(f"the loss of the evaluation is {means['loss']}")
    return {"perplexity": exp(means["loss"]), "words": words, **means}

  return evaluate


def exp(loss: float) -> float:
  """exp, and infinity where it overflows."""
  return math.inf if loss > 700 else math.exp(loss)
