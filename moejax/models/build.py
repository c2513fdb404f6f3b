"""Models from the plain values of a config, by name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moejax import named
from moejax.experts import EXPERTS
from moejax.models.attention import FORMS, Attention
from moejax.models.gnmt import GNMT, WIRINGS
from moejax.models.layers import LSTM
from moejax.models.lstm_lm import LSTMLM
from moejax.moe import HierarchicalMoE, MoE, OneExpert
from moejax.router import ROUTERS


def _lstm_lm(
  vocab_size,
  width: int,
  layers: Iterable[str],
  dropout: float = 0.0,
  num_samples: int = 0,
  lstm: Mapping[str, Any] | None = None,
  moe: Mapping[str, Any] | None = None,
  hierarchical_moe: Mapping[str, Any] | None = None,
  one_expert: Mapping[str, Any] | None = None,
  dtype: str = "float32",
  vocab_multiple: int = 1,
) -> LSTMLM:
  if num_samples < 0:
    raise ValueError(
      f"config.model.num_samples is {num_samples}; give 1 or more, or 0 for"
      " the full softmax."
    )
  make = _layer_maker(width, lstm, moe, hierarchical_moe, one_expert)
  return LSTMLM(
    vocab_size,
    width,
    make(layers, "config.model.layers"),
    num_samples=num_samples,
    **_shared(dropout, dtype, vocab_multiple),
  )


def _gnmt(
  vocab_size,
  width: int,
  encoder: Iterable[str],
  decoder: Iterable[str],
  attention: Mapping[str, Any] | None = None,
  dropout: float = 0.0,
  lstm: Mapping[str, Any] | None = None,
  moe: Mapping[str, Any] | None = None,
  hierarchical_moe: Mapping[str, Any] | None = None,
  one_expert: Mapping[str, Any] | None = None,
  dtype: str = "float32",
  vocab_multiple: int = 1,
) -> GNMT:
  make = _layer_maker(width, lstm, moe, hierarchical_moe, one_expert)
  layers = make(decoder, "config.model.decoder")
  if not layers or not isinstance(layers[0], LSTM):
    raise ValueError(
      f"config.model.decoder is {tuple(decoder)}, but it is the decoder's first"
      " LSTM that attends to the source; let it begin with 'lstm'."
    )
  attends, wiring = named.make(
    _attention, attention or {}, "config.model.attention"
  )
  return GNMT(
    vocab_size,
    width,
    make(encoder, "config.model.encoder"),
    layers,
    attends,
    wiring,
    **_shared(dropout, dtype, vocab_multiple),
  )


def _attention(
  width: int = 512, form: str = "product", wiring: str = "recurrent"
) -> tuple[Attention, str]:
  where = "config.model.attention"
  named.sizes(where, width=width)
  named.known(wiring, WIRINGS, f"{where}.wiring")
  return Attention(width, named.known(form, FORMS, f"{where}.form")), wiring


def _shared(dropout: float, dtype: str, vocab_multiple: int) -> dict[str, Any]:
  """Checks the fields that all models have."""
  if not 0 <= dropout < 1:
    raise ValueError(
      f"config.model.dropout is {dropout}; give 0 or more, and less than 1."
    )
  named.sizes("config.model", vocab_multiple=vocab_multiple)
  return {
    "dropout": dropout,
    "dtype": DTYPES[named.known(dtype, DTYPES, "config.model.dtype")],
    "vocab_multiple": vocab_multiple,
  }


def _layer_maker(
  width: int,
  lstm: Mapping[str, Any] | None,
  moe: Mapping[str, Any] | None,
  hierarchical_moe: Mapping[str, Any] | None,
  one_expert: Mapping[str, Any] | None,
) -> Callable[[Iterable[str], str], tuple[nn.Module, ...]]:
  """Returns a function (names of layers, where they stand) -> layers."""
  named.sizes("config.model", width=width)
  builders = {
    "lstm": lambda: named.make(
      _lstm, lstm or {}, "config.model.lstm", width=width
    ),
    "moe": lambda: named.make(
      _moe, moe or {}, "config.model.moe", path="config.model.moe"
    ),
    "hierarchical_moe": lambda: named.make(
      _hierarchical_moe, hierarchical_moe or {}, "config.model.hierarchical_moe"
    ),
    "one_expert": lambda: OneExpert(
      _expert(one_expert or {}, "config.model.one_expert", num_experts=1)
    ),
  }

  def make(names, where):
    return tuple(builders[named.known(n, builders, where)]() for n in names)

  return make


def _lstm(width: int, hidden: int | None = None) -> LSTM:
  named.sizes("config.model.lstm", hidden=hidden)
  return LSTM(width, hidden)


def _moe(
  num_experts: int,
  router: Mapping[str, Any],
  experts: Mapping[str, Any] | Sequence[Any],
  group_size: int | None = None,
  capacity_factor: float | None = 1.25,
  eval_capacity_factor: float | None = 2.0,
  dispatch: str = "auto",
  recompute: bool = False,
  *,
  path: str,
) -> MoE:
  named.sizes(path, num_experts=num_experts)
  return MoE(
    named.choose(ROUTERS, router, f"{path}.router", num_experts=num_experts),
    _experts(experts, f"{path}.experts", num_experts),
    group_size,
    capacity_factor,
    eval_capacity_factor,
    dispatch,
    recompute,
  )


def _hierarchical_moe(
  num_experts: int,
  num_groups: int,
  primary: Mapping[str, Any],
  secondary: Mapping[str, Any],
  group_size: int | None = None,
  groups_together: int = 1,
  capacity_factor: float | None = 1.25,
  eval_capacity_factor: float | None = 2.0,
  dispatch: str = "gather",
) -> HierarchicalMoE:
  where = "config.model.hierarchical_moe"
  named.sizes(where, num_experts=num_experts, num_groups=num_groups)
  if num_experts % num_groups:
    raise ValueError(
      f"{where}: {num_groups} groups do not divide {num_experts} experts;"
      " choose a num_groups that does."
    )
  each = {"num_experts": num_experts // num_groups}
  inner = f"{where}.secondary"
  return HierarchicalMoE(
    named.choose(ROUTERS, primary, f"{where}.primary", num_experts=num_groups),
    named.make(_moe, secondary, inner, path=inner, **each),
    group_size,
    groups_together,
    capacity_factor,
    eval_capacity_factor,
    dispatch,
  )


def _experts(
  section: Mapping[str, Any] | Sequence[Any],
  where: str,
  num_experts: int,
) -> nn.Module:
  """Builds experts of one kind, or of several: a list means mixed ones.

  Each entry of a list gives its own num_experts, and may give its `capacity`
  relative to that of the layer.
  """
  if isinstance(section, Mapping):
    return _expert(section, where, num_experts=num_experts)
  for i, entry in enumerate(section):
    named.typed(entry, Mapping, f"{where}[{i}]")
    named.typed(entry.get("capacity", 1.0), float, f"{where}[{i}].capacity")
  entries = [dict(entry) for entry in section]
  capacities = tuple(entry.pop("capacity", 1.0) for entry in entries)
  kinds = tuple(
    _expert(entry, f"{where}[{i}]") for i, entry in enumerate(entries)
  )
  mixed = EXPERTS["mixed"](kinds, capacities)
  if mixed.num_experts != num_experts:
    raise ValueError(
      f"{where} lists {mixed.num_experts} experts, but num_experts is"
      f" {num_experts}; make the two agree."
    )
  return mixed


def _expert(section: Mapping[str, Any], where: str, **given: Any) -> nn.Module:
  """Builds experts of one kind; their activation goes by its name."""
  # Each takes a module, which no config can hold; mixed ones are a list.
  kinds = {k: v for k, v in EXPERTS.items() if k not in ("each", "mixed")}
  fields = dict(section)
  checked = {n: fields[n] for n in ("num_experts", "hidden") if n in fields}
  named.sizes(where, **checked)
  if "activation" in fields:
    name = named.known(fields["activation"], ACTIVATIONS, f"{where}.activation")
    fields["activation"] = ACTIVATIONS[name]
  return named.choose(kinds, fields, where, **given)


ACTIVATIONS = {n: getattr(nn, n) for n in ("relu", "gelu", "silu", "tanh")}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MODELS = {"gnmt": _gnmt, "lstm_lm": _lstm_lm}
