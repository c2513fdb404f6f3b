"""Balance losses: pure functions of routing decisions.

Importance and load are summed over all groups, that is over the whole batch of
all devices, before CV^2; the mean of per-device CV^2 is another quantity.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing import Routing


def cv_squared(x: Float[Array, "E"]) -> Float[Array, ""]:
  """Squared coefficient of variation: variance over squared mean.

  The population variance, guarded as in the authors' code. Never the square of
  std / mean, whose gradient is 0/0 at perfect balance.
  """
  return jnp.var(x) / (jnp.mean(x) ** 2 + 1e-10)


def importance(routing: Routing) -> Float[Array, ""]:
  """CV(Importance)^2, to be weighed with w_importance (eq. 7)."""
  return cv_squared(routing.importance.sum(axis=0))


def load(routing: Routing) -> Float[Array, ""]:
  """CV(Load)^2, to be weighed with w_load (eq. 11).

  Constant, without gradient, where load is a count: gating without noise.
  """
  return cv_squared(routing.load.sum(axis=0))


LOSSES = {"importance": importance, "load": load}


def routings(sown: Any) -> list[Routing]:
  """Finds the routing decisions in the collection "routing" of a model."""
  leaves = jax.tree.leaves(sown, is_leaf=lambda v: isinstance(v, Routing))
  return [leaf for leaf in leaves if isinstance(leaf, Routing)]


def auxiliary(
  sown: Any, weights: Mapping[str, float]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Weighs the balance losses of every MoE layer and adds them.

  Args:
    sown: the collection "routing" of a model, or any tree of Routing.
    weights: loss name in `LOSSES` -> weight, e.g. w_importance.

  Returns:
    The total, and each loss by name, unweighted, summed over layers.

  Raises:
    ValueError: a name that no loss has.
  """
  for name in weights:
    if name not in LOSSES:
      (nearest,) = difflib.get_close_matches(name, LOSSES, 1, 0)
      raise ValueError(
        f"unknown balance loss {name!r}; the nearest is {nearest!r}, the"
        f" known ones are {', '.join(LOSSES)}."
      )
  found = routings(sown)
  zero = jnp.zeros((), jnp.float32)
  values = {
    name: sum((LOSSES[name](routing) for routing in found), zero)
    for name in weights
  }
  total = sum((weights[name] * value for name, value in values.items()), zero)
  return total, values


def balance(sown: Any) -> dict[str, Float[Array, ""]]:
  """What Table 6 reports, and the dropped edges; the mean over layers.

  Returns:
    cv_importance, cv_load and max_over_mean_load (of `Routing.load`, smooth
    under noise), dropped_fraction (of edges); empty without MoE layers.
  """
  reports = [_balance(routing) for routing in routings(sown)]
  if not reports:
    return {}
  return jax.tree.map(lambda *values: sum(values) / len(values), *reports)


def _balance(routing: Routing) -> dict[str, Float[Array, ""]]:
  total = routing.load.sum(axis=0)
  edges = jnp.maximum(routing.count.sum(), 1)
  dropped = 0 if routing.dropped is None else routing.dropped.sum()
  return {
    "cv_importance": jnp.sqrt(importance(routing)),
    "cv_load": jnp.sqrt(load(routing)),
    "max_over_mean_load": total.max() / jnp.maximum(total.mean(), 1e-10),
    "dropped_fraction": dropped / edges,
  }
