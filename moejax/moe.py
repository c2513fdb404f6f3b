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
from moejax import named, sharding
from moejax import router as router_lib
from moejax import routing as routing_lib
from moejax import slots as slots_lib
from moejax.experts import Each, Mixed
from moejax.routing import Routing
from moejax.slots import Block, Capacity

# What a caller may give: arrays of JAX or NumPy.
ArrayLike = Array | np.ndarray

# The collection in which every MoE layer leaves its Routing.
ROUTING = "routing"
# Where a step counts the calls of a layer.
_CALLS = "moejax.calls"


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


class MoE(nn.Module):
  """Sparsely-gated mixture of experts, y = sum_e G(x)_e E_e(x) (eq. 1).

  All tokens are routed at once (the layer is convolutional over time, sec.
  3.1), in groups of `group_size` consecutive tokens whose capacity is their
  own. The layer leaves its `Routing` in the collection "routing"; what it
  should cost is the trainer's affair (`losses.auxiliary`).

  Attributes:
    router: x [G S D] -> Routing.
    experts: declares the experts' weights and runs them.
    group_size: S; None takes all tokens as one group. It must not depend on
      the mesh, or results would; the number of groups must divide over the
      devices that share the batch.
    capacity_factor: slots over the mean load in training; None drops nothing.
    eval_capacity_factor: the same in evaluation.
    dispatch: how rows travel, a name in `dispatch.DISPATCH`, or "auto".
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
    router_lib.check(self.router, "router")
    experts_lib.check(self.experts, "experts")
    super().__post_init__()

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch D"],
    train: bool = False,
    *,
    mask: Shaped[ArrayLike, "..."] | None = None,
    ids: Int[ArrayLike, "..."] | None = None,
  ) -> Float[Array, "*batch D"]:
    """Mixes; a token whose every edge was dropped, or padding, gives zero.

    Args:
      x: activations, [B, L, D] as a rule; whole numbers become float32.
      train: whether to draw noise and use the training capacity; True or False
        itself, since it decides what is compiled.
      mask: real tokens; all of them by default.
      ids: the tokens' ids in the vocabulary, for a router that reads them.

    Raises:
      ValueError: sizes that do not divide, or experts that do not match.
    """
    return _mix_in_groups(self, x, train, mask, ids)

  def mix(
    self,
    x: Float[Array, "G S D"],
    train: bool,
    mask: Bool[Array, "G S"] | None,
    ids: Int[Array, "G S"] | None,
  ) -> tuple[Float[Array, "G S D"], Routing]:
    """Mixes tokens that are in groups; reports nothing but what it returns."""
    num_experts = self.router.num_experts
    if self.experts.num_experts != num_experts:
      raise ValueError(
        f"the router chooses among {num_experts} experts, but there are"
        f" {self.experts.num_experts}; give both the same num_experts."
      )
    routing = self.router(x, train=train, mask=mask, ids=ids)
    factor = self.capacity_factor if train else self.eval_capacity_factor
    capacity = _capacity(routing, x.shape[1], factor, self.experts)
    edges = routing.assignment.expert
    name = _chosen(self.dispatch, capacity, self.experts, edges)

    def run(weights, rows, real):
      return self.experts.run(weights, rows, real, train)

    # Where parameters are made nothing is differentiated; and lifted within the
    # manual part of `ragged` they would be tracers of it.
    if self.recompute and not self.is_initializing():
      run = jax.checkpoint(run)
      if _need_slots(self.experts):
        # Modules that hold weights of their own.
        lifted = nn.checkpoint(lambda experts, *args: experts.run(*args, train))
        run = functools.partial(lifted, self.experts)
    y = dispatch_lib.DISPATCH[name](
      run,
      self.experts(x.shape[-1]),
      x,
      routing.assignment,
      num_experts,
      capacity,
    )
    return y, _count_dropped(routing, capacity)


class HierarchicalMoE(nn.Module):
  """A mixture of groups of experts, each a mixture itself (app. B, eq. 12).

  The primary router sends tokens to groups; a group's own router sees, and
  pays for, only those. A group lives whole on one device: tokens travel once
  for each group they visit, and the experts of a group share what arrived.

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
      leaves of groups must divide over them.
    capacity_factor: a group's slots over its mean load in training. Those of
      `secondary` multiply with it.
    eval_capacity_factor: the same in evaluation.
    dispatch: how rows travel to groups: "gather" or "einsum".
  """

  primary: nn.Module
  secondary: MoE
  group_size: int | None = None
  groups_together: int = 1
  capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  dispatch: str = "gather"

  def __post_init__(self) -> None:
    router_lib.check(self.primary, "primary")
    if not isinstance(self.secondary, MoE):
      raise ValueError(
        f"secondary is {named.shown(self.secondary)}; give the MoE of one group"
        " of experts."
      )
    super().__post_init__()

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch D"],
    train: bool = False,
    *,
    mask: Shaped[ArrayLike, "..."] | None = None,
    ids: Int[ArrayLike, "..."] | None = None,
  ) -> Float[Array, "*batch D"]:
    """Mixes, as MoE does.

    Raises:
      ValueError: sizes that do not divide, or experts that do not match.
    """
    if self.secondary.group_size is not None:
      raise ValueError(
        f"group size {self.secondary.group_size} of the secondary mixture: it"
        " routes what each group of tokens sends it; leave its group_size None"
        f" and set that of the whole layer, now {self.group_size}."
      )
    if self.dispatch not in ("gather", "einsum"):
      raise ValueError(
        f"unknown dispatch {self.dispatch!r} between groups of experts; choose"
        " gather or einsum."
      )
    return _mix_in_groups(self, x, train, mask, ids)

  def mix(
    self,
    x: Float[Array, "G S D"],
    train: bool,
    mask: Bool[Array, "G S"] | None,
    ids: Int[Array, "G S"] | None,
  ) -> tuple[Float[Array, "G S D"], Routing]:
    """Mixes tokens that are in groups; reports nothing but what it returns."""
    num_groups, together = self.primary.num_experts, self.groups_together
    if together < 1 or x.shape[0] % together:
      raise ValueError(
        f"groups_together {together} does not divide the {x.shape[0]} groups of"
        f" {x.shape[1]} tokens that a batch, or a microbatch, has; choose one"
        " that does, or other microbatches."
      )
    routing = self.primary(x, train=train, mask=mask, ids=ids)
    # Else the losses, whose sums lie with the groups of experts, would have
    # every device count the edges of all.
    load, count = (
      sharding.constrain(sums, "group", None)
      for sums in (routing.load, routing.count)
    )
    routing = routing._replace(load=load, count=count)
    factor = self.capacity_factor if train else self.eval_capacity_factor
    capacity = _capacity(routing, x.shape[1], factor)
    trip = dispatch_lib.depart(
      self.dispatch, x, routing.assignment, num_groups, capacity
    )
    shape = trip.gate[0].shape
    rows, real, gate = (_side_by_side(slots, together) for (slots,) in trip[:3])
    mix = sharding.over_experts(
      lambda secondary, rows, real: secondary.mix(rows, train, real, None),
      num_groups,
    )
    y, inner = mix(self.secondary, rows, real)
    routing = _count_dropped(routing, capacity)
    routing = routing_lib.merge_groups(routing, together)
    return trip.home([y.reshape(*shape, -1)]), _flatten(routing, inner, gate)


def _mix_in_groups(module, x, train, mask, ids):
  """Groups the tokens, mixes them, and reports the decision."""
  shape, num_tokens = x.shape[:-1], x.size // x.shape[-1]
  if num_tokens == 0:
    raise ValueError(f"x is {x.shape}, without a token; give one or more.")
  size = num_tokens if module.group_size is None else module.group_size
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
  x = _as_float(x)
  try:
    mix = sharding.lift_to_compiler(_mix, num_tokens // size)
    y, routing = mix(module, x, mask, ids, train)
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise TypeError(
      f"dispatch {module.dispatch!r} has no derivative forward (jax.jvp,"
      " jax.linearize, jax.hessian); choose dispatch='einsum' for it."
    ) from error
  # What init leaves behind would be counted a second time by apply.
  if not module.is_initializing():
    _report(module, routing)
  return y


def _as_float(x):
  """Promotes whole numbers, as `nn.Dense` does; takes arrays of NumPy too.

  Raises:
    ValueError: complex numbers.
  """
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise ValueError(
      f"x is {x.dtype}, which no router reads; give its real and imaginary"
      " parts side by side."
    )
  return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def _mix(module, x, mask, ids, train):
  """Mixes tokens in groups; returns y, the decision and its logical axes."""
  num_tokens, width = x.size // x.shape[-1], x.shape[-1]
  size = module.group_size or num_tokens
  if mask is not None:
    mask = jnp.asarray(mask, bool)
    # Whatever stands in padding, NaN included, must not reach a product.
    x = jnp.where(mask[..., None], x, 0)
    mask = mask.reshape(-1, size)
  if ids is not None:
    ids = jnp.asarray(ids).reshape(-1, size)
  grouped = x.reshape(-1, size, width)
  grouped = sharding.constrain(grouped, "group", None, None)
  y, routing = module.mix(grouped, train, mask, ids)
  return y.reshape(*x.shape[:-1], -1), routing, routing_lib.axes(routing)


def _report(module: nn.Module, routing: Routing) -> None:
  """Adds the decision to those that the layer made before in this step.

  Raises:
    ValueError: the variables hold one of another step.
  """
  if not module.is_mutable_collection(ROUTING):
    return
  # These counters are what all copies of a module share in one `apply`, in
  # whatever `nn.scan` or `nn.remat` they are, and nothing after it.
  calls = module.scope.rng_counters
  calls[_CALLS] = calls.get(_CALLS, 0) + 1
  if calls[_CALLS] == 1 and module.has_variable(ROUTING, "routing"):
    raise ValueError(
      "the layer still holds a routing of an earlier step or call, which would"
      ' be weighed once more; give model.apply {"params": params} alone, and in'
      " nnx take it out after every call:"
      ' sown = nnx.pop(model, nnx.PathContains("routing")).'
    )
  module.sow(
    ROUTING,
    "routing",
    routing,
    reduce_fn=lambda past, one: past.replace(value=(*past.value, one)),
    init_fn=lambda: _Reports((), names=()),
  )


def _capacity(
  routing: Routing,
  tokens: int,
  factor: float | None,
  experts: nn.Module | None = None,
) -> Capacity:
  """Slots of every expert, or of each kind of mixed ones."""
  edges = routing.assignment.expert.shape[1]
  num_experts = routing.count.shape[1]

  def slots(relative: float) -> int | None:
    scaled = None if factor is None else factor * relative
    return slots_lib.capacity(edges, tokens, num_experts, scaled)

  if not isinstance(experts, Mixed):
    return slots(1.0)
  relative = experts.capacities or (1.0,) * len(experts.kinds)
  if len(relative) != len(experts.kinds):
    raise ValueError(
      f"there are capacities of {len(relative)} kinds of experts, but"
      f" {len(experts.kinds)} kinds; give each one, or leave them out."
    )
  if factor is None:
    return None
  return tuple(
    Block(kind.num_experts, slots(each))
    for kind, each in zip(experts.kinds, relative, strict=True)
  )


def _chosen(
  name: str, capacity: Capacity, experts: nn.Module, edges: Array
) -> str:
  if name == "auto":
    known = sharding.is_known("group", edges)
    return dispatch_lib.fastest(
      capacity, _need_slots(experts), edges.size, known
    )
  if name not in dispatch_lib.DISPATCH:
    raise ValueError(
      f"unknown dispatch {name!r}; choose one of auto,"
      f" {', '.join(dispatch_lib.DISPATCH)}."
    )
  if name == "ragged" and sharding.in_expert():
    raise ValueError(
      "dispatch 'ragged' sorts the rows of a whole device, but this mixture is"
      " part of an expert, one of several there; choose auto, gather or einsum."
    )
  return name


def _need_slots(experts: nn.Module) -> bool:
  if isinstance(experts, Mixed):
    return any(_need_slots(kind) for kind in experts.kinds)
  return isinstance(experts, Each)


def _count_dropped(routing: Routing, capacity: Capacity) -> Routing:
  """Says which edges capacity turned away: those beyond it, first come."""
  zero = jnp.zeros_like(routing.count)
  assignment, num_experts = routing.assignment, routing.count.shape[1]
  if capacity is None:
    return routing._replace(dropped=zero, dropped_first=zero)
  if isinstance(capacity, int):
    capacity = (Block(num_experts, capacity),)
  slots = jnp.concatenate(
    [jnp.full((1, n), c, zero.dtype) for n, c in capacity], axis=1
  )
  first = zero
  if assignment.token is None:
    num_tokens = routing.logits.shape[1]
    # As in `routing.make_routing` not in the gate's type: bfloat16 ends at 256.
    ones = jnp.ones_like(assignment.gate[:, :num_tokens], dtype=zero.dtype)
    first = routing_lib.per_expert(
      ones, assignment.expert[:, :num_tokens], num_experts
    )
  return routing._replace(
    dropped=jnp.maximum(routing.count - slots, 0),
    dropped_first=jnp.maximum(first - slots, 0),
  )


def _side_by_side(
  slots: Shaped[Array, "P G C ..."], together: int
) -> Shaped[Array, "P _ _ ..."]:
  """Puts the slots of every `together` groups of tokens side by side."""
  P, G, C = slots.shape[:3]
  slots = slots.reshape(P, G // together, together * C, *slots.shape[3:])
  rest = (None,) * (slots.ndim - 2)
  return sharding.constrain(
    slots, sharding.expert_axis(P), "group_replicated", *rest
  )


def _flatten(
  primary: Routing, inner: Routing, gate: Float[Array, "P G C"]
) -> Routing:
  """Makes one decision over all P * Q experts of the P groups' own."""
  P, G, C, Q = inner.logits.shape

  def flat(value):
    return value.swapaxes(0, 1).reshape(G, P * Q)

  def in_a_row(value):
    return None if value is None else value.reshape(P * Q)

  def importance_of(assignment, gate):
    token = assignment.tokens(C)
    of_edge = jnp.take_along_axis(gate, token, axis=1, mode="clip")
    return routing_lib.per_expert(
      of_edge * assignment.gate, assignment.expert, Q
    )

  importance = jax.vmap(importance_of)(inner.assignment, gate)
  return inner._replace(
    importance=flat(importance),
    load=flat(inner.load),
    count=flat(inner.count),
    thresholds=in_a_row(inner.thresholds),
    bias=in_a_row(inner.bias),
    dropped=flat(inner.dropped),
    dropped_first=flat(inner.dropped_first),
    primary=primary,
  )


class OneExpert(nn.Module):
  """A mixture of one: the paper's MoE-1-Wide and MoE-1-Deep (app. C.1).

  The gate of a lone expert is 1, so there is none, and no balance to lose.
  """

  experts: nn.Module

  def __post_init__(self) -> None:
    experts_lib.check(self.experts, "experts")
    if self.experts.num_experts != 1:
      raise ValueError(
        f"there are {self.experts.num_experts} experts, but no router; give"
        " num_experts=1, or use MoE."
      )
    super().__post_init__()

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch D"],
    train: bool = False,
    *,
    mask: Shaped[ArrayLike, "..."] | None = None,
    ids: Int[ArrayLike, "..."] | None = None,
  ) -> Float[Array, "*batch D"]:
    """Applies the expert to every token; padding gives zero, as in MoE."""
    del ids
    mix = sharding.lift_to_compiler(OneExpert._run)
    return mix(self, _as_float(x), mask, train)[0]

  def _run(self, x, mask, train):
    """Returns y, and what else `_mix` does of a mixture: nothing."""
    real = None
    if mask is not None:
      mask = jnp.asarray(mask, bool)
      # As there: NaN times the zero gradient of padding would be NaN.
      x, real = jnp.where(mask[..., None], x, 0), mask.reshape(1, -1)
    rows = x.reshape(1, -1, x.shape[-1])
    weights = self.experts(x.shape[-1])
    y = self.experts.run(weights, rows, real, train).reshape(x.shape)
    return y if mask is None else jnp.where(mask[..., None], y, 0), (), ()
