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
from moejax import gating, partition, ragged, sharding
from moejax import routing as routing_lib
from moejax import slots as slots_lib
from moejax.experts import Each, Mixed
from moejax.router import Router, Single, SortedRows, check_train
from moejax.routing import Assignment, Routing

# What a caller may give: arrays of JAX or NumPy.
ArrayLike = Array | np.ndarray

# The collection in which every MoE layer leaves its Routing.
ROUTING = "routing"
# Where a step counts the calls of a layer.
_CALLS = "moejax.calls"


class _Layer(nn.Module):
  """What both layers do: group tokens, `mix` them, and report."""

  def __post_init__(self) -> None:
    if self.shared is not None:
      self.shared = experts_lib.own_shared(self, self.shared)
    super().__post_init__()

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch D"],
    train: bool = False,
    mask: Shaped[ArrayLike, "..."] | None = None,
    ids: Int[ArrayLike, "..."] | None = None,
  ) -> Float[Array, "*batch O"]:
    """Mixes; a token whose every edge was dropped, or padding, gives zero.

    What shared experts make of a token that is no padding is added.

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
    if single and self.shared is not None:
      raise ValueError(
        "the router Single has 1 expert, which every token visits as it does"
        " shared ones; leave `shared` out and make the 1 expert wider."
      )
    if single and self.masked_outputs:
      raise ValueError(
        f"masked_outputs is {self.masked_outputs}, but the router Single has 1"
        " expert, whose output is all there is; leave it out."
      )
    mix = partition.lift_to_compiler(_mix, 0 if single else num_tokens // size)
    try:
      y, routing = mix(self, x, mask, ids, train, size, single)
    except TypeError as error:
      if "forward-mode" not in str(error):
        raise
      raise TypeError(
        f"dispatch {self.dispatch!r} has no derivative forward (jax.jvp,"
        " jax.linearize, jax.hessian); choose dispatch='einsum' for it, at both"
        " levels and in mixtures that are experts."
      ) from error
    if not single:
      self.report(routing)
    return y

  @nn.nowrap
  def weights_of(self, experts: nn.Module, width: int, train: bool) -> Any:
    """Returns experts' weights, without what their dropout leaves out."""
    weights = experts(width)
    if not experts_lib.drops_out(experts):
      return weights
    check_train(train)
    if train:
      weights = experts.drop_out(weights, self.make_rng("dropout"))
    return weights

  @nn.nowrap
  def expert_fn(self, experts: nn.Module, train: bool) -> slots_lib.ExpertFn:
    """Returns what runs experts, again in the backward pass if asked to."""

    def run(weights, rows, mask=None, **group_sizes):
      return experts.run(weights, rows, mask, train, **group_sizes)

    # Where parameters are made nothing is differentiated; and lifted within the
    # manual part of `ragged` they would be tracers of it.
    if not self.recompute or self.is_initializing():
      return run
    if _need_slots(experts):
      # Modules that hold weights of their own.
      lifted = nn.checkpoint(lambda experts, *args: experts.run(*args, train))
      return functools.partial(lifted, experts)
    return jax.checkpoint(run)

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


def _mix(module, x, mask, ids, train, size, single):
  """Mixes tokens; returns y, the decision and its logical axes."""
  D, front = x.shape[-1], x.shape[:-1]
  real = None if mask is None else jnp.asarray(mask, bool)
  if mask is not None:
    # Whatever stands in padding, NaN included, must not reach a product.
    x = jnp.where(real[..., None], x, 0)

  def on_every_token(expert, weights):
    """Runs one expert, for which there is nothing to route."""
    taken = None if mask is None else real.reshape(1, -1)
    run = module.expert_fn(expert, train)
    y = run(weights, x.reshape(1, -1, D), taken).reshape(*front, -1)
    return y if mask is None else jnp.where(real[..., None], y, 0)

  if single:
    y = on_every_token(module.experts, module.declare_experts(D, train))
    return y, (), ()
  grouped = sharding.constrain(x.reshape(-1, size, D), "group", None, None)
  of_groups = (
    None if a is None else jnp.asarray(a).reshape(-1, size) for a in (real, ids)
  )
  y, routing = module.mix(grouped, train, *of_groups)
  y = y.reshape(*front, -1)
  if module.shared is not None:
    shared = module.weights_of(module.shared, D, train)
    beside = on_every_token(module.shared, shared)
    if beside.shape != y.shape:
      raise ValueError(
        f"the shared experts return {beside.shape[-1]} numbers a token, but the"
        f" others {y.shape[-1]}; give both the same."
      )
    y += beside
  return y, routing, routing_lib.axes(routing)


class MoE(_Layer):
  """Sparsely-gated mixture of experts, y = sum_e G(x)_e E_e(x) (eq. 1).

  All tokens are routed at once (the layer is convolutional over time, sec.
  3.1), in groups of `group_size` consecutive tokens whose capacity is their
  own. The layer leaves its `Routing` in the collection "routing"; what it
  should cost is the trainer's affair (`losses.auxiliary`). With the router
  `Single` it is one dense expert and reports nothing. Why it may drop tokens,
  which the paper's does not, says docs/decisions.md, 9.

  The parameters lie in one scope named after the layer, {"router": ...,
  "experts": ...}, with "shared" where it has such, wherever the router and the
  experts are made: outside, in `setup`, or within `nn.compact`. Give every
  layer a router of its own.

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
    masked_outputs: chance, in training, of leaving out what an expert returns
      for a token (expert output masking, 2207.04672, where 0.2 is best); what
      is left counts 1 / (1 - masked_outputs) times. The draws are those of the
      rng stream "dropout". Of balance nothing changes.
    exchange_parts: where experts are split over devices, in how many parts each
      device sends its groups to them. With 2, rows of one part can travel while
      experts compute the other; but the experts' weights are read twice. It
      divides the groups of a device, and changes no result. Experts that are
      modules (`Each`) are sent all at once.
    shared: experts that every token visits beside the routed ones, with gate 1
      (2401.06066, eq. 9): y = sum_i shared_i(x) + sum_e G(x)_e E_e(x). They are
      one expert, or become one: n feed-forward experts of width F one of n F.
      Every device has it, where a layout does not split hidden layers.
  """

  router: nn.Module
  experts: nn.Module
  group_size: int | None = None
  capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  dispatch: str = "auto"
  recompute: bool = False
  masked_outputs: float = 0.0
  exchange_parts: int = 1
  shared: nn.Module | None = None

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
    weights = self.declare_experts(x.shape[-1], train)
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
    run, fn = dispatch_lib.DISPATCH[name], self.expert_fn(experts, train)
    sent = x, self._masked(routing.assignment, train)
    parts = self.exchange_parts
    # Experts that are modules would be called, and tell of mixtures of their
    # own, several times.
    at_once = _need_slots(experts) or sharding.in_expert()
    if parts > 1 and (at_once or not sharding.splits("expert")):
      parts = 1
    here = x.shape[0] // sharding.num_devices("group")
    if parts < 1 or here % parts:
      raise ValueError(
        f"exchange_parts {parts} does not divide the {here} groups of tokens of"
        " each device; choose one that does, or a smaller group_size."
      )
    if parts == 1:
      y = run(fn, weights, *sent, num_experts, capacity)
      return y, _count_dropped(routing, capacity)

    def part(i):
      """Each has groups of every device."""
      return jax.tree.map(
        lambda a: a.reshape(-1, parts, *a.shape[1:])[:, i], sent
      )

    ys = [
      run(fn, weights, *part(i), num_experts, capacity) for i in range(parts)
    ]
    y = jnp.stack(ys, axis=1).reshape(*x.shape[:2], -1)
    return y, _count_dropped(routing, capacity)

  def _masked(self, assignment: Assignment, train: bool) -> Assignment:
    """Sets gates of edges to zero whose output is left out."""
    chance = self.masked_outputs
    if not 0 <= chance < 1:
      raise ValueError(
        f"masked_outputs is {chance}, but it is the chance of leaving an output"
        " out; give at least 0 and less than 1."
      )
    if not (train and chance):
      return assignment
    gate = assignment.gate

    def keep(key, shape, dtype):
      return jax.random.bernoulli(key, 1 - chance, shape).astype(dtype)

    kept = gating.draw(keep, self.make_rng("dropout"), gate.shape, gate.dtype)
    return assignment._replace(gate=gate * kept / (1 - chance))

  def declare(self, width: int, train: bool) -> tuple[Any, Any, Routing]:
    """Declares the weights of router and experts, for others to run.

    Returns:
      The weights of both, and a decision of the router about a row of zeros,
      which tells what it learns beside them.
    """
    weights = self.declare_experts(width, train)
    # One row cannot be split as groups of tokens are.
    with nn.logical_axis_rules(()):
      row = jnp.zeros((1, 1, width), jnp.float32)
      routing = self.router(row, train=train)
    of_router = nn.unbox(self.router.variables.get("params", {}))
    return of_router, weights, routing

  @nn.nowrap
  def declare_experts(self, width: int, train: bool) -> Any:
    """Returns the experts' weights; ValueError if the router has others."""
    if self.experts.num_experts != self.router.num_experts:
      raise ValueError(
        f"the router chooses among {self.router.num_experts} experts, but there"
        f" are {self.experts.num_experts}; give both the same num_experts."
      )
    return self.weights_of(self.experts, width, train)


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
    shared: as of `MoE`; the secondary mixture has none.
  """

  primary: nn.Module
  secondary: MoE
  group_size: int | None = None
  groups_together: int = 1
  capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  dispatch: str = "auto"
  shared: nn.Module | None = None

  @property
  def recompute(self) -> bool:
    """That of the experts."""
    return self.secondary.recompute

  def __post_init__(self) -> None:
    self.primary = _own_router(self, self.primary, "primary")
    fits = isinstance(self.secondary, MoE)
    self.secondary = experts_lib.own(
      self, self.secondary, "secondary", fits, "the MoE of one group of experts"
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
    if self.secondary.shared is not None:
      raise ValueError(
        "the secondary mixture has shared experts, but its tokens are those of"
        f" 1 of {P} groups of experts; give `shared` to the whole layer."
      )
    if self.secondary.masked_outputs:
      raise ValueError(
        f"masked_outputs {self.secondary.masked_outputs} of the secondary"
        " mixture: outputs are left out in mixtures of one level alone; leave"
        " it 0."
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
    return self._mix_in_slots(x, routing, train)

  def _why_unsorted(self, x, train: bool) -> str:
    """Says what keeps rows in slots, and the way out; "" if nothing does."""
    inner, part = self.secondary, "" if train else "eval_"
    gate, experts = inner.router, inner.experts
    outer_factor, inner_factor = (
      getattr(layer, f"{part}capacity_factor") for layer in (self, inner)
    )
    reasons = (
      (
        (outer_factor, inner_factor) != (None, None),
        f"drops none, and the {part}capacity_factor of the two levels is"
        f" {outer_factor} and {inner_factor}; give both None",
      ),
      (
        not (isinstance(gate, Router) and gate.is_by_token(train)),
        f"{type(gate).__name__}(num_experts={gate.num_experts}) within groups"
        f" decides{' in training' * train} about all that came there at once;"
        " choose a router that decides about every token by itself",
      ),
      (
        isinstance(experts, Mixed) or _need_slots(experts),
        f"experts of {type(experts).__name__} need slots there; choose experts"
        " of one kind of moejax.experts",
      ),
      (
        inner.dispatch not in ("auto", "ragged"),
        f"within groups dispatch is {inner.dispatch!r}; leave that of the"
        " secondary mixture 'auto'",
      ),
      (
        sharding.in_expert(),
        "this mixture is part of an expert, one of several on a device",
      ),
      (
        not sharding.is_known("group", x),
        "it is not known how the mesh splits them; use a layout",
      ),
    )
    return next((reason for holds, reason in reasons if holds), "")

  def _mix_in_slots(self, x, routing: Routing, train: bool):
    """Gives groups of experts slots, and runs a mixture in each."""
    (G, S, _), P = x.shape, self.primary.num_experts
    together = self.groups_together
    factor = self.capacity_factor if train else self.eval_capacity_factor
    num_edges = routing.assignment.expert.shape[1]
    capacity = slots_lib.capacity(num_edges, S, P, factor)
    name = "gather" if self.dispatch == "auto" else self.dispatch
    sent = dispatch_lib.dispatch(name, x, routing.assignment, P, capacity)
    (rows,), (taken,), (gate,), (token,), combine = sent

    def side_by_side(slots):
      """[P, G, C, ...] -> [P, G / together, together * C, ...]."""
      slots = slots.reshape(P, G // together, -1, *slots.shape[3:])
      axes = (sharding.expert_axis(P), "group_replicated")
      return sharding.constrain(slots, *axes, *(None,) * (slots.ndim - 2))

    in_slots = gate.shape
    # Tokens of groups that are together follow each other.
    first = jnp.arange(G, dtype=jnp.int32) % together * S
    token = token + first[None, :, None]
    rows, taken, gate, token = map(side_by_side, (rows, taken, gate, token))
    mix = sharding.over_experts(
      lambda secondary, rows, taken: secondary.mix(rows, train, taken, None), P
    )
    y, inner = mix(self.secondary, rows, taken)
    y = combine([y.reshape(*in_slots, -1)])

    # One decision over all P * Q experts of the P groups' own.
    *_, C, Q = inner.logits.shape
    group = jnp.arange(P, dtype=jnp.int32)[:, None, None]
    filled = Assignment(jnp.where(taken, group, P), gate, token)

    @jax.vmap
    def importance_of(assignment, gate):
      token = assignment.tokens(C)
      of_edge = jnp.take_along_axis(gate, token, axis=1, mode="clip")
      of_edge = of_edge * assignment.gate
      return routing_lib.per_expert(of_edge, assignment.expert, Q)

    # Eq. 13: each secondary gate counts as much as the primary one before it.
    importance = importance_of(inner.assignment, gate)
    inner = inner._replace(importance=importance, sent=filled)
    flat = {
      name: getattr(inner, name).swapaxes(0, 1).reshape(-1, P * Q)
      for name in routing_lib.SUMS
    }
    primary = routing_lib.merge_groups(
      _count_dropped(routing, capacity), together
    )
    learned = _flat_learned(inner, P * Q)
    return y, inner._replace(primary=primary, **flat, **learned)

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

    edges, weights = routing.assignment, (of_routers, of_experts)
    y, expert, gate, logits, load = ragged.two_levels(
      decide, inner.expert_fn(inner.experts, train), weights, x, edges, P, Q
    )
    # Of the edges between groups each makes K: all first choices come first.
    G, _, K = expert.shape
    gate = edges.gate[..., None] * gate
    expert, gate = (a.swapaxes(1, 2).reshape(G, -1) for a in (expert, gate))
    token = None if edges.token is None else jnp.tile(edges.token, (1, K))
    flat = routing_lib.make_routing(
      Assignment(expert, gate, token), logits, edges.expert < P, P * Q
    )
    flat = flat._replace(
      load=load, within=edges.expert, **_flat_learned(learning, P * Q)
    )
    primary = _count_dropped(routing, None)
    return y, _count_dropped(flat, None)._replace(primary=primary)


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
  first = zero
  if routing.assignment.token is None:
    chosen = routing.assignment.expert[:, : routing.logits.shape[1]]
    # As in `routing.make_routing` not in the gate's type: bfloat16 ends at 256.
    ones = jnp.ones_like(chosen, dtype=zero.dtype)
    first = routing_lib.per_expert(ones, chosen, zero.shape[1])
  return routing._replace(
    dropped=jnp.maximum(routing.count - capacity, left_out),
    dropped_first=jnp.maximum(first - capacity, 0),
  )


def _flat_learned(routing: Routing, size: int) -> dict[str, Any]:
  """Returns what is learned beside the weights, of all groups in a row."""
  return jax.tree.map(
    lambda value: value.reshape(size),
    {name: getattr(routing, name) for name in routing_lib.LEARNED},
  )
