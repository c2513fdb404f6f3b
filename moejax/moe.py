"""The layer: group, route, dispatch, and report what was decided."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from moejax import dispatch as dispatch_lib
from moejax import experts as experts_lib
from moejax import partition, ragged, sharding
from moejax import routing as routing_lib
from moejax import slots as slots_lib
from moejax.experts import Each, Mixed
from moejax.router import Router, Single, SortedRows
from moejax.routing import Assignment, Routing

# What a caller may give: arrays of JAX or NumPy.
ArrayLike = Array | np.ndarray

# The collection in which every MoE layer leaves its Routing.
ROUTING = "routing"
# Where a step counts the calls of a layer.
_CALLS = "moejax.calls"


class _Layer(nn.Module):
  """What both layers do: group tokens, `mix` them, and report."""

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch D"],
    train: bool = False,
    *,
    mask: Shaped[ArrayLike, "..."] | None = None,
    ids: Int[ArrayLike, "..."] | None = None,
  ) -> Float[Array, "*batch O"]:
    """Mixes; a token whose every edge was dropped, or padding, gives zero.

    Args:
      x: activations, [B, L, D] as a rule; whole numbers become float32.
      train: whether to draw noise and use the training capacity; True or False
        itself, since it decides what is compiled.
      mask: real tokens; all of them by default.
      ids: the tokens' ids in the vocabulary, for a router that reads them.

    Raises:
      ValueError: sizes that do not divide, experts that do not match, complex
        numbers, or variables that hold the routing of another step.
    """
    shape, num_tokens = x.shape[:-1], x.size // x.shape[-1]
    if num_tokens == 0:
      raise ValueError(f"x is {x.shape}, without a token; give one or more.")
    size = num_tokens if self.group_size is None else self.group_size
    if size < 1 or num_tokens % size:
      raise ValueError(
        f"group size {size} does not divide the {num_tokens} tokens of a batch"
        " (rows times row length); choose one that does."
      )
    for name, value in (("mask", mask), ("ids", ids)):
      if value is not None and value.shape != shape:
        raise ValueError(
          f"the {name} is {value.shape}, but the tokens are {shape}; give one"
          " entry per token."
        )
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise ValueError(
        f"x is {x.dtype}, which no router reads; give its real and imaginary"
        " parts side by side."
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      x = x.astype(jnp.float32)
    single = isinstance(getattr(self, "router", None), Single)
    try:
      mix = partition.lift_to_compiler(
        _mix_single if single else _mix_in_groups,
        0 if single else num_tokens // size,
      )
      y, routing = mix(self, x, mask, ids, train)
    except TypeError as error:
      if "forward-mode" not in str(error):
        raise
      raise TypeError(
        f"dispatch {self.dispatch!r} has no derivative forward (jax.jvp,"
        " jax.linearize, jax.hessian); choose dispatch='einsum' for it."
      ) from error
    if not single:
      self.report(routing)
    return y

  def report(self, routing: Routing) -> None:
    """Adds the decision to those that the layer made before in this step."""
    # What init leaves behind would be counted a second time by apply.
    if self.is_initializing() or not self.is_mutable_collection(ROUTING):
      return
    # These counters are what all copies of a module share in one `apply`, in
    # whatever `nn.scan` or `nn.remat` they are, and nothing after it.
    calls = self.scope.rng_counters
    calls[_CALLS] = calls.get(_CALLS, 0) + 1
    if calls[_CALLS] == 1 and self.has_variable(ROUTING, "routing"):
      raise ValueError(
        "the layer still holds a routing of an earlier step or call, which"
        " would be weighed once more; give model.apply"
        ' {"params": params} alone, and in nnx take it out after every call:'
        ' sown = nnx.pop(model, nnx.PathContains("routing")).'
      )
    self.sow(
      ROUTING,
      "routing",
      routing,
      reduce_fn=lambda past, one: past.replace(value=(*past.value, one)),
      init_fn=lambda: _Reports((), names=()),
    )


class _Reports(nn.Partitioned):
  """The routings of one layer in one step; those of a stack stand in front."""

  def unbox(self, apply_constraint: bool = True) -> tuple[Routing, ...]:
    return self.value

  def add_axis(self, index: int, params: Mapping[str, Any]) -> "_Reports":
    if index != 0:
      raise ValueError(
        f"a stack of layers puts its routings along axis {index}, but the"
        ' balance losses read them along axis 0; write variable_axes={"params":'
        ' ..., "routing": 0} in nn.scan or nn.vmap.'
      )
    return self

  def remove_axis(self, index: int, params: Mapping[str, Any]) -> "_Reports":
    return self


def _mix_in_groups(module, x, mask, ids, train):
  """Mixes tokens in groups; returns y, the decision and its logical axes."""
  size = module.group_size or x.size // x.shape[-1]
  if mask is not None:
    mask = jnp.asarray(mask, bool)
    # Whatever stands in padding, NaN included, must not reach a product.
    x = jnp.where(mask[..., None], x, 0)
    mask = mask.reshape(-1, size)
  if ids is not None:
    ids = jnp.asarray(ids).reshape(-1, size)
  grouped = x.reshape(-1, size, x.shape[-1])
  grouped = sharding.constrain(grouped, "group", None, None)
  y, routing = module.mix(grouped, train, mask, ids)
  return y.reshape(*x.shape[:-1], -1), routing, routing_lib.axes(routing)


def _mix_single(module, x, mask, ids, train):
  """Applies a single expert to all tokens: there is nothing to route."""
  taken = None
  if mask is not None:
    mask = jnp.asarray(mask, bool)
    # As above: NaN times the zero gradient of padding would be NaN.
    x, taken = jnp.where(mask[..., None], x, 0), mask.reshape(1, -1)
  module.check_experts()
  rows = x.reshape(1, -1, x.shape[-1])
  weights = module.experts(x.shape[-1])
  y = module.expert_fn(train)(weights, rows, taken)
  y = y.reshape(*x.shape[:-1], -1)
  return y if mask is None else jnp.where(mask[..., None], y, 0), (), ()


class MoE(_Layer):
  """Sparsely-gated mixture of experts, y = sum_e G(x)_e E_e(x) (eq. 1).

  All tokens are routed at once (the layer is convolutional over time, sec.
  3.1), in groups of `group_size` consecutive tokens whose capacity is their
  own. The layer leaves its `Routing` in the collection "routing"; what it
  should cost is the trainer's affair (`losses.auxiliary`). With the router
  `Single` it is one dense expert and reports nothing. Why it may drop tokens,
  which the paper's does not, says docs/decisions.md, 9.

  The parameters lie in one scope named after the layer, {"router": ...,
  "experts": ...}, wherever the router and the experts are made: outside, in
  `setup`, or within `nn.compact`. Give every layer a router of its own.

  Attributes:
    router: x [G S D] -> Routing.
    experts: declares the experts' weights and runs them.
    group_size: S; None takes all tokens as one group. It must not depend on
      the mesh, or results would; the number of groups must divide over the
      devices that share the batch.
    capacity_factor: slots over the mean load in training; None drops nothing.
    eval_capacity_factor: the same in evaluation.
    dispatch: how rows move, a name in `dispatch.DISPATCH`, or "auto".
    recompute: whether the backward pass runs the experts again instead of
      keeping their hidden layers (app. D).
  """

  router: nn.Module
  experts: nn.Module
  group_size: int | None = None
  capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  dispatch: str = "auto"
  recompute: bool = False

  def __post_init__(self) -> None:
    self.router = _own_router(self, self.router, "router")
    self.experts = experts_lib.own_experts(self, self.experts, "experts")
    super().__post_init__()

  def mix(
    self,
    x: Float[Array, "G S D"],
    train: bool,
    mask: Bool[Array, "G S"] | None,
    ids: Int[Array, "G S"] | None,
  ) -> tuple[Float[Array, "G S O"], Routing]:
    """Mixes tokens that are in groups; reports nothing but what it returns."""
    self.check_experts()
    experts, num_experts = self.experts, self.router.num_experts
    routing = self.router(x, train=train, mask=mask, ids=ids)
    factor = self.capacity_factor if train else self.eval_capacity_factor
    edges = routing.assignment.expert
    capacity = slots_lib.capacity(
      edges.shape[1], x.shape[1], num_experts, factor
    )
    name = self.dispatch
    if name == "auto":
      known = sharding.is_known("group", edges)
      name = dispatch_lib.fastest(
        capacity, _need_slots(experts), edges.size, known
      )
    if name not in dispatch_lib.DISPATCH:
      raise ValueError(
        f"unknown dispatch {name!r}; choose one of auto,"
        f" {', '.join(dispatch_lib.DISPATCH)}."
      )
    if name == "ragged" and sharding.in_expert():
      raise ValueError(
        "dispatch 'ragged' sorts the rows of a whole device, but this mixture"
        " is part of an expert, one of several there; choose auto, gather or"
        " einsum."
      )
    if isinstance(experts, Mixed):
      num_experts = tuple(kind.num_experts for kind in experts.kinds)
    y = dispatch_lib.DISPATCH[name](
      self.expert_fn(train),
      experts(x.shape[-1]),
      x,
      routing.assignment,
      num_experts,
      capacity,
    )
    return y, _count_dropped(routing, capacity)

  def declare(self, width: int, train: bool) -> tuple[Any, Any, Routing]:
    """Declares the weights of router and experts, for others to run.

    Returns:
      The weights of both, and a decision of the router about a row of zeros,
      which tells what it learns beside them.
    """
    self.check_experts()
    row = jnp.zeros((1, 1, width), jnp.float32)
    # One row cannot be split as groups of tokens are.
    with nn.logical_axis_rules(()):
      routing = self.router(row, train=train)
    of_router = nn.unbox(self.router.variables.get("params", {}))
    return of_router, self.experts(width), routing

  @nn.nowrap
  def check_experts(self) -> None:
    """Raises ValueError where router and experts differ in their number."""
    if self.experts.num_experts != self.router.num_experts:
      raise ValueError(
        f"the router chooses among {self.router.num_experts} experts, but there"
        f" are {self.experts.num_experts}; give both the same num_experts."
      )

  @nn.nowrap
  def expert_fn(self, train: bool) -> slots_lib.ExpertFn:
    """Returns what runs the experts, again in the backward pass if asked to."""

    def run(weights, rows, mask=None, **group_sizes):
      return self.experts.run(weights, rows, mask, train, **group_sizes)

    # Where parameters are made nothing is differentiated; and lifted within the
    # manual part of `ragged` they would be tracers of it.
    if not self.recompute or self.is_initializing():
      return run
    if _need_slots(self.experts):
      # Modules that hold weights of their own.
      lifted = nn.checkpoint(lambda experts, *args: experts.run(*args, train))
      return functools.partial(lifted, self.experts)
    return jax.checkpoint(run)


class HierarchicalMoE(_Layer):
  """A mixture of groups of experts, each a mixture itself (app. B, eq. 12).

  The primary router sends tokens to groups; a group's own router sees, and
  pays for, only those (docs/decisions.md, 25, 50). A group lives whole on one
  device: tokens move once for each group they visit, and the experts of a group
  share what arrived.

  The one Routing it leaves speaks of all experts, expert j of group i being
  i * Q + j: importance is eq. 13, load becomes eq. 14 in `losses`. Tokens that
  found their group full have no secondary gates and count in neither. Groups of
  tokens that are together at the second level are one group in it, whose
  balance by itself is that of scope "group".

  Attributes:
    primary: router between the P groups.
    secondary: the mixture within a group of Q experts; every group has its own
      weights. It splits into no groups: its tokens are those that
      `groups_together` groups of tokens sent to one group of experts.
    group_size: S, tokens routed together at the first level.
    groups_together: how many groups of tokens that follow each other are one
      for the secondary mixtures. What they sent lies on one device, so that it
      costs no exchange. An expert has slots for all of them, which go to the
      first choices, then the second; among these to those of earlier groups.
      Where groups are small for their experts this saves slots, as there are 4
      at least. Data replicas of the experts keep to their own tokens: what it
      leaves of groups must divide over them. Sorted rows have no slots: there
      it says no more than what scope "group" balances.
    capacity_factor: a group's slots over its mean load in training. Those of
      `secondary` multiply with it. None at both levels drops nothing.
    eval_capacity_factor: the same in evaluation.
    dispatch: how rows move to groups: "gather" or "einsum" to slots, which
      without a capacity are as many as tokens, in every group and every expert;
      "ragged" sorts rows, within groups of experts too, at both levels without
      a capacity. It needs a secondary router that decides about every token by
      itself, and experts of one kind that need no slots. "auto" is "ragged"
      where that can be, else "gather".
  """

  primary: nn.Module
  secondary: MoE
  group_size: int | None = None
  groups_together: int = 1
  capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  dispatch: str = "auto"

  def __post_init__(self) -> None:
    self.primary = _own_router(self, self.primary, "primary")
    self.secondary = experts_lib.own(
      self,
      self.secondary,
      "secondary",
      isinstance(self.secondary, MoE),
      "the MoE of one group of experts",
    )
    super().__post_init__()

  def mix(
    self,
    x: Float[Array, "G S D"],
    train: bool,
    mask: Bool[Array, "G S"] | None,
    ids: Int[Array, "G S"] | None,
  ) -> tuple[Float[Array, "G S D"], Routing]:
    """Mixes tokens that are in groups; reports nothing but what it returns."""
    P, together = self.primary.num_experts, self.groups_together
    if self.secondary.group_size is not None:
      raise ValueError(
        f"group size {self.secondary.group_size} of the secondary mixture: it"
        " routes what each group of tokens sends it; leave its group_size None"
        f" and set that of the whole layer, now {self.group_size}."
      )
    if self.dispatch not in ("auto", *dispatch_lib.DISPATCH):
      raise ValueError(
        f"unknown dispatch {self.dispatch!r} between groups of experts; choose"
        f" one of auto, {', '.join(dispatch_lib.DISPATCH)}."
      )
    if together < 1 or x.shape[0] % together:
      raise ValueError(
        f"groups_together {together} does not divide the {x.shape[0]} groups of"
        f" {x.shape[1]} tokens that a batch, or a microbatch, has; choose one"
        " that does, or other microbatches."
      )
    routing = self.primary(x, train=train, mask=mask, ids=ids)
    unsorted = self._why_unsorted(x, train)
    if self.dispatch == "ragged" and unsorted:
      raise ValueError(
        f"dispatch 'ragged' sorts the tokens of {P} groups of experts, but"
        f" {unsorted}; or choose auto, gather or einsum."
      )
    # Else the losses, whose sums lie with the groups of experts, would have
    # every device count the edges of all.
    load, count = (
      sharding.constrain(sums, "group", None)
      for sums in (routing.load, routing.count)
    )
    routing = routing._replace(load=load, count=count)
    if self.dispatch in ("auto", "ragged") and not unsorted:
      y, routing = self._mix_sorted(x, routing, train)
      return y, routing_lib.merge_groups(routing, together)
    factor = self.capacity_factor if train else self.eval_capacity_factor
    num_edges = routing.assignment.expert.shape[1]
    capacity = slots_lib.capacity(num_edges, x.shape[1], P, factor)
    name = "gather" if self.dispatch == "auto" else self.dispatch
    sent = dispatch_lib.dispatch(name, x, routing.assignment, P, capacity)

    def side_by_side(slots):
      """[P, G, C, ...] -> [P, G / together, together * C, ...]."""
      _, G, C, *rest = slots.shape
      slots = slots.reshape(P, G // together, together * C, *rest)
      axes = (sharding.expert_axis(P), "group_replicated")
      return sharding.constrain(slots, *axes, *(None,) * (slots.ndim - 2))

    # Tokens of groups that are together follow each other.
    first = jnp.arange(x.shape[0], dtype=jnp.int32) % together * x.shape[1]
    of_slots = (
      *(each for (each,) in sent[:3]),
      sent.token[0] + first[None, :, None],
    )
    rows, taken, gate, token = map(side_by_side, of_slots)
    group = jnp.arange(P, dtype=jnp.int32)[:, None, None]
    filled = Assignment(jnp.where(taken, group, P), gate, token)
    mix = sharding.over_experts(
      lambda secondary, rows, taken: secondary.mix(rows, train, taken, None), P
    )
    y, inner = mix(self.secondary, rows, taken)
    y = sent.combine([y.reshape(*sent.gate[0].shape, -1)])
    routing = _count_dropped(routing, capacity)
    primary = routing_lib.merge_groups(routing, together)
    return y, _flatten(primary, inner, filled)

  def _why_unsorted(self, x, train: bool) -> str:
    """Says what keeps rows in slots, and the way out; "" if nothing does."""
    inner = self.secondary
    part = "" if train else "eval_"
    factors = [
      getattr(layer, f"{part}capacity_factor") for layer in (self, inner)
    ]
    if factors != [None, None]:
      return (
        f"drops none, and the {part}capacity_factor of the two levels is"
        f" {factors[0]} and {factors[1]}; give both None"
      )
    gate = inner.router
    if not (isinstance(gate, Router) and gate.is_by_token(train)):
      return (
        f"{type(gate).__name__}(num_experts={gate.num_experts}) within groups"
        f" decides{' in training' * train} about all that came there at once;"
        " choose a router that decides about every token by itself"
      )
    if isinstance(inner.experts, Mixed) or _need_slots(inner.experts):
      return (
        f"experts of {type(inner.experts).__name__} need slots there; choose"
        " experts of one kind of moejax.experts"
      )
    if inner.dispatch not in ("auto", "ragged"):
      return (
        f"within groups dispatch is {inner.dispatch!r}; leave that of the"
        " secondary mixture 'auto'"
      )
    if sharding.in_expert():
      return "this mixture is part of an expert, one of several on a device"
    if not sharding.is_known("group", x):
      return "it is not known how the mesh splits them; use a layout"
    return ""

  def _mix_sorted(self, x, routing: Routing, train: bool):
    """Mixes rows that are sorted by group, and then by expert."""
    inner, P = self.secondary, self.primary.num_experts
    Q = inner.router.num_experts
    declare = sharding.over_experts(
      lambda secondary: secondary.declare(x.shape[-1], train), P
    )
    of_routers, of_experts, learning = declare(inner)
    rngs = {}
    if train and self.has_rng("router"):
      rngs = {"router": self.make_rng("router")}
    router = inner.router.clone(parent=None)

    def decide(weights, rows, group_sizes, number, mask):
      variables = {"params": weights} if weights else {}
      sorted_rows = SortedRows(rows, group_sizes, number)
      return router.apply(
        variables, sorted_rows, train=train, mask=mask, rngs=rngs
      )

    edges = routing.assignment
    found = ragged.two_levels(
      decide, inner.expert_fn(train), (of_routers, of_experts), x, edges, P, Q
    )
    # Of the edges between groups each makes K: all first choices come first.
    G, _, K = found.expert.shape
    gate = edges.gate[..., None] * found.gate
    expert, gate = (
      a.swapaxes(1, 2).reshape(G, -1) for a in (found.expert, gate)
    )
    token = None if edges.token is None else jnp.tile(edges.token, (1, K))
    flat = routing_lib.make_routing(
      Assignment(expert, gate, token), found.logits, edges.expert < P, P * Q
    )
    flat = flat._replace(
      load=found.load, within=edges.expert, **_flat_learned(learning, P * Q)
    )
    primary = _count_dropped(routing, None)
    return found.y, _count_dropped(flat, None)._replace(primary=primary)


def _own_router(layer: nn.Module, module: Any, name: str) -> Any:
  fits = hasattr(module, "num_experts") and not hasattr(module, "run")
  wanted = "a module of moejax.router, as NoisyTopK(num_experts=8, k=2)"
  return experts_lib.own(layer, module, name, fits, wanted)


def _need_slots(experts: nn.Module) -> bool:
  if isinstance(experts, Mixed):
    return any(_need_slots(kind) for kind in experts.kinds)
  return isinstance(experts, Each)


def _count_dropped(routing: Routing, capacity: int | None) -> Routing:
  """Says how many edges are beyond the capacity, first come, first served."""
  zero = jnp.zeros_like(routing.count)
  # Edges that the router counted and had no place for, the last ones.
  left_out = zero if routing.dropped is None else routing.dropped
  if capacity is None:
    return routing._replace(dropped=left_out, dropped_first=zero)
  assignment, first = routing.assignment, zero
  if assignment.token is None:
    num_tokens = routing.logits.shape[1]
    # As in `routing.make_routing` not in the gate's type: bfloat16 ends at 256.
    ones = jnp.ones_like(assignment.gate[:, :num_tokens], dtype=zero.dtype)
    first = routing_lib.per_expert(
      ones, assignment.expert[:, :num_tokens], zero.shape[1]
    )
  return routing._replace(
    dropped=jnp.maximum(routing.count - capacity, left_out),
    dropped_first=jnp.maximum(first - capacity, 0),
  )


def _flatten(primary: Routing, inner: Routing, sent: Assignment) -> Routing:
  """Makes one decision over all P * Q experts of the P groups' own.

  `sent` are the primary's edges in the slots, [P, G, C].
  """
  P, G, C, Q = inner.logits.shape

  def importance_of(assignment, gate):
    token = assignment.tokens(C)
    of_edge = jnp.take_along_axis(gate, token, axis=1, mode="clip")
    return routing_lib.per_expert(
      of_edge * assignment.gate, assignment.expert, Q
    )

  # Eq. 13: each secondary gate counts as much as the primary one before it.
  importance = jax.vmap(importance_of)(inner.assignment, sent.gate)
  sums = inner._replace(importance=importance)
  flat = {
    name: getattr(sums, name).swapaxes(0, 1).reshape(G, P * Q)
    for name in ("importance", "load", "count", "dropped", "dropped_first")
  }
  flat |= _flat_learned(inner, P * Q)
  return inner._replace(primary=primary, sent=sent, **flat)


def _flat_learned(routing: Routing, size: int) -> dict[str, Any]:
  """Returns what is learned beside the weights, of all groups in a row."""
  return jax.tree.map(
    lambda value: value.reshape(size),
    {name: getattr(routing, name) for name in routing_lib.LEARNED},
  )
