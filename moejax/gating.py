"""Gating: router logits in, routing decision out. Pure functions.

`mask` marks real tokens; padding is never routed, weighed or counted.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax import routing, sharding
from moejax.routing import Routing


def softmax(
  logits: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None
) -> Routing:
  """Dense gating (eq. 2): every token visits every expert.

  Causal at inference; its gradient reaches every logit.
  """
  return top_k(logits, logits.shape[-1], mask)


def top_k(
  logits: Float[Array, "G S E"],
  k: int,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """The k largest logits, softmax over these k alone (eq. 3 and 5).

  Causal at inference; its gradient reaches the k logits that survive (none for
  k = 1, where the gate is the constant 1). Among equal logits the lowest
  expert wins, so a router of all zeros sends every token to experts 0..k-1.
  Load is the hard count, without gradient.

  Raises:
    ValueError: k is below 1 or above the number of experts.
  """
  _check_k(k, logits.shape[-1])
  values, expert = _largest(logits, k)
  return _decide(logits, expert, jax.nn.softmax(values), mask)


def noisy_top_k(
  logits: Float[Array, "G S E"],
  noise_std: Float[Array, "G S E"],
  k: int,
  rng: PRNGKeyArray,
  mask: Bool[Array, "G S"] | None = None,
) -> Routing:
  """Noisy top-k gating (eq. 3-5) with the smooth load (eq. 8-10).

  The noise of a group depends on `rng` and the group's index alone, never on
  how groups lie over devices. Needs no batch statistics; not for inference,
  where `top_k` of the clean logits takes its place. The load's gradient
  reaches logits and noise_std of every expert, through the threshold too.

  With k = E there is no k-th other expert to beat: all are chosen, noise could
  only blur the gates and is left out, and load is the (constant) count.

  Args:
    logits: x W_g.
    noise_std: Softplus(x W_noise), not negative. Where it is 0 the load is 1
      for an expert above its threshold and 0 for one at or below it.
    k: experts per token.
    rng: key of the noise.
    mask: real tokens.

  Raises:
    ValueError: k is below 1 or above the number of experts.
  """
  num_experts = logits.shape[-1]
  _check_k(k, num_experts)
  if k == num_experts:
    return top_k(logits, k, mask)
  noisy = logits + noise_std * _noise(logits, rng)
  values, expert = _largest(noisy, k + 1)
  decision = _decide(
    noisy, expert[..., :k], jax.nn.softmax(values[..., :k]), mask
  )
  kth, next_best = values[..., k - 1, None], values[..., k, None]
  # kth_excluding(H(x), k, i): an expert that is in must beat the (k+1)-th, one
  # that is out the k-th.
  threshold = jnp.where(noisy > next_best, next_best, kth)
  chance = _chance_above(logits - threshold, noise_std)
  if mask is not None:
    chance = jnp.where(mask[..., None], chance, 0)
  return decision._replace(load=chance.sum(axis=1))


def _largest(
  logits: Float[Array, "G S E"], k: int
) -> tuple[Float[Array, "G S K"], Int[Array, "G S K"]]:
  # Each device on its own groups: a CPU's top_k is opaque to the partitioner,
  # which would gather the logits of all devices on each.
  axes = ("group", None, None)
  return sharding.manual(
    lambda logits: tuple(jax.lax.top_k(logits, k)), (axes,), (axes, axes)
  )(logits)


def _noise(
  logits: Float[Array, "G S E"], rng: PRNGKeyArray
) -> Float[Array, "G S E"]:
  def one_group(group):
    key = jax.random.fold_in(rng, group)
    return jax.random.normal(key, logits.shape[1:], logits.dtype)

  return jax.vmap(one_group)(jnp.arange(logits.shape[0]))


def _chance_above(
  margin: Float[Array, "G S E"], noise_std: Float[Array, "G S E"]
) -> Float[Array, "G S E"]:
  """Phi(margin / noise_std) (eq. 9), and its limit where noise_std is 0."""
  # The gradient divides by noise_std^2, which must not underflow; the inner
  # `where` keeps 0/0 out of it as well.
  noisy = noise_std > 1e-12
  smooth = jax.scipy.stats.norm.cdf(margin / jnp.where(noisy, noise_std, 1))
  return jnp.where(noisy, smooth, (margin > 0).astype(margin.dtype))


def _decide(
  logits: Float[Array, "G S E"],
  expert: Int[Array, "G S K"],
  gate: Float[Array, "G S K"],
  mask: Bool[Array, "G S"] | None,
) -> Routing:
  num_experts = logits.shape[-1]
  if mask is not None:
    expert = jnp.where(mask[..., None], expert, num_experts)
    gate = jnp.where(mask[..., None], gate, 0)
  assignment = routing.from_choices(expert, gate)

  def add(value):
    return routing.per_expert(value, assignment.expert, num_experts)

  count = add(jnp.ones_like(assignment.gate))
  return Routing(
    assignment,
    logits,
    importance=add(assignment.gate),
    load=count,
    count=count,
  )


def _check_k(k: int, num_experts: int) -> None:
  if not 1 <= k <= num_experts:
    raise ValueError(
      f"k = {k} experts per token, but there are {num_experts} experts;"
      f" choose k between 1 and {num_experts}."
    )


GATING = {"softmax": softmax, "top_k": top_k, "noisy_top_k": noisy_top_k}
