"""The routing decision: the one value that routers make and the rest reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class Assignment(NamedTuple):
  """Which tokens visit which experts: A edges per group, best edge first.

  An expert that is full takes no more edges, so their order is a priority. No
  token visits an expert twice. Within groups of experts (app. B) there is an
  axis P of these in front.

  Attributes:
    expert: where each edge leads; E marks an unused edge.
    gate: the combine weight G(x)_e of each edge (eq. 1), 0 on unused ones.
    token: where each edge starts. None where every token chose K experts: edge
      a then is choice a // S of token a % S. Dispatchers need no scatter there.
  """

  expert: Int[Array, "*P G A"]
  gate: Float[Array, "*P G A"]
  token: Int[Array, "*P G A"] | None = None

  def tokens(self, tokens_per_group: int) -> Int[Array, "*P G A"]:
    """Returns the token of each edge, whoever chose."""
    if self.token is not None:
      return self.token
    token = jnp.arange(self.expert.shape[-1], dtype=jnp.int32)
    return jnp.broadcast_to(token % tokens_per_group, self.expert.shape)


class Routing(NamedTuple):
  """A decision, and what the balance losses need of it.

  Gradient reaches the router through `assignment.gate`, `importance`, `load`,
  `logits`, `thresholds` and `bias`.

  Attributes:
    assignment: the edges.
    logits: H(x), with the noise if any was drawn (eq. 4).
    importance: sum of gates over the group's tokens (eq. 6).
    load: tokens per expert; the smooth estimate (eq. 10) under noisy gating.
    count: edges to each expert, before capacity drops any.
    mask: the real tokens; None where all are.
    thresholds: T (eq. 19), where the router is learning them.
    bias: what a loss-free router adds to the scores, where it is learning it.
    k: how many experts a token is to have on average, said of each expert,
      where thresholds or bias follow quantiles of the batch: then the loss
      `quantile` teaches them, and no other.
    dropped: the edges beyond capacity, which the layer fills in; at first those
      counted that the assignment had no place for, if any.
    dropped_first: those of `dropped` that were their token's first choice.
    primary: the decision between P groups of experts, where this one was made
      within them (app. B), about the same groups of tokens. Sums, thresholds,
      biases and k are then of the experts of all groups, flat. Assignment,
      logits and mask are each group's own, side by side, where tokens are in
      slots: no mesh could split P and G as one axis. Of sorted rows the
      assignment too is flat, from tokens to experts of all groups; logits and
      mask have an entry for each edge of `primary`, the rows.
    within: of sorted rows, the group of experts that each is sent to; P for
      none.
    sent: where tokens are in slots of groups of experts, the edge of `primary`
      that fills each, [P, G, C]; P marks an empty one. `edges` reads it.
  """

  assignment: Assignment
  logits: Float[Array, "*P G S E"]
  importance: Float[Array, "G E"]
  load: Float[Array, "G E"]
  count: Float[Array, "G E"]
  mask: Bool[Array, "*P G S"] | None = None
  thresholds: Float[Array, "E"] | None = None
  bias: Float[Array, "E"] | None = None
  k: Int[Array, "E"] | None = None
  dropped: Float[Array, "G E"] | None = None
  dropped_first: Float[Array, "G E"] | None = None
  primary: "Routing | None" = None
  within: Int[Array, "G S"] | None = None
  sent: Assignment | None = None


# What is balanced: all groups together, or each by itself.
SCOPES = ("batch", "group")

# Fields of a Routing by what they are of: tokens, sums of groups, parameters.
OF_TOKENS = ("assignment", "logits", "mask", "within", "sent")
SUMS = ("importance", "load", "count", "dropped", "dropped_first")
LEARNED = ("thresholds", "bias", "k")


def per_expert(
  value: Float[Array, "G A *rest"], expert: Int[Array, "G A"], num_experts: int
) -> Float[Array, "G E *rest"]:
  """Sums a value of the edges over the edges of each expert.

  Both forms add in a fixed order. A CPU's scatter does, and takes a hundredth
  of the time at E = 256; a GPU's does not, and there a comparison with every
  expert, which fuses into the sum, costs less than the router's own product.
  """

  # Mapped: one write into the whole would fetch all groups to each device.
  @jax.vmap
  def by_writing(value, expert):
    zeros = jnp.zeros((num_experts, *value.shape[1:]), value.dtype)
    return zeros.at[expert].add(value)

  def by_comparing(value, expert):
    chosen = jax.nn.one_hot(expert, num_experts, dtype=value.dtype)
    if value.ndim == 2:
      return (chosen * value[..., None]).sum(axis=1)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("GAE,GA...->GE...", chosen, value, precision=exact)

  return jax.lax.platform_dependent(
    value, expert, cpu=by_writing, default=by_comparing
  )


def from_token_choice(
  expert: Int[Array, "G S K"], gate: Float[Array, "G S K"]
) -> Assignment:
  """Tokens choose: all first choices come before all second choices."""
  return Assignment(_by_rank(expert), _by_rank(gate))


def from_expert_choice(
  token: Int[Array, "G E C"],
  gate: Float[Array, "G E C"],
  used: Bool[Array, "G E C"],
) -> Assignment:
  """Experts choose: the first picks of all experts come before the second."""
  E = token.shape[1]
  expert = jnp.arange(E, dtype=jnp.int32)[None, :, None]
  expert, gate = jnp.where(used, expert, E), jnp.where(used, gate, 0)
  return Assignment(*map(_by_rank, (expert, gate, token)))


def _by_rank(x: Shaped[Array, "G N K"]) -> Shaped[Array, "G A"]:
  return x.swapaxes(1, 2).reshape(x.shape[0], -1)


def make_routing(
  assignment: Assignment,
  logits: Float[Array, "G S E"],
  mask: Bool[Array, "G S"] | None = None,
  num_experts: int | None = None,
) -> Routing:
  """Sums up the edges: importance, and a load that is their count.

  There are as many experts as logits, if not said otherwise.
  """
  E = logits.shape[-1] if num_experts is None else num_experts
  gate = assignment.gate.astype(jnp.float32)
  importance = per_expert(gate, assignment.expert, E)
  # In bfloat16 a count would end at 256.
  count = per_expert(jnp.ones_like(gate), assignment.expert, E)
  return Routing(assignment, logits, importance, count, count, mask)


def edges(routing: Routing) -> Assignment:
  """Returns the edges from tokens to experts, of one level or two.

  Of two, expert j of group i is i * Q + j, and a gate the product of both (eq.
  12). They are then in no order of priority.
  """
  sent, inner = routing.sent, routing.assignment
  if sent is None:
    return inner
  P, G, C, Q = routing.logits.shape
  slot = inner.tokens(C)
  group, gate, token = (
    jnp.take_along_axis(x, slot, axis=2, mode="clip") for x in sent
  )
  used = (group < P) & (inner.expert < Q)
  flat = Assignment(
    jnp.where(used, group * Q + inner.expert, P * Q),
    jnp.where(used, gate * inner.gate, 0),
    token,
  )
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(G, -1), flat)


def flatten_groups(assignment: Assignment, num_tokens: int) -> Assignment:
  """Makes one group, without its axis, of all."""
  expert, gate, token = assignment
  G = expert.shape[0]
  if token is None:
    # Choices stay outermost, as tokens that choose have it.
    by_choice = (x.reshape(G, -1, num_tokens) for x in (expert, gate))
    return Assignment(*(x.swapaxes(0, 1).reshape(-1) for x in by_choice))
  first = num_tokens * jnp.arange(G, dtype=jnp.int32)[:, None]
  # A token out of range must not become one of the next group.
  token = jnp.where(token < num_tokens, token + first, G * num_tokens)
  return Assignment(*(x.reshape(-1) for x in (expert, gate, token)))


# -- groups and batches together ----------------------------------------------


def _map(
  routing: Routing,
  of_tokens: Callable[[Array, int], Any],
  of_sums: Callable[[Array], Any],
  of_learned: Callable[[Array], Any],
) -> Routing:
  """Applies to every array, at both levels, the function of its kind.

  That of tokens also gets the axis of G: 1 behind groups of experts, else 0.
  """
  axis = int(routing.primary is not None and routing.within is None)
  fns = dict.fromkeys(OF_TOKENS, lambda x: of_tokens(x, axis))
  fns |= dict.fromkeys(SUMS, of_sums) | dict.fromkeys(LEARNED, of_learned)
  mapped = {n: jax.tree.map(fns[n], getattr(routing, n)) for n in fns}
  if routing.primary is not None:
    mapped["primary"] = _map(routing.primary, of_tokens, of_sums, of_learned)
  return Routing(**mapped)


def merge_groups(routing: Routing, number: int) -> Routing:
  """Makes one group of every `number` that follow each other.

  It has the tokens, edges and sums of all. Tokens stay on the device where they
  lie, whether it had the whole group or has a part of it now. Two levels are
  merged where rows are sorted.
  """

  def in_a_row(x, _):
    return x.reshape(-1, number * x.shape[1], *x.shape[2:])

  def add(x):
    return x.reshape(-1, number, x.shape[1]).sum(axis=1)

  S = (routing.primary or routing).logits.shape[1]
  apart = jax.tree.map(
    lambda x: x.reshape(-1, number, x.shape[1]), routing.assignment
  )
  merged = _map(routing, in_a_row, add, lambda x: x)._replace(
    assignment=jax.vmap(lambda each: flatten_groups(each, S))(apart)
  )
  if routing.primary is None:
    return merged
  return merged._replace(primary=merge_groups(routing.primary, number))


def stack_microbatches(parts: Routing) -> Routing:
  """Makes one decision of those of M batches, which are stacked in front.

  It has the groups of all. Those of the same place in their batches follow
  each other, and so stay on the device where they lie.
  """

  def merge(x, axis=0):
    """[M, G, ...] -> [G * M, ...]; past an axis P in front of G, if any."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  # What is learned is the same in every batch.
  return _map(parts, merge, merge, lambda x: x[0])


def axes(routing: Routing) -> Routing:
  """Returns the logical axes of every array of a decision, as tuples."""

  def by_group(x, axis=0):
    return tuple("group" if i == axis else None for i in range(x.ndim))

  return _map(routing, by_group, by_group, lambda x: (None,) * x.ndim)
