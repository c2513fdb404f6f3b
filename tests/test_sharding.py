"""Layouts: 8 devices compute what one does, and exchange only tokens."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import dispatch, experts, losses, moe, router, sharding

B, L, D, E, F, K, Q = 8, 8, 5, 8, 16, 2, 4
# Of each expert in a group of L tokens, and all that one device holds of them.
CAPACITY = 4
SLOTS = E * B * CAPACITY // 8
MASK = jnp.asarray(np.arange(B * L).reshape(B, L) % 7 > 0)
BY_SLOTS = pytest.mark.parametrize("name", ["einsum", "gather"])
EACH = pytest.mark.parametrize("name", [*dispatch.DISPATCH, "hierarchical"])
ALL = pytest.mark.parametrize("layout", sharding.LAYOUTS)


def layer(name, num_experts=E, group_size=L):
  """E experts by a way of dispatch, or E groups of Q experts."""
  gate = router.NoisyTopK(num_experts, K)
  options = {"group_size": group_size, "capacity_factor": 1.0}
  if name == "hierarchical":
    within = moe.MoE(
      router.NoisyTopK(Q, K),
      experts.FeedForward(Q, F),
      capacity_factor=1.0,
      recompute=True,
    )
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
  gate = tree["primary" if name == "hierarchical" else "router"]["gate"]
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
  report = (y, first.dropped, routing.load, first.logits)
  return jnp.mean(y**2) + aux, report


def step(name, params, x):
  return jax.value_and_grad(
    functools.partial(forward, name), (0, 1), has_aux=True
  )(params, x)


@functools.cache
def on_one_device(name):
  run = jax.jit(functools.partial(step, name))
  return run(nn.unbox(boxed(name)), inputs())


@functools.cache
def on_all_devices(layout_name, name, fn=step):
  """The result on the mesh, the compiled program and where params lie."""
  layout = sharding.LAYOUTS[layout_name]
  mesh = sharding.make_mesh(layout)
  places = sharding.shardings(boxed(name), layout, mesh)
  params = jax.device_put(nn.unbox(boxed(name)), places)
  batch = sharding.batch_sharding(layout, mesh, len(inputs()))
  x = jax.device_put(inputs(), batch)
  kept = (None, (places, batch)) if fn is step else None
  with sharding.use(layout, mesh):
    run = jax.jit(functools.partial(fn, name), out_shardings=kept)
    compiled = run.lower(params, x).compile()
    return compiled(params, x), compiled.as_text(), params


KINDS = ("all-to-all", "all-gather", "collective-permute", "reduce-scatter")


def collectives(text):
  """How many entries each collective operation yields, by kind."""
  found = {kind: [] for kind in KINDS}
  operation = rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\("
  for shapes, kind in re.findall(operation, text):
    sizes = re.findall(r"\[([\d,]*)\]", re.sub(r"\{.*?\}", "", shapes))
    found[kind].append(
      sum(math.prod(int(n) for n in size.split(",") if n) for size in sizes)
    )
  return {kind: sorted(entries) for kind, entries in found.items()}


@ALL
@EACH
def test_layouts_agree_with_one_device(layout, name):
  got, _, _ = on_all_devices(layout, name)
  want = on_one_device(name)
  (_, (_, dropped, _, _)), _ = want
  assert np.asarray(dropped).sum() > 0
  assert all(np.abs(slope).max() > 0 for slope in jax.tree.leaves(want[1]))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, got, want)


@ALL
@pytest.mark.parametrize("name", ["gather", "hierarchical"])
def test_every_device_holds_its_share_of_the_experts(layout, name):
  """Or of the groups of experts, with the gates within."""
  _, _, params = on_all_devices(layout, name)
  held = E // {"replicated": 1, "expert": 8, "data_expert": 4}[layout]
  split, whole = ("experts", "router")
  if name == "hierarchical":
    split, whole = ("secondary", "primary")
  for w in jax.tree.leaves(params[split]):
    assert w.addressable_shards[0].data.shape == (held, *w.shape[1:])
  for w in jax.tree.leaves(params[whole]):
    assert w.sharding.is_fully_replicated


@EACH
def test_replicated_layout_moves_no_token(name):
  _, text, _ = on_all_devices("replicated", name)
  assert not any(collectives(text).values())
  assert "all-reduce" in text


@BY_SLOTS
@pytest.mark.parametrize("layout", ["expert", "data_expert"])
def test_tokens_travel_there_and_back_and_nothing_else(layout, name):
  _, text, _ = on_all_devices(layout, name)
  # Each way, and both gradients.
  nothing = {kind: [] for kind in KINDS}
  assert collectives(text) == nothing | {"all-to-all": 4 * [SLOTS * D]}
  if layout == "expert":
    _, text, _ = on_all_devices(layout, name, forward)
    assert collectives(text) == nothing | {"all-to-all": 2 * [SLOTS * D]}


@pytest.mark.parametrize("layout", ["expert", "data_expert"])
def test_tokens_travel_once_to_each_group_of_experts(layout):
  """And of every slot whether it is taken, the gate, and the gate's slope."""
  _, text, _ = on_all_devices(layout, "hierarchical")
  found = collectives(text)
  # The slope of each group's load; no tokens.
  assert all(entries <= E for entries in found.pop("all-gather"))
  tokens, of_slots = 4 * [SLOTS * D], 3 * [SLOTS]
  assert found.pop("all-to-all") == of_slots + tokens
  assert not any(found.values())
  if layout == "expert":
    _, text, _ = on_all_devices(layout, "hierarchical", forward)
    found = collectives(text)
    assert found.pop("all-to-all") == of_slots[:2] + tokens[:2]
    assert not any(found.values())


@pytest.mark.parametrize("layout", ["expert", "data_expert"])
def test_ragged_fetches_weights_and_moves_no_token(layout):
  _, text, _ = on_all_devices(layout, "ragged")
  found = collectives(text)
  assert found["all-gather"] == 2 * [E * D * F]
  assert not found["all-to-all"] and not found["collective-permute"]


@pytest.mark.parametrize("devices", [1, 2, 8])
@ALL
def test_meshes_of_any_size(layout, devices):
  mesh = sharding.make_mesh(sharding.LAYOUTS[layout], jax.devices()[:devices])
  half = max(devices // 2, 1)
  want = {
    "replicated": (devices, 1, 1),
    "expert": (1, devices, 1),
    "data_expert": (min(devices, 2), half, 1),
  }
  assert mesh.axis_names == ("data", "expert", "model")
  assert mesh.devices.shape == want[layout]
  assert list(mesh.devices.flat) == jax.devices()[:devices]


def test_mesh_takes_all_devices_by_default():
  mesh = sharding.make_mesh(sharding.LAYOUTS["expert"])
  assert mesh.devices.size == jax.device_count() == 8


def test_meshes_that_do_not_divide_name_both_numbers():
  with pytest.raises(ValueError, match=r"'data_expert'.*by 2.*the 3 at hand"):
    sharding.make_mesh(sharding.LAYOUTS["data_expert"], jax.devices()[:3])
  fixed = sharding.Layout("fixed", (2, 2, 1), ())
  with pytest.raises(ValueError, match=r"'fixed' wants 4 .* there are 8"):
    sharding.make_mesh(fixed)


def init_on_mesh(layout_name, module):
  layout = sharding.LAYOUTS[layout_name]
  with sharding.use(layout, sharding.make_mesh(layout)):
    rngs = {"params": jax.random.key(0)}
    return jax.eval_shape(module.init, rngs, inputs())


@ALL
def test_groups_that_do_not_divide_name_both_numbers(layout):
  with pytest.raises(ValueError, match=r"'group'.* 4 entries.* 8 devices"):
    init_on_mesh(layout, layer("gather", group_size=16))


@pytest.mark.parametrize("name", ["gather", "hierarchical"])
@pytest.mark.parametrize("on, devices", [("expert", 8), ("data_expert", 4)])
def test_experts_that_do_not_divide_name_both_numbers(on, devices, name):
  message = rf"'expert'.* 6 entries.* {devices} devices"
  with pytest.raises(ValueError, match=message):
    init_on_mesh(on, layer(name, num_experts=6))
  init_on_mesh("replicated", layer(name, num_experts=6))


def test_off_the_mesh_nothing_is_asked_for():
  x = jnp.ones((3, 5))
  assert sharding.constrain(x, "group", None) is x

  def fn(x):
    return x

  assert sharding.manual(fn, (("group",),), ("group",)) is fn


@ALL
def test_batch_lies_over_every_device(layout):
  layout = sharding.LAYOUTS[layout]
  mesh = sharding.make_mesh(layout)
  place = sharding.batch_sharding(layout, mesh, len(inputs()))
  x = jax.device_put(inputs(), place)
  assert {shard.data.shape for shard in x.addressable_shards} == {(1, L, D)}


def test_batch_must_divide():
  layout = sharding.LAYOUTS["expert"]
  with pytest.raises(ValueError, match="12 entries.*8 devices; choose batch"):
    sharding.batch_sharding(layout, sharding.make_mesh(layout), 12)
