"""Gating: router logits in, routing decision out. Pure functions.

`mask` marks real tokens; padding is never routed, weighed or counted. Load is
the hard count, without gradient, where nothing else is said. A gating is causal
and needs no statistics of the batch unless it says so. A k below 1 or above the
number of experts is a ValueError.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped

from moejax import partition, quantiles, routing, sharding
from moejax.routing import SCOPES, Routing


def softmax(
  logits: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None
) -> Routing:
  """Dense gating (eq. 2): every token visits every expert.

  Its gradient reaches every logit.
  """
  return top_k(logits, logits.shape[-1], mask)


def top_k(
  logits: Float[Array, "G S E"],
  k: int,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """The k largest logits, softmax over these k alone (eq. 3 and 5).

  Its gradient reaches the k logits chosen (none for k = 1, where the gate is
  the constant 1). Of equal logits the lowest expert wins, so a router of all
  zeros sends every token to experts 0..k-1 (docs/decisions.md, 10).
  """
  check_k(k, logits.shape[-1])
  values, expert = _largest(logits, k)
  return _route_tokens(logits, expert, jax.nn.softmax(values), mask)


def noisy_top_k(
  logits: Float[Array, "G S E"],
  noise_std: Float[Array, "G S E"],
  k: int,
  rng: PRNGKeyArray | Key[Array, "G"],
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """Noisy top-k gating (eq. 3-5) with the smooth load (eq. 8-10).

  What the paper does not say of it is in docs/decisions.md, 3, 4, 53. At
  inference `top_k` of the clean logits takes its place.

  `noise_std` is Softplus(x W_noise), not negative. Where it is 0 the load is 1
  for an expert above its threshold and 0 for one at or below it. The noise of a
  group depends on `rng` and the group's index alone, or on the group's own key,
  not on devices.

  The gates' gradient reaches logits and noise_std of the k chosen, the load's
  those of every expert, through the threshold too. With k = E there is no k-th
  other expert to beat, and load is the (constant) count, as in the authors'
  code.
  """
  num_experts = logits.shape[-1]
  check_k(k, num_experts)
  noise = draw(jax.random.normal, rng, logits.shape, logits.dtype)
  noisy = logits + noise_std * noise
  if k == num_experts:
    return top_k(noisy, k, mask)
  values, expert = _largest(noisy, k + 1)
  gate = jax.nn.softmax(values[..., :k])
  decision = _route_tokens(noisy, expert[..., :k], gate, mask)
  kth, next_best = values[..., k - 1, None], values[..., k, None]
  # kth_excluding(H(x), k, i): an expert that is in must beat the (k+1)-th, one
  # that is out the k-th.
  margin = logits - jnp.where(noisy > next_best, next_best, kth)
  # Phi(margin / noise_std) (eq. 9), and its limit where noise_std is 0. The
  # gradient divides by noise_std^2, which must not underflow; the inner `where`
  # keeps 0/0 out of it as well.
  is_noisy = noise_std > 1e-12
  smooth = jax.scipy.stats.norm.cdf(margin / jnp.where(is_noisy, noise_std, 1))
  chance = jnp.where(is_noisy, smooth, (margin > 0).astype(margin.dtype))
  if mask is not None:
    chance = jnp.where(mask[..., None], chance, 0)
  return decision._replace(load=chance.sum(axis=1))


def balanced(
  logits: Float[Array, "G S E"],
  k: int,
  mask: Bool[Array, "G S"] | None = None,
  over: str = "group",
  group_factor: float = 2.0,
) -> Routing:
  """Strictly balanced gating (app. F, eq. 15, 16, 18): the experts choose.

  Of the n real tokens it is over, every expert takes m = k n / E (to the
  nearest integer, halves up, and at least one): those with the largest softmax
  X for it, and of equal ones the first. A token's gates are its X, renormalized
  over the experts that took it: k on average, perhaps none.

  Over "batch" it is the paper's: the tokens of all groups, on all devices.
  Only counts travel between these. A group then has its share of an expert's m
  tokens, as it comes, where "group" gives each group the same. As shapes are
  static, there is room for `group_factor` times the mean share, of small means
  for more. A group that is no random sample of the batch may have a larger
  share: its tokens of least X are then `dropped`, and their gates are those of
  the experts that are left. Larger groups differ less.

  Not causal: who takes a token depends on all tokens it is over. It needs
  this statistic of the batch, so `threshold` takes its place at inference. Its
  gradient reaches the logits of the experts that took the token (none where a
  single one did, whose gate is the constant 1).
  """
  if over not in SCOPES:
    raise ValueError(
      f"balanced gating is over {over!r}; choose 'batch' or 'group'."
    )
  if not group_factor >= 1:
    raise ValueError(
      f"group_factor is {group_factor}, but a group has the mean share of an"
      " expert's tokens or more; give 1 or more (2 is usual)."
    )
  factor = group_factor if over == "batch" else None
  token, used, share = _best_tokens(logits, k, mask, factor)

  # Mapped: one write into the whole would fetch all groups to each device. No
  # expert takes a token twice.
  @jax.vmap
  @jax.vmap
  def mark(token, used):
    none = jnp.zeros(logits.shape[1], bool)
    return none.at[token].set(used, unique_indices=True)

  gate = _softmax_of(logits, mark(token, used).swapaxes(1, 2))
  decision = _route_experts(logits, gate, token, used, mask)
  # In bfloat16 a count would end at 256.
  share = jnp.broadcast_to(share, decision.count.shape).astype(jnp.float32)
  return decision._replace(
    load=share, count=share, dropped=share - decision.count
  )


def threshold(
  logits: Float[Array, "G S E"],
  thresholds: Float[Array, "*G _"],
  max_k: int,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """What `balanced` becomes at inference (eq. 19): every expert with X > T.

  A token visits at most max_k experts, those with the largest X, because shapes
  are static; perhaps none. Its gates are their X, renormalized. Thresholds are
  those of the experts, or of every token [G S E].

  Causal: T stands for the batch. Its gradient reaches the logits of the chosen
  experts, not the thresholds, which `losses.threshold` or `losses.quantile`
  teaches.
  """
  check_k(max_k, logits.shape[-1], "max_k")
  x = jax.nn.softmax(logits)
  # -1 is below every X.
  above = x > _beside_logits(thresholds, logits, "thresholds")
  values, expert = _largest(jnp.where(above, x, -1), max_k)
  used = values >= 0
  gate = _softmax_of(jnp.take_along_axis(logits, expert, axis=-1), used)
  return _route_tokens(logits, expert, gate, mask, used)


def softmax_top_k(
  logits: Float[Array, "G S E"],
  k: int,
  mask: Bool[Array, "G S"] | None = None,
  normalized: bool = False,
  num_groups: int = 1,
  max_groups: int = 1,
  scale: float = 1.0,
) -> Routing:
  """The k largest of a softmax over all experts (2401.06066, eq. 3-5).

  Where `top_k` weighs the k alone, their gates are here their shares of the
  softmax over all, with a sum below 1 (2409.02060); `normalized`, they are
  divided by this sum, and so those of `top_k`. Both times `scale`.

  A token sees only the experts of its `max_groups` best groups (2405.04434,
  sec. 2.2.2). The experts lie in `num_groups` equal groups that follow each
  other; a group's score is its largest softmax. With one group there is no
  limit.

  Its gradient reaches every logit; normalized, the k chosen (none for k = 1).
  Groups that do not divide the experts, have fewer than k within the limit, or
  a scale not above 0, are a ValueError.
  """
  near = _in_best_groups(logits, k, num_groups, max_groups, scale, best=1)
  values, expert = _largest(near, k)
  gate = jax.nn.softmax(values)
  if not normalized:
    every = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    gate = jnp.exp(values - every)
  return _route_tokens(logits, expert, gate * scale, mask)


def switch(
  logits: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None
) -> Routing:
  """The expert with the largest logit (2101.03961, eq. 2).

  Its gate is its softmax over all experts, not renormalized, so that gradient
  reaches every logit.
  """
  return softmax_top_k(logits, 1, mask)


def gshard_top_2(
  logits: Float[Array, "G S E"],
  rng: PRNGKeyArray | Key[Array, "G"] | None = None,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """The two largest logits, the second at random (2006.16668, algorithm 1).

  The gates g1 and g2 are the two largest softmaxes, divided by their sum before
  any edge is dropped. The second choice is used with probability
  min(1, 2 g2), by a draw that depends on `rng` as noise does; where it is not,
  g1 stays as it is. Without rng, as in evaluation, it always is.

  Its gradient reaches both logits.
  """
  if logits.shape[-1] < 2:
    raise ValueError(
      f"top-2 gating needs 2 experts, but there is {logits.shape[-1]}; choose"
      " num_experts=2 or more, or another router."
    )
  values, expert = _largest(logits, 2)
  # What all experts share cancels in the quotient.
  gate = jax.nn.softmax(values)
  if rng is None:
    return _route_tokens(logits, expert, gate, mask)
  chance = draw(jax.random.uniform, rng, gate.shape[:2], gate.dtype)
  second = chance < 2 * gate[..., 1]
  used = jnp.stack([jnp.ones_like(second), second], axis=-1)
  return _route_tokens(logits, expert, gate, mask, used)


def expert_choice(
  logits: Float[Array, "G S E"],
  k: int,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """Expert choice (2202.09368): the picks of `balanced`, weighed by X itself.

  k, experts per token on average, is their capacity factor c.

  Not causal, and nothing takes its place at inference: whether an expert takes
  a token depends on those after it too, so a language model would see its
  future. It needs this statistic of the batch. Its gradient reaches every logit
  of the tokens that were taken.
  """
  token, used, _ = _best_tokens(logits, k, mask)
  return _route_experts(logits, jax.nn.softmax(logits), token, used, mask)


def hash_ids(
  ids: Int[Array, "G S"],
  num_experts: int,
  k: int,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """Hash layer (2106.04426): a token's id alone says which experts it visits.

  Every expert gives the id a pseudo-random score, fixed for ever and on every
  platform, and the k largest win: k distinct experts, each with gate 1/k.
  Without weights or gradient; the logits are zeros.
  """
  check_k(k, num_experts)

  def mix(x):
    """Spreads every bit over the word, one-to-one (MurmurHash3's end)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

  # An odd step and a mixing that is one-to-one: a token's scores never tie.
  step = jnp.arange(num_experts, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
  score = mix(mix(ids.astype(jnp.uint32))[..., None] + step[None, None])
  _, expert = _largest(score, k)
  gate = jnp.full(expert.shape, 1 / k, jnp.float32)
  return _route_tokens(jnp.zeros(score.shape, jnp.float32), expert, gate, mask)


def sigmoid(
  logits: Float[Array, "G S E"],
  bias: Float[Array, "*G _"],
  k: int,
  mask: Bool[Array, "G S"] | None = None,
  num_groups: int = 1,
  max_groups: int = 1,
  scale: float = 1.0,
) -> Routing:
  """Gating balanced without a loss (2408.15664; 2412.19437, eq. 13-16).

  The k largest of sigmoid(logits) + bias are chosen; their gates are their
  sigmoids, divided by the sum of these, times `scale`. The bias steers the
  choice alone; it is that of the experts, or of every token [G S E].

  A token sees only the experts of its `max_groups` best groups of `num_groups`,
  as of `softmax_top_k`; a group's score is the sum of its two best experts'.

  Its gradient reaches the logits of the chosen experts (none for k = 1, where
  the gate is constant), not the bias, which `losses.bias` or `losses.quantile`
  teaches. Errors are those of `softmax_top_k`.
  """
  scores = jax.nn.sigmoid(logits) + _beside_logits(bias, logits, "bias")
  near = _in_best_groups(scores, k, num_groups, max_groups, scale, best=2)
  _, expert = _largest(near, k)
  # Scores over their sum, also where all of them underflow.
  chosen = jnp.take_along_axis(logits, expert, axis=-1)
  gate = jax.nn.softmax(jax.nn.log_sigmoid(chosen)) * scale
  return _route_tokens(logits, expert, gate, mask)._replace(bias=bias)


def draw(
  sample: Callable[..., Array],
  rng: PRNGKeyArray | Key[Array, "G"],
  shape: tuple[int, ...],
  dtype: DTypeLike,
) -> Shaped[Array, "G ..."]:
  """Draws sample(key, shape, dtype) for each group by its index alone.

  Or by its own key, where `rng` is one for each: never by devices.
  """
  if not (jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.ndim):
    rng = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(shape[0]))
  return jax.vmap(lambda key: sample(key, shape[1:], dtype))(rng)


def check_k(k: int, num_experts: int, name: str = "k") -> None:
  """Raises ValueError where a token cannot visit k experts."""
  if not 1 <= k <= num_experts:
    raise ValueError(
      f"{name} = {k} experts per token, but there are {num_experts} experts;"
      f" choose {name} between 1 and {num_experts}."
    )


def _beside_logits(values, logits, name):
  """Gives values of the experts, or of every token, the axes of logits."""
  num_experts = logits.shape[-1]
  if values.shape[-1] != num_experts:
    raise ValueError(
      f"{name} has {values.shape[-1]} entries, but there are {num_experts}"
      " experts; give one for each."
    )
  return jnp.expand_dims(values, tuple(range(3 - values.ndim)))


def _in_best_groups(scores, k, num_groups, max_groups, scale, best):
  """Scores [G, S, E], -inf beyond a token's best groups of experts.

  A group of experts scores the sum of its `best` largest.
  """
  G, S, E = scores.shape
  check_k(k, E)
  if not scale > 0:
    raise ValueError(f"scale is {scale}, but gates are above 0; give it so.")
  if num_groups < 1 or E % num_groups:
    raise ValueError(
      f"{num_groups} groups do not divide {E} experts; choose a num_groups that"
      " does."
    )
  if not 1 <= max_groups <= num_groups:
    raise ValueError(
      f"a token visits at most {max_groups} groups of experts, but there are"
      f" {num_groups}; choose max_groups between 1 and {num_groups}."
    )
  size = E // num_groups
  if k > max_groups * size:
    raise ValueError(
      f"k = {k} experts per token, but {max_groups} of {num_groups} groups have"
      f" {max_groups * size} of the {E} experts; choose a smaller k or a larger"
      " max_groups."
    )
  if max_groups == num_groups:
    return scores
  in_groups = scores.reshape(G, S * num_groups, size)
  of_groups, _ = _largest(in_groups, min(best, size))
  of_groups = of_groups.sum(axis=-1).reshape(G, S, num_groups)
  _, group = _largest(of_groups, max_groups)
  near = jax.nn.one_hot(group, num_groups, dtype=bool).any(axis=2)
  return jnp.where(jnp.repeat(near, size, axis=-1), scores, -jnp.inf)


def _largest(values, k):
  """The k largest of values [G, N, M] and where they are, [G, N, K] each."""
  if not sharding.is_known("group", values):
    # The compiler splits a sort over devices, and not a CPU's top_k.
    order = jnp.argsort(values, axis=-1, stable=True, descending=True)
    order = order[..., :k].astype(jnp.int32)
    return jnp.take_along_axis(values, order, axis=-1), order
  # Each device on its own groups: a CPU's top_k is opaque to the partitioner,
  # which would gather the values of all devices on each.
  axes = ("group", None, None)
  largest = partition.manual(
    lambda values: tuple(jax.lax.top_k(values, k)), (axes,), (axes, axes)
  )
  # A slice of the result would make XLA take it for a sort of all values. One
  # barrier for both results makes it fail where every device has all groups.
  return tuple(map(jax.lax.optimization_barrier, largest(values)))


def _softmax_of(logits, chosen):
  """Softmax over the chosen alone (eq. 16); zeros where none is."""
  # Not -inf: where none is chosen the softmax would be NaN.
  gate = jax.nn.softmax(jnp.where(chosen, logits, -1e30))
  return jnp.where(chosen, gate, 0)


def _route_tokens(logits, expert, gate, mask, used=True) -> Routing:
  """Makes the decision of tokens that choose experts [G, S, K]."""
  if mask is not None:
    used = used & mask[..., None]
  expert = jnp.where(used, expert, logits.shape[-1])
  choice = routing.from_token_choice(expert, jnp.where(used, gate, 0))
  return routing.make_routing(choice, logits, mask)


def _route_experts(logits, gate, token, used, mask) -> Routing:
  """Makes the decision of experts that choose; the gates are [G, S, E]."""
  picked = jnp.take_along_axis(gate.swapaxes(1, 2), token, axis=-1)
  choice = routing.from_expert_choice(token, picked, used)
  return routing.make_routing(choice, logits, mask)


def _best_tokens(logits, k, mask, group_factor=None):
  """Each expert's tokens with the largest X, best first, and which to use.

  Both are [G, E, C]. With them comes how many each group's share is: [G, 1],
  or, where a factor bounds that of the whole batch, [G, E], which may exceed C.
  """
  G, S, E = logits.shape
  check_k(k, E)

  def portion(tokens):
    """m of so many tokens (eq. 18)."""
    return (tokens * k + E // 2) // E

  if mask is None:
    mask = jnp.ones(logits.shape[:2], bool)
  # Padding comes last. Shapes are those of a group without any.
  x = jax.nn.softmax(logits).astype(jnp.float32)
  x = jnp.where(mask[..., None], x, -1)
  real = mask.sum(axis=1, dtype=jnp.int32)
  most = max(1, portion(S))
  if group_factor is None:
    share = jnp.clip(portion(real), 1, real)[:, None]
  else:
    # At least eight standard deviations above the mean, those of rare events.
    room = max(most * group_factor, most + 8 * math.sqrt(most))
    most = min(math.ceil(room), S, max(1, portion(G * S)))
    n = real.sum()
    share = _shares_of_groups(x, jnp.clip(portion(n), 1, n))
  _, token = _largest(x.swapaxes(1, 2), most)
  rank = jax.lax.broadcasted_iota(jnp.int32, token.shape, 2)
  return token, rank < share[..., None], share


def _shares_of_groups(x, m):
  """How many of each column's m largest each group has: [G, E] of x [G, S, E].

  Of equal ones the first are taken, in the order of groups, so that it is m.

  The m-th largest is found bit by bit, as is the last group to have a part in
  it: every bit takes one sum over devices, of E counts, and no sorting.
  """
  G, _, E = x.shape
  bits = quantiles.to_bits(jax.lax.stop_gradient(x))
  _, zeros = sharding.vary_alike(x, jnp.zeros(E, jnp.uint32))

  def count(chosen, axis):
    return chosen.sum(axis, dtype=jnp.int32)

  mth = quantiles.largest(
    lambda least: count(bits >= least[None, None], (0, 1)) >= m,
    quantiles.NUM_BITS,
    zeros,
  )
  above = count(bits > mth[None, None], 1)
  tied = count(bits == mth[None, None], 1)
  left = m - above.sum(axis=0)
  group = jnp.arange(G, dtype=jnp.uint32)[:, None]

  def before(last):
    return jnp.where(group < last[None], tied, 0).sum(axis=0)

  last = quantiles.largest(
    lambda last: before(last) <= left, G.bit_length(), zeros
  )
  part = jnp.where(group == last[None], (left - before(last))[None], 0)
  return above + jnp.where(group < last[None], tied, part)
