"""Balance losses: pure functions of routing decisions.

Each takes the scope of its balance. "batch" sums over all groups, that is over
the whole batch of all devices, before anything that is not linear: the mean of
the groups' CV^2 is another quantity (docs/decisions.md, 6). "group" asks every
group to be balanced by itself, and takes that mean.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import quantiles, sharding
from moejax.routing import SCOPES, Routing, per_expert


def cv_squared(x: Float[Array, "E"]) -> Float[Array, ""]:
  """Squared coefficient of variation: variance over squared mean.

  The population variance, guarded as in the authors' code. Never the square of
  std / mean, whose gradient is 0/0 at perfect balance (docs/decisions.md, 5).
  """
  return jnp.var(x) / (jnp.mean(x) ** 2 + 1e-10)


def importance(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  """CV(Importance)^2, to be weighed with w_importance (eq. 7).

  In a hierarchy, of all leaf experts at once (eq. 13). A group that is all
  padding is balanced.
  """
  return jax.vmap(cv_squared)(_add_groups(routing.importance, scope)).mean()


def load(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  """CV(Load)^2, to be weighed with w_load (eq. 11).

  In a hierarchy, of all leaf experts at once (eq. 14; docs/decisions.md, 7).
  Constant, without gradient, where load is a count: gating without noise.
  """
  return jax.vmap(cv_squared)(load_per_expert(routing, scope)).mean()


def switch_balance(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  """E * sum_e f_e P_e (2101.03961, eq. 4), 1 at perfect balance.

  f_e is the fraction of tokens whose largest logit is that of e, P_e the mean
  of its softmax over all experts. The gradient passes through P alone.

  In a hierarchy, the sum over both levels, 2 at perfect balance. The secondary
  level's is that of each group of experts, over the tokens that reached it and
  its own experts, averaged with the number of these tokens for weight: a group
  that few tokens reach counts for little, one that none reaches for nothing.
  Where there is nothing but padding it is 0.
  """

  def of_level(level):
    E = level.logits.shape[-1]
    real = _real(level)[..., None]

    def add(x):
      x = jnp.where(real, x, 0)
      if level.within is None:
        return _add_groups(x.sum(axis=2), scope, axis=1)
      # The rows of all groups of experts stand in one array.
      P = routing.count.shape[1] // E
      by_group = per_expert(x[0], level.within, P).swapaxes(0, 1)
      return _add_groups(by_group, scope, axis=1)

    tokens = add(jnp.ones_like(real, jnp.float32))[..., 0]
    first = add(jax.nn.one_hot(jnp.argmax(level.logits, axis=-1), E))
    chance = add(jax.nn.softmax(level.logits))
    value = E * (first * chance).sum(axis=-1) / jnp.maximum(tokens, 1)
    return (value.sum(axis=0) / jnp.maximum(tokens.sum(axis=0), 1)).mean()

  return _over_levels(of_level, routing)


def z(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  """Mean over tokens of logsumexp(logits)^2 (2202.08906, eq. 5).

  Keeps logits small; a mean over tokens whatever the scope. In a hierarchy,
  the sum over both levels.
  """
  del scope

  def of_level(level):
    return _mean(jax.nn.logsumexp(level.logits, axis=-1) ** 2, level)

  return _over_levels(of_level, routing)


def threshold(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  """Teaches the thresholds T what the batchwise mask M chose (eq. 20).

  sum over tokens and experts of (M_threshold - M_batchwise)(X - T), X being the
  softmax of the logits, held fixed: the gradient reaches T alone. Never
  negative, and 0 where the masks agree. In a hierarchy, the sum over both
  levels; 0 where no thresholds are being learned.

  It is the literal sum, whatever the scope: the gradient of T_e is a number of
  tokens, those chosen less those above T_e. So over M microbatches together it
  counts M times what the mean of theirs does. Where gradients are clipped by
  their common norm it would shrink all others; give it a small weight there.
  See docs/decisions.md, 29.
  """
  del scope

  def of_level(level):
    if not _LEARNED["threshold"](level):
      return jnp.zeros((), jnp.float32)
    S, E = level.logits.shape[-2:]

    def one_group(token, expert):
      mask = jnp.zeros((S, E), jnp.float32)
      return mask.at[token, expert].set(1, mode="drop")

    token, expert = level.assignment.tokens(S), level.assignment.expert
    chosen = jax.vmap(jax.vmap(one_group))(token, expert)
    X = jax.lax.stop_gradient(jax.nn.softmax(level.logits))
    T = level.thresholds.reshape(-1, 1, 1, E)
    above = (X > T) & _real(level)[..., None]
    return ((above.astype(jnp.float32) - chosen) * (X - T)).sum()

  return _over_levels(of_level, routing)


def bias(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  """sum_e bias_e sign(count_e - mean count): balance without a loss.

  Its gradient is the sign alone, so that gradient descent at rate u is the rule
  b_e += u sign(mean count - count_e) of 2408.15664; nothing else is reached.
  Counts are those of the whole batch whatever the scope. In a hierarchy, the
  sum over both levels, a leaf expert being compared with those of its own
  group; 0 where no bias is being learned.
  """
  del scope

  def of_level(level):
    if not _LEARNED["bias"](level):
      return jnp.zeros((), jnp.float32)
    count = level.count.sum(axis=0).reshape(-1, level.logits.shape[-1])
    # Whole numbers: at perfect balance a mean would be off by its rounding,
    # which has a sign.
    excess = count.shape[1] * count - count.sum(axis=1, keepdims=True)
    sign = jax.lax.stop_gradient(jnp.sign(excess))
    return (level.bias.reshape(sign.shape) * sign).sum()

  return _over_levels(of_level, routing)


def quantile(routing: Routing, scope: str = "batch") -> Float[Array, ""]:
  r"""Draws thresholds and biases to quantiles of the batch, a moving average.

  .. math:: \sum_e (v_e - target_e)^2 / 2

  The gradient reaches the value v alone and is v - target. So descent at rate
  1, as `training.optim.with_averages` has it, with a weight w is
  v += w (target - v): an exponential moving average of decay 1 - w, and of
  weight 1 the last batch's quantile. The mean of microbatches is one step
  towards the mean of their targets. A layer that is called n times takes n
  steps: divide the weight by n.

  Of the n real tokens every expert is to have m = k n / E, as in eq. 18:

  - of thresholds T (2603.11535) the target is what m of its X exceed, X being
    the softmax of the logits: midway between the m-th and the next largest, or
    0 where m = n. Of tokens that are alike, as a word is in a first layer, it
    takes all or none.
  - of biases (quantile balancing, kexue.fm/archives/11619) it is what lets m
    tokens choose the expert. A token does where score + bias is above its
    cutoff, the (k+1)-th largest of these: so it is midway between the m-th
    smallest cutoff - score and the next, less the mean over experts. All
    experts' at once are a step of an iteration: their cutoffs move with them.

  Both are over the whole batch whatever the scope, and only counts travel
  between devices. In a hierarchy, the sum over both levels, each group of
  experts by the tokens that reached it. 0 where nothing is learned so, and of
  an expert whose group no token reached.
  """
  del scope

  def of_level(level):
    total = jnp.zeros((), jnp.float32)
    if level.k is None:
      return total
    logits = level.logits.astype(jnp.float32)
    E = logits.shape[-1]
    k = level.k.reshape(-1)[0]

    def distance(value, target):
      # NaN without a token.
      target = jnp.where(jnp.isnan(target), value, target)
      return 0.5 * ((value - target) ** 2).sum()

    if level.thresholds is not None:
      exceeded = _exceeded_by_share(level, jax.nn.softmax(logits), k)
      # An expert that is to have all tokens takes the least of them, too.
      exceeded = jnp.where(k < E, exceeded, exceeded / 2)
      total += distance(level.thresholds.reshape(-1, E), exceeded)
    if level.bias is not None:
      bias = level.bias.reshape(-1, E)
      scores = jax.nn.sigmoid(logits)
      steered = jnp.sort(scores + _of_tokens(level, bias), axis=-1)
      # Without a (k+1)-th all are chosen, whatever the bias.
      next_best = jnp.maximum(E - 1 - k, 0)
      cutoff = jax.lax.dynamic_index_in_dim(steered, next_best, -1)
      target = -_exceeded_by_share(level, scores - cutoff, k)
      total += distance(bias, target - target.mean(axis=1, keepdims=True))
    return total

  return _over_levels(of_level, routing)


LOSSES = {
  "importance": importance,
  "load": load,
  "switch_balance": switch_balance,
  "z": z,
  "threshold": threshold,
  "bias": bias,
  "quantile": quantile,
}

# What a router must be learning for the loss of a name to do anything.
_LEARNED = {
  "threshold": lambda r: r.thresholds is not None and r.k is None,
  "bias": lambda r: r.bias is not None and r.k is None,
  "quantile": lambda r: r.k is not None,
}


def unstacked(sown: Any) -> Any:
  """Puts a list of its entries in place of every stack of routing decisions.

  Layers are stacked by `nn.scan`, and mixtures that are the experts of another
  by `experts.Each`: then each entry is a list again.
  """

  def entries(routing):
    if not is_routing(routing) or routing.count.ndim <= 2:
      return routing
    return [
      entries(jax.tree.map(lambda a, i=i: a[i], routing))
      for i in range(routing.count.shape[0])
    ]

  return jax.tree.map(entries, sown, is_leaf=is_routing)


def is_routing(value: Any) -> bool:
  """Tells a decision, which is a tree itself, in a tree of them."""
  return isinstance(value, Routing)


def routings(sown: Any) -> list[Routing]:
  """Finds the routing decisions in the collection "routing" of a model.

  Those of a stack come one by one, see `unstacked`.
  """
  leaves = jax.tree.leaves(unstacked(sown), is_leaf=is_routing)
  return [leaf for leaf in leaves if is_routing(leaf)]


def auxiliary(
  sown: Any, weights: Mapping[str, float], scope: str = "batch"
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Weighs the balance losses of every MoE layer and adds them.

  Args:
    sown: the collection "routing" of a model in training, or any tree of
      Routing, such as the state that `nnx.pop` returns.
    weights: loss name in `LOSSES` -> weight, e.g. w_importance.
    scope: what is to be balanced, the "batch" or every "group" by itself.

  Returns:
    The total, and each loss by name, unweighted, summed over layers.

  Raises:
    ValueError: a name that no loss has, an unknown scope, a weight that is no
      rate of a moving average for `quantile`, or none for it where a router
      learns so, or a weight for what there is none of: routing, or thresholds
      or biases that a layer learns so.
  """
  check(weights, scope)
  found = routings(sown)
  # What a schedule computes is an array: its value is not known yet.
  weighed = [
    name
    for name, weight in weights.items()
    if not isinstance(weight, int | float) or weight
  ]
  if weighed and not found:
    raise ValueError(
      f"the balance losses {', '.join(weighed)} have weights, but there is no"
      " routing of an MoE layer to weigh; ask for it by model.apply(...,"
      ' mutable=["routing"]), let it out of a stack of layers by nn.scan(...,'
      ' variable_axes={"params": 0, "routing": 0}), nn.vmap alike, and give a'
      " model without mixtures no weights."
    )
  levels = [level for routing in found for level in _levels(routing)]
  for name, learns in _LEARNED.items():
    if name in weighed and found and not any(map(learns, levels)):
      raise ValueError(
        f"the balance loss {name!r} has weight {weights[name]}, but of"
        f" {len(found)} MoE layers 0 are learning by it; leave the weight"
        " out, or choose a router that learns so, in training."
      )
  if "quantile" not in weights and any(map(_LEARNED["quantile"], levels)):
    raise ValueError(
      "a router's thresholds or biases follow quantiles, but the balance loss"
      " 'quantile' has no weight, so that they would never move; give it one,"
      " such as 0.1."
    )
  zero = jnp.zeros((), jnp.float32)
  values = {
    name: sum((LOSSES[name](routing, scope) for routing in found), zero)
    for name in weights
  }
  total = sum((weights[name] * value for name, value in values.items()), zero)
  return total, values


def check(weights: Mapping[str, float], scope: str = "batch") -> None:
  """Lets nothing pass that `auxiliary` does not know.

  Raises:
    ValueError: a name that no loss has, an unknown scope, or a weight that is
      no rate of a moving average for `quantile`.
  """
  if scope not in SCOPES:
    raise ValueError(
      f"the scope of the balance losses is {scope!r}; choose 'batch' or"
      " 'group'."
    )
  for name in weights:
    if name not in LOSSES:
      (nearest,) = difflib.get_close_matches(name, LOSSES, 1, 0)
      raise ValueError(
        f"unknown balance loss {name!r}; the nearest is {nearest!r}, the"
        f" known ones are {', '.join(LOSSES)}."
      )
  rate = weights.get("quantile", 1)
  if isinstance(rate, int | float) and not 0 < rate <= 1:
    raise ValueError(
      f"the balance loss 'quantile' has weight {rate}, but it is the rate of a"
      " moving average; give more than 0 and at most 1 (0.1 is decay 0.9), or"
      " leave it out."
    )


def balance(sown: Any) -> dict[str, Float[Array, ""]]:
  """What Table 6 reports, and what else shows a collapse; means over layers.

  Everything is of the whole batch, and of leaf experts in a hierarchy.

  Returns:
    cv_importance, cv_load, max_over_mean_load: of `Routing.load`, smooth under
      noise (eq. 14 in a hierarchy).
    max_over_mean_count: of the edges counted.
    unused_experts: how many have no edge.
    entropy: of the softmax of the logits in nats, mean over tokens; in a
      hierarchy primary plus secondary, each the mean over its own tokens.
    dropped_first_fraction, dropped_later_fraction: edges beyond capacity,
      of all chosen; those that were their token's first choice, and the
      rest, among them all that an expert chose. In a hierarchy, of the edges to
      leaf experts there would be if nothing were dropped, every edge between
      groups standing for as many of them: a primary drop is one of all these.
    dropped_fraction: both together.

    Empty without MoE layers.
  """

  def max_over_mean(x):
    return x.max() / jnp.maximum(x.mean(), 1e-10)

  def entropy(level):
    p = jax.nn.softmax(level.logits)
    return _mean(jax.scipy.special.entr(p).sum(axis=-1), level)

  def report(routing):
    # Of a drop-free layer's edges, those that are left, and those dropped.
    kept = jnp.ones((), jnp.float32)
    first = later = jnp.zeros((), jnp.float32)
    for level in _levels(routing):
      share = kept / jnp.maximum(level.count.sum(), 1)
      dropped, dropped_first = (
        jnp.zeros((), jnp.float32) if x is None else x.sum() * share
        for x in (level.dropped, level.dropped_first)
      )
      first += dropped_first
      later += dropped - dropped_first
      kept -= dropped
    count = routing.count.sum(axis=0)
    return {
      "cv_importance": jnp.sqrt(importance(routing)),
      "cv_load": jnp.sqrt(load(routing)),
      "max_over_mean_load": max_over_mean(load_per_expert(routing)),
      "max_over_mean_count": max_over_mean(count),
      "unused_experts": (count == 0).sum().astype(jnp.float32),
      "entropy": _over_levels(entropy, routing),
      "dropped_fraction": first + later,
      "dropped_first_fraction": first,
      "dropped_later_fraction": later,
    }

  reports = [report(routing) for routing in routings(sown)]
  if not reports:
    return {}
  return jax.tree.map(lambda *values: sum(values) / len(values), *reports)


def load_per_expert(
  routing: Routing, scope: str = "batch"
) -> Float[Array, "_ E"]:
  """Load (eq. 10), put together from both levels in a hierarchy (eq. 14).

  Of the whole batch, [1, E], or of every group of tokens, [G, E].
  """
  secondary = _add_groups(routing.load, scope)
  primary = routing.primary
  if primary is None:
    return secondary
  reached = primary.count
  if primary.dropped is not None:
    reached -= primary.dropped
  reached = jax.lax.stop_gradient(_add_groups(reached, scope))
  share = _add_groups(primary.load, scope) / (reached + 1e-10)
  each = secondary.reshape(*share.shape, -1) * share[..., None]
  return each.reshape(secondary.shape)


# -- groups -------------------------------------------------------------------


def _add_groups(x: Array, scope: str, axis: int = 0) -> Array:
  """Adds the groups up where they are to be balanced together."""
  check({}, scope)
  return x.sum(axis, keepdims=True) if scope == "batch" else x


# -- levels of a hierarchy ----------------------------------------------------


def _levels(routing: Routing) -> list[Routing]:
  """The levels, each with an axis of mixtures in front: P of them, or 1."""
  above = [] if routing.primary is None else _levels(routing.primary)
  if above and routing.within is None:
    return [*above, routing]
  mask = routing.mask
  return [
    *above,
    routing._replace(
      assignment=jax.tree.map(lambda a: a[None], routing.assignment),
      logits=routing.logits[None],
      mask=None if mask is None else mask[None],
    ),
  ]


def _over_levels(of_level, routing):
  return sum(of_level(level) for level in _levels(routing))


def _real(level):
  if level.mask is None:
    return jnp.ones(level.logits.shape[:-1], bool)
  return level.mask


def _of_tokens(level, values):
  """Gives each token the values [P, E] of its mixture: [P, 1, 1, E] or so."""
  if level.within is None:
    return values[:, None, None]
  return values.at[level.within].get(mode="clip")[None]


def _exceeded_by_share(level, x, k):
  """What m of a mixture's real x [P, G, S, E] exceed, [P, E]; NaN without any.

  Midway between the m-th and the (m+1)-th largest, where there are so many.
  Without gradient.
  """
  E = x.shape[-1]
  real = _real(level)[..., None]

  def count(chosen):
    """Adds up tokens, of all devices: [P, E]."""
    if level.within is None:
      return chosen.sum(axis=(1, 2), dtype=jnp.int32)
    # The rows of all groups of experts stand in one array.
    P = level.k.size // E
    by_group = per_expert(chosen[0].astype(jnp.float32), level.within, P)
    return by_group.sum(axis=0).astype(jnp.int32)

  n = count(real)
  m = jnp.clip((n * k + E // 2) // E, 1, n)
  x = jax.lax.stop_gradient(jnp.where(real, x, -jnp.inf))
  bits = quantiles.to_bits(x)
  # Both at once: [2, P, E].
  many = jnp.stack([m, jnp.minimum(m + 1, n)])

  def holds(least):
    at_least = [count(bits >= _of_tokens(level, each)) for each in least]
    return jnp.stack(at_least) >= many

  _, zeros = sharding.vary_alike(x, jnp.zeros((2, len(n), E), jnp.uint32))
  found = quantiles.largest(holds, quantiles.NUM_BITS, zeros)
  mth, next_largest = quantiles.from_bits(found)
  return jnp.where(n > 0, (mth + next_largest) / 2, jnp.nan)


def _mean(x, level):
  """The mean of x [P, G, S] over real tokens, 0 without any."""
  real = _real(level)
  tokens = jnp.maximum(real.sum().astype(x.dtype), 1)
  return jnp.where(real, x, 0).sum() / tokens
