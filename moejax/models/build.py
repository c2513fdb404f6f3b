"""Models by name, built from the plain values of a config: see `MODELS`.

What a factory here takes as `**fields` are the fields of the module it returns,
whose docstring says what they are and what they are by default.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import flax.linen as nn

from moejax import config_fields
from moejax.config_fields import Names, Range, Section, Size
from moejax.dispatch import DISPATCH
from moejax.experts import FeedForward, Identity, Linear, Mixed
from moejax.models.attention import Attention
from moejax.models.gnmt import GNMT
from moejax.models.layers import LSTM, BidirectionalLSTM
from moejax.models.lstm_lm import LSTMLM
from moejax.models.recurrent import RecurrentMoE
from moejax.models.transformer import (
  Blocks,
  LatentAttention,
  MultiHeadAttention,
  PairTransformer,
  Transformer,
)
from moejax.moe import HierarchicalMoE, MoE
from moejax.router import ROUTERS, Balanced, Sigmoid, Single
from moejax.routing import SCOPES

_Build = Callable[..., nn.Module]

# -- layers -------------------------------------------------------------------

ACTIVATIONS = {n: getattr(nn, n) for n in ("relu", "gelu", "silu", "tanh")}


@config_fields.fields_of(
  FeedForward, num_experts=Size, hidden=Size | Sequence[Size]
)
def _feed_forward(
  activation: Annotated[str, Names(ACTIVATIONS)] = "relu", **fields: Any
) -> FeedForward:
  return FeedForward(activation=ACTIVATIONS[activation], **fields)


# The kinds that are missing here take a module, which no config can hold. There
# are residuals: what comes out is as wide as what goes in.
EXPERTS = {
  "feed_forward": _feed_forward,
  "linear": config_fields.limited(Linear, num_experts=Size, out=None),
  "identity": config_fields.limited(Identity, num_experts=Size),
}
_Experts = Annotated[_Build, Section(EXPERTS, given=("num_experts",))]
_Routers = ROUTERS | {
  "balanced": config_fields.limited(
    Balanced,
    over=Annotated[str, Names(SCOPES)],
    group_factor=Annotated[float, Range(1)],
    learned_by=Annotated[str, Names(("threshold", "quantile"))],
  ),
  "sigmoid": config_fields.limited(
    Sigmoid, learned_by=Annotated[str, Names(("bias", "quantile"))]
  ),
}
_Router = Annotated[_Build, Section(_Routers, given=("num_experts",))]

_Shared = Annotated[_Build, Section(EXPERTS, optional=True)] | None

_fields_of = functools.partial(
  config_fields.fields_of,
  group_size=Size | None,
  dispatch=Annotated[str, Names(("auto", *DISPATCH))],
)


@_fields_of(MoE, exchange_parts=Size)
def _moe(
  num_experts: Size,
  router: _Router,
  experts: _Experts | Sequence[Annotated[Any, Section(EXPERTS)]],
  shared: _Shared = None,
  **fields: Any,
) -> MoE:
  """Makes a MoE.

  Args:
    num_experts: how many there are.
    router: chooses among them.
    experts: of one kind, or a list of several, each with its own num_experts.
    shared: experts beside these that every token visits.
  """
  fields["shared"] = shared and shared()
  if isinstance(experts, tuple):
    built = Mixed(tuple(build() for build in experts))
    if built.num_experts != num_experts:
      raise ValueError(
        f"`experts` lists {built.num_experts} experts, but num_experts is"
        f" {num_experts}; make the two agree."
      )
  else:
    built = experts(num_experts=num_experts)
  return MoE(router(num_experts=num_experts), built, **fields)


@_fields_of(HierarchicalMoE)
def _hierarchical_moe(
  num_experts: Size,
  num_groups: Size,
  primary: _Router,
  secondary: Annotated[_Build, Section(_moe, given=("num_experts",))],
  shared: _Shared = None,
  **fields: Any,
) -> HierarchicalMoE:
  """Makes a HierarchicalMoE.

  Args:
    num_experts: how many there are, in all groups.
    num_groups: groups of experts, P.
    primary: router between the groups.
    shared: experts beside these that every token visits.
  """
  fields["shared"] = shared and shared()
  if num_experts % num_groups:
    raise ValueError(
      f"config.model.hierarchical_moe: {num_groups} groups do not divide"
      f" {num_experts} experts; choose a num_groups that does."
    )
  within = secondary(num_experts=num_experts // num_groups)
  return HierarchicalMoE(primary(num_experts=num_groups), within, **fields)


# Its experts are matrices, and have no hidden layer to recompute.
@_fields_of(MoE, exchange_parts=Size, recompute=None)
def _recurrent_moe(
  width,
  num_experts: Size,
  router: _Router,
  segment: Size | None = None,
  **fields: Any,
) -> RecurrentMoE:
  """Makes a RecurrentMoE.

  Args:
    num_experts: how many there are.
    router: chooses among them.
    segment: time steps that the backward pass runs again at once; None keeps
      what all of them computed.
    group_size: rows of a batch that are routed together at a time step; None
      takes all rows as one group.
  """
  cells = Linear(num_experts, 4 * width)
  mixture = MoE(router(num_experts=num_experts), cells, **fields)
  return RecurrentMoE(width, mixture, segment)


def _section(factory, line, *given):
  return Annotated[_Build, Section(factory, given), line] | None


# Sections of a model, by the names that its stacks are lists of.
LAYERS = {
  "lstm": _section(LSTM, "an LSTM", "width"),
  "moe": _section(_moe, "a mixture of experts"),
  "hierarchical_moe": _section(_hierarchical_moe, "a mixture of two levels"),
  "one_expert": _section(
    EXPERTS, "the single expert of MoE-1-Wide and MoE-1-Deep", "num_experts"
  ),
  "recurrent_moe": _section(
    _recurrent_moe, "an LSTM whose matrices are a mixture", "width"
  ),
}


def _alone(expert: _Build) -> _Build:
  """Makes a layer of a single expert, which is always on."""
  return lambda: MoE(Single(), expert(num_experts=1))


def _stacks(
  fields: dict[str, Any], *stacks: Iterable[str]
) -> list[tuple[nn.Module, ...]]:
  """Takes layers' sections out of a model's fields; builds stacks of layers."""
  of = {name: fields.pop(name) for name in LAYERS}
  for name in ("lstm", "recurrent_moe"):
    of[name] = functools.partial(of[name], width=fields["width"])
  lstm = of["lstm"]
  of["bidirectional_lstm"] = lambda: BidirectionalLSTM(lstm(), lstm())
  of["one_expert"] = _alone(of["one_expert"])
  return [tuple(of[name]() for name in stack) for stack in stacks]


# -- models -------------------------------------------------------------------


@config_fields.fields_of(LSTMLM, **LAYERS)
def _lstm_lm(
  vocab_size, layers: Sequence[Annotated[str, Names(LAYERS)]], **fields: Any
) -> LSTMLM:
  """Makes an LSTMLM.

  Args:
    layers: sections of layers by name, one after the other.
  """
  (stack,) = _stacks(fields, layers)
  return LSTMLM(vocab_size, layers=stack, **fields)


_ENCODER = (*LAYERS, "bidirectional_lstm")


@config_fields.fields_of(GNMT, **LAYERS)
def _gnmt(
  vocab_size,
  encoder: Sequence[Annotated[str, Names(_ENCODER)]],
  decoder: Sequence[Annotated[str, Names(LAYERS)]],
  attention: Annotated[Callable, Section(Attention)] | None = None,
  **fields: Any,
) -> GNMT:
  """Makes a GNMT.

  Args:
    encoder: sections of layers by name, one after the other; what
      "bidirectional_lstm" is made of says the section of the LSTM.
    decoder: the same; the first is an LSTM.
  """
  if decoder[:1] != ("lstm",):
    raise ValueError(
      f"config.model.decoder is {decoder}, but it is the decoder's first LSTM"
      " that attends to the source; let it begin with 'lstm'."
    )
  stacks = _stacks(fields, encoder, decoder)
  return GNMT(vocab_size, fields.pop("width"), *stacks, attention(), **fields)


# Feed-forward layers of a Transformer's blocks.
_FEED_FORWARD = {
  "dense": _section(
    EXPERTS, "a feed-forward layer without a mixture", "num_experts"
  ),
  "moe": LAYERS["moe"],
  "hierarchical_moe": LAYERS["hierarchical_moe"],
}
ATTENTION = {"multi_head": MultiHeadAttention, "latent": LatentAttention}
_Pattern = Sequence[Annotated[str, Names(_FEED_FORWARD)]]


@config_fields.fields_of(
  Blocks, causal=None, reads_source=None, **_FEED_FORWARD
)
def _blocks(
  attention: Annotated[_Build, Section(ATTENTION)],
  pattern: _Pattern,
  first: _Pattern = (),
  **fields: Any,
) -> Blocks:
  """Makes Blocks.

  Args:
    attention: of every block.
    pattern: sections of feed-forward layers by name, one block after the other,
      again and again.
    first: the same, of the first blocks, which do not repeat.
  """
  if not pattern:
    raise ValueError(
      "a pattern of blocks is empty; give at least one of"
      f" {', '.join(_FEED_FORWARD)}."
    )
  of = {name: fields.pop(name) for name in _FEED_FORWARD}
  of["dense"] = _alone(of["dense"])
  for name in {*pattern, *first}:
    of[name]()  # Refuses here what the blocks would, layer by layer, later.
  layers = (tuple(of[name] for name in names) for names in (pattern, first))
  return Blocks(fields.pop("num_layers"), attention, *layers, **fields)


@config_fields.fields_of(Transformer)
def _transformer(
  vocab_size, blocks: Annotated[_Build, Section(_blocks)], **fields: Any
) -> Transformer:
  """Makes a Transformer.

  Args:
    blocks: of attention and feed-forward layers.
  """
  return Transformer(vocab_size, blocks=blocks(), **fields)


@config_fields.fields_of(PairTransformer)
def _pair_transformer(
  vocab_size,
  encoder: Annotated[_Build, Section(_blocks)],
  decoder: Annotated[_Build, Section(_blocks)],
  **fields: Any,
) -> PairTransformer:
  """Makes a PairTransformer.

  Args:
    encoder: blocks that see a whole source.
    decoder: blocks that see what is written, and the source.
  """
  sides = encoder(causal=False), decoder(reads_source=True)
  return PairTransformer(vocab_size, fields.pop("width"), *sides, **fields)


def _causal(factory: _Build) -> _Build:
  """Refuses routers that look ahead, unless told not to."""

  @config_fields.fields_of(factory)
  def make(looks_ahead: bool = False, **fields: Any) -> nn.Module:
    """Makes a model.

    Args:
      looks_ahead: whether a router may choose by later tokens in evaluation,
        too. Perplexity then tells nothing about the next word, and the model
        writes no text.
    """
    model = factory(**fields)
    if not looks_ahead:
      try:
        model.for_decoding()
      except ValueError as error:
        raise ValueError(
          f"{error} Or set config.model.looks_ahead, and trust no perplexity."
        ) from None
    return model

  return make


# What `config.model.kind` names: a factory that takes the fields of the section
# and, from the corpus, the size of the vocabulary.
MODELS = {
  "gnmt": _causal(_gnmt),
  "lstm_lm": _causal(_lstm_lm),
  "pair_transformer": _causal(_pair_transformer),
  "transformer": _causal(_transformer),
}
# Those that read pairs of sentences.
TRANSLATORS = ("gnmt", "pair_transformer")
