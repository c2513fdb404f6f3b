"""Meshes of the user's own: the layer's results, and each device's work."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import experts, losses, moe, router

E, D, F, S = 4, 8, 16, 16
B, L = 16, 16


def feed_forward(num_experts=E):
  return experts.FeedForward(num_experts, F)


def mixture(choose=None, of=None, **fields):
  choose = choose or router.NoisyTopK(E, k=2)
  return moe.MoE(choose, of or feed_forward(), group_size=S, **fields)


LAYERS = {
  "einsum": mixture(dispatch="einsum"),
  "gather": mixture(dispatch="gather"),
  "ragged": mixture(dispatch="ragged"),
  "dropless": mixture(capacity_factor=None, recompute=True),
  "each": mixture(router.TopK(E, k=2), experts.Each(E, nn.Dense(D))),
  "mixed": mixture(
    of=experts.Mixed((feed_forward(2), experts.Linear(2))), dispatch="ragged"
  ),
  "balanced": mixture(router.Balanced(E, k=2)),
  "two levels": moe.HierarchicalMoE(
    router.TopK(2, k=1),
    moe.MoE(router.TopK(2, k=1), feed_forward(2)),
    group_size=S,
  ),
  "single": moe.MoE(router.Single(), experts.FeedForward(1, F)),
}


class Net(nn.Module):
  """A user's model: a layer of Flax, and one of ours on a residual path."""

  layer: nn.Module

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(D)(x)
    return x + self.layer(x, train=True)


def flops_of(compiled):
  """Returns what the compiler counts for one device, each loop once."""
  return compiled.cost_analysis()["flops"]


def run(name):
  """Returns (params, x) -> loss, y and both gradients, of the layer's net."""
  net = Net(LAYERS[name])

  def loss(params, x):
    variables, rngs = {"params": params}, {"router": jax.random.key(1)}
    y, sown = net.apply(variables, x, mutable=["routing"], rngs=rngs)
    total = (y**2).mean()
    if losses.routings(sown):
      total += losses.auxiliary(sown, {"importance": 0.1})[0]
    return total, y

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@functools.cache
def alone(name):
  """Returns the arguments, what one device makes of them, and its FLOPs."""
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  rngs = {"params": jax.random.key(0), "router": jax.random.key(1)}
  params = nn.unbox(jax.jit(Net(LAYERS[name]).init)(rngs, x))["params"]
  spread = jax.random.normal(jax.random.key(2), (D, E))
  params = jax.tree.map(
    lambda w: w + spread if w.shape == spread.shape else w, params
  )
  compiled = jax.jit(run(name)).lower(params, x).compile()
  flops = flops_of(compiled)
  return (params, x), jax.device_get(compiled(params, x)), flops


def mesh(kind, **axes):
  types = (kind,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# A mesh, how the batch lies on it, whether `jax.set_mesh` makes it known, the
# user's own rules, and the devices that share the batch.
MESHES = {
  "auto": (mesh(AUTO, data=8), "data", True, (), 8),
  "auto, not set": (mesh(AUTO, data=8), "data", False, (), 8),
  "auto, two axes": (mesh(AUTO, data=4, model=2), "data", True, (), 4),
  "rules": (
    mesh(AUTO, data=4, model=2),
    "data",
    True,
    (("batch", "data"), ("group", "data")),
    4,
  ),
  "explicit": (mesh(EXPLICIT, data=8), "data", False, (), 8),
  "explicit, set": (mesh(EXPLICIT, data=8), "data", True, (), 8),
  "explicit, two axes": (
    mesh(EXPLICIT, data=4, model=2),
    ("data", "model"),
    True,
    (),
    8,
  ),
}
SOME = ("gather", "ragged")
# Each mesh with either, and each layer on a mesh of either type.
CASES = [(SOME[i % 2], kind) for i, kind in enumerate(MESHES)] + [
  (name, ("auto", "explicit")[i % 2])
  for i, name in enumerate(sorted(LAYERS.keys() - {"gather"}))
]


@pytest.mark.parametrize("name, kind", CASES)
def test_a_device_does_its_own_share(name, kind):
  (params, x), wanted, flops = alone(name)
  over, batch, is_set, rules, devices = MESHES[kind]
  whole = NamedSharding(over, PartitionSpec())
  split = NamedSharding(over, PartitionSpec(batch))
  params, x = jax.device_put((params, x), (whole, split))
  with contextlib.ExitStack() as stack:
    if is_set:
      stack.enter_context(jax.set_mesh(over))
    stack.enter_context(nn.logical_axis_rules(rules))
    compiled = jax.jit(run(name)).lower(params, x).compile()
    found = compiled(params, x)
  y = found[0][1]
  assert y.sharding.is_equivalent_to(split, y.ndim)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6),
    jax.device_get(found),
    wanted,
  )
  # Parts of a loop over sorted rows are rounded up. And where the compiler
  # alone knows how rows lie, sorted ones go forward twice.
  twice = 4 / 3 if name in ("ragged", "dropless", "mixed") else 1
  work_here = flops_of(compiled)
  assert work_here * devices <= 1.05 * twice * flops


@pytest.mark.parametrize(
  "name, check_vma", [("gather", False), ("ragged", True)]
)
def test_within_shard_map_a_device_works_on_its_own_rows(name, check_vma):
  (params, x), _, flops = alone(name)
  over = mesh(AUTO, data=8)
  whole, split = PartitionSpec(), PartitionSpec("data")

  def of_part(params, x):
    (_, y), (slope, _) = run(name)(params, x)
    if not check_vma:
      # Else the types have asked for the sum.
      slope = jax.lax.psum(slope, "data")
    return y, slope

  fn = jax.shard_map(
    of_part,
    mesh=over,
    in_specs=(whole, split),
    out_specs=(split, whole),
    check_vma=check_vma,
  )
  compiled = jax.jit(fn).lower(params, x).compile()
  lies = NamedSharding(over, whole), NamedSharding(over, split)
  y, slope = compiled(*jax.device_put((params, x), lies))
  on_one = jax.jit(run(name))
  parts = [on_one(params, part) for part in jnp.split(x, 8)]
  wanted = jnp.concatenate([y for (_, y), _ in parts])
  np.testing.assert_allclose(y, wanted, rtol=2e-4, atol=2e-6)
  total = jax.tree.map(lambda *s: sum(s), *[s for _, (s, _) in parts])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6),
    jax.device_get(slope),
    jax.device_get(total),
  )
  assert flops_of(compiled) * 8 <= 1.05 * flops


def test_in_shard_map_over_some_axes():
  """The others are left to the compiler; here nothing is split over them."""
  over = mesh(AUTO, data=4, model=2)
  whole, split = PartitionSpec(), PartitionSpec("data")
  (params, x), _, _ = alone("ragged")

  def of_part(params, x):
    return run("ragged")(params, x)[0][1]

  fn = jax.shard_map(
    of_part,
    mesh=over,
    in_specs=(whole, split),
    out_specs=split,
    axis_names={"data"},
  )
  with jax.set_mesh(over):
    y = jax.jit(fn)(params, x)
  on_one = jax.jit(of_part)
  parts = [on_one(params, part) for part in jnp.split(x, 4)]
  np.testing.assert_allclose(y, jnp.concatenate(parts), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("choose", ["balanced", "hash"])
def test_replicated_inputs_run_on_every_device(choose):
  """XLA once ended the process at a top-k whose results met one barrier."""
  whole = NamedSharding(mesh(AUTO, data=2), PartitionSpec())
  layer = mixture(router.ROUTERS[choose](E, k=2))
  x = jax.random.normal(jax.random.key(0), (2, S, D))
  ids = jnp.zeros((2, S), jnp.int32)
  variables = nn.unbox(layer.init(jax.random.key(1), x, ids=ids))
  args = jax.device_put((variables, x, ids), whole)
  apply = jax.jit(lambda v, x, ids: layer.apply(v, x, ids=ids))
  np.testing.assert_allclose(apply(*args), apply(variables, x, ids), atol=1e-6)


def test_parameters_are_made_under_any_mesh():
  """Also within a jit, where keys have a type of the mesh as well."""
  layer = LAYERS["gather"]
  x = jnp.ones((B, L, D))
  shapes = jax.tree.map(jnp.shape, nn.unbox(layer.init(jax.random.key(0), x)))
  for kind in (AUTO, EXPLICIT):
    over = mesh(kind, data=8)
    split = NamedSharding(over, PartitionSpec("data"))
    with jax.set_mesh(over):
      init = jax.jit(lambda x: nn.unbox(layer.init(jax.random.key(0), x)))
      made = init(jax.device_put(x, split))
    assert jax.tree.map(jnp.shape, made) == shapes


# One group alone, and tokens that are split along their second axis.
@pytest.mark.parametrize(
  "kind, spec, group_size, groups",
  [
    (AUTO, ("data",), None, 1),
    (EXPLICIT, ("data",), None, 1),
    (EXPLICIT, (None, "data"), S, 16),
  ],
)
def test_groups_that_cannot_be_split_are_told_of(
  kind, spec, group_size, groups
):
  """They still come out right: every device works out all groups."""
  layer = LAYERS["gather"].clone(group_size=group_size)
  over = mesh(kind, data=8)
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  variables = layer.init(jax.random.key(1), x)
  wanted = layer.apply(variables, x)
  split = jax.device_put(x, NamedSharding(over, PartitionSpec(*spec)))
  whole = jax.device_put(variables, NamedSharding(over, PartitionSpec()))
  message = f"groups of tokens, {groups}, .* Split the first.* group_size by"
  with pytest.warns(UserWarning, match=message):
    y = jax.jit(layer.apply)(whole, split)
  np.testing.assert_allclose(y, wanted, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("gather", EXPLICIT), ("ragged", AUTO)])
def test_arrays_that_lie_on_no_mesh_yet(name, kind):
  """As they are at first: `jax.jit` puts them on the mesh in use."""
  args, (wanted, _), _ = alone(name)
  with jax.set_mesh(mesh(kind, data=8)):
    (found, _) = jax.jit(run(name))(*args)
  np.testing.assert_allclose(found[1], wanted[1], rtol=2e-4, atol=2e-6)


# Axes of both types, and rules that are for another mesh and so say nothing.
@pytest.mark.parametrize(
  "over, rules, devices",
  [
    (
      jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, EXPLICIT)),
      (),
      4,
    ),
    (
      mesh(AUTO, data=8),
      (("group", "replica"), ("batch", ("replica", "data"))),
      8,
    ),
  ],
)
def test_the_compiler_finds_a_share_by_itself(over, rules, devices):
  (params, x), _, flops = alone("gather")
  split = NamedSharding(over, PartitionSpec("data"))
  params = jax.device_put(params, NamedSharding(over, PartitionSpec()))
  with jax.set_mesh(over), nn.logical_axis_rules(rules):
    lowered = jax.jit(run("gather")).lower(params, jax.device_put(x, split))
  assert flops_of(lowered.compile()) * devices <= 1.05 * flops


def test_several_batches_share_a_layer():
  """Under `jax.vmap`, in a program that is compiled as a whole."""
  layer = LAYERS["ragged"]
  x = jax.random.normal(jax.random.key(0), (2, 4, L, D))
  variables = layer.init(jax.random.key(1), x[0])
  y = jax.jit(jax.vmap(layer.apply, (None, 0)))(variables, x)
  wanted = [layer.apply(variables, each) for each in x]
  np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
