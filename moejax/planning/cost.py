"""What a model costs, by formula; nothing is allocated, whatever its size.

The convention is the one that gives the paper's Tables 7 and 8 digit by digit:
every entry of a matrix is a parameter, and a multiply-add of every token that
meets the matrix. So a router counts W_g and W_noise, an LSTM its projection;
of a mixture's experts a token meets the k it visits, of its groups the k it is
sent to. Biases, activations and dispatch are free, capacity is no matter.

A timestep of a translation is one word of the source and one of the target. Of
attention it has the products with U and W; what every pair of places costs
depends on lengths, and is in `flops_per_step` alone.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from moejax import config as config_lib
from moejax import experts, moe, router
from moejax.models import gnmt, layers, lstm_lm, softmax


class Count(NamedTuple):
  """Of a whole model.

  Attributes:
    parameters: entries of all matrices but embedding and softmax, the paper's
      number.
    ops: multiply-adds a timestep in the forward pass, embedding and softmax
      excluded: the paper's ops/timestep.
    biases: entries of all vectors.
    embedding: entries of the tables of word vectors.
    softmax: entries of the output layer's table.
    gates: of the ops those of routers.
    attention: of the ops those of attention.
  """

  parameters: int
  ops: int
  biases: int
  embedding: int
  softmax: int
  gates: int
  attention: int = 0

  @property
  def total(self) -> int:
    """Of all arrays that training changes."""
    return self.parameters + self.biases + self.embedding + self.softmax


def count(config: config_lib.Config, vocab_size: int) -> Count:
  """Counts the model of a config with a vocabulary of this size.

  Raises:
    ValueError: the config describes no model, or one without a formula here.
  """
  model = config_lib.model(config, vocab_size)
  parts = _look_up(_MODELS, model)(model)
  table = layers.table_rows(vocab_size, model.vocab_multiple) * model.width
  cost = _add(*parts)
  return Count(
    parameters=cost.parameters,
    ops=cost.ops,
    biases=cost.biases,
    embedding=len(parts) * table,
    softmax=table,
    gates=cost.gates,
    attention=cost.attention,
  )


def flops_per_step(config: config_lib.Config, vocab_size: int) -> int:
  """Counts what a training step needs to compute, in floating-point operations.

  Two for a multiply-add; the backward pass is twice the forward pass. Of every
  place for a word, embedding excluded, softmax included: of the classes that
  its samples are at most, and its target, where it is sampled. Of a translation
  every place of a row attends to every place of its source, whatever pairs they
  belong to. Nothing for slots that stay empty, for dispatch, or for what is
  computed a second time to save memory.
  """
  model = config_lib.model(config, vocab_size)
  target, *source = _look_up(_MODELS, model)(model)
  # A translation model takes no samples.
  samples, length = getattr(model, "num_samples", 0), config.data.row_length
  classes = softmax.most_distinct(samples, vocab_size) + 1
  ops = target.ops + model.width * (classes if samples else vocab_size)
  ops *= length
  for encoder in source:
    places = config.data.source_length
    # Of a score and of a context, one entry each.
    pair = model.attention.width + model.width
    ops += places * (encoder.ops + length * pair)
  return 6 * ops * config.data.batch_size


class _Cost(NamedTuple):
  """Of one layer; see `Count`."""

  parameters: int
  ops: int
  biases: int = 0
  gates: int = 0
  attention: int = 0


def _add(*costs: _Cost) -> _Cost:
  return _Cost(*map(sum, zip(*costs, strict=True)))


def _language_model(model: lstm_lm.LSTMLM) -> tuple[_Cost]:
  """What reads the one kind of words there is."""
  return (_stack(model.layers, model.width),)


def _translation_model(model: gnmt.GNMT) -> tuple[_Cost, _Cost]:
  """Decoder, which reads the target, and encoder, which reads the source.

  The first layer of the recurrent wiring reads a context beside its input.
  """
  width = model.width
  first, *rest = model.decoder
  inputs = 2 * width if model.wiring == "recurrent" else width
  entries = width * model.attention.width
  query = _Cost(entries, entries, attention=entries)
  decoder = _add(_lstm(first, inputs), _stack(rest, width), query)
  keys = query._replace(biases=model.attention.width)
  return decoder, _add(_stack(model.encoder, width), keys)


def _stack(built: Iterable[nn.Module], width: int) -> _Cost:
  none = _Cost(0, 0)
  return _add(
    none, *(_look_up(_LAYERS, layer)(layer, width) for layer in built)
  )


def _lstm(layer: layers.LSTM, width: int) -> _Cost:
  """4 (D + O) H, and H O for a projection; O is what recurs."""
  out = layer.width
  units = out if layer.hidden is None else layer.hidden
  matrices = 4 * (width + out) * units
  if layer.hidden is not None:
    matrices += units * out
  return _Cost(matrices, matrices, biases=4 * units)


def _mixture(layer: moe.MoE, width: int) -> _Cost:
  """The gate, and k of E experts, all as busy; rounded down if they differ."""
  gate = _gate(layer.router, width)
  parameters = _experts(layer.experts, width)
  active = gate.active * parameters // layer.router.num_experts
  return _Cost(
    gate.matrices + parameters,
    gate.matrices + active,
    gate.biases,
    gate.matrices,
  )


def _two_levels(layer: moe.HierarchicalMoE, width: int) -> _Cost:
  """The primary gate, and P mixtures of which a token visits k."""
  gate, groups = _gate(layer.primary, width), layer.primary.num_experts
  one = _mixture(layer.secondary, width)
  return _Cost(
    gate.matrices + groups * one.parameters,
    gate.matrices + gate.active * one.ops,
    gate.biases + groups * one.biases,
    gate.matrices + gate.active * one.gates,
  )


def _one_expert(layer: moe.OneExpert, width: int) -> _Cost:
  parameters = _experts(layer.experts, width)
  return _Cost(parameters, parameters)


class _Gate(NamedTuple):
  """What a router has: entries of matrices and vectors; experts a token."""

  matrices: int
  biases: int
  active: int


def _gate(gating: router.Router, width: int) -> _Gate:
  matrices, vectors, active = _look_up(_ROUTERS, gating)
  num_experts = gating.num_experts
  return _Gate(
    matrices * width * num_experts, vectors * num_experts, active(gating)
  )


def _experts(module: nn.Module, width: int) -> int:
  return _look_up(_EXPERTS, module)(module, width)


def _feed_forward(module: experts.FeedForward, width: int) -> int:
  """E (D F + F F' + ... + F'' D), and E D F where gated."""
  widths = (width, *module.widths, width)
  entries = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
  if module.gated:
    entries += width * widths[1]
  return module.num_experts * entries


def _linear(module: experts.Linear, width: int) -> int:
  return module.num_experts * width * width


def _identity(module: experts.Identity, width: int) -> int:
  del module, width
  return 0


def _mixed(module: experts.Mixed, width: int) -> int:
  return sum(_experts(kind, width) for kind in module.kinds)


def _look_up(formulas: Mapping[type, Any], module: nn.Module) -> Any:
  if type(module) not in formulas:
    known = ", ".join(kind.__name__ for kind in formulas)
    raise ValueError(
      f"no formula for the cost of {type(module).__name__}, only of {known};"
      " add one to moejax/cost.py."
    )
  return formulas[type(module)]


# Of each kind of model what reads the target, and what reads the source.
_MODELS: Mapping[type, Callable[..., tuple[_Cost, ...]]] = {
  lstm_lm.LSTMLM: _language_model,
  gnmt.GNMT: _translation_model,
}
_LAYERS: Mapping[type, Callable[..., _Cost]] = {
  layers.LSTM: _lstm,
  moe.MoE: _mixture,
  moe.HierarchicalMoE: _two_levels,
  moe.OneExpert: _one_expert,
}
_EXPERTS: Mapping[type, Callable[..., int]] = {
  experts.FeedForward: _feed_forward,
  experts.Linear: _linear,
  experts.Identity: _identity,
  experts.Mixed: _mixed,
}
# Matrices [D, E] and vectors [E] of each router, and experts of a token, which
# are an average where experts choose.
_ROUTERS: Mapping[type, tuple[int, int, Callable[[Any], int]]] = {
  router.Softmax: (1, 0, operator.attrgetter("num_experts")),
  router.TopK: (1, 0, operator.attrgetter("k")),
  router.NoisyTopK: (2, 0, operator.attrgetter("k")),
  router.Balanced: (1, 1, operator.attrgetter("k")),
  router.Switch: (1, 0, lambda gating: 1),
  router.GShardTop2: (1, 0, lambda gating: 2),
  router.ExpertChoice: (1, 0, operator.attrgetter("k")),
  router.Hash: (0, 0, operator.attrgetter("k")),
  router.Sigmoid: (1, 1, operator.attrgetter("k")),
}
