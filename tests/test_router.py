"""Routers: their weights, their noise, their precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating, router

G, S, D, E, K = 2, 4, 3, 5, 2

MAKE = {
  "softmax": lambda: router.Softmax(E),
  "top_k": lambda: router.TopK(E, K),
  "noisy_top_k": lambda: router.NoisyTopK(E, K),
}


def make(name):
  if name not in MAKE:
    pytest.fail(
      f"router.ROUTERS[{name!r}] is not tested: add how it is made to MAKE"
      " of tests/test_router.py"
    )
  assert isinstance(MAKE[name](), router.ROUTERS[name])
  return MAKE[name]()


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (G, S, D))


def init(module, train=False):
  rngs = {"params": jax.random.key(0), "router": jax.random.key(9)}
  return module.init(rngs, inputs(), train=train)["params"]


def random_params(module):
  """Params other than zero, so that every matrix shows in the output."""
  params = nn.unbox(init(module))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  return tree.unflatten(
    [jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
  )


def apply(module, params, x, train=False, noise=None, mask=None):
  rngs = {} if noise is None else {"router": jax.random.key(noise)}
  return module.apply({"params": params}, x, train=train, mask=mask, rngs=rngs)


def same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", router.ROUTERS)
def test_parameters_do_not_depend_on_train(name):
  module = make(name)
  same(init(module, train=True), init(module, train=False))


@pytest.mark.parametrize("name", ["softmax", "noisy_top_k"])
def test_gating_weights_start_at_zero(name):
  params = nn.unbox(init(make(name)))
  for leaf in jax.tree.leaves(params):
    assert leaf.shape == (D, E) and (np.asarray(leaf) == 0).all()
  assert len(params) == (2 if name == "noisy_top_k" else 1)


def test_top_k_does_not_start_with_all_tokens_on_the_first_experts():
  module = make("top_k")
  x = jax.random.normal(jax.random.key(1), (1, 200, D))
  got = apply(module, nn.unbox(init(module)), x)
  assert (np.asarray(got.count) > 0).all()


@pytest.mark.parametrize("name", router.ROUTERS)
def test_evaluation_is_the_clean_gating(name):
  """Deterministic, and without a key for noise."""
  module = make(name)
  params = random_params(module)
  logits = inputs() @ params["gate"]["kernel"]
  mask = jnp.asarray(np.arange(G * S).reshape(G, S) % 3 > 0)
  k = E if name == "softmax" else K
  want = gating.top_k(logits, k, mask)
  got = apply(module, params, inputs(), mask=mask)
  np.testing.assert_array_equal(got.assignment.expert, want.assignment.expert)
  np.testing.assert_allclose(
    got.assignment.gate, want.assignment.gate, atol=1e-6
  )
  same(got, apply(module, params, inputs(), mask=mask))


@pytest.mark.parametrize("name", ["softmax", "top_k"])
def test_routers_without_noise_train_as_they_evaluate(name):
  module = make(name)
  params = random_params(module)
  same(
    apply(module, params, inputs(), train=True),
    apply(module, params, inputs(), train=False),
  )


def test_training_noise_follows_the_key():
  module = make("noisy_top_k")
  params = random_params(module)
  first = apply(module, params, inputs(), train=True, noise=1)
  same(first, apply(module, params, inputs(), train=True, noise=1))
  second = apply(module, params, inputs(), train=True, noise=2)
  assert (np.asarray(first.logits) != np.asarray(second.logits)).all()


def test_padding_is_masked_in_training():
  module = make("noisy_top_k")
  params = random_params(module)
  mask = jnp.asarray(np.arange(G * S).reshape(G, S) % 3 > 0)
  got = apply(module, params, inputs(), train=True, noise=1, mask=mask)
  np.testing.assert_array_equal(got.count.sum(-1), K * np.asarray(mask).sum(-1))
  unmasked = apply(module, params, inputs(), train=True, noise=1)
  assert (np.asarray(got.load) <= np.asarray(unmasked.load)).all()
  assert got.load.sum() < 0.9 * unmasked.load.sum()


@pytest.mark.parametrize("epsilon", [1e-2, 0.5])
def test_noise_std_is_softplus_of_w_noise_plus_epsilon(epsilon):
  module = router.NoisyTopK(E, K, noise_epsilon=epsilon)
  params = random_params(module)
  zeros = jax.tree.map(jnp.zeros_like, params)
  # From zeros: noise * (ln 2 + epsilon) and nothing else.
  at_zero = apply(module, zeros, inputs(), train=True, noise=1).logits
  noise = np.asarray(at_zero) / (np.log(2) + epsilon)
  x, w = np.asarray(inputs()), jax.tree.map(np.asarray, params)
  noise_std = np.logaddexp(0, x @ w["noise"]["kernel"]) + epsilon
  np.testing.assert_allclose(
    apply(module, params, inputs(), train=True, noise=1).logits,
    x @ w["gate"]["kernel"] + noise * noise_std,
    rtol=1e-4,
    atol=1e-4,
  )


def test_default_noise_epsilon_is_that_of_the_authors_code():
  assert router.NoisyTopK(E, K).noise_epsilon == 1e-2


@pytest.mark.parametrize("name", router.ROUTERS)
def test_logits_are_float32_under_bfloat16_activations(name):
  module = make(name)
  params = random_params(module)
  x = inputs().astype(jnp.bfloat16)
  got = apply(module, params, x, train=True, noise=1)
  for leaf in jax.tree.leaves(got._replace(assignment=got.assignment.gate)):
    assert leaf.dtype == jnp.float32
  assert got.assignment.expert.dtype == jnp.int32
  # To the last bit: the activations alone were rounded.
  same(got, apply(module, params, x.astype(jnp.float32), train=True, noise=1))


@pytest.mark.parametrize("name", router.ROUTERS)
def test_logits_are_multiplied_at_the_highest_precision(name):
  """A matrix unit would otherwise round float32 to bfloat16."""
  module = make(name)
  params = random_params(module)

  def run(params, x):
    return apply(module, params, x, train=True, noise=1).logits

  dots = [
    line
    for line in str(jax.make_jaxpr(run)(params, inputs())).split("\n")
    if "dot_general" in line or "precision" in line
  ]
  products = sum("dot_general" in line for line in dots)
  precisions = [line for line in dots if "precision" in line]
  assert products == len(params) == len(precisions)
  assert all(line.count("HIGHEST") == 2 for line in precisions)


def test_both_matrices_learn_from_zero():
  """Through the gates, and through the load (app. A)."""
  module = make("noisy_top_k")
  params = jax.tree.map(jnp.zeros_like, random_params(module))

  def load(params):
    got = apply(module, params, inputs(), train=True, noise=1)
    return (got.load * jnp.arange(E, dtype=jnp.float32)[None]).sum()

  def gates(params):
    got = apply(module, params, inputs(), train=True, noise=1)
    return (got.assignment.gate**2).sum()

  for score in (load, gates):
    slopes = jax.grad(score)(params)
    for name in ("gate", "noise"):
      assert (np.abs(slopes[name]["kernel"]) > 1e-4).any()
