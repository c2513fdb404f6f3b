"""Meshes of the user's own: the layer's results, and each device's work."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import experts, losses, moe, router

pytestmark = pytest.mark.usefixtures("few_sizes")

E, D, F, S = 4, 8, 16, 16
B, L = 16, 16
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("data")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)


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


def inputs():
  return jax.random.normal(jax.random.key(0), (B, L, D))


@functools.cache
def alone(name):
  """Arguments of `run`, what comes of them on one device, and its work."""
  x = inputs()
  rngs = {"params": jax.random.key(0), "router": jax.random.key(1)}
  params = nn.unbox(jax.jit(Net(LAYERS[name]).init)(rngs, x))["params"]
  spread = jax.random.normal(jax.random.key(2), (D, E))
  params = jax.tree.map(
    lambda w: w + spread if w.shape == spread.shape else w, params
  )
  compiled = jax.jit(run(name)).lower(params, x).compile()
  flops = flops_of(compiled)
  return (params, x), jax.device_get(compiled(params, x)), flops


@functools.cache
def of_part(name):
  """Runs a layer on one device's rows, compiled."""
  return jax.jit(run(name))


def mesh(kind, **axes):
  types = (kind,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


# A mesh, how the batch lies on it, whether `jax.set_mesh` makes it known, the
# user's own rules, and the devices that share the batch. The last two: rules
# that are for another mesh and so say nothing, and axes of both types.
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
  "strange rules": (
    mesh(AUTO, data=8),
    "data",
    True,
    (("group", "replica"), ("batch", ("replica", "data"))),
    8,
  ),
  "both": (
    jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, EXPLICIT)),
    "data",
    True,
    (),
    4,
  ),
}
# Each mesh with slots or sorted rows, and each layer on a mesh of either type.
CASES = [
  *(("ragged", kind) for kind in ("auto, not set", "rules", "explicit, set")),
  *(("gather", kind) for kind in ("auto", "explicit", "strange rules", "both")),
  *(("gather", kind) for kind in ("auto, two axes", "explicit, two axes")),
  *(("mixed", "auto"), ("each", "explicit"), ("balanced", "auto")),
  *(("two levels", "explicit"), ("single", "auto"), ("dropless", "explicit")),
]


@pytest.mark.parametrize("name, kind", CASES)
def test_a_device_does_its_own_share(name, kind):
  args, wanted, flops = alone(name)
  over, batch, is_set, rules, devices = MESHES[kind]
  split = NamedSharding(over, PartitionSpec(batch))
  args = jax.device_put(args, (NamedSharding(over, WHOLE), split))
  with contextlib.ExitStack() as stack:
    if is_set:
      stack.enter_context(jax.set_mesh(over))
    stack.enter_context(nn.logical_axis_rules(rules))
    compiled = jax.jit(run(name)).lower(*args).compile()
    found = compiled(*args)
  y = found[0][1]
  assert kind == "both" or y.sharding.is_equivalent_to(split, y.ndim)
  jax.tree.map(close, jax.device_get(found), wanted)
  # Parts of a loop over sorted rows are rounded up. And where the compiler
  # alone knows how rows lie, sorted ones go forward twice.
  twice = 4 / 3 if name in ("ragged", "dropless", "mixed") else 1
  assert flops_of(compiled) * devices <= 1.05 * twice * flops


def within_shard_map(name, over, check_vma, **axes):
  """y and the gradient of the weights, as compiled."""
  (params, x), _, flops = alone(name)

  def on_device(params, x):
    (_, y), (slope, _) = run(name)(params, x)
    if not check_vma:
      # Else the types have asked for the sum.
      slope = jax.lax.psum(slope, "data")
    return y, slope

  fn = jax.shard_map(
    on_device,
    mesh=over,
    in_specs=(WHOLE, SPLIT),
    out_specs=(SPLIT, WHOLE),
    check_vma=check_vma,
    **axes,
  )
  with jax.set_mesh(over):
    compiled = jax.jit(fn).lower(params, x).compile()
    found = compiled(params, x)
  parts = jnp.split(x, over.shape["data"])
  parts = [of_part(name)(params, part) for part in parts]
  wanted = jnp.concatenate([y for (_, y), _ in parts])
  slope = jax.tree.map(lambda *s: sum(s), *[s for _, (s, _) in parts])
  jax.tree.map(close, jax.device_get(found), jax.device_get((wanted, slope)))
  return flops_of(compiled), flops


@pytest.mark.parametrize(
  "name, check_vma", [("gather", False), ("ragged", True)]
)
def test_within_shard_map_a_device_works_on_its_own_rows(name, check_vma):
  here, flops = within_shard_map(name, mesh(AUTO, data=8), check_vma)
  assert here * 8 <= 1.05 * flops


def test_in_shard_map_over_some_axes():
  """The others are left to the compiler; here nothing is split over them."""
  over = mesh(AUTO, data=4, model=2)
  within_shard_map("ragged", over, True, axis_names={"data"})


@pytest.mark.parametrize("choose", ["balanced", "hash"])
def test_replicated_inputs_run_on_every_device(choose):
  """XLA once ended the process at a top-k whose results met one barrier."""
  layer = mixture(router.ROUTERS[choose](E, k=2))
  x, ids = inputs()[:2], jnp.zeros((2, S), jnp.int32)
  variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x, ids=ids))
  apply = jax.jit(lambda v, x, ids: layer.apply(v, x, ids=ids))
  args = variables, x, ids
  there = jax.device_put(args, NamedSharding(mesh(AUTO, data=2), WHOLE))
  np.testing.assert_allclose(apply(*there), apply(*args), atol=1e-6)


def test_parameters_are_made_under_any_mesh():
  """Also within a jit, where keys have a type of the mesh as well."""
  init = LAYERS["gather"].init
  shapes = jax.eval_shape(lambda x: init(jax.random.key(0), x), inputs())
  shapes = jax.tree.map(jnp.shape, nn.unbox(shapes))
  for kind in (AUTO, EXPLICIT):
    over = mesh(kind, data=8)
    with jax.set_mesh(over):
      made = jax.jit(lambda x: nn.unbox(init(jax.random.key(0), x)))
      made = made(jax.device_put(inputs(), NamedSharding(over, SPLIT)))
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
  over, x = mesh(kind, data=8), inputs()
  variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x))
  apply = jax.jit(layer.apply)
  wanted = apply(variables, x)
  split = jax.device_put(x, NamedSharding(over, PartitionSpec(*spec)))
  whole = jax.device_put(variables, NamedSharding(over, WHOLE))
  message = f"groups of tokens, {groups}, .* Split the first.* group_size by"
  with pytest.warns(UserWarning, match=message):
    y = apply(whole, split)
  np.testing.assert_allclose(y, wanted, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("gather", EXPLICIT), ("ragged", AUTO)])
def test_arrays_that_lie_on_no_mesh_yet(name, kind):
  """As they are at first: `jax.jit` puts them on the mesh in use."""
  args, (wanted, _), _ = alone(name)
  with jax.set_mesh(mesh(kind, data=8)):
    (found, _) = jax.jit(run(name))(*args)
  close(found[1], wanted[1])


@pytest.mark.usefixtures("standard_promotion")
def test_a_step_of_arrays_that_lie_on_no_mesh_yet():
  """Gradients are of the parameters' type, so that an optimizer takes both."""
  layer, x = LAYERS["gather"], inputs()
  params = alone("gather")[0][0]["layer"]
  tx = optax.adam(1e-2)

  def step(params, state, x):
    loss = lambda params: (layer.apply({"params": params}, x) ** 2).mean()  # noqa: E731
    slopes = jax.grad(loss)(params)
    return optax.apply_updates(params, tx.update(slopes, state)[0]), slopes

  state = tx.init(params)
  wanted = jax.jit(step)(params, state, x)
  over = mesh(EXPLICIT, data=8)
  with jax.set_mesh(over):
    split = jax.device_put(x, NamedSharding(over, SPLIT))
    for each in (x, split):
      found = jax.jit(step)(params, state, each)
      jax.tree.map(close, jax.device_get(found), wanted)
    # Not compiled as a whole either.
    y = layer.apply({"params": params}, x)
    assert layer.init(jax.random.key(0), x)["params"].keys() == params.keys()
  close(jax.device_get(y), layer.apply({"params": params}, x))


@pytest.mark.parametrize("name", ["einsum", "gather", "ragged"])
def test_hidden_units_may_be_split_within_shard_map(name):
  """Over devices on which the tokens are the same; sums come by the types."""
  over, x = mesh(AUTO, data=4, model=2), inputs()
  whole, part = (
    moe.MoE(
      router.TopK(E, 2),
      experts.FeedForward(E, hidden),
      dispatch=name,
      eval_capacity_factor=None,
    )
    for hidden in (F, F // 2)
  )
  params = alone("gather")[0][0]["layer"]
  params = params | {"router": {"gate": params["router"]["gate"]}}
  specs = {
    "router": {"gate": {"kernel": WHOLE}},
    "experts": {
      "w_in": PartitionSpec(None, None, "model"),
      "w_out": PartitionSpec(None, "model"),
    },
  }

  def parts(params, x):
    return jax.lax.psum(part.apply({"params": params}, x), "model")

  split = jax.shard_map(
    parts, mesh=over, in_specs=(specs, SPLIT), out_specs=SPLIT
  )

  def slopes(fn):
    return jax.jit(jax.grad(lambda p, x: (fn(p, x) ** 2).sum(), (0, 1)))

  wanted = slopes(lambda p, x: whole.apply({"params": p}, x))(params, x)
  jax.tree.map(close, jax.device_get(slopes(split)(params, x)), wanted)


def test_several_batches_share_a_layer():
  """Under `jax.vmap`, in a program that is compiled as a whole."""
  (params, x), _, _ = alone("ragged")
  layer, variables = LAYERS["ragged"], {"params": params["layer"]}
  x = x.reshape(2, B // 2, L, D)
  y = jax.jit(jax.vmap(layer.apply, (None, 0)))(variables, x)
  wanted = jax.jit(lambda v, x: [layer.apply(v, each) for each in x])
  close(y, wanted(variables, x))
