"""Routing decisions made by hand, which no loss or report may see through.

Their numbers are random: nothing relies on what a router would decide.
"""

import jax
import jax.numpy as jnp
import kinds
import numpy as np

from moejax import routing
from moejax.routing import Routing

G, S, E, K = 3, 6, 4, 2
P, Q = 3, 2  # groups of experts, experts in each


def make_level(seed, rows, experts, of_group, mask=None, picks=False):
  """One level of rows of S tokens; `of_group` is the shape [G, E] of sums."""
  random = np.random.default_rng(seed)

  def floats(*shape):
    return kinds.to_device(random.uniform(0.1, 2.0, shape))

  def some(shape, out_of):
    """Different numbers along the last axis."""
    best = random.random((*shape[:-1], out_of)).argsort(axis=-1)
    return kinds.to_device(best[..., : shape[-1]], jnp.int32)

  if picks:
    token = some((rows, experts, 3), S)
    used = kinds.to_device(random.random(token.shape) < 0.7, bool)
    if mask is not None:
      used &= jax.vmap(lambda real, token: real[token])(mask, token)
    assignment = routing.from_expert_choice(token, floats(*used.shape), used)
  else:
    expert = some((rows, S, K), experts)
    if mask is not None:
      expert = jnp.where(mask[..., None], expert, experts)
    assignment = routing.from_token_choice(expert, floats(*expert.shape))
  return Routing(
    assignment,
    logits=kinds.to_device(random.normal(size=(rows, S, experts))),
    importance=floats(*of_group),
    load=floats(*of_group),
    count=kinds.to_device(random.integers(2, 9, of_group)),
    mask=mask,
    thresholds=floats(of_group[1]) * 0.3,
    bias=floats(of_group[1]) - 1,
  )


def drop(decision, first=True):
  """Capacity drops one edge of each expert, or two."""
  dropped = 1 + decision.count % 2
  dropped_first = jnp.ones_like(dropped) if first else None
  return decision._replace(dropped=dropped, dropped_first=dropped_first)


def make_mask(seed, rows, padding):
  """Random padding, and one row that is nothing else."""
  real = np.random.default_rng(seed).random((rows, S)) < 0.7
  real[padding] = False
  return jnp.asarray(real)


def within(secondary, primary):
  """Makes two levels of a decision in rows, those of the first group first."""

  def in_groups(x):
    return x.reshape(primary.logits.shape[-1], -1, *x.shape[1:])

  return secondary._replace(
    assignment=jax.tree.map(in_groups, secondary.assignment),
    logits=in_groups(secondary.logits),
    mask=None if secondary.mask is None else in_groups(secondary.mask),
    primary=primary,
  )


def make_hierarchy():
  primary = make_level(3, G, P, (G, P), make_mask(3, G, 1))
  secondary = make_level(4, P * G, Q, (G, P * Q), make_mask(4, P * G, 5))
  return within(drop(secondary), drop(primary))


CASES = {
  "flat": make_level(1, G, E, (G, E)),
  "padded": drop(
    make_level(2, G, E, (G, E), make_mask(2, G, 1), picks=True), first=False
  ),
  "hierarchy": make_hierarchy(),
}


def as_numpy(decision):
  """The same in float64."""

  def convert(x):
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype == np.float32 else x

  return jax.tree.map(convert, decision)


def levels(decision):
  """Each level, and how many mixtures it has side by side."""
  if decision.primary is None:
    return [(decision, 1)]
  return [(decision.primary, 1), (decision, P)]


def tokens(level, mixtures):
  """The real tokens' logits of a level, of each group [G] and mixture [P]."""
  tokens, experts = level.logits.shape[-2:]
  logits = level.logits.reshape(mixtures, -1, tokens, experts)
  mask = np.ones(logits.shape[:-1], bool)
  if level.mask is not None:
    mask = level.mask.reshape(mask.shape)
  return [
    [logits[p, g][mask[p, g]] for p in range(mixtures)]
    for g in range(logits.shape[1])
  ]


def edges(level, at):
  """The edges of one group, in the loops' form; `at` is g, or (p, g)."""
  tokens, experts = level.logits.shape[-2:]
  expert = level.assignment.expert[at]
  token = np.arange(expert.size) % tokens
  if level.assignment.token is not None:
    token = level.assignment.token[at]
  return [
    (s, e, 0.0) for s, e in zip(token, expert, strict=True) if e < experts
  ]


def hide(decision):
  """The decision about nothing but padding."""

  def hide_level(level):
    unused = jnp.full_like(level.assignment.expert, level.logits.shape[-1])
    sums = ("importance", "load", "count", "dropped", "dropped_first")
    return level._replace(
      assignment=level.assignment._replace(expert=unused),
      mask=jnp.zeros(level.logits.shape[:-1], bool),
      **dict.fromkeys(sums, jnp.zeros_like(level.count)),
    )

  if decision.primary is None:
    return hide_level(decision)
  return hide_level(decision)._replace(primary=hide_level(decision.primary))
