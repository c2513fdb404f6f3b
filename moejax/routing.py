"""The routing decision: the one value that routers make and the rest reads."""

from collections.abc import Callable, Sequence
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
    dropped: the edges beyond capacity, which the layer fills in; at first those
      counted that the assignment had no place for, if any.
    dropped_first: those of `dropped` that were their token's first choice.
    primary: the decision between P groups of experts, where this one was made
      within them (app. B), about the same groups of tokens. Sums, thresholds
      and biases are then those of the experts of all groups, flat. Assignment,
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
LEARNED = ("thresholds", "bias")


def _map(fn: Callable[..., Any], routing: Routing, names: Sequence[str]) -> Any:
  """Returns {name: field}, with `fn` applied to every array of these fields."""
  return {n: jax.tree.map(fn, getattr(routing, n)) for n in names}


def per_expert(
  value: Float[Array, "G A *rest"], expert: Int[Array, "G A"], num_experts: int
) -> Float[Array, "G E *rest"]:
  """Sums a value of the edges over the edges of each expert.

  Both forms add in a fixed order. A CPU's scatter does, and takes a hundredth
  of the time at E = 256; a GPU's does not, and there a comparison with every
  expert, which fuses into the sum, costs less than the router's own product.
  """

  def by_writing(value, expert):
    def of_group(value, expert):
      zeros = jnp.zeros((num_experts, *value.shape[1:]), value.dtype)
      return zeros.at[expert].add(value)

    # Mapped: one write into the whole would fetch all groups to each device.
    return jax.vmap(of_group)(value, expert)

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
  return Assignment(*(_by_rank(x) for x in (expert, gate)))


def from_expert_choice(
  token: Int[Array, "G E C"],
  gate: Float[Array, "G E C"],
  used: Bool[Array, "G E C"],
) -> Assignment:
  """Experts choose: the first picks of all experts come before the second."""
  E = token.shape[1]
  expert = jnp.arange(E, dtype=jnp.int32)[None, :, None]
  expert, gate = jnp.where(used, expert, E), jnp.where(used, gate, 0)
  return Assignment(*(_by_rank(x) for x in (expert, gate, token)))


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

  def add(value):
    total = logits.shape[-1] if num_experts is None else num_experts
    return per_expert(value, assignment.expert, total)

  # In bfloat16 a count would end at 256.
  count = add(jnp.ones(assignment.gate.shape, jnp.float32))
  return Routing(
    assignment,
    logits,
    importance=add(assignment.gate.astype(jnp.float32)),
    load=count,
    count=count,
    mask=mask,
  )


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
  G = assignment.expert.shape[0]
  if assignment.token is None:
    # Choices stay outermost, as tokens that choose have it.
    return Assignment(
      *(
        a.reshape(G, -1, num_tokens).swapaxes(0, 1).reshape(-1)
        for a in assignment[:2]
      )
    )
  first = num_tokens * jnp.arange(G, dtype=jnp.int32)[:, None]
  # A token out of range must not become one of the next group.
  token = jnp.where(
    assignment.token < num_tokens, assignment.token + first, G * num_tokens
  )
  return Assignment(
    *(a.reshape(-1) for a in (assignment.expert, assignment.gate, token))
  )


def merge_groups(routing: Routing, number: int) -> Routing:
  """Makes one group of every `number` that follow each other.

  It has the tokens, edges and sums of all. Tokens stay on the device where they
  lie, whether it had the whole group or has a part of it now. Two levels are
  merged where rows are sorted.
  """
  primary = routing.primary
  S = (primary or routing).logits.shape[1]
  edges = jax.tree.map(
    lambda x: x.reshape(-1, number, x.shape[1]), routing.assignment
  )

  def in_a_row(x):
    return x.reshape(-1, number * x.shape[1], *x.shape[2:])

  def add(x):
    return x.reshape(-1, number, x.shape[1]).sum(axis=1)

  return routing._replace(
    assignment=jax.vmap(lambda each: flatten_groups(each, S))(edges),
    **_map(in_a_row, routing, ("logits", "mask", "within")),
    **_map(add, routing, SUMS),
    primary=None if primary is None else merge_groups(primary, number),
  )


def _in_slots(routing):
  """Whether the groups of experts are an axis P in front of tokens."""
  return routing.primary is not None and routing.within is None


def stack_microbatches(parts: Routing) -> Routing:
  """Makes one decision of those of M batches, which are stacked in front.

  It has the groups of all. Those of the same place in their batches follow
  each other, and so stay on the device where they lie.
  """

  def merge(axis):
    """[M, G, ...] -> [G * M, ...]; past an axis P in front of G, if any."""

    def of(x):
      x = jnp.moveaxis(x, 0, axis + 1)
      return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return of

  primary = parts.primary
  return Routing(
    **_map(merge(int(_in_slots(parts))), parts, OF_TOKENS),
    **_map(merge(0), parts, SUMS),
    # What is learned is the same in every batch.
    **_map(lambda x: x[0], parts, LEARNED),
    primary=None if primary is None else stack_microbatches(primary),
  )


def axes(routing: Routing) -> Routing:
  """Returns the logical axes of every array of a decision, as tuples."""

  def named(*first):
    return lambda x: (*first, *(None,) * (x.ndim - len(first)))

  primary = routing.primary
  front = (None,) * _in_slots(routing)
  return Routing(
    **_map(named(*front, "group"), routing, OF_TOKENS),
    **_map(named("group"), routing, SUMS),
    **_map(named(), routing, LEARNED),
    primary=None if primary is None else axes(primary),
  )
