"""Every gating beside its loops, and what tests of gating share."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference

from moejax import gating

G, S, E, K = 2, 5, 5, 2
KEY = jax.random.key(7)


class Case(NamedTuple):
  """A gating and its loops, with the arguments that other gatings ignore.

  Attributes:
    run: (logits, noise_std, mask, k) -> Routing, of all groups.
    reference: (logits, noise, noise_std, mask, k) -> Decision, of one group;
      of all groups a list, where these are decided about together.
    choices: (E, k) -> experts of every token; None where that varies.
    edges: (S, E, k) -> A; None where it is S * choices.
    gates: what a token's gates add up to.
    together: whether what one group gets depends on the others.
  """

  run: Callable
  reference: Callable
  choices: Callable | None
  edges: Callable | None = None
  gates: str = "one"
  together: bool = False


def thresholds(experts):
  """Some T of eq. 19, about as large as a softmax is."""
  return np.linspace(0.6, 1.4, experts).astype("float32") / max(experts, 2)


def bias(experts):
  """Some bias that changes some choices."""
  return np.linspace(0.2, -0.3, experts).astype("float32")


def ids(logits):
  """Token ids: the same in every precision, some below zero."""
  return (logits[..., 0] * 1024).astype("int32")


def picks(tokens, experts, k):
  """Eq. 18: m."""
  return max(1, int(np.floor(k * tokens / experts + 0.5)))


CASES = {
  "softmax": Case(
    lambda logits, std, mask, k: gating.softmax(logits, mask),
    lambda logits, noise, std, mask, k: reference.softmax_gating(logits, mask),
    lambda experts, k: experts,
  ),
  "top_k": Case(
    lambda logits, std, mask, k: gating.top_k(logits, k, mask),
    lambda logits, noise, std, mask, k: reference.top_k(logits, k, mask),
    lambda experts, k: k,
  ),
  "noisy_top_k": Case(
    lambda logits, std, mask, k: gating.noisy_top_k(logits, std, k, KEY, mask),
    lambda logits, noise, std, mask, k: reference.noisy_top_k(
      logits, noise, std, k, mask
    ),
    lambda experts, k: k,
  ),
  "balanced": Case(
    lambda logits, std, mask, k: gating.balanced(logits, k, mask),
    lambda logits, noise, std, mask, k: reference.balanced(logits, k, mask),
    None,
    lambda tokens, experts, k: experts * picks(tokens, experts, k),
    "one or none",
  ),
  "balanced batch": Case(
    lambda logits, std, mask, k: gating.balanced(logits, k, mask, "batch"),
    lambda logits, noise, std, mask, k: reference.balanced_batch(
      logits, k, mask
    ),
    None,
    # Of few tokens an expert may take all of a group.
    lambda tokens, experts, k: (
      experts * min(tokens, picks(G * tokens, experts, k))
    ),
    "one or none",
    together=True,
  ),
  "threshold": Case(
    lambda logits, std, mask, k: gating.threshold(
      logits, jnp.asarray(thresholds(logits.shape[-1])), k, mask
    ),
    lambda logits, noise, std, mask, k: reference.threshold(
      logits, thresholds(logits.shape[-1]), k, mask
    ),
    None,
    lambda tokens, experts, k: tokens * k,
    "one or none",
  ),
  "softmax_top_k": Case(
    lambda logits, std, mask, k: gating.softmax_top_k(logits, k, mask),
    lambda logits, noise, std, mask, k: reference.softmax_top_k(
      logits, k, mask
    ),
    lambda experts, k: k,
    gates="at most one",
  ),
  "switch": Case(
    lambda logits, std, mask, k: gating.switch(logits, mask),
    lambda logits, noise, std, mask, k: reference.switch(logits, mask),
    lambda experts, k: 1,
    gates="at most one",
  ),
  "gshard_top_2": Case(
    lambda logits, std, mask, k: gating.gshard_top_2(logits, None, mask),
    lambda logits, noise, std, mask, k: reference.gshard_top_2(
      logits, None, mask
    ),
    lambda experts, k: 2,
  ),
  "expert_choice": Case(
    lambda logits, std, mask, k: gating.expert_choice(logits, k, mask),
    lambda logits, noise, std, mask, k: reference.expert_choice(
      logits, k, mask
    ),
    None,
    lambda tokens, experts, k: experts * picks(tokens, experts, k),
    "at most one",
  ),
  "hash": Case(
    lambda logits, std, mask, k: gating.hash_ids(
      ids(logits), logits.shape[-1], k, mask
    ),
    lambda logits, noise, std, mask, k: reference.hash_ids(
      ids(logits), logits.shape[-1], k, mask
    ),
    lambda experts, k: k,
  ),
  "sigmoid": Case(
    lambda logits, std, mask, k: gating.sigmoid(
      logits, jnp.asarray(bias(logits.shape[-1])), k, mask
    ),
    lambda logits, noise, std, mask, k: reference.sigmoid(
      logits, bias(logits.shape[-1]), k, mask
    ),
    lambda experts, k: k,
  ),
}


@functools.cache
def case(name):
  """Returns a case, compiled."""
  run = jax.jit(CASES[name].run, static_argnums=3)
  return CASES[name]._replace(run=run)


def num_edges(name, tokens, experts, k):
  """A of a group."""
  if case(name).edges is not None:
    return case(name).edges(tokens, experts, k)
  return tokens * case(name).choices(experts, k)


def draw(seed, masked=False, shape=(G, S, E)):
  """Draws logits, noise_std and mask."""
  random = np.random.default_rng(seed)
  logits = random.normal(size=shape).astype("float32")
  noise_std = random.uniform(0.2, 1.5, shape).astype("float32")
  mask = random.random(shape[:2]) < 0.6 if masked else None
  return jax.device_put((logits, noise_std, mask))


def dense(assignment, tokens=S, experts=E):
  """Gates as the matrix G(x) [G, S, E]."""
  token = jax.nn.one_hot(assignment.tokens(tokens), tokens)
  expert = jax.nn.one_hot(assignment.expert, experts)
  return jnp.einsum("GAS,GAE,GA->GSE", token, expert, assignment.gate)


def decide(name, logits, noise, noise_std, mask, k=K):
  """The reference's decision for each group."""
  logits, noise, noise_std = (
    np.asarray(a, np.float64) for a in (logits, noise, noise_std)
  )
  if case(name).together:
    return case(name).reference(logits, noise, noise_std, mask, k)
  return [
    case(name).reference(
      logits[g], noise[g], noise_std[g], None if mask is None else mask[g], k
    )
    for g in range(logits.shape[0])
  ]


def noise_of(decision, logits, noise_std):
  return (np.asarray(decision.logits, np.float64) - logits) / noise_std


def edges(assignment, g, tokens=S, experts=E):
  """The used edges of group g, in order."""
  token = assignment.tokens(tokens)[g]
  listed = zip(token, assignment.expert[g], assignment.gate[g], strict=True)
  return [(int(t), int(e), float(w)) for t, e, w in listed if e < experts]


def agree(got, want):
  """Whether a Routing is what the loops decided for each group."""
  tokens, experts = want[0].gates.shape
  for g, decision in enumerate(want):
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    close(dense(got.assignment, tokens, experts)[g], decision.gates)
    close(got.importance[g], decision.importance)
    close(got.load[g], decision.load)
    np.testing.assert_array_equal(got.count[g], decision.count)
    listed = edges(got.assignment, g, tokens, experts)
    assert [edge[:2] for edge in listed] == [e[:2] for e in decision.edges]
    close([edge[2] for edge in listed], [e[2] for e in decision.edges])
