"""Sparsely-gated mixtures of experts in JAX.

`import moejax` loads nothing by itself, not even jax; a name is loaded when it
is used. Dimension key, in shape annotations and einsum strings alike:

  B  batch                     E  experts
  L  length                    K  experts per token
  D  model width               C  capacity: slots per expert and group
  G  groups                    A  assignments (edges) per group
  S  tokens per group          N  rows
  F  expert hidden width       O  output width
  V  vocabulary                H  LSTM width
  P  sampled classes           M  source length
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
  "moe": "MoE HierarchicalMoE",
  "router": "Router Softmax TopK NoisyTopK Balanced SoftmaxTopK Switch"
  " GShardTop2 ExpertChoice ExpertThreshold Hash Sigmoid",
  "experts": "FeedForward Linear Identity Each Mixed",
  "routing": "Routing Assignment",
  "losses": "routings",
  "sharding": "Layout LAYOUTS make_mesh",
  "training.optim": "with_averages",
  "training.run": "load",
}
# Name -> the module that has it, and its name there.
_PLACES = {
  name: (place, name)
  for place, names in _NAMES.items()
  for name in names.split()
} | {
  "auxiliary_loss": ("losses", "auxiliary"),
  "balance_metrics": ("losses", "balance"),
  "use_layout": ("sharding", "use"),
}
_MODULES = ("gating", "losses", "dispatch", "experts", "sharding", "testing")

__all__ = sorted([*_PLACES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return importlib.import_module(f"moejax.{name}")
  if name not in _PLACES:
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
  place, attribute = _PLACES[name]
  return getattr(importlib.import_module(f"moejax.{place}"), attribute)


def __dir__() -> list[str]:
  return __all__
