"""Models from the plain values of a config, by name.

What a factory here takes as `**fields` are the fields of the module it returns,
whose docstring says what they are and what they are by default.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from moejax import named
from moejax.dispatch import DISPATCH
from moejax.experts import FeedForward, Identity, Linear, Mixed
from moejax.models.attention import FORMS, Attention
from moejax.models.gnmt import GNMT, WIRINGS
from moejax.models.layers import LSTM, BidirectionalLSTM
from moejax.models.lstm_lm import LSTMLM
from moejax.models.recurrent import RecurrentMoE
from moejax.moe import HierarchicalMoE, MoE
from moejax.named import Names, Range, Section, Size
from moejax.router import ROUTERS, Balanced, Single
from moejax.routing import SCOPES

ACTIVATIONS = {n: getattr(nn, n) for n in ("relu", "gelu", "silu", "tanh")}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_Build = Callable[..., nn.Module]


@named.fields_of(FeedForward, num_experts=Size, hidden=Size | Sequence[Size])
def _feed_forward(
  activation: Annotated[str, Names(ACTIVATIONS)] = "relu", **fields: Any
) -> FeedForward:
  """Makes a FeedForward.

  Args:
    activation: after every product but the last.
  """
  return FeedForward(activation=ACTIVATIONS[activation], **fields)


@named.fields_of(Linear, num_experts=Size)
def _linear(out=None, **fields: Any) -> Linear:
  """Makes a Linear, whose output is as wide as its input: there are residuals.

  Args:
    num_experts: how many there are.
  """
  return Linear(**fields)


# The kinds that are missing here take a module, which no config can hold.
EXPERTS = {
  "feed_forward": _feed_forward,
  "linear": _linear,
  "identity": named.limited(Identity, num_experts=Size),
}
_Experts = Annotated[_Build, Section(EXPERTS, given=("num_experts",))]
_Routers = ROUTERS | {
  "balanced": named.limited(
    Balanced,
    over=Annotated[str, Names(SCOPES)],
    group_factor=Annotated[float, Range(1)],
  )
}
_Router = Annotated[_Build, Section(_Routers, given=("num_experts",))]


@named.fields_of(
  MoE,
  group_size=Size | None,
  dispatch=Annotated[str, Names(("auto", *DISPATCH))],
)
def _moe(
  num_experts: Size,
  router: _Router,
  experts: _Experts | Sequence[Annotated[Any, Section(EXPERTS)]],
  **fields: Any,
) -> MoE:
  """Makes a MoE.

  Args:
    num_experts: how many there are.
    router: chooses among them.
    experts: of one kind, or a list of several, each with its own num_experts.
  """
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


@named.fields_of(
  HierarchicalMoE,
  group_size=Size | None,
  dispatch=Annotated[str, Names(("auto", *DISPATCH))],
)
def _hierarchical_moe(
  num_experts: Size,
  num_groups: Size,
  primary: _Router,
  secondary: Annotated[_Build, Section(_moe, given=("num_experts",))],
  **fields: Any,
) -> HierarchicalMoE:
  """Makes a HierarchicalMoE.

  Args:
    num_experts: how many there are, in all groups.
    num_groups: groups of experts, P.
    primary: router between the groups.
  """
  if num_experts % num_groups:
    raise ValueError(
      f"config.model.hierarchical_moe: {num_groups} groups do not divide"
      f" {num_experts} experts; choose a num_groups that does."
    )
  within = secondary(num_experts=num_experts // num_groups)
  return HierarchicalMoE(primary(num_experts=num_groups), within, **fields)


@named.fields_of(
  MoE,
  group_size=Size | None,
  dispatch=Annotated[str, Names(("auto", *DISPATCH))],
)
def _recurrent_moe(
  width,
  num_experts: Size,
  router: _Router,
  segment: Size | None = None,
  experts=None,  # are matrices
  recompute=False,  # of no hidden layer
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


_LSTM = named.limited(LSTM, hidden=Size | None)


class _Layers(NamedTuple):
  """Sections of layers, by the names that stacks are lists of.

  Attributes:
    lstm: an LSTM.
    moe: a mixture of experts.
    hierarchical_moe: a mixture of two levels.
    one_expert: the single expert of MoE-1-Wide and MoE-1-Deep.
    recurrent_moe: an LSTM whose matrices are a mixture; of language models.
  """

  lstm: Annotated[_Build, Section(_LSTM, given=("width",))] | None = None
  moe: Annotated[_Build, Section(_moe)] | None = None
  hierarchical_moe: Annotated[_Build, Section(_hierarchical_moe)] | None = None
  one_expert: _Experts | None = None
  recurrent_moe: (
    Annotated[_Build, Section(_recurrent_moe, given=("width",))] | None
  ) = None

  def stack(self, names: Iterable[str], width: int) -> tuple[nn.Module, ...]:
    """Builds a layer for each name."""
    builders = {
      "lstm": lambda: self.lstm(width=width),
      "bidirectional_lstm": lambda: BidirectionalLSTM(
        self.lstm(width=width), self.lstm(width=width)
      ),
      "moe": self.moe,
      "hierarchical_moe": self.hierarchical_moe,
      "recurrent_moe": lambda: self.recurrent_moe(width=width),
      "one_expert": lambda: MoE(Single(), self.one_expert(num_experts=1)),
    }
    return tuple(builders[name]() for name in names)


_Stack = Sequence[Annotated[str, Names(_Layers._fields)]]
# A recurrent mixture has no step of decoding, a layer that reads the future
# cannot have one.
_DECODER = tuple(n for n in _Layers._fields if n != "recurrent_moe")
_Decoder = Sequence[Annotated[str, Names(_DECODER)]]
_Encoder = Sequence[Annotated[str, Names((*_DECODER, "bidirectional_lstm"))]]
_DType = Annotated[str, Names(DTYPES)]
_SHARED = {
  "width": Size,
  "dropout": Annotated[float, Range(0, 1)],
  "vocab_multiple": Size,
}


def _take_layers(fields: dict[str, Any]) -> _Layers:
  """Takes the sections of layers out of the fields of a model."""
  return _Layers(**{name: fields.pop(name) for name in _Layers._fields})


@named.fields_of(
  _Layers, LSTMLM, num_samples=Annotated[int, Range(0)], **_SHARED
)
def _lstm_lm(
  vocab_size, layers: _Stack, dtype: _DType = "float32", **fields: Any
) -> LSTMLM:
  """Makes an LSTMLM.

  Args:
    layers: sections of layers by name, one after the other.
  """
  stack = _take_layers(fields).stack(layers, fields["width"])
  return LSTMLM(vocab_size, layers=stack, dtype=DTYPES[dtype], **fields)


@named.fields_of(Attention, width=Size, form=Annotated[str, Names(FORMS)])
def _attention(
  wiring: Annotated[str, Names(WIRINGS)] = "recurrent", **fields: Any
) -> tuple[Attention, str]:
  """Makes an Attention.

  Args:
    wiring: who reads the contexts; "every_layer" is GNMT's, and "parallel" asks
      for all of them at once.
  """
  return Attention(**fields), wiring


@named.fields_of(_Layers, GNMT, residual_from=Size, **_SHARED)
def _gnmt(
  vocab_size,
  encoder: _Encoder,
  decoder: _Decoder,
  attention: Annotated[Callable, Section(_attention)] | None = None,
  dtype: _DType = "float32",
  wiring=None,  # is one of the section's
  **fields: Any,
) -> GNMT:
  """Makes a GNMT.

  Args:
    encoder: sections of layers by name, one after the other; what
      "bidirectional_lstm" is made of says the section of the LSTM.
    decoder: the same; the first is an LSTM.
  """
  if tuple(decoder[:1]) != ("lstm",):
    raise ValueError(
      f"config.model.decoder is {tuple(decoder)}, but it is the decoder's first"
      " LSTM that attends to the source; let it begin with 'lstm'."
    )
  layers, (attends, wiring) = _take_layers(fields), attention()
  return GNMT(
    vocab_size,
    encoder=layers.stack(encoder, fields["width"]),
    decoder=layers.stack(decoder, fields["width"]),
    attention=attends,
    wiring=wiring,
    dtype=DTYPES[dtype],
    **fields,
  )


MODELS = {"gnmt": _gnmt, "lstm_lm": _lstm_lm}
