"""Two levels as a layer: parameters, noise, cost, shapes, errors."""

import functools
import math

import flax.linen as nn
import jax
import jax.extend as jex
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from moejax import experts, losses, moe, router, sharding

pytestmark = pytest.mark.usefixtures("few_sizes")

P, Q, K, D, F, S, G = 3, 4, 2, 3, 2, 8, 2
IDS = jnp.arange(G * S, dtype=jnp.int32).reshape(G, S)
KEY = jax.random.key(3)
NOISY = router.NoisyTopK(P, K)


def layer(primary=None, secondary=None, **options):
  primary, options = primary or NOISY, {"group_size": S} | options
  return moe.HierarchicalMoE(primary, secondary or mixture(), **options)


def mixture(gate=None, kind=None, **options):
  """What is within a group."""
  gate = gate or router.NoisyTopK(Q, K)
  return moe.MoE(gate, kind or experts.FeedForward(Q, F), **options)


FREE = {"capacity_factor": None, "eval_capacity_factor": None}


def sorted_layer(gate=None, kind=None, primary=None, **options):
  """Without a capacity, its rows sorted."""
  within = mixture(gate, kind, **FREE, **options)
  return layer(primary, within, dispatch="ragged", **FREE)


def inputs(shape=(G, S)):
  return 1 + jax.random.normal(jax.random.key(1), (*shape, D))


def apply(module, params, x, train=False, **options):
  """Returns y and the routing."""
  y, state = module.apply(
    {"params": params},
    x,
    train=train,
    rngs={"router": KEY} if train else {},
    mutable=["routing"],
    **options,
  )
  (routing,) = losses.routings(state)
  return y, routing


def test_parameters_and_how_they_may_be_split():
  """Every group has its own secondary, along the axis that devices share."""
  boxed = jax.jit(layer().init)(KEY, inputs())["params"]
  names = jax.tree.map(
    lambda leaf: (leaf.value.shape, leaf.names),
    boxed,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )
  primary = {"kernel": ((D, P), ("embed", None))}
  gate = {"kernel": ((P, D, Q), ("expert", "embed", None))}
  assert names == {
    "primary": {"gate": primary, "noise": primary},
    "secondary": {
      "router": {"gate": gate, "noise": gate},
      "experts": {
        "w_in": ((P, Q, D, F), ("expert", None, "embed", "mlp")),
        "w_out": ((P, Q, F, D), ("expert", None, "mlp", "embed")),
      },
    },
  }
  for leaf in jax.tree.leaves(boxed["secondary"]["experts"]):
    assert len(np.unique(leaf)) == leaf.size


@pytest.mark.parametrize("factor", [1.25, None])
def test_every_group_draws_its_own_noise(factor):
  """From zeros the logits are noise * (ln 2 + 0.01) and nothing else."""
  shape = groups, tokens = 4, 64
  free = {"capacity_factor": factor}
  secondary = mixture(kind=experts.Identity(Q), **free)
  module = layer(router.TopK(P, P), secondary, group_size=tokens, **free)
  zeros = jax.tree.map(
    jnp.zeros_like, kinds.random_params(module, inputs(shape))
  )
  run = jax.jit(functools.partial(apply, module, train=True))
  noise = run(zeros, inputs(shape))[1].logits / (math.log(2) + 1e-2)
  if factor is None:
    # Sorted: the edge of each token to every group, one group after the other.
    noise = noise.reshape(groups, P, tokens, Q).swapaxes(0, 1)
  assert noise.shape == (P, groups, tokens, Q)
  assert len(np.unique(noise)) > 0.99 * noise.size
  np.testing.assert_allclose(noise.mean(axis=(2, 3)), 0, atol=0.25)
  np.testing.assert_allclose(noise.std(axis=(2, 3)), 1, atol=0.2)


def make(kind, num_experts):
  fixed = ("softmax", "switch", "gshard_top_2")
  args = (num_experts,) if kind in fixed else (num_experts, K)
  return router.ROUTERS[kind](*args)


def shapes_of(module, train, **options):
  """y and the routing of a layer just made; their shapes."""

  def run():
    variables = module.init(KEY, inputs(), **options)
    return apply(module, variables["params"], inputs(), train, **options)

  return jax.eval_shape(run)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("factor", [1.25, None])
@pytest.mark.parametrize("kind", router.ROUTERS)
def test_every_router_serves_at_either_level(kind, factor, train, together=2):
  """But for ids, which are not dispatched: they are the primary's.

  Rows are sorted where no token's experts depend on the others of its group.
  """
  inner = make("top_k" if kind == "hash" else kind, Q)
  free = {"capacity_factor": factor, "eval_capacity_factor": factor}
  options = free | {"groups_together": together}
  module = layer(make(kind, P), mixture(inner, **free), **options)
  y, routing = shapes_of(module, train, ids=IDS)
  assert y.shape == (G, S, D)
  *front, experts_within = routing.logits.shape
  assert routing.mask.shape == (*front,) and experts_within == Q
  if factor is None and inner.is_by_token(train):
    edges = routing.primary.assignment.expert.shape
    assert routing.within.shape == (*front,) == edges
  else:
    assert routing.within is None
    assert front[:2] == [P, G // together] and front[2] % together == 0
  for name in ("importance", "load", "count", "dropped", "dropped_first"):
    assert getattr(routing, name).shape == (G // together, P * Q)
    assert getattr(routing.primary, name).shape == (G // together, P)
  learned = {
    **dict.fromkeys(("balanced", "expert_threshold"), "thresholds" * train),
    "sigmoid": "bias",
  }
  for name in ("thresholds", "bias"):
    vector = getattr(routing, name)
    assert (vector is not None) == (learned.get(kind) == name)
    assert vector is None or vector.shape == (P * Q,)


@pytest.mark.parametrize(
  "module, message",
  [
    (layer(group_size=5), "group size 5 .* 16 tokens"),
    (layer(groups_together=3), "groups_together 3 .* 2 groups of 8 tokens"),
    (layer(groups_together=0), "groups_together 0 .* 2 groups"),
    (
      layer(secondary=mixture(group_size=4)),
      rf"group size 4 of the secondary .* now {S}",
    ),
    (
      layer(secondary=mixture(kind=experts.FeedForward(Q + 2, F))),
      rf"\b{Q} experts.*\b{Q + 2}\b",
    ),
    (layer(router.NoisyTopK(P, P + 1)), rf"k = {P + 1}\b.*\b{P} experts"),
    (layer(capacity_factor=0.0, eval_capacity_factor=0.0), r"0\.0 .* 3 expert"),
    (layer(dispatch="sorted"), "unknown .* 'sorted' between.*auto, einsum"),
    (layer(secondary=mixture(dispatch="ragged")), "'ragged'.*gather or einsum"),
    (
      layer(dispatch="ragged"),
      r"3 groups.*eval_.* is 2\.0 and 2\.0; give both",
    ),
    (sorted_layer(router.ExpertChoice(Q, K)), r"ExpertChoice\(num_experts=4\)"),
    (
      sorted_layer(kind=experts.Mixed((experts.Linear(2), experts.Linear(2)))),
      "experts of Mixed need slots there",
    ),
    (sorted_layer(kind=experts.Each(Q, nn.Dense(D))), "of Each need slots"),
    (sorted_layer(dispatch="gather"), "within groups dispatch is 'gather'"),
  ],
)
def test_bad_arguments_are_named(module, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: module.init(KEY, inputs()))


def test_a_mixture_in_every_expert_keeps_its_slots():
  """A device has several of them."""
  within = sorted_layer().clone(group_size=None, dispatch="auto")
  whole = moe.MoE(router.TopK(2, 1), experts.Each(2, within))
  assert jax.eval_shape(lambda: whole.init(KEY, inputs()))


def largest(jaxpr):
  """The entries of the largest array that a program makes, weights apart."""
  sizes = [0]
  for eqn in jaxpr.eqns:
    sizes += [math.prod(var.aval.shape) for var in eqn.outvars]
    for inner in jex.core.jaxprs_in_params(eqn.params):
      sizes.append(largest(inner))
  return max(sizes)


def test_work_is_that_of_edges_not_of_experts():
  """No expert is given every token: 16 times as many are of no more rows."""

  def memory(groups, size, dispatch):
    noisy = functools.partial(router.NoisyTopK, k=K)
    kind = experts.FeedForward(size, 8)
    module = sorted_layer(noisy(size), kind, noisy(groups))
    module = module.clone(dispatch=dispatch)
    x = jnp.zeros((2, 512, 256))
    shapes = jax.eval_shape(lambda: module.init(KEY, x))["params"]
    loss = lambda at, x: apply(module, at, x, True)[0].sum()  # noqa: E731
    slopes = jax.make_jaxpr(jax.grad(loss, (0, 1)))(shapes, x)
    return largest(slopes.jaxpr)

  edges = 2 * 512 * K * K
  assert memory(2, 4, "ragged") == memory(8, 16, "ragged") == edges * 256
  assert memory(8, 16, "gather") > 10 * edges * 256


@pytest.mark.parametrize("learned_by", ["bias", "quantile"])
def test_sorted_rows_and_slots_for_all_are_one_mixture(learned_by):
  """In value, in every loss of either scope, in the report, and in gradient."""
  primary = router.ExpertChoice(P, K)
  gate = router.Sigmoid(Q, K, learned_by=learned_by)
  module = sorted_layer(gate, primary=primary)
  params, x = kinds.random_params(module, inputs()), inputs()
  names = ("importance", "switch_balance", "z", learned_by)
  weights = dict.fromkeys(names, 0.3)

  def score(module, params, x):
    mask = jnp.arange(G * S).reshape(G, S) % 5 > 0
    y, routing = apply(module, params, x, True, mask=mask)
    of_batch, values = losses.auxiliary(routing, weights)
    of_group, _ = losses.auxiliary(routing, weights, "group")
    report = y, values, losses.balance(routing), routing.load
    return (y * jnp.cos(x)).sum() + of_batch + of_group, report

  def run(dispatch):
    of = functools.partial(score, module.clone(dispatch=dispatch))
    return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(params, x)

  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
  jax.tree.map(close, run("ragged"), run("gather"))


def test_ids_do_not_travel_to_groups():
  module = layer(secondary=mixture(router.Hash(Q, K)))
  with pytest.raises(ValueError, match=f"over {Q} experts.*no ids"):
    jax.eval_shape(lambda: module.init(KEY, inputs(), ids=IDS))


@pytest.mark.parametrize(
  "gate, learned",
  [
    (functools.partial(router.NoisyTopK, k=K), ()),
    (functools.partial(router.Balanced, k=K, over="batch"), ("threshold",)),
    (
      functools.partial(
        router.Balanced, k=K, over="batch", learned_by="quantile"
      ),
      ("quantile",),
    ),
  ],
  ids=["noisy", "balanced over the batch", "quantiles"],
)
def test_devices_judge_the_balance_without_fetching_tokens(gate, learned):
  """Logits stay where they are, though both levels' losses read them.

  So they do where experts take their share of the tokens of all devices.
  """
  layout = sharding.LAYOUTS["data_expert"]
  mesh = sharding.make_mesh(layout)
  module = layer(gate(8), mixture(gate(8), experts.FeedForward(8, F)))
  x = inputs((8, S))
  names = ("importance", "load", "switch_balance", "z", *learned)
  weights = dict.fromkeys(names, 0.1)

  def report(params, x):
    y, sown = apply(module, params, x, train=True, mask=x[..., 0] > 0)
    (routing,) = losses.routings(sown)
    counts = routing.count, routing.primary.count
    return y, counts, losses.auxiliary(sown, weights), losses.balance(sown)

  params = kinds.random_params(module, inputs((8, S)))
  want = jax.jit(report)(params, x)
  x = jax.device_put(x, sharding.batch_sharding(layout, mesh, len(x)))
  with sharding.use(layout, mesh):
    compiled = jax.jit(report).lower(params, x).compile()
  assert "all-gather" not in compiled.as_text()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, compiled(params, x), want)
  for level in map(np.asarray, want[1]):
    # Alike for every expert, and not for every group of tokens.
    every = level.sum(axis=0)
    assert (every == every[0]).all() == bool(learned)
    assert (level != level[:1]).any()
