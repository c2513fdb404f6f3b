"""Layouts: 8 devices compute what one does, and exchange only tokens."""

import collections
import contextlib
import functools
import math
import os
import re
import tempfile
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moejax import dispatch, experts, gating, losses, moe, router, sharding
from moejax.data import packing
from moejax.models import lstm_lm, stack
from moejax.planning import collectives
from moejax.planning.collectives import Collective
from moejax.training import state

pytestmark = pytest.mark.usefixtures("few_sizes")

# So wide a hidden layer that its rows weigh more than its matrix: XLA moves the
# lighter of the two.
B, L, D, E, F, K, Q = 8, 16, 5, 8, 64, 2, 4
FACTOR = 1.0
# Slots of each expert in a group of L tokens, and the bytes of all those that
# one device fills.
CAPACITY = K * L // E
DISPATCHED = 4 * D * E * CAPACITY * B // 8
MASK = jnp.asarray(np.arange(B * L).reshape(B, L) % 7 > 0)
# The devices that share an expert have the same tokens.
COPIES = sharding.Layout(
  "copies", (1, -1, 2), sharding.rules(batch=("data", "expert"))
)
LAYOUTS = sharding.LAYOUTS | {"copies": COPIES}
# Layers of two levels, and how many groups of tokens are one at the second.
TWO_LEVELS = {
  "hierarchical": 1,
  "half together": B // 2,
  "sorted": 1,
  "quantiles": 1,
}
# Whose rows are sorted, where they can be sent to a device of their own. Of
# "picks" the experts choose.
DROPLESS = ("dropless", "dropless in two", "picks", "sorted")
# Einsum differs from gather within a device alone. Where all devices have all
# experts no row moves.
SPLIT = ("expert", "data_expert", "expert_model", "fsdp")
CASES = [
  *((layout, "gather", "") for layout in sharding.LAYOUTS),
  *((layout, "hierarchical", "") for layout in SPLIT),
  *((layout, "sorted", "") for layout in ("replicated", *SPLIT[1:])),
  *((layout, "quantiles", "") for layout in sharding.LAYOUTS),
  ("data_expert", "half together", ""),
  *((layout, "shared", "") for layout in SPLIT[:3]),
  ("data_expert", "einsum", ""),
  ("data_expert", "ragged", ""),
  ("copies", "ragged", ""),
  ("expert_model", "dropless", ""),
  ("data_expert", "picks", ""),
  ("expert", "dropless", "all-to-all"),
  ("data_expert", "ragged", "all-to-all"),
  ("expert_model", "picks", "all-to-all"),
  ("expert_model", "two parts", ""),
  ("expert", "dropless in two", "all-to-all"),
  ("copies", "dropless", "all-to-all"),
  ("data_expert", "sorted", "all-to-all"),
  ("expert_model", "sorted", "all-to-all"),
]
INVOLUNTARY = "Involuntary full rematerialization"


def layer(name):
  """E experts by a dispatch, or E groups of Q experts."""
  gate = router.NoisyTopK(E, K)
  factor = None if name in DROPLESS else FACTOR
  options = {"group_size": L, "capacity_factor": factor}
  if name in TWO_LEVELS:
    inner = router.NoisyTopK(Q, K)
    if name == "quantiles":
      # Of a bias, and of thresholds.
      gate = router.Sigmoid(E, K, learned_by="quantile")
      inner = router.ExpertThreshold(Q, K)
    within = moe.MoE(
      inner,
      experts.FeedForward(Q, F),
      capacity_factor=factor,
      recompute=True,
    )
    options["groups_together"] = TWO_LEVELS[name]
    return moe.HierarchicalMoE(gate, within, **options)
  if name == "picks":
    gate = router.ExpertChoice(E, K)
  if name in ("dropless", "picks", "ragged"):
    options |= {"recompute": True, "dispatch": "ragged"}
  else:
    options["dispatch"] = "gather" if name == "shared" else name
  kind = experts.FeedForward(E, F)
  if name == "shared":
    # And what training leaves out, which no layout may change.
    options |= {"shared": experts.FeedForward(2, F), "masked_outputs": 0.25}
    kind = kind.clone(dropout=0.25)
  if name == "two parts":
    # So that each device has two groups.
    options |= {"dispatch": "gather", "exchange_parts": 2, "group_size": L // 2}
  if name == "dropless in two":
    options |= {"dispatch": "ragged", "exchange_parts": 2, "group_size": L // 2}
  return moe.MoE(gate, kind, **options)


def inputs():
  return 1 + jax.random.normal(jax.random.key(1), (B, L, D))


@functools.cache
def boxed(name):
  """Random params, so skewed that one expert or group overflows."""
  rng = jax.random.key(0)
  tree = jax.eval_shape(lambda: layer(name).init(rng, inputs()))["params"]
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(rng, len(leaves))
  drawn = map(
    lambda key, w: 0.5 * jax.random.normal(key, w.shape), keys, leaves
  )
  tree = structure.unflatten(drawn)
  gate = tree["primary" if name in TWO_LEVELS else "router"]["gate"]
  kernel = gate["kernel"]
  gate["kernel"] = kernel.replace_boxed(kernel.value.at[:, 0].add(1))
  return tree


def forward(name, params, x):
  """Returns the loss of task and balance, y, and what was decided."""
  y, state = layer(name).apply(
    {"params": params},
    x,
    train=True,
    mask=MASK,
    rngs={"router": jax.random.key(2), "dropout": jax.random.key(3)},
    mutable=["routing"],
  )
  weights = {"importance": 0.3, "load": 0.7}
  if name == "quantiles":
    weights["quantile"] = 0.5
  aux, _ = losses.auxiliary(state, weights)
  (routing,) = losses.routings(state)
  first = routing if routing.primary is None else routing.primary
  decided = first.logits, routing.importance
  if routing.within is not None:
    # The noise of both levels, which no layout may change; where rows go that
    # are none is theirs to say.
    noisy = jnp.where(routing.mask[..., None], routing.logits, 0)
    decided = *decided, noisy, routing.assignment
  return jnp.mean(y**2) + aux, (y, first.dropped, routing.load, decided)


def step(name, params, x):
  run = sharding.zero3(functools.partial(forward, name))
  return jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)


@functools.cache
def on_one_device(name):
  run = jax.jit(functools.partial(step, name))
  return run(nn.unbox(boxed(name)), inputs())


def placed(layout_name, name):
  """Layout, mesh, arguments as they lie on it, and how they do."""
  layout = LAYOUTS[layout_name]
  mesh = sharding.make_mesh(layout)
  params = sharding.shardings(boxed(name), layout, mesh)
  lies = params, sharding.batch_sharding(layout, mesh, len(inputs()))
  args = jax.device_put((nn.unbox(boxed(name)), inputs()), lies)
  return layout, mesh, args, lies


class OnMesh(NamedTuple):
  """What came of a compiled program: result, collectives, XLA's warnings."""

  result: Any
  found: list[Collective]
  warnings: str


@functools.cache
def on_all_devices(layout_name, name, move="", fn=step):
  layout, mesh, args, lies = placed(layout_name, name)
  kept = (None, lies) if fn is step else None
  with contextlib.ExitStack() as stack:
    if move:
      pretend(stack.enter_context(pytest.MonkeyPatch.context()))
    stack.enter_context(sharding.use(layout, mesh))
    warnings = stack.enter_context(stderr())
    run = jax.jit(functools.partial(fn, name), out_shardings=kept)
    compiled = run.lower(*args).compile()
  found = collectives.read(compiled.as_text(), mesh)
  return OnMesh(compiled(*args), found, warnings[0])


@contextlib.contextmanager
def stderr():
  """Catches what C++ writes there, where sys.stderr has no part."""
  caught = []
  with tempfile.TemporaryFile() as file:
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield caught
    finally:
      os.dup2(before, 2)
      os.close(before)
      file.seek(0)
      caught.append(file.read().decode())


def pretend(patch):
  """Rows go to devices of their own, as on all platforms but a CPU."""
  patch.setattr(sharding, "platform", lambda: "tpu")


@pytest.mark.parametrize("layout, name, move", CASES)
def test_layouts_agree_with_one_device(layout, name, move):
  """And XLA finds a path from each sharding to the next."""
  on_mesh = on_all_devices(layout, name, move)
  assert move or INVOLUNTARY not in on_mesh.warnings
  # As `exchange` sends rows on a CPU.
  assert not move or moves(on_mesh.found, "collective-permute")
  got, want = on_mesh.result, on_one_device(name)
  (_, (_, dropped, _, _)), _ = want
  assert (np.asarray(dropped).sum() > 0) == (name not in DROPLESS)
  assert all(np.abs(slope).max() > 0 for slope in jax.tree.leaves(want[1]))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, got, want)


HELD = {"replicated": E, "expert": 1, "data_expert": 2, "expert_model": 2}


@pytest.mark.parametrize("layout", HELD)
@pytest.mark.parametrize("name", ["gather", "hierarchical", "shared"])
def test_every_device_holds_its_share_of_the_experts(layout, name):
  """Or of the groups of experts, with the gates within; and shared ones."""
  *_, (params, _), _ = placed(layout, name)
  split, whole = ("experts", "router")
  if name == "hierarchical":
    split, whole = ("secondary", "primary")
  hidden = F // 2 if layout == "expert_model" else F
  for w in jax.tree.leaves(params[split]):
    shape = tuple(hidden if n == F else n for n in w.shape[1:])
    assert w.addressable_shards[0].data.shape == (HELD[layout], *shape)
  for w in jax.tree.leaves(params[whole]):
    assert w.sharding.is_fully_replicated
  # 2 experts of width F are one of 2 F, and have no axis to split but that.
  for w in jax.tree.leaves(params.get("shared", {})):
    shape = tuple(2 * hidden if n == 2 * F else n for n in w.shape)
    assert w.addressable_shards[0].data.shape == shape


@pytest.mark.parametrize("name", ["gather", "hierarchical"])
def test_fsdp_keeps_an_eighth_of_everything(name):
  *_, (params, _), _ = placed("fsdp", name)
  for w in jax.tree.leaves(params):
    part = w.addressable_shards[0].data.shape
    assert math.prod(part) == w.size // 8
    # Of the largest axis that divides, so that parts are thick.
    assert max(n for n in w.shape if n % 8 == 0) not in part


# -- what is exchanged --------------------------------------------------------


def moves(found, *kinds):
  """Kind, bytes of a result and mesh axes; sums are no moves."""
  return sorted(
    (each.kind, each.bytes, each.axes)
    for each in found
    if each.kind in kinds or (not kinds and each.kind != "all-reduce")
  )


def sums(found):
  """Bytes that are added up, by mesh axes."""
  total = collections.Counter()
  for each in found:
    if each.kind == "all-reduce":
      total[each.axes] += each.bytes
  return total


# Of [D, E] of the gates and of their noise; importance, load and a loss.
OF_ROUTER = 4 * (2 * D * E + 2 * E + 1)
OF_EXPERTS = 4 * 2 * E * D * F


@pytest.mark.parametrize("name", ["gather", "sorted"])
def test_replicated_layout_moves_no_token(name):
  found = on_all_devices("replicated", name).found
  assert not moves(found)
  added = sums(found)
  assert set(added) == {("data",)}
  if name not in TWO_LEVELS:
    assert added["data",] == OF_ROUTER + OF_EXPERTS


@pytest.mark.parametrize(
  "layout, name",
  [
    ("expert", "gather"),
    ("expert", "shared"),
    ("data_expert", "gather"),
    ("data_expert", "einsum"),
  ],
)
def test_tokens_move_there_and_back_and_nothing_else(layout, name):
  found = on_all_devices(layout, name).found
  # There and back, and both gradients.
  one = ("all-to-all", DISPATCHED, ("expert",))
  assert moves(found) == 4 * [one]
  # k * capacity factor * tokens * D bytes on the wire, but for those that stay.
  n = {"expert": 8, "data_expert": 4}[layout]
  want = 4 * K * FACTOR * (B * L // 8) * D * (n - 1) / n
  for each in found:
    if each.kind == "all-to-all":
      assert each.dtype == "f32" and each.times == 1
      np.testing.assert_allclose(each.wire_bytes, want, rtol=0.05)
  if layout == "expert":
    shared = 4 * 2 * D * 2 * F * (name == "shared")
    assert sums(found) == {("expert",): OF_ROUTER + shared}
    forth = on_all_devices(layout, name, fn=forward).found
    assert moves(forth) == 2 * [one]
  else:
    # Of the experts, each device's own with their copies.
    own = {("data",): OF_EXPERTS // 4, ("data", "expert"): OF_ROUTER}
    assert sums(found) == own


def test_each_of_two_parts_is_sent_by_itself():
  """A group of half as many tokens has as many slots: 4 at least."""
  found = on_all_devices("expert_model", "two parts").found
  sent = moves(found, "all-to-all")
  assert sent == 8 * [("all-to-all", DISPATCHED, ("expert",))]


def test_where_there_are_no_parts():
  """Rows that are decoded are too few; a mixture in experts reports once."""
  inner = moe.MoE(router.Switch(2), experts.FeedForward(2, F))
  options = {"group_size": L // 2, "exchange_parts": 2}
  whole = moe.MoE(router.TopK(E, K), experts.Each(E, inner), **options)
  layout = LAYOUTS["expert"]

  def shapes(module, x):
    """Of what it returns and reports."""
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    apply = functools.partial(module.apply, mutable=["routing"])
    found = jax.eval_shape(apply, {"params": params}, x)
    return jax.tree.map(lambda leaf: leaf.shape, found)

  with sharding.use(layout, sharding.make_mesh(layout)):
    decoding = stack.for_decoding(layer("two parts"))
    assert shapes(decoding, inputs()[:, :1])[0] == (B, 1, D)
    alone = whole.clone(exchange_parts=1)
    assert shapes(whole, inputs()) == shapes(alone, inputs())


@pytest.mark.parametrize("parts", [0, 3])
def test_parts_that_do_not_divide_are_refused(parts):
  module = layer("two parts").clone(exchange_parts=parts)
  layout = LAYOUTS["expert"]
  message = f"exchange_parts {parts} does not divide the 2 groups of tokens"
  with (
    sharding.use(layout, sharding.make_mesh(layout)),
    pytest.raises(ValueError, match=message),
  ):
    jax.eval_shape(lambda: module.init(jax.random.key(0), inputs()))


def test_no_token_moves_twice_where_two_devices_share_an_expert():
  """To one of the two, which then gives the other a copy; and so back."""
  found = on_all_devices("expert_model", "gather").found
  there = 4 * [("all-to-all", DISPATCHED, ("expert",))]
  copies = 2 * [("all-gather", 2 * DISPATCHED, ("model",))]
  assert moves(found) == sorted(there + copies)
  # A TPU leaves each its half of the sums: a reduce-scatter.
  assert sums(found)["model",] == 2 * 2 * DISPATCHED
  assert sums(found)["expert", "model"] == OF_ROUTER


def test_fsdp_gathers_every_parameter_twice():
  found = on_all_devices("fsdp", "gather").found
  once = [w.size * 4 for w in jax.tree.leaves(nn.unbox(boxed("gather")))]
  want = sorted(("all-gather", size, ("data",)) for size in 2 * once)
  assert moves(found) == want
  # A TPU leaves each its part of the sums: reduce-scatters.
  assert sums(found) == {("data",): OF_ROUTER + OF_EXPERTS}


@pytest.mark.parametrize("layout", ["expert", "data_expert"])
def test_tokens_move_once_to_each_group_of_experts(layout):
  """And of every slot whether it is taken, the gate, and the gate's slope."""
  found = on_all_devices(layout, "hierarchical").found
  slots = DISPATCHED // (4 * D)
  sizes = [each[1] for each in moves(found, "all-to-all")]
  assert sizes == sorted([slots, 4 * slots, 4 * slots] + 4 * [DISPATCHED])
  # The slope of each group's load; no tokens.
  others = [each for each in moves(found) if each[0] != "all-to-all"]
  assert all(each[:2] <= ("all-gather", 4 * E) for each in others)


def test_groups_of_tokens_that_are_together_exchange_no_more():
  together, apart = (
    on_all_devices("data_expert", name).found
    for name in ("half together", "hierarchical")
  )
  assert moves(together) == moves(apart) and len(together) == len(apart)


# -- sorted rows --------------------------------------------------------------


@pytest.mark.parametrize("layout", ["data_expert", "copies"])
def test_tokens_are_gathered_once_and_sums_scattered_back(layout):
  """And of every edge its expert and its gate; no weights, unless split."""
  split = layout == "copies"
  tokens = 4 * B // (4 if split else 8) * L
  edges = tokens * K
  weights = 2 * [("all-gather", E // 4 * D * F)] if split else []
  there = 2 * [("all-gather", edges)] + [("all-gather", tokens * D)]
  sums = [("reduce-scatter", tokens * D // 4)]
  # And their gradients, that of the gates among them.
  back = [("all-gather", tokens * D), *sums, ("reduce-scatter", edges // 4)]
  found = moves(on_all_devices(layout, "ragged").found)
  found = [(kind, size // 4) for kind, size, _ in found]
  assert found == sorted(weights + there + sums + back)


@pytest.mark.parametrize(
  "name, capacity, buffer_size",
  [
    # Of each of its experts all tokens, but never more than all edges.
    ("expert", None, B * L),
    ("data_expert", None, B // 2 * L * K),
    ("data_expert", L + 1, B // 2 * L * K),
    ("data_expert", 1, B // 2 * 2),
  ],
)
@pytest.mark.parametrize("move", ["", "all-to-all"])
def test_the_buffer_holds_all_rows_that_can_come(
  monkeypatch, move, name, capacity, buffer_size
):
  seen = []

  def spy(weights, rows, group_sizes):
    seen.append((weights.shape, rows.shape, group_sizes.shape))
    return rows

  if move:
    pretend(monkeypatch)
  layout = sharding.LAYOUTS[name]
  mesh = sharding.make_mesh(layout)

  def run(x):
    edges = gating.top_k(x @ jnp.ones((D, E)), K).assignment
    args = jnp.ones((E, D, F)), x, edges, E, capacity
    return dispatch.DISPATCH["ragged"](spy, *args)

  with sharding.use(layout, mesh):
    jax.eval_shape(run, inputs())
  mine = E // mesh.shape["expert"]
  assert seen == [((mine, D, F), (buffer_size, D), (mine,))]


def test_rows_travel_to_groups_of_experts_alone(monkeypatch):
  """Once for each group, and back; nothing of their size is gathered.

  Of every edge comes back which experts took it and with what gates, and the
  gates' slopes return.
  """
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  layout, mesh, args, _ = placed("expert", "sorted")
  loss = lambda *args: forward("sorted", *args)[0]  # noqa: E731
  with sharding.use(layout, mesh):
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*args)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  of_device, edges, groups = B * L, B * L * K // 8, B // 8
  op = r"(ragged_all_to_all|all_to_all|all_gather)\b.*-> tensor<(\S+)>"
  assert collections.Counter(re.findall(op, text)) == {
    ("ragged_all_to_all", f"{of_device}x{D}xf32"): 2,
    ("ragged_all_to_all", f"{edges}x{D}xf32"): 2,
    ("ragged_all_to_all", f"{edges}x{K}xi32"): 1,
    ("ragged_all_to_all", f"{edges}x{K}xf32"): 1,
    ("ragged_all_to_all", f"{of_device}x{K}xf32"): 1,
    # Which edges they are: their noise depends on it, and their load.
    ("ragged_all_to_all", f"{of_device}x1xi32"): 1,
    ("all_gather", f"{B}xi32"): 1,
    ("all_gather", f"8x{E}xi32"): 1,
    # Load, with its slope.
    ("all_to_all", f"{E}x{groups}x{Q}xf32"): 1,
    ("all_to_all", f"1x{B}x{Q}xf32"): 1,
  }


@pytest.mark.parametrize(
  "kind",
  [
    experts.FeedForward(1, F),
    experts.Identity(E),
    experts.Mixed((experts.Linear(E), experts.Identity(E))),
  ],
  ids=lambda kind: type(kind).__name__,
)
def test_experts_without_an_axis_of_their_own_stay(kind):
  """A single one, those without weights and those of several kinds."""
  gate = router.TopK(kind.num_experts, min(K, kind.num_experts))
  module = moe.MoE(gate, kind, L, None, dispatch="ragged")
  params = nn.unbox(jax.jit(module.init)(jax.random.key(0), inputs()))
  layout = sharding.LAYOUTS["expert"]

  def loss(params, x):
    return jnp.square(module.apply(params, x, train=True)).sum()

  want = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, inputs())
  with sharding.use(layout, sharding.make_mesh(layout)):
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, inputs())
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, got, want)


# -- what else XLA does -------------------------------------------------------


def test_xla_says_where_it_finds_none():
  mesh = sharding.make_mesh(sharding.LAYOUTS["data_expert"])

  def fn(x):
    x = jax.lax.with_sharding_constraint(2 * x, P(("data", "expert")))
    x = x.reshape(64, 4, 16).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, P("data", None, "expert"))

  x = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)
  with jax.set_mesh(mesh), stderr() as warnings:
    jax.jit(fn).lower(x).compile()
  assert INVOLUNTARY in warnings[0]


@pytest.mark.parametrize("name", ["expert", "fsdp"])
def test_no_device_ever_holds_a_whole_copy(name, monkeypatch):
  """Parameters and optimiser state are made where they will lie."""
  compiled, jit = [], jax.jit

  def spy(fn, **options):
    compiled.append(jit(fn, **options).lower().compile())
    return compiled[-1]

  monkeypatch.setattr(jax, "jit", spy)
  mixture = moe.MoE(router.TopK(E, K), experts.FeedForward(E, 512), L)
  model = lstm_lm.LSTMLM(24, 32, (mixture,))
  batch = packing.batch_shapes(B, L)
  layout = sharding.LAYOUTS[name]
  mesh = sharding.make_mesh(layout)
  made = state.create(model, optax.adam(1e-3), batch, 0, layout, mesh)
  monkeypatch.undo()
  (init,) = compiled
  memory = init.memory_analysis()
  whole = sum(a.nbytes for a in jax.tree.leaves(made))
  assert whole > 3e6
  assert memory.output_size_in_bytes < 1.1 * whole / 8
  assert memory.temp_size_in_bytes < whole / 8
