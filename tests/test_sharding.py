"""Meshes, and what the names of a layout's axes mean on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import experts, moe, partition, router, sharding

B, L, D, E = 8, 16, 5, 8
ALL = pytest.mark.parametrize("layout", sharding.LAYOUTS)


def layer(two_levels, num_experts=E, group_size=L):
  gate = router.TopK(num_experts, 2)
  if not two_levels:
    return moe.MoE(gate, experts.FeedForward(num_experts, 16), group_size)
  within = moe.MoE(router.TopK(4, 2), experts.FeedForward(4, 16))
  return moe.HierarchicalMoE(gate, within, group_size)


def inputs():
  return jnp.ones((B, L, D))


@pytest.mark.parametrize("devices", [1, 2, 8])
@ALL
def test_meshes_of_any_size(layout, devices):
  mesh = sharding.make_mesh(sharding.LAYOUTS[layout], jax.devices()[:devices])
  half = max(devices // 2, 1)
  want = {
    "replicated": (devices, 1, 1),
    "expert": (1, devices, 1),
    "data_expert": (min(devices, 2), half, 1),
    "expert_model": (1, half, min(devices, 2)),
    "fsdp": (devices, 1, 1),
  }
  assert mesh.axis_names == ("data", "expert", "model")
  assert mesh.devices.shape == want[layout]
  in_turn = mesh.devices.swapaxes(1, 2)
  assert list(in_turn.flat) == jax.devices()[:devices]


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
    init_on_mesh(layout, layer(False, group_size=32))


@pytest.mark.parametrize("two_levels", [False, True])
@pytest.mark.parametrize(
  "on, devices", [("expert", 8), ("data_expert", 4), ("expert_model", 4)]
)
def test_experts_that_do_not_divide_name_both_numbers(on, devices, two_levels):
  message = rf"'expert'.* 6 entries.* {devices} devices"
  with pytest.raises(ValueError, match=message):
    init_on_mesh(on, layer(two_levels, num_experts=6))
  init_on_mesh("replicated", layer(two_levels, num_experts=6))


def test_groups_that_are_together_do_not_leave_their_replica():
  module = layer(True).clone(groups_together=B // 2)
  init_on_mesh("data_expert", module)
  message = (
    "'group_replicated'.* 1 entries.* 2 devices; .* smaller groups_together"
  )
  with pytest.raises(ValueError, match=message):
    init_on_mesh("data_expert", module.clone(groups_together=B))


def test_off_the_mesh_nothing_is_asked_for():
  x = jnp.ones((3, 5))
  assert sharding.constrain(x, "group", None) is x

  def fn(x):
    return x

  assert partition.manual(fn, (("group",),), ("group",))(x) is x


@ALL
def test_batch_lies_over_every_device(layout):
  layout = sharding.LAYOUTS[layout]
  mesh = sharding.make_mesh(layout)
  place = sharding.batch_sharding(layout, mesh, len(inputs()))
  # Rows follow the devices, so that a process has those it reads.
  for i, device in enumerate(jax.devices()):
    assert place.addressable_devices_indices_map((B,))[device] == (
      slice(i, i + 1),
    )


def test_what_rests_in_parts_is_used_whole():
  layout = sharding.Layout(
    "both", (2, 4, 1), sharding.rules(param_shards="data")
  )
  message = r"'both' splits parameters over 'data' .* 'expert' over 4 devices"
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(layout)


def test_what_does_not_divide_rests_whole():
  layout = sharding.LAYOUTS["fsdp"]
  mesh = sharding.make_mesh(layout)
  shapes = {"odd": (9, 5), "two": (8, 24, 16), "step": ()}
  tree = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
  places = sharding.shardings(tree, layout, mesh)
  assert places["odd"].is_fully_replicated
  assert places["step"].is_fully_replicated
  assert places["two"].shard_shape((8, 24, 16)) == (8, 3, 16)


def test_rules_follow_the_experts():
  assert dict(sharding.rules()) == sharding.RULES
  split = dict(sharding.rules(batch="data", expert=("data", "expert")))
  assert split["group"] == "data" and split["group_replicated"] is None
  table = dict(sharding.rules(mlp=None))
  assert (
    table["group_replicated"] == table["group_dispatched"] == ("data", "model")
  )
  assert dict(sharding.rules(group_replicated="data", expert=None))[
    "group_replicated"
  ] == ("data")


def test_batch_must_divide():
  layout = sharding.LAYOUTS["expert"]
  with pytest.raises(ValueError, match="12 entries.*8 devices; choose batch"):
    sharding.batch_sharding(layout, sharding.make_mesh(layout), 12)


def single(name):
  """A layer with one expert, or with one of a kind or one group of them."""
  one, four = experts.FeedForward(1, 16), experts.FeedForward(4, 16)
  if name == "expert":
    return moe.MoE(router.TopK(1, 1), one, L)
  if name == "kind":
    return moe.MoE(
      router.TopK(6, 2), experts.Mixed((four, one, experts.Identity(1))), L
    )
  within = moe.MoE(router.TopK(4, 2), four)
  return moe.HierarchicalMoE(router.TopK(1, 1), within, L)


@pytest.mark.parametrize(
  "name, dispatcher",
  [
    ("expert", "einsum"),
    ("expert", "ragged"),
    ("kind", "gather"),
    ("kind", "ragged"),
    ("group", "gather"),
  ],
)
def test_a_single_expert_need_not_divide(name, dispatcher):
  module = single(name).clone(dispatch=dispatcher)
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  params = nn.unbox(module.init(jax.random.key(1), x))
  want = jax.jit(module.apply)(params, x)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout, jax.devices()[:4])
  with sharding.use(layout, mesh):
    got = jax.jit(module.apply)(params, x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
