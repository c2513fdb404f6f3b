"""Layouts: 8 devices compute what one does, and exchange only tokens."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import dispatch, experts, losses, moe, router, sharding

B, L, D, E, F, K = 8, 8, 4, 8, 16, 2
MASK = jnp.asarray(np.arange(B * L).reshape(B, L) % 7 > 0)
BOTH = pytest.mark.parametrize("name", dispatch.DISPATCH)
ALL = pytest.mark.parametrize("layout", sharding.LAYOUTS)


def layer(name, num_experts=E, group_size=L):
  return moe.MoE(
    router.NoisyTopK(num_experts, K),
    experts.FeedForward(num_experts, F),
    group_size=group_size,
    capacity_factor=1.0,
    dispatch=name,
  )


def inputs():
  return 1 + jax.random.normal(jax.random.key(1), (B, L, D))


@functools.cache
def boxed():
  init = jax.jit(layer("gather").init)
  tree = init({"params": jax.random.key(0)}, inputs())["params"]
  # Zero gates would hide what the router's product sums up; and so skewed that
  # one expert overflows.
  kernel = tree["router"]["gate"]["kernel"]
  random = jax.random.normal(jax.random.key(4), (D, E)).at[:, 0].add(1)
  tree["router"]["gate"]["kernel"] = kernel.replace_boxed(random)
  return tree


def forward(name, params, x):
  """Returns the loss of task and balance, and y."""
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
  report = (y, routing.dropped, routing.load, routing.logits)
  return jnp.mean(y**2) + aux, report


def step(name, params, x):
  return jax.value_and_grad(
    functools.partial(forward, name), (0, 1), has_aux=True
  )(params, x)


@functools.cache
def on_one_device(name):
  return jax.jit(functools.partial(step, name))(nn.unbox(boxed()), inputs())


@functools.cache
def on_all_devices(layout_name, name, fn=step):
  """The result on the mesh, the compiled program and where params lie."""
  layout = sharding.LAYOUTS[layout_name]
  mesh = sharding.make_mesh(layout)
  places = sharding.shardings(boxed(), layout, mesh)
  params = jax.device_put(nn.unbox(boxed()), places)
  batch = sharding.batch_sharding(layout, mesh, len(inputs()))
  x = jax.device_put(inputs(), batch)
  kept = (None, (places, batch)) if fn is step else None
  with sharding.use(layout, mesh):
    run = jax.jit(functools.partial(fn, name), out_shardings=kept)
    compiled = run.lower(params, x).compile()
    return compiled(params, x), compiled.as_text(), params


def collectives(text):
  """Counts the collective operations of a compiled program, by kind."""
  kinds = ("all-to-all", "all-gather", "collective-permute", "reduce-scatter")
  return {
    kind: len(re.findall(rf"\b{kind}(?:-start)?\(", text)) for kind in kinds
  }


@ALL
@BOTH
def test_layouts_agree_with_one_device(layout, name):
  got, _, _ = on_all_devices(layout, name)
  want = on_one_device(name)
  (_, (_, dropped, _, _)), _ = want
  assert np.asarray(dropped).sum() > 0
  assert all(np.abs(slope).max() > 0 for slope in jax.tree.leaves(want[1]))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, got, want)


@ALL
def test_every_device_holds_its_share_of_the_experts(layout):
  _, _, params = on_all_devices(layout, "gather")
  shards = {"replicated": 1, "expert": 8, "data_expert": 4}
  for w in params["experts"].values():
    assert w.addressable_shards[0].data.shape[0] == E // shards[layout]
  for w in jax.tree.leaves(params["router"]):
    assert w.sharding.is_fully_replicated


@BOTH
def test_expert_layout_exchanges_tokens_and_gathers_nothing(name):
  _, text, _ = on_all_devices("expert", name)
  assert collectives(text) == {
    "all-to-all": 4,  # there and back, and both gradients
    "all-gather": 0,
    "collective-permute": 0,
    "reduce-scatter": 0,
  }
  _, text, _ = on_all_devices("expert", name, forward)
  assert collectives(text)["all-to-all"] == 2
  assert collectives(text)["all-gather"] == 0


@BOTH
def test_replicated_layout_moves_no_token(name):
  _, text, _ = on_all_devices("replicated", name)
  assert not any(collectives(text).values())
  assert "all-reduce" in text


@BOTH
def test_data_expert_layout_gathers_nothing(name):
  _, text, _ = on_all_devices("data_expert", name)
  assert collectives(text)["all-to-all"] == 4
  assert collectives(text)["all-gather"] == 0


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


@pytest.mark.parametrize("layout, devices", [("expert", 8), ("data_expert", 4)])
def test_experts_that_do_not_divide_name_both_numbers(layout, devices):
  message = rf"'expert'.* 6 entries.* {devices} devices"
  with pytest.raises(ValueError, match=message):
    init_on_mesh(layout, layer("gather", num_experts=6))
  init_on_mesh("replicated", layer("gather", num_experts=6))


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
