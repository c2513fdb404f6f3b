"""What a model costs; nothing is allocated, whatever its size.

The convention gives the paper's Tables 7 and 8 digit by digit: every entry of a
matrix is a parameter, and a multiply-add of every token that meets the matrix.
A router counts W_g and W_noise, an LSTM its projection. A token meets k/E of a
mixture's experts, and all that it shares. Biases (docs/decisions.md, 17),
activations and dispatch are free, and capacity does not matter.

A timestep of a translation is one word of the source and one of the target. Of
attention it has the products with matrices; what every pair of positions costs
depends on lengths, and only `flops_per_word` counts it.
"""

import fractions
import math
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax

from moejax import config as config_lib
from moejax.models import softmax
from moejax.models.attention import Attention
from moejax.models.transformer import LatentAttention, MultiHeadAttention
from moejax.moe import HierarchicalMoE, MoE
from moejax.routing import Routing

# A part of a mixture -> the router that chooses among its copies.
_ROUTER_OF = {"experts": "router", "secondary": "primary"}
# What a decoder's attention makes of states of the source, once for all words.
_OF_SOURCE = ("w_key", "w_value", "w_latent", "w_rotary")


class Count(NamedTuple):
  """What a whole model has and computes."""

  # Entries of all matrices but embedding and softmax, the paper's number.
  parameters: int
  # Multiply-adds of a timestep in the forward pass, embedding and softmax
  # excluded: the paper's ops/timestep.
  ops: int
  biases: int  # Entries of all vectors.
  embedding: int  # Entries of the tables of word vectors.
  softmax: int  # Entries of the output layer's table.
  gates: int  # The part of `ops` in routers.
  attention: int  # The part of `ops` in attention.
  source: int  # The part of `ops` that a word of a translation's source costs.
  # The part of `ops` in experts of mixtures; a dense layer is none.
  experts: int
  routed: int  # The part of `experts` that routers send tokens to.
  routed_parameters: int  # The part of `parameters` in these.
  expert_io: int  # Numbers that these read and return in a timestep.
  # Multiply-adds with the positions that a word attends to, every one of its
  # row or of its row's source, whatever sentence that is of; not among `ops`.
  positions: int
  source_positions: int  # The same of a word of the source.

  @property
  def total(self) -> int:
    """Of all arrays that training changes."""
    return self.parameters + self.biases + self.embedding + self.softmax

  @property
  def ops_per_io(self) -> float | None:
    """Ratio of an expert's computation to its input and output (sec. 3.2).

    Experts wait for the network where it is below the ratio of what devices
    compute to what they exchange. With one hidden layer it is that layer's
    size. None without experts.
    """
    return self.routed / self.expert_io if self.expert_io else None


def count(experiment: config_lib.Experiment, vocab_size: int) -> Count:
  """Counts the model of a config with a vocabulary of this size.

  ValueError where the config describes no model.
  """
  model = experiment.model(vocab_size)
  return count_model(model, experiment.shapes, method="loss")


def count_model(model: nn.Module, *inputs: object, method: str) -> Count:
  """Counts a module from shapes: of its parameters, and of a method's inputs.

  Its children "embed..." are embeddings, "head" is the softmax, "encoder..."
  reads the source.
  """
  # By the paths of routers: how many experts a token is sent to, and which
  # share of all. By those of mixtures: how many numbers go in and come out.
  active, shares, widths = {}, {}, {}
  positions = {}  # By paths of attention.

  def note(call, args, kwargs, context):
    result, module = call(*args, **kwargs), context.module
    is_mixture = isinstance(module, MoE | HierarchicalMoE)
    if is_mixture and context.method_name == "__call__":
      widths[module.path] = args[0].shape[-1] + result.shape[-1]
    # Of a score and of a mean, an entry each for every position.
    if isinstance(module, MultiHeadAttention | LatentAttention):
      if context.method_name == "__call__":
        ops = module.ops_per_position(args[0].shape[-1])
        positions[module.path] = ops * args[1].shape[1]
    elif isinstance(module, Attention) and context.method_name == "remember":
      _, M, D = args[0].shape
      positions[module.path] = (module.width + D) * M
    if isinstance(result, Routing):
      tokens, num_experts = result.logits.shape[-2:]
      edges = result.assignment.expert.shape[-1]
      # Experts that choose round what they take; k is what they mean.
      k = getattr(module, "k", fractions.Fraction(edges, tokens))
      active[module.path] = k
      shares[module.path] = fractions.Fraction(k) / num_experts
    return result

  keys = {n: jax.random.key(0) for n in ("params", "router", "dropout")}
  with nn.intercept_methods(note):
    shapes = jax.eval_shape(
      lambda inputs: model.init(keys, *inputs, method=method), inputs
    )
  sums = dict.fromkeys(Count._fields, 0)
  repeats = {}  # By paths of what is within `nn.scan`, as `Blocks` uses it.
  flat = flax.traverse_util.flatten_dict(shapes["params"])
  for path, boxed in flat.items():
    leaf, where = nn.unbox(boxed), path[0]
    size, rank = math.prod(leaf.shape), len(leaf.shape)
    if getattr(boxed, "names", ())[:1] == ("layers",):
      rank -= 1
      repeats |= dict.fromkeys(
        (path[:depth] for depth in range(len(path))), leaf.shape[0]
      )
    if where == "head" or where.startswith("embed"):
      sums["softmax" if where == "head" else "embedding"] += size
      continue
    # A single expert needs no router.
    of_token = [
      shares.get((*path[:depth], _ROUTER_OF[name]), 1)
      for depth, name in enumerate(path)
      if name in _ROUTER_OF
    ]
    # Each level of a mixture puts an axis in front; attention's v is a column,
    # and what relative positions add is looked up.
    if rank - len(of_token) < 2 or path[-1] in ("v", "distances"):
      sums["biases"] += size
      continue
    ops = size * math.prod(of_token)
    is_source = where.startswith("encoder") or path == ("attention", "u")
    is_source |= "source_attention" in path and path[-1] in _OF_SOURCE
    sums["parameters"] += size
    sums["ops"] += ops
    sums["gates"] += ops * bool({"router", "primary"} & {*path})
    sums["attention"] += ops * bool({"attention", "source_attention"} & {*path})
    sums["source"] += ops * is_source
    routed = any(
      name == "experts" and (*path[:depth], "router") in shares
      for depth, name in enumerate(path)
    )
    sums["routed"] += ops * routed
    sums["routed_parameters"] += size * routed
    sums["experts"] += ops * (routed or "shared" in path)
  for path, width in widths.items():
    levels = ("router",), ("primary",), ("secondary", "router")
    routers = [(*path, *level) for level in levels if (*path, *level) in active]
    # A mixture that is an expert reads what that one does.
    if routers and "experts" not in path:
      of_token = math.prod(active[each] for each in routers)
      sums["expert_io"] += width * repeats.get(path, 1) * of_token
  for path, ops in positions.items():
    side = "source_" if path[0].startswith("encoder") else ""
    sums[f"{side}positions"] += ops * repeats.get(path, 1)
  return Count(**{name: int(value) for name, value in sums.items()})


def experts_share(
  experiment: config_lib.Experiment, vocab_size: int, count: Count
) -> float:
  """Returns the experts' part of a timestep in training, softmax included."""
  model = experiment.model(vocab_size)
  return count.experts / (count.ops + _softmax_ops(model, vocab_size))


def flops_per_word(
  experiment: config_lib.Experiment, vocab_size: int, count: Count
) -> tuple[int, int]:
  """Counts what training needs to compute, in floating-point operations.

  A multiply-add is two, and the backward pass costs twice the forward pass (the
  TFLOPS of sec. 5.1). Softmax and positions are included, embedding excluded;
  where the softmax is sampled, it has the target and as many classes as the
  draws are of in the mean. Empty slots, dispatch, padding, and what is computed
  again to save memory count nothing.

  Returned are those of a word of the target, and of one of the source.
  """
  model = experiment.model(vocab_size)
  target = count.ops - count.source + _softmax_ops(model, vocab_size)
  target += count.positions
  return 6 * target, 6 * (count.source + count.source_positions)


def _softmax_ops(model: nn.Module, vocab_size: int) -> int:
  classes = vocab_size
  if samples := getattr(model, "num_samples", 0):
    classes = round(softmax.mean_distinct(samples, vocab_size)) + 1
  return model.width * classes
