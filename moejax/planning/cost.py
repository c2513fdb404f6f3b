"""What a model costs; nothing is allocated, whatever its size.

The convention gives the paper's Tables 7 and 8 digit by digit: every entry of a
matrix is a parameter, and a multiply-add of every token that meets the matrix.
A router counts W_g and W_noise, an LSTM its projection. A token meets k/E of a
mixture's experts. Biases (docs/decisions.md, 17), activations and dispatch are
free, and capacity does not matter.

A timestep of a translation is one word of the source and one of the target. Of
attention it has the products with U and W; what every pair of positions costs
depends on lengths, and only `flops_per_step` counts it.
"""

import fractions
import math
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax

from moejax import config as config_lib
from moejax.models import softmax
from moejax.routing import Routing

# A part of a mixture -> the router that chooses among its copies.
_ROUTER_OF = {"experts": "router", "secondary": "primary"}
_ROUTERS = tuple(_ROUTER_OF.values())


class Count(NamedTuple):
  """What a whole model has and computes.

  Attributes:
    parameters: entries of all matrices but embedding and softmax, the paper's
      number.
    ops: multiply-adds of a timestep in the forward pass, embedding and softmax
      excluded: the paper's ops/timestep.
    biases: entries of all vectors.
    embedding: entries of the tables of word vectors.
    softmax: entries of the output layer's table.
    gates: the part of `ops` in routers.
    attention: the part of `ops` in attention.
    source: the part of `ops` that a word of a translation's source costs.
  """

  parameters: int
  ops: int
  biases: int
  embedding: int
  softmax: int
  gates: int
  attention: int
  source: int

  @property
  def total(self) -> int:
    """Of all arrays that training changes."""
    return self.parameters + self.biases + self.embedding + self.softmax


def count(experiment: config_lib.Experiment, vocab_size: int) -> Count:
  """Counts the model of a config with a vocabulary of this size.

  Raises:
    ValueError: the config describes no model.
  """
  model = experiment.model(vocab_size)
  return count_model(model, experiment.shapes, method="loss")


def count_model(model: nn.Module, *inputs: object, method: str) -> Count:
  """Counts a module from shapes: of its parameters, and of a method's inputs.

  Its children "embed..." are embeddings, "head" is the softmax, "encoder..."
  reads the source.
  """
  shares = {}

  def note_share(call, args, kwargs, context):
    """Notes which share of its experts each router sends a token to."""
    result, module = call(*args, **kwargs), context.module
    if isinstance(result, Routing):
      tokens, num_experts = result.logits.shape[-2:]
      edges = result.assignment.expert.shape[-1]
      # Experts that choose round what they take; k is what they mean.
      k = getattr(module, "k", fractions.Fraction(edges, tokens))
      shares[module.path] = fractions.Fraction(k) / num_experts
    return result

  keys = {n: jax.random.key(0) for n in ("params", "router", "dropout")}
  with nn.intercept_methods(note_share):
    shapes = jax.eval_shape(
      lambda inputs: model.init(keys, *inputs, method=method), inputs
    )
  flat = flax.traverse_util.flatten_dict(nn.unbox(shapes)["params"])
  sums = dict.fromkeys(Count._fields, 0)
  for path, leaf in flat.items():
    size, where = math.prod(leaf.shape), path[0]
    if where == "head" or where.startswith("embed"):
      sums["softmax" if where == "head" else "embedding"] += size
      continue
    share, copies = fractions.Fraction(1), 0
    for depth, name in enumerate(path):
      if name in _ROUTER_OF:
        copies += 1
        # A single expert needs no router.
        share *= shares.get((*path[:depth], _ROUTER_OF[name]), 1)
    # Each level of a mixture puts an axis in front; attention's v is a column.
    if len(leaf.shape) - copies < 2 or path == ("attention", "v"):
      sums["biases"] += size
      continue
    ops = size * share
    sums["parameters"] += size
    sums["ops"] += ops
    sums["gates"] += ops * any(name in _ROUTERS for name in path)
    sums["attention"] += ops * (where == "attention")
    sums["source"] += ops * (
      where.startswith("encoder") or path == ("attention", "u")
    )
  return Count(**{name: int(value) for name, value in sums.items()})


def flops_per_step(
  experiment: config_lib.Experiment, vocab_size: int, count: Count
) -> int:
  """Counts what a training step needs to compute, in floating-point operations.

  A multiply-add is two, and the backward pass costs twice the forward pass.
  Every position counts, embedding excluded, softmax included; where the softmax
  is sampled, with the target and at most as many classes as it draws. In a
  translation every position of a row attends to every position of its source,
  whatever pairs they belong to. Empty slots, dispatch, and what is computed
  again to save memory count nothing.
  """
  model = experiment.model(vocab_size)
  classes, (batch_size, length) = vocab_size, experiment.shapes["mask"].shape
  if samples := getattr(model, "num_samples", 0):
    classes = softmax.most_distinct(samples, vocab_size) + 1
  target = count.ops - count.source + model.width * classes
  ops = length * target
  if attention := getattr(model, "attention", None):
    # Of a score and of a context, one entry each.
    pair = attention.width + model.width
    source_length = experiment.shapes["source"].shape[1]
    ops += source_length * (count.source + length * pair)
  return 6 * ops * batch_size
