"""bfloat16 activations, and hidden layers that are computed again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config_fields, losses
from moejax.models.build import MODELS

# All different, so that a shape tells what an array is.
B, L, D, F, E, V, P = 4, 9, 10, 14, 6, 50, 18
MOE = {
  "num_experts": E,
  "router": {"kind": "noisy_top_k", "k": 2},
  # No kink: rounding would put some units on its other side.
  "experts": {"kind": "feed_forward", "hidden": F, "activation": "silu"},
}
RNGS = {name: jax.random.key(0) for name in ("params", "router", "softmax")}


def build(dtype="float32", **options):
  """A config's model."""
  model = {
    "kind": "lstm_lm",
    "width": D,
    "layers": ("lstm", "moe"),
    "dtype": dtype,
    "moe": MOE,
  }
  section = model | options
  return config_fields.build(MODELS, section, "config.model", vocab_size=V)


def batch():
  words = np.random.default_rng(0).integers(0, V, (B, L), dtype=np.int32)
  start = np.zeros((B, L), bool)
  start[:, 0] = True
  batch = {
    "inputs": words,
    "targets": (7 * words + 1) % V,
    "mask": np.arange(L) < np.array([L, L, L - 3, L])[:, None],
    "start": start,
  }
  return {name: jnp.asarray(value) for name, value in batch.items()}


def parameters(model):
  return nn.unbox(model.init(RNGS, batch(), method="loss")["params"])


def loss(params, model):
  value, sown = model.apply(
    {"params": params},
    batch(),
    train=True,
    rngs=RNGS,
    mutable=["routing"],
    method="loss",
  )
  auxiliary, _ = losses.auxiliary(sown, {"importance": 0.1, "load": 0.1})
  return value.mean() + auxiliary


@pytest.mark.parametrize("num_samples", [0, P])
def test_one_step_in_bfloat16_is_that_in_float32_but_for_rounding(num_samples):
  models = [build(d, num_samples=num_samples) for d in ("float32", "bfloat16")]
  params = jax.jit(lambda: parameters(models[0]))()
  (wide, exact), (narrow, rounded) = (
    jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))(params)
    for model in models
  )
  assert narrow.dtype == jnp.float32 and narrow != wide
  np.testing.assert_allclose(narrow, wide, rtol=2**-8)

  def check(path, got, want):
    assert got.dtype == jnp.float32
    far = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert far < 0.02, jax.tree_util.keystr(path)

  jax.tree.map_with_path(check, rounded, exact)


TWO_LEVELS = {
  "num_experts": 2 * E,
  "num_groups": 2,
  "primary": {"kind": "top_k", "k": 2},
  "secondary": {"router": MOE["router"], "experts": MOE["experts"]},
}


def hidden(recompute, section):
  """Shapes with F hidden units that a config's backward pass is given."""
  again = {"recompute": recompute}
  if section == "moe":
    layer = MOE | {"dispatch": "gather"} | again
  else:
    layer = TWO_LEVELS | {"secondary": TWO_LEVELS["secondary"] | again}
  model = build(layers=(section,), **{section: layer})
  params = jax.eval_shape(lambda: parameters(model))
  saved = jax.eval_shape(
    lambda params: jax.tree.leaves(
      jax.vjp(functools.partial(loss, model=model), params)[1]
    ),
    params,
  )
  weights = {leaf.shape for leaf in jax.tree.leaves(params)}
  return [
    leaf.shape
    for leaf in saved
    if leaf.shape[-1:] == (F,) and leaf.shape not in weights
  ]


@pytest.mark.parametrize("section", ["moe", "hierarchical_moe"])
def test_a_config_may_ask_to_recompute_hidden_layers(section):
  assert hidden(False, section) and not hidden(True, section)
