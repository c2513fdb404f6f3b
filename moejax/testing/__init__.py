"""Contracts: tests of a router, experts, dispatch, loss or product of yours.

A contract is a class of pytest tests; a subclass says what is tested:

  class TestMine(moejax.testing.RouterContract):
    router = Mine(num_experts=4)

Inputs are small, random and always the same. A test that fails raises an
AssertionError that says what is broken. Where something is not meant to hold,
`test_... = None` leaves it out. Nothing here imports pytest.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax import experts as experts_lib
from moejax import gating
from moejax import routing as routing_lib
from moejax.routing import Assignment, Routing
from moejax.testing.grouped import GroupedContract as GroupedContract

# Groups and tokens in each, some of them padding; ids; experts where we choose.
G, S, E = 2, 8, 4
MASK = np.array([[1, 0, 1, 1, 0, 1, 1, 0], [1] * S], bool)
IDS = np.arange(G * S, dtype=np.int32).reshape(G, S) % 5
_MODES = ("evaluation", "training")


class Alone(nn.Module):
  """Experts without a router.

  Attributes:
    experts: a module of `moejax.experts`, or one like these.
  """

  experts: nn.Module

  def __call__(self, rows: Any, mask: Any = None, train=False, **sizes) -> Any:
    """Declares the experts' weights and runs them on rows, slots or sorted."""
    weights = self.experts(jax.tree.leaves(rows)[0].shape[-1])
    return self.experts.run(weights, rows, mask, train, **sizes)


class RouterContract:
  """What a router keeps to, in training and in evaluation.

  Attributes:
    router: a `moejax.Router` of two experts or more.
    width: D of its tokens.
  """

  router: Any
  width: int = 4

  def test_parameters(self):
    """They do not depend on the mode in which they were made."""
    shapes = [
      jax.tree.map(jnp.shape, jax.eval_shape(_init(self.router, self.width, m)))
      for m in _MODES
    ]
    _demand(
      shapes[0] == shapes[1], "made {}, but in training {}".format(*shapes)
    )

  def test_edges(self):
    """They lead from real tokens to experts, to none of these twice."""
    for mode, run in self._modes():
      assignment, limit = run()[0].assignment, self.router.num_experts
      gate, expert = np.asarray(assignment.gate), np.asarray(assignment.expert)
      token, used = np.asarray(assignment.tokens(S)), expert < limit
      _demand(
        (expert >= 0).all() and (expert <= limit).all(),
        f"{mode}: edges lead to {expert.min()}..{expert.max()}, but experts are"
        f" 0..{limit - 1}, and {limit} marks an unused edge",
      )
      ends = token[used]
      _demand((ends >= 0).all() and (ends < S).all(), f"{mode}: token {ends}")
      _finite(gate, f"{mode}: gates")
      _same(gate[~used], 0, f"{mode}: gates of unused edges")
      visits = np.zeros((G, S, limit))
      np.add.at(visits, (np.nonzero(used)[0], ends, expert[used]), 1)
      _demand(visits.max() <= 1, f"{mode}: a token visits an expert twice")
      _same(visits[~MASK], 0, f"{mode}: numbers of edges of padding")

  def test_sums(self):
    """Importance, load and count are sums over edges, and float32."""
    for mode, run in self._modes():
      found, _ = run()
      expert, gate, _ = map(np.asarray, found.assignment)
      group = np.broadcast_to(np.arange(G)[:, None], expert.shape)
      importance, count = np.zeros((2, G, self.router.num_experts + 1))
      np.add.at(importance, (group, expert), gate)
      np.add.at(count, (group, expert), 1)
      importance, count = importance[:, :-1], count[:, :-1]
      if found.dropped is not None:
        count = count + found.dropped
      _same(
        found.importance,
        importance,
        f"{mode}: importance and sums of gates (eq. 6)",
      )
      _same(found.count, count, f"{mode}: count and numbers of edges")
      load, tokens = np.asarray(found.load), MASK.sum(axis=1, keepdims=True)
      if mode == "evaluation":
        _same(load, count, f"{mode}: load and count, without noise,")
      _demand(
        (load >= 0).all() and (load <= tokens + 1e-3).all(),
        f"{mode}: load {load} is not between 0 and the tokens {tokens}",
      )
      x = jnp.zeros((G, S, self.width), jnp.bfloat16)
      found, _ = jax.eval_shape(functools.partial(run, x=x))
      types = {a.dtype.name for a in (found.logits, *found[2:5])}
      _demand(types == {"float32"}, f"of x in bfloat16 sums are {types}")

  def test_padding(self):
    """Whatever stands in it changes nothing, and a batch may be all padding."""
    for mode, run in self._modes():
      found, slopes = run()
      other, _ = run(x=np.where(MASK[..., None], self._x(), 50))
      said = f"{mode}: decisions with other numbers in padding"
      _same(_smooth(other), _smooth(found), said)
      _same(slopes[1][~MASK], 0, f"{mode}: gradients to padding")
      found, slopes = run(mask=np.zeros_like(MASK))
      nothing = (found.assignment.gate, found.importance, found.load, slopes[1])
      _same(nothing, 0, f"{mode}: of padding alone, gates, sums and gradient")
      _finite(slopes[0], f"{mode}: the gradient of padding alone")

  def test_other_tokens(self):
    """They change nothing for a token, where `is_by_token` says so."""
    half, x = np.arange(S) < S // 2, self._x()
    for mode, run in self._modes():
      if not self.router.is_by_token(mode == "training"):
        continue
      before = _gates(run()[0].assignment, self.router.num_experts)
      for mine in (half, ~half):
        found, _ = run(
          x=np.where(mine[:, None], x, 1 - 2 * x), mask=MASK | ~mine
        )
        after = _gates(found.assignment, self.router.num_experts)
        said = f"{mode}: is_by_token is True: gates beside other tokens"
        _same(after[:, mine], before[:, mine], said)

  def test_order(self):
    """Tokens in another order have the same gates, unless chance is drawn."""
    order = np.random.default_rng(0).permutation(S)
    for mode, run in self._modes():
      before, again = (_smooth(run(seed=seed)[0]) for seed in (0, 1))
      if any((before[n] != again[n]).any() for n in ("gates", "load")):
        continue
      inputs = {"x": self._x(), "mask": MASK, "ids": IDS}
      found, _ = run(**{name: a[:, order] for name, a in inputs.items()})
      said = f"{mode}: gates of tokens in another order"
      _same(_smooth(found)["gates"], before["gates"][:, order], said)

  def test_jit(self):
    """Neither it nor a mask of real tokens changes anything."""
    for mode, run in self._modes():
      params, x = self._start(), jnp.asarray(self._x())
      plain = _route(self.router, mode, params, x, None, jnp.asarray(IDS), 0)
      found, _ = run(mask=np.ones_like(MASK))
      _same(
        _smooth(found),
        _smooth(plain),
        f"{mode}: decisions with and without jax.jit and mask",
      )

  def test_gradient(self):
    """It is finite, that of the value, and in training reaches all it should.

    It may reach a parameter by gates, importance, load, thresholds or bias.
    """
    for mode, run in self._modes():
      for scale in (0, 1, 1e4):
        _finite(run(x=scale * self._x())[1], f"{mode}: x times {scale}")
      at = self._start(), jnp.asarray(self._x())
      fn = _compiled(self.router, mode)
      slopes = _check_slopes(lambda at, fn=fn: fn(at, MASK, IDS, 0), at, mode)
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes[0]):
      name = jax.tree_util.keystr(path)
      _demand((slope != 0).any(), f"no gradient reaches the parameter {name}")

  def _x(self):
    return _random(1, (G, S, self.width))

  def _start(self):
    return _router_params(self.router, self.width)

  def _modes(self):
    """Pairs of a mode and a function to a decision and a score's gradient."""
    for mode in _MODES:
      params, fn = self._start(), _compiled(self.router, mode)

      def run(x=None, mask=MASK, ids=IDS, seed=0, params=params, fn=fn):
        x = jnp.asarray(self._x() if x is None else x)
        (_, (_, found)), slopes = fn((params, x), mask, ids, seed)
        return found, slopes

      yield mode, run


class ExpertsContract:
  """What experts keep to, in slots and on sorted rows.

  Attributes:
    experts: a module of `moejax.experts`, or one like these, of two or more.
    width: D of their rows.
    sorted_rows: whether they run on sorted rows, or refuse them.
  """

  experts: Any
  width: int = 4
  sorted_rows: bool = True

  def test_rows(self):
    """Each row is mapped by itself, in the type in which it comes."""
    (weights, rows), taken = self._draw()
    taken = jnp.ones_like(taken)
    values = [
      _rows(self.experts, False)((weights, changed), taken)[0][1][0]
      for changed in (rows, rows[:, ::-1], rows.at[:, -1].add(1))
    ]
    said = "rows beside others, or in another place,"
    _same(values[1][:, ::-1], values[0], said)
    _same(values[2][:, :-1], values[0][:, :-1], said)
    run = functools.partial(Alone(self.experts).apply, {"params": weights})
    dtype = jax.eval_shape(run, rows.astype(jnp.bfloat16)).dtype
    _demand(dtype == jnp.bfloat16, f"rows in bfloat16 become {dtype}")

  def test_weights(self):
    """Those of each expert are its own; the gradient of all others is zero."""
    at, taken = self._draw()
    for is_sorted in (False, True)[: 1 + self.sorted_rows]:
      fn = _rows(self.experts, is_sorted)
      used = []
      for e in range(len(taken)):
        alone = jnp.zeros_like(taken).at[e].set(True)
        slopes = fn(at, alone)[1]
        _finite(slopes, f"the gradient where expert {e} alone has rows")
        used.append([np.asarray(s) != 0 for s in jax.tree.leaves(slopes)])
      for of_experts in zip(*used, strict=True):
        shared = np.sum(of_experts, axis=0) > 1
        _demand(not shared.any(), "rows of one expert teach another's weights")
      _same(fn(at, jnp.zeros_like(taken))[1], 0, "gradients without rows")

  def test_sorted_rows(self):
    """In slots and sorted they have one value and one gradient."""
    at, taken = self._draw()
    if self.sorted_rows:
      slots, in_order = (_rows(self.experts, s)(at, taken) for s in (0, 1))
      _same(in_order, slots, "value and gradient in slots and sorted")
      return
    try:
      _rows(self.experts, True)(at, taken)
    except ValueError:
      return
    raise AssertionError("sorted_rows is False, but they raise no ValueError")

  def test_gradient(self):
    """It is that of finite differences."""
    at, taken = self._draw()
    fn = _rows(self.experts, False)
    _check_slopes(lambda at: fn(at, taken), at, "experts")

  def _draw(self, slots=3):
    """Weights and rows; of slots the first 3, 2, 1, 0, 3, ..., 0 are taken."""
    num_experts = self.experts.num_experts
    count = (slots - np.arange(num_experts)) % (slots + 1)
    count[-1] = 0
    rows = jnp.asarray(_random(2, (num_experts, slots, self.width)))
    init = functools.partial(Alone(self.experts).init, jax.random.key(0))
    weights = nn.unbox(jax.eval_shape(init, rows)).get("params", {})
    weights = jax.tree.map(lambda w: jnp.asarray(_random(7, w.shape)), weights)
    return (weights, rows), jnp.arange(slots)[None] < count[:, None]


class DispatchContract:
  """What a dispatch keeps to: y[token] += gate * expert(x[token]) (eq. 1).

  Attributes:
    dispatch: a function as those of `moejax.dispatch.DISPATCH`.
    capacities: slots per expert and group that are tried.
  """

  dispatch: Callable
  capacities: tuple[int | None, ...] = (None, 2)

  def test_value_and_gradient(self):
    """An expert takes its first `capacity` edges; the rest do nothing."""
    x, w = _random(3, (G, S, 3)), _random(4, (E, 3, 5))
    logits = jnp.asarray(_random(5, (G, S, E)) + [2, 0, 0, -9], jnp.float32)
    tries = [(gating.top_k, capacity) for capacity in self.capacities]
    tries.append((gating.expert_choice, self.capacities[-1]))
    for choose, capacity in tries:
      said = f"{choose.__name__}, capacity {capacity}"
      edges = choose(logits, 2, jnp.asarray(MASK)).assignment
      unused = edges.expert == E
      # Nobody need clear what an unused edge holds.
      edges = edges._replace(gate=jnp.where(unused, 7, edges.gate))
      want, kept = np.zeros((G, S, 5)), np.zeros(unused.shape, bool)
      for g in range(G):
        left = [S if capacity is None else capacity] * E + [0]
        for a, token in enumerate(edges.tokens(S)[g]):
          e = edges.expert[g, a]
          if left[e]:
            left[e] -= 1
            kept[g, a] = True
            want[g, token] += float(edges.gate[g, a]) * (x[g, token] @ w[e])

      def run(at, edges, capacity=capacity):
        x, w, gate = at
        edges = edges._replace(gate=gate)
        expert_fn = experts_lib.Linear(E, 5).run
        fn = _function(self, "dispatch")
        return fn(expert_fn, {"w": w}, x, edges, E, capacity), ()

      scored, at = _scored(run), (jnp.asarray(x), jnp.asarray(w), edges.gate)
      (_, (y, _)), (_, to_w, to_gate) = scored(at, edges)
      _same(y, want, f"{said}: y")
      _same(to_gate[~kept], 0, f"{said}: gradients of edges without a slot")
      visited = np.unique(np.asarray(edges.expert)[kept])
      idle = np.delete(np.asarray(to_w), visited, axis=0)
      _same(idle, 0, f"{said}: gradients of experts without tokens")
      _check_slopes(lambda at: scored(at, edges), at, said)  # noqa: B023
      none = edges._replace(expert=jnp.full_like(edges.expert, E))
      (_, (y, _)), slopes = scored(at, none)
      _same((y, slopes), 0, f"{said}: y and gradients where no edge is used")


class LossContract:
  """What a balance loss keeps to, as a function of a Routing of all groups.

  Attributes:
    loss: a function as those of `moejax.losses.LOSSES`.
    at_balance: its value where all experts have equal sums, thresholds choose
      what was chosen, and logits are logarithms of probabilities.
  """

  loss: Callable
  at_balance: float = 0.0

  def test_balance(self):
    """There its value is known, and its gradient is finite."""
    chances = np.log([0.5, 0.3, 0.15, 0.05])
    logits = [[np.roll(chances, s) for s in range(S)]] * G
    found = _decided(np.array(logits), np.ones((G, S), bool))
    found = found._replace(thresholds=jnp.full(E, 0.2))
    value, slopes = self._score(found)
    want = float(self.at_balance)
    _same(value, want, f"at balance the loss and at_balance, {want},")
    _finite(slopes, "the gradient at perfect balance")

  def test_gradient(self):
    """It is somewhere, and there that of finite differences."""
    found = _decided(_random(6, (G, S, E)), MASK)
    _, slopes = self._score(found)
    reached = [name for name, slope in slopes.items() if (slope != 0).any()]
    _demand(reached, "the loss has no gradient")
    at = {name: getattr(found, name) for name in reached}
    _check_slopes(
      lambda at: _loss(_function(self, "loss"))(at, found), at, "loss"
    )

  def test_padding(self):
    """Tokens with padding cost what they would cost without."""
    logits, real = _random(6, (G, S, E)), np.arange(S) < S - 3
    padded = _decided(logits, np.broadcast_to(real, (G, S)))
    value, slopes = self._score(padded)
    alone, _ = self._score(_decided(logits[:, real]))
    _same(value, alone, "losses with padding and without")
    _same(slopes["logits"][:, ~real], 0, "gradients to padding")
    nothing, slopes = self._score(_decided(logits, np.zeros((G, S), bool)))
    _finite((nothing, slopes), "the loss of nothing but padding")
    _same(slopes, 0, "gradients of nothing but padding")

  def test_order(self):
    """That of tokens in a group, and of groups, does not matter."""
    order = np.random.default_rng(0).permutation(S)
    logits = _random(6, (G, S, E))
    want, _ = self._score(_decided(logits, MASK))
    for groups, tokens in ((slice(None), order), (slice(None, None, -1), ...)):
      other = _decided(logits[groups][:, tokens], MASK[groups][:, tokens])
      _same(self._score(other)[0], want, "losses in another order")

  def test_groups(self):
    """Sums are added up over groups before what is not linear."""
    found = _decided(_random(6, (G, S, E)), MASK)
    merged = routing_lib.merge_groups(found, G)
    values = self._score(merged)[0], self._score(found)[0]
    _same(*values, f"losses of {G} groups and of these as one")

  def _score(self, found):
    """Returns the loss, and its gradient by fields of the decision."""
    at = {name: getattr(found, name) for name in _FIELDS}
    (_, (value, _)), slopes = _loss(_function(self, "loss"))(at, found)
    return value, slopes


# -- how it is done -----------------------------------------------------------


def _demand(holds, said):
  if not holds:
    raise AssertionError(said)


def _same(got, want, said):
  """Compares trees of arrays; with 0, which is meant to the last bit."""

  def check(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    off = np.abs(got - want).max(initial=0)
    # Not so where it is NaN.
    near = off <= tolerance * (1 + np.abs(want).max(initial=0))
    is_what = "zero" if tolerance == 0 else "the same"
    _demand(near, f"{said} should be {is_what}, but differ by {off:.3g}")

  if isinstance(want, int):
    jax.tree.map(lambda got: check(got, want, 0), got)
  else:
    jax.tree.map(lambda got, want: check(got, want, 2e-4), got, want)


def _finite(tree, said):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    holds = np.isfinite(np.asarray(leaf)).all()
    _demand(holds, f"{said}: {jax.tree_util.keystr(path)} is not finite")


def _random(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype("float32")


def _function(contract, name):
  """Returns a function that is an attribute; it is no method."""
  found = inspect.getattr_static(contract, name)
  return found.__func__ if isinstance(found, staticmethod) else found


def _weighed(parts, dtype):
  """Sums all entries, each with a weight of its own."""
  return sum(
    (part.astype(dtype) * _random(8, part.shape).astype(dtype)).sum()
    for part in jax.tree.leaves(parts)
  )


def _scored(fn):
  """Compiles fn(at, ...) -> (parts, aux) with a score's gradient to `at`."""

  def score(at, *args):
    parts, aux = fn(at, *args)
    return _weighed(parts, jnp.float32), (parts, aux)

  return jax.jit(jax.value_and_grad(score, has_aux=True))


def _check_slopes(scored, at, said):
  """Compares a gradient, leaf by leaf, with differences along directions.

  The median of five: at a step over a choice a difference is another.
  """
  leaves, tree = jax.tree.flatten(at)
  slopes = scored(at)[1]
  _finite(slopes, f"{said}: the gradient")
  paths = jax.tree_util.tree_leaves_with_path(slopes)
  step = 1e-3
  for i, (path, slope) in enumerate(paths):
    errors = []
    for seed in range(5):
      direction, ends = _random(seed, slope.shape), []
      for sign in (1, -1):
        moved = leaves[i] + jnp.asarray(sign * step * direction)
        moved = tree.unflatten([*leaves[:i], moved, *leaves[i + 1 :]])
        parts = jax.device_get(scored(moved)[0][1][0])
        ends.append(_weighed(parts, np.float64))
      want = (ends[0] - ends[1]) / (2 * step)
      got = (np.float64(slope) * direction).sum()
      errors.append(abs(got - want) / (0.1 + abs(want)))
    _demand(
      np.median(errors) < 0.03,
      f"{said}: the gradient to {jax.tree_util.keystr(path)} is not that of"
      f" finite differences; relative errors are {np.sort(errors)}",
    )
  return slopes


# What is compiled serves all tests of a contract.


def _init(router, width, mode="training"):
  """Returns what makes the parameters, in boxes."""
  init = functools.partial(router.init, train=mode == "training")
  rngs = {"params": jax.random.key(0), "router": jax.random.key(1)}
  x = jnp.zeros((G, S, width))
  ids = jnp.asarray(IDS)
  return lambda: init(rngs, x, ids=ids).get("params", {})


@functools.cache
def _router_params(router, width):
  """Parameters off their start, where some have no effect."""
  return jax.tree.map(
    lambda w: w + jnp.asarray(0.5 * _random(7, w.shape), w.dtype),
    nn.unbox(jax.jit(_init(router, width))()),
  )


def _route(router, mode, params, x, mask, ids, seed):
  return router.apply(
    {"params": params},
    x,
    train=mode == "training",
    mask=mask,
    ids=ids,
    rngs={"router": jax.random.key(seed)},
  )


@functools.cache
def _compiled(router, mode):
  def fn(at, *args):
    found = _route(router, mode, *at, *args)
    return _smooth(found), found

  return _scored(fn)


def _gates(assignment: Assignment, num_experts: int) -> Float[Array, "G S E"]:
  """Returns G(x) as a table."""

  @jax.vmap
  def table(token, expert, gate):
    zeros = jnp.zeros((S, num_experts), gate.dtype)
    return zeros.at[token, expert].add(gate, mode="drop")

  return table(assignment.tokens(S), assignment.expert, assignment.gate)


def _smooth(found: Routing) -> dict[str, Array]:
  """What of a decision may have a gradient to parameters, but for logits."""
  names = ("importance", "load", "thresholds", "bias")
  parts = {name: getattr(found, name) for name in names}
  parts["gates"] = _gates(found.assignment, found.logits.shape[-1])
  return {name: part for name, part in parts.items() if part is not None}


@functools.cache
def _rows(experts, is_sorted):
  """Compiles (weights, rows in slots), taken -> rows in slots, both ways."""

  def fn(at, taken):
    weights, rows = at
    run = functools.partial(Alone(experts).apply, {"params": weights})
    rows = jnp.where(taken[..., None], rows, 0)
    if is_sorted:
      order = jnp.argsort(~taken.reshape(-1), stable=True)
      flat = rows.reshape(order.size, -1)[order]
      y = run(flat, group_sizes=taken.sum(axis=1, dtype=jnp.int32))
      y = jnp.zeros_like(y).at[order].set(y).reshape(*taken.shape, -1)
    else:
      y = run(rows, taken)
    return jnp.where(taken[..., None], y, 0), ()

  return _scored(fn)


@functools.cache
def _loss(loss):
  """Compiles a loss of a decision, of which `at` are some fields."""
  return _scored(lambda at, found: (loss(found._replace(**at)), ()))


_FIELDS = ("importance", "load", "logits", "thresholds", "bias")


def _decided(logits, mask=None):
  """Two of E experts by these logits, with what losses read besides."""
  mask = None if mask is None else jnp.asarray(mask)
  found = gating.top_k(jnp.asarray(logits, jnp.float32), 2, mask)
  thresholds, bias = (jnp.asarray(_random(seed, E)) for seed in (9, 10))
  return found._replace(thresholds=0.25 + 0.1 * thresholds, bias=bias)
