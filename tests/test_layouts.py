"""Layouts: 8 devices compute what one does, and exchange only tokens."""

import collections
import contextlib
import functools
import math
import os
import tempfile
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moejax import experts, losses, moe, router, sharding
from moejax.data import packing
from moejax.models import lstm_lm
from moejax.planning import collectives
from moejax.planning.collectives import Collective
from moejax.training import state

# So wide a hidden layer that its rows weigh more than its matrix: XLA moves the
# lighter of the two.
B, L, D, E, F, K, Q = 8, 16, 5, 8, 64, 2, 4
FACTOR = 1.0
# Slots of each expert in a group of L tokens, and the bytes of all those that
# one device fills.
CAPACITY = K * L // E
DISPATCHED = 4 * D * E * CAPACITY * B // 8
MASK = jnp.asarray(np.arange(B * L).reshape(B, L) % 7 > 0)
BY_SLOTS = pytest.mark.parametrize("name", ["einsum", "gather"])
# Layers of two levels, and how many groups of tokens are one at the second.
TWO_LEVELS = {
  "hierarchical": 1,
  "half together": B // 2,
  "all together": B,
  "sorted": 1,
}
# Einsum differs from gather within a device alone; more of ragged is in
# test_ragged.py.
CASES = [
  *((layout, "gather") for layout in sharding.LAYOUTS),
  *((layout, "hierarchical") for layout in sharding.LAYOUTS),
  *((layout, "sorted") for layout in sharding.LAYOUTS),
  *((layout, "ragged") for layout in ("replicated", "expert_model", "fsdp")),
  *((layout, "einsum") for layout in ("expert", "data_expert")),
]
INVOLUNTARY = "Involuntary full rematerialization"


def layer(name, num_experts=E, group_size=L):
  """E experts by a dispatch, or E groups of Q experts."""
  gate = router.NoisyTopK(num_experts, K)
  factor = None if name == "sorted" else FACTOR
  options = {"group_size": group_size, "capacity_factor": factor}
  if name in TWO_LEVELS:
    within = moe.MoE(
      router.NoisyTopK(Q, K),
      experts.FeedForward(Q, F),
      capacity_factor=factor,
      recompute=True,
    )
    options["groups_together"] = TWO_LEVELS[name]
    return moe.HierarchicalMoE(gate, within, **options)
  return moe.MoE(
    gate,
    experts.FeedForward(num_experts, F),
    dispatch=name,
    recompute=name == "ragged",
    **options,
  )


def inputs():
  return 1 + jax.random.normal(jax.random.key(1), (B, L, D))


@functools.cache
def boxed(name):
  """Random params, so skewed that one expert or group overflows."""
  rng = jax.random.key(0)
  tree = jax.eval_shape(lambda: layer(name).init(rng, inputs()))["params"]
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(rng, len(leaves))
  tree = structure.unflatten(
    [
      0.5 * jax.random.normal(key, leaf.shape)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
  )
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
    rngs={"router": jax.random.key(2)},
    mutable=["routing"],
  )
  aux, _ = losses.auxiliary(state, {"importance": 0.3, "load": 0.7})
  (routing,) = losses.routings(state)
  first = routing if routing.primary is None else routing.primary
  # Of sorted rows the noise of both levels, which no layout may change; where
  # rows go that are none is theirs to say.
  noisy = first.logits
  if routing.within is not None:
    noisy = noisy, jnp.where(routing.mask[..., None], routing.logits, 0)
  report = (y, first.dropped, routing.load, noisy)
  return jnp.mean(y**2) + aux, report


def step(name, params, x):
  run = sharding.zero3(functools.partial(forward, name))
  return jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)


@functools.cache
def on_one_device(name):
  run = jax.jit(functools.partial(step, name))
  return run(nn.unbox(boxed(name)), inputs())


class OnMesh(NamedTuple):
  """What came of a compiled program: result, collectives, XLA's warnings."""

  result: Any
  found: list[Collective]
  warnings: str
  params: Any


@functools.cache
def on_all_devices(layout_name, name, fn=step):
  layout = sharding.LAYOUTS[layout_name]
  mesh = sharding.make_mesh(layout)
  places = sharding.shardings(boxed(name), layout, mesh)
  params = jax.device_put(nn.unbox(boxed(name)), places)
  batch = sharding.batch_sharding(layout, mesh, len(inputs()))
  x = jax.device_put(inputs(), batch)
  kept = (None, (places, batch)) if fn is step else None
  with sharding.use(layout, mesh), stderr() as warnings:
    run = jax.jit(functools.partial(fn, name), out_shardings=kept)
    compiled = run.lower(params, x).compile()
  found = collectives.read(compiled.as_text(), mesh)
  return OnMesh(compiled(params, x), found, warnings[0], params)


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


@pytest.mark.parametrize("layout, name", CASES)
def test_layouts_agree_with_one_device(layout, name):
  """And XLA finds a path from each sharding to the next."""
  on_mesh = on_all_devices(layout, name)
  assert INVOLUNTARY not in on_mesh.warnings
  got, want = on_mesh.result, on_one_device(name)
  (_, (_, dropped, _, _)), _ = want
  assert (np.asarray(dropped).sum() > 0) == (name != "sorted")
  assert all(np.abs(slope).max() > 0 for slope in jax.tree.leaves(want[1]))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, got, want)


HELD = {"replicated": E, "expert": 1, "data_expert": 2, "expert_model": 2}


@pytest.mark.parametrize("layout", HELD)
@pytest.mark.parametrize("name", ["gather", "hierarchical"])
def test_every_device_holds_its_share_of_the_experts(layout, name):
  """Or of the groups of experts, with the gates within."""
  params = on_all_devices(layout, name).params
  split, whole = ("experts", "router")
  if name == "hierarchical":
    split, whole = ("secondary", "primary")
  hidden = F // 2 if layout == "expert_model" else F
  for w in jax.tree.leaves(params[split]):
    shape = tuple(hidden if n == F else n for n in w.shape[1:])
    assert w.addressable_shards[0].data.shape == (HELD[layout], *shape)
  for w in jax.tree.leaves(params[whole]):
    assert w.sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["gather", "hierarchical"])
def test_fsdp_keeps_an_eighth_of_everything(name):
  for w in jax.tree.leaves(on_all_devices("fsdp", name).params):
    part = w.addressable_shards[0].data.shape
    assert math.prod(part) == w.size // 8
    # Of the largest axis that divides, so that parts are thick.
    assert max(n for n in w.shape if n % 8 == 0) not in part


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


@pytest.mark.parametrize("name", ["gather", "ragged", "hierarchical", "sorted"])
def test_replicated_layout_moves_no_token(name):
  found = on_all_devices("replicated", name).found
  assert not moves(found)
  added = sums(found)
  assert set(added) == {("data",)}
  if name not in TWO_LEVELS:
    assert added["data",] == OF_ROUTER + OF_EXPERTS


@BY_SLOTS
@pytest.mark.parametrize("layout", ["expert", "data_expert"])
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
    assert sums(found) == {("expert",): OF_ROUTER}
    forth = on_all_devices(layout, name, forward).found
    assert moves(forth) == 2 * [one]
  else:
    # Of the experts, each device's own with their copies.
    own = {("data",): OF_EXPERTS // 4, ("data", "expert"): OF_ROUTER}
    assert sums(found) == own


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

  def of_slots(found, *more):
    sizes = [each[1] for each in moves(found, "all-to-all")]
    assert sizes == sorted([*more, *len(sizes[len(more) :]) * [DISPATCHED]])
    # The slope of each group's load; no tokens.
    others = [each for each in moves(found) if each[0] != "all-to-all"]
    assert all(each[:2] <= ("all-gather", 4 * E) for each in others)
    return len(sizes) - len(more)

  slots = DISPATCHED // (4 * D)
  found = on_all_devices(layout, "hierarchical").found
  assert of_slots(found, slots, 4 * slots, 4 * slots) == 4
  if layout == "expert":
    found = on_all_devices(layout, "hierarchical", forward).found
    assert of_slots(found, slots, 4 * slots) == 2


@pytest.mark.parametrize(
  "layout, name",
  [
    ("data_expert", "half together"),
    ("expert_model", "all together"),
  ],
)
def test_groups_of_tokens_that_are_together_exchange_no_more(layout, name):
  """And all is what it is on one device."""
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  got = on_all_devices(layout, name)
  jax.tree.map(close, got.result, on_one_device(name))
  apart = on_all_devices(layout, "hierarchical")
  assert moves(got.found) == moves(apart.found)
  assert len(got.found) == len(apart.found)
  assert INVOLUNTARY not in got.warnings


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
