"""Routers: their weights, their noise, their precision."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import gating, losses, router, routing
from moejax.training import optim

G, S, D, E, K = 2, 4, 3, 5, 2
MASK = jnp.asarray(np.arange(G * S).reshape(G, S) % 3 > 0)
IDS = jnp.asarray(np.arange(G * S).reshape(G, S) % 5, jnp.int32)
ALL = pytest.mark.parametrize("name", router.ROUTERS)


# Those whose weights start at zero, and whose training has chance in it.
FROM_ZERO = ("softmax", "noisy_top_k")
BY_CHANCE = ("noisy_top_k", "gshard_top_2")


def make(name):
  fixed = ("softmax", "switch", "gshard_top_2")
  return router.ROUTERS[name](E, *(() if name in fixed else (K,)))


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (G, S, D))


@functools.cache
def init(module, train=False):
  rngs = {"params": jax.random.key(0), "router": jax.random.key(9)}
  init = functools.partial(module.init, train=train, ids=IDS)
  return jax.jit(init)(rngs, inputs()).get("params", {})


def random_params(module):
  """Params off their start, so that every one of them shows in the output."""
  random = np.random.default_rng(5)

  def shifted(w):
    noise = random.normal(size=w.shape) * (1 if w.ndim == 2 else 0.3)
    return w + jnp.asarray(noise, w.dtype)

  return jax.tree.map(shifted, nn.unbox(init(module)))


def apply(module, params, x, train=False, noise=None, mask=None, ids=IDS):
  rngs = {} if noise is None else {"router": jax.random.key(noise)}
  return module.apply(
    {"params": params}, x, train=train, mask=mask, ids=ids, rngs=rngs
  )


def same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@ALL
def test_parameters_may_be_split(name):
  def names(leaf):
    return ("embed", None) if leaf.ndim == 2 else (None,)

  boxed = init(make(name))
  specs = nn.get_partition_spec(boxed)
  want = jax.tree.map(
    lambda leaf: jax.sharding.PartitionSpec(*names(leaf)), nn.unbox(boxed)
  )
  assert specs == want


def test_a_single_expert_needs_no_router():
  module = router.Single()
  assert init(module) == {}
  got = apply(module, {}, inputs(), mask=MASK)
  same(got, gating.top_k(jnp.zeros((G, S, 1)), 1, MASK))
  np.testing.assert_array_equal(got.assignment.gate, MASK)
  with pytest.raises(ValueError, match="there are 2 experts, but .* Single"):
    apply(router.Single(2), {}, inputs())


@ALL
def test_where_the_parameters_start(name):
  params = nn.unbox(init(make(name)))
  kernels = {"hash": 0, "noisy_top_k": 2}.get(name, 1)
  vectors = {
    "balanced": ("log_thresholds", np.log(1 / E)),
    "expert_threshold": ("average_thresholds", 1 / E),
    "sigmoid": ("bias", 0),
  }
  assert len(params) == kernels + (name in vectors)
  for leaf in jax.tree.leaves(params):
    if leaf.ndim == 2:
      assert leaf.shape == (D, E)
      assert (np.asarray(leaf) == 0).all() == (name in FROM_ZERO)
  if name in vectors:
    vector, start = vectors[name]
    np.testing.assert_allclose(params[vector], np.full(E, start), rtol=1e-6)


@pytest.mark.parametrize(
  "name", [name for name in router.ROUTERS if name not in FROM_ZERO]
)
def test_at_first_tokens_and_experts_meet_evenly(name):
  """From zeros all would tie: k experts or k tokens of E would take part."""
  module = make(name)
  tokens = 200
  x = jax.random.normal(jax.random.key(1), (1, tokens, D))
  ids = jnp.arange(tokens, dtype=jnp.int32)[None]
  got = apply(module, nn.unbox(init(module)), x, True, noise=1, ids=ids)
  assert (np.asarray(got.count) > 0).all()
  routed = np.asarray(got.assignment.tokens(tokens))
  taken = np.unique(routed[np.asarray(got.assignment.expert) < E])
  assert taken.size > 0.6 * tokens


@pytest.mark.parametrize("train", [False, True])
@ALL
def test_without_chance_no_key_is_needed(name, train):
  module = make(name)
  params = random_params(module)
  run = functools.partial(apply, module, params, inputs(), train, mask=MASK)
  if train and name in BY_CHANCE:
    with pytest.raises(flax.errors.InvalidRngError):
      run()
  else:
    same(run(), run())


@pytest.mark.parametrize("epsilon", [1e-2, 0.5])
def test_noise_std_is_softplus_of_w_noise_plus_epsilon(epsilon):
  assert router.NoisyTopK(E, K).noise_epsilon == 1e-2
  module = router.NoisyTopK(E, K, noise_epsilon=epsilon)
  params = random_params(module)
  zeros = jax.tree.map(jnp.zeros_like, params)
  train = functools.partial(apply, module, x=inputs(), train=True)
  # From zeros: noise * (ln 2 + epsilon) and nothing else.
  noise, other = (
    np.asarray(train(zeros, noise=key).logits) / (np.log(2) + epsilon)
    for key in (1, 2)
  )
  assert (noise != other).all()
  x, w = np.asarray(inputs()), jax.tree.map(np.asarray, params)
  noise_std = np.logaddexp(0, x @ w["noise"]["kernel"]) + epsilon
  want = x @ w["gate"]["kernel"] + noise * noise_std
  got = train(params, noise=1).logits
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  bad = router.NoisyTopK(E, K, noise_epsilon=-epsilon)
  with pytest.raises(ValueError, match=r"noise_epsilon is -0\..*0 or more"):
    apply(bad, params, inputs(), train=True, noise=1)


@ALL
def test_logits_are_float32_under_bfloat16_activations(name):
  module = make(name)
  params = random_params(module)
  x = inputs().astype(jnp.bfloat16)
  got = apply(module, params, x, train=True, noise=1)
  numbers = got._replace(assignment=got.assignment.gate, k=None)
  for leaf in jax.tree.leaves(numbers):
    assert leaf.dtype == jnp.float32
  assert got.assignment.expert.dtype == jnp.int32
  # To the last bit: the activations alone were rounded.
  same(got, apply(module, params, x.astype(jnp.float32), train=True, noise=1))


def test_logits_are_multiplied_at_the_highest_precision():
  """A matrix unit would otherwise round float32 to bfloat16."""
  module = make("noisy_top_k")
  run = functools.partial(apply, module, train=True, noise=1)
  text = jax.jit(run).lower(random_params(module), inputs()).as_text()
  products = [line for line in text.split("\n") if "dot_general" in line]
  assert len(products) == 2
  assert all("HIGHEST, HIGHEST" in line for line in products)


def test_hash_needs_ids():
  module = make("hash")
  with pytest.raises(ValueError, match=f"over {E} experts.*pass ids="):
    apply(module, {}, inputs(), ids=None)


@pytest.mark.parametrize(
  "k, max_k, want", [(2, None, 4), (3, None, 5), (2, 1, 1)]
)
def test_balanced_bounds_the_experts_of_a_token(k, max_k, want):
  module = router.Balanced(E, k, max_k)
  params = random_params(module)
  params["log_thresholds"] = jnp.full(E, -100.0)
  got = apply(module, params, inputs())
  np.testing.assert_array_equal(got.count.sum(-1), [want * S] * G)


def test_balanced_over_the_batch():
  """Over what is the router's, eq. 19 and 20 being what they are."""
  module = router.Balanced(E, K, over="batch")
  params = random_params(module)
  got = apply(module, params, inputs(), train=True, mask=MASK)
  logits = inputs() @ params["gate"]["kernel"]
  want = gating.balanced(logits, K, MASK, "batch")
  same(got.count, want.count)
  assert (np.asarray(got.count[0]) != np.asarray(got.count[1])).any()
  same(
    apply(module, params, inputs()),
    apply(router.Balanced(E, K), params, inputs()),
  )
  for wrong, said in (
    ({"over": "bach"}, "over 'bach'; choose 'batch' or 'group'"),
    ({"group_factor": 0.9}, "group_factor is 0.9, .* 1 or more"),
  ):
    with pytest.raises(ValueError, match=said):
      apply(router.Balanced(E, K, **wrong), params, inputs(), train=True)


def learn(module, loss, rate, groups=1):
  """Descends one loss; returns counts in training, before and after."""
  x = jax.random.normal(jax.random.key(3), (groups, 60 // groups, D))
  params = random_params(module)

  def score(params):
    return loss(apply(module, params, x, train=True, ids=None))

  def step(params, _):
    slopes = jax.grad(score)(params)
    return jax.tree.map(lambda w, g: w - rate * g, params, slopes), None

  @jax.jit
  def run(params):
    learned, _ = jax.lax.scan(step, params, length=300)
    decisions = (
      apply(module, params, x, train=True, ids=None),
      apply(module, params, x, ids=None),
      apply(module, learned, x, ids=None),
    )
    return learned, [decision.count.sum(axis=0) for decision in decisions]

  learned, counts = run(params)
  # Neither loss says anything about the gating weights.
  same(learned["gate"], params["gate"])
  return np.asarray(counts)


@pytest.mark.parametrize("over", routing.SCOPES)
def test_thresholds_learn_to_be_balanced(over):
  """By eq. 20 the experts of inference become those of training."""
  module = router.Balanced(E, K, over=over)
  groups = 4 if over == "batch" else 1
  trained, before, after = learn(module, losses.threshold, 0.03, groups)
  np.testing.assert_array_equal(trained, [60 * K / E] * E)
  assert np.abs(before - trained).max() > 5
  assert np.abs(after - trained).max() <= 1


FOLLOWING = {
  "balanced": router.Balanced(E, K, E, learned_by="quantile"),
  "expert_threshold": router.ExpertThreshold(E, K, E),
  "sigmoid": router.Sigmoid(E, K, learned_by="quantile"),
}


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize(
  "tx, steps, most",
  [(optim.with_averages(optax.adamw(1.0)), 60, 3), (optax.adam(5e-3), 200, 6)],
  ids=["averages", "plain Adam"],
)
def test_quantiles_learn_to_balance(name, tx, steps, most):
  """In tens of steps at weight 0.2, and by an optimizer that knows of none."""
  module, share = FOLLOWING[name], 60 * K / E
  x = jax.random.normal(jax.random.key(3), (2, 30, D))
  params = random_params(module)

  def decide(learned, train):
    return apply(module, params | learned, x, train, ids=None)

  def score(learned):
    return losses.auxiliary(decide(learned, True), {"quantile": 0.2})[0]

  def step(carry, _):
    learned, state = carry
    updates, state = tx.update(jax.grad(score)(learned), state, learned)
    return (optax.apply_updates(learned, updates), state), None

  @jax.jit
  def run(learned):
    (after, _), _ = jax.lax.scan(
      step, (learned, tx.init(learned)), length=steps
    )
    return [decide(each, False).count.sum(axis=0) for each in (learned, after)]

  (at,) = params.keys() - {"gate"}
  # Optax counts in int32 and multiplies by float32.
  with jax.numpy_dtype_promotion("standard"):
    before, after = map(np.asarray, run({at: params[at]}))
  assert np.abs(before - share).max() > 8
  assert np.abs(after - share).max() <= most


def test_what_learns_by_a_loss_says_so():
  for module, said in (
    (router.Balanced(E, K, learned_by="bias"), "'bias'.*'threshold' or 'quan"),
    (router.Sigmoid(E, K, learned_by="sign"), "'sign'; .*'bias' or 'quantile'"),
    (
      router.Sigmoid(6, K, num_groups=3, max_groups=2, learned_by="quantile"),
      "'quantile', but .* 2 of 3 groups",
    ),
  ):
    with pytest.raises(ValueError, match=said):
      init(module)


def test_bias_learns_to_balance():
  """By its rule every expert gets its share, whatever the scores."""
  _, before, after = learn(make("sigmoid"), losses.bias, 0.005)
  assert np.abs(before - 60 * K / E).max() > 8
  assert np.abs(after - 60 * K / E).max() <= 3
