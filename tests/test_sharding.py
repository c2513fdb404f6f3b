"""Meshes, and what the names of a layout's axes mean on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import experts, moe, partition, router, sharding

pytestmark = pytest.mark.usefixtures("few_sizes")

B, L, D, E = 8, 16, 5, 8
ALL = pytest.mark.parametrize("layout", sharding.LAYOUTS)


def layer(two_levels, num_experts=E, **options):
  gate = router.TopK(num_experts, min(2, num_experts))
  options = {"group_size": L} | options
  if not two_levels:
    kind = experts.FeedForward(num_experts, 16)
    return moe.MoE(gate, kind, **options)
  within = moe.MoE(router.TopK(4, 2), experts.FeedForward(4, 16))
  return moe.HierarchicalMoE(gate, within, **options)


@pytest.mark.parametrize("devices", [1, 2, 8])
@ALL
def test_meshes_of_any_size(layout, devices):
  """Rows follow the devices, so that a process has those it reads."""
  layout = sharding.LAYOUTS[layout]
  mesh = sharding.make_mesh(layout, jax.devices()[:devices])
  half = max(devices // 2, 1)
  want = {
    "replicated": (devices, 1, 1),
    "expert": (1, devices, 1),
    "data_expert": (min(devices, 2), half, 1),
    "expert_model": (1, half, min(devices, 2)),
    "fsdp": (devices, 1, 1),
  }
  assert mesh.axis_names == ("data", "expert", "model")
  assert mesh.devices.shape == want[layout.name]
  in_turn = mesh.devices.swapaxes(1, 2)
  assert list(in_turn.flat) == jax.devices()[:devices]
  place = sharding.batch_sharding(layout, mesh, devices)
  for i, device in enumerate(jax.devices()[:devices]):
    rows = place.addressable_devices_indices_map((devices,))[device]
    assert rows in ((slice(i, i + 1),), (slice(None),))


def on_mesh(layout_name, module):
  """Traces the layer on the mesh of all devices, which are the default."""
  layout = sharding.LAYOUTS[layout_name]
  with sharding.use(layout, sharding.make_mesh(layout)):
    jax.eval_shape(module.init, jax.random.key(0), jnp.ones((B, L, D)))


@pytest.mark.parametrize(
  "layout, module, message",
  [
    *(
      (name, layer(False, group_size=32), "'group'.* 4 entries.* 8 devices")
      for name in sharding.LAYOUTS
    ),
    *(
      (name, layer(two, 6), rf"'expert'.* 6 entries.* {devices} devices")
      for name, devices in (("expert", 8), ("data_expert", 4))
      for two in (False, True)
    ),
    (
      "data_expert",
      layer(True, groups_together=B),
      "'group_replicated'.* 1 entries.* 2 devices; .* smaller groups_together",
    ),
  ],
)
def test_what_does_not_divide_names_both_numbers(layout, module, message):
  with pytest.raises(ValueError, match=message):
    on_mesh(layout, module)


@pytest.mark.parametrize(
  "layout, module",
  [
    ("replicated", layer(False, 6)),
    ("replicated", layer(True, 6)),
    ("data_expert", layer(True, groups_together=B // 2)),
  ],
)
def test_what_divides_passes(layout, module):
  on_mesh(layout, module)


@pytest.mark.parametrize(
  "layout, devices, message",
  [
    (sharding.LAYOUTS["data_expert"], 3, "'data_expert'.*by 2.*the 3 at hand"),
    (sharding.Layout("fixed", (2, 2, 1), ()), 8, "'fixed' wants 4 .* are 8"),
    (
      sharding.Layout("both", (2, 4, 1), sharding.rules(param_shards="data")),
      8,
      "'both' splits parameters over 'data' .* 'expert' over 4 devices",
    ),
  ],
)
def test_meshes_that_cannot_be_name_what_clashes(layout, devices, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(layout, jax.devices()[:devices])


def test_a_batch_must_divide():
  layout = sharding.LAYOUTS["expert"]
  with pytest.raises(ValueError, match="12 entries.*8 devices; choose batch"):
    sharding.batch_sharding(layout, sharding.make_mesh(layout), 12)


def test_off_the_mesh_nothing_is_asked_for():
  x = jnp.ones((3, 5))
  assert sharding.constrain(x, "group", None) is x
  same = partition.manual(lambda x: x, (("group",),), ("group",))
  assert same(x) is x


def test_what_does_not_divide_rests_whole():
  layout = sharding.LAYOUTS["fsdp"]
  mesh = sharding.make_mesh(layout)
  shapes = {"odd": (9, 5), "two": (8, 24, 16), "step": ()}
  tree = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
  places = sharding.shardings(tree, layout, mesh)
  parts = {name: places[name].shard_shape(s) for name, s in shapes.items()}
  assert parts == shapes | {"two": (8, 3, 16)}


@pytest.mark.parametrize(
  "changes, want",
  [
    ({}, sharding.RULES),
    (
      {"batch": "data", "expert": ("data", "expert")},
      {"group": "data", "group_replicated": None},
    ),
    (
      {"mlp": None},
      dict.fromkeys(
        ("group_replicated", "group_dispatched"), ("data", "model")
      ),
    ),
    (
      {"group_replicated": "data", "expert": None},
      {"group_replicated": "data"},
    ),
    ({"vocab": "model"}, {"batch_at_vocab": ("data", "expert")}),
  ],
)
def test_rules_follow_the_experts(changes, want):
  table = dict(sharding.rules(**changes))
  assert table | want == table and table | changes == table


ONE, FOUR = experts.FeedForward(1, 16), experts.FeedForward(4, 16)
KINDS = moe.MoE(
  router.TopK(6, 2), experts.Mixed((FOUR, ONE, experts.Identity(1))), L
)


# One expert, one of a kind, and one group of them.
@pytest.mark.parametrize(
  "module",
  [
    moe.MoE(router.TopK(1, 1), ONE, L, dispatch="einsum"),
    KINDS.clone(dispatch="gather"),
    KINDS.clone(dispatch="ragged"),
    layer(True, 1, dispatch="gather"),
  ],
  ids=["expert", "kind", "sorted kind", "group"],
)
def test_a_single_expert_need_not_divide(module):
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x))
  want = jax.jit(module.apply)(params, x)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout, jax.devices()[:4])
  with sharding.use(layout, mesh):
    got = jax.jit(module.apply)(params, x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
