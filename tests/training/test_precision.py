"""bfloat16 activations, and hidden layers that are computed again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from ml_collections import ConfigDict

from moejax import config as config_lib
from moejax import losses
from moejax.models.softmax import Softmax
from moejax.training import state, step

# All different, so that a shape tells what an array is.
B, L, D, F, E, V, P = 4, 9, 10, 14, 6, 50, 18
MOE = {
  "num_experts": E,
  "router": {"kind": "noisy_top_k", "k": 2},
  # No kink: rounding would put some units on its other side.
  "experts": {"kind": "feed_forward", "hidden": F, "activation": "silu"},
}


def build(dtype, dispatch="gather", **options):
  """A config's model."""
  model = {
    "kind": "lstm_lm",
    "width": D,
    "layers": ("lstm", "moe"),
    "dtype": dtype,
    "moe": MOE | {"dispatch": dispatch},
  }
  return config_lib.model(ConfigDict({"model": model | options}), V)


def batch_of(seed=0):
  """Rows in which a word says which one is next."""
  words = np.random.default_rng(seed).integers(0, V, (B, L), dtype=np.int32)
  start = np.zeros((B, L), bool)
  start[:, 0] = True
  batch = {
    "inputs": words,
    "targets": (7 * words + 1) % V,
    "mask": np.arange(L) < np.array([L, L, L - 3, L])[:, None],
    "start": start,
  }
  return {name: jnp.asarray(value) for name, value in batch.items()}


@functools.cache
def draw():
  """Parameters of a model, whatever its precision."""
  init = jax.jit(lambda: build("float32").init(KEY, batch_of(), method="loss"))
  return nn.unbox(init()["params"])


KEY = jax.random.key(0)
RNGS = {name: KEY for name in ("router", "softmax")}


def loss(params, model):
  value, sown = model.apply(
    {"params": params},
    batch_of(),
    train=True,
    rngs=RNGS,
    mutable=["routing"],
    method="loss",
  )
  auxiliary, _ = losses.auxiliary(sown, {"importance": 0.1, "load": 0.1})
  return value.mean() + auxiliary


def equations(jaxpr):
  """Yields those of a program, and of all that it calls."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=is_program
    ):
      if is_program(inner):
        yield from equations(getattr(inner, "jaxpr", inner))


def is_program(value):
  return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


@functools.cache
def program(dispatch, num_samples):
  """All equations of a gradient with bfloat16 activations."""
  model = build("bfloat16", dispatch, num_samples=num_samples)
  slope = jax.make_jaxpr(jax.grad(functools.partial(loss, model=model)))
  return list(equations(slope(draw()).jaxpr))


def operands(equation):
  """Dtypes of what goes in, and all sizes of their axes."""
  values = [value.aval for value in equation.invars]
  dtypes = {str(value.dtype) for value in values}
  return dtypes, {size for value in values for size in value.shape}


ALL = pytest.mark.parametrize(
  "dispatch, num_samples",
  [("einsum", 0), ("gather", P), ("ragged", 0), ("ragged", P)],
)


@ALL
def test_only_routers_multiply_in_float32(dispatch, num_samples):
  products = [
    operands(equation)
    for equation in program(dispatch, num_samples)
    if equation.primitive.name == "dot_general"
  ]
  # Two kernels, and of each the gradient; that of x too.
  router = [sizes for dtypes, sizes in products if "float32" in dtypes]
  assert router == 6 * [{B * L, D, E}]
  narrow = [sizes for dtypes, sizes in products if dtypes == {"bfloat16"}]
  assert len(narrow) + len(router) == len(products)
  for size in (4 * D, F, num_samples or V):
    assert sum(size in sizes for sizes in narrow) >= 3


@ALL
def test_statistics_are_of_float32(dispatch, num_samples):
  """Those of the softmax, and of the router."""
  seen = set()
  for equation in program(dispatch, num_samples):
    name = equation.primitive.name
    if name in ("exp", "log", "erf", "reduce_max", "cumsum", "top_k"):
      dtypes, sizes = operands(equation)
      assert "bfloat16" not in dtypes
      seen |= {(name, size) for size in sizes}
  assert {("exp", num_samples or V), ("erf", E), ("top_k", E)} <= seen


def test_scores_are_sums_in_float32():
  head = Softmax(V, D)
  h, table = (
    jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
    for shape in ((B, L, D), (V, D))
  )
  params = {"table": table.astype(jnp.float32)}
  scores = head.apply({"params": params}, h, method="logits")
  want = np.float64(h) @ np.float64(table).T
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_samples", [0, P])
def test_one_step_in_bfloat16_is_that_in_float32_but_for_rounding(num_samples):
  (wide, exact), (narrow, rounded) = (
    jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))(draw())
    for model in (
      build(dtype, num_samples=num_samples) for dtype in ("float32", "bfloat16")
    )
  )
  assert narrow.dtype == jnp.float32 and narrow != wide
  np.testing.assert_allclose(narrow, wide, rtol=2**-8)

  def check(path, got, want):
    assert got.dtype == jnp.float32
    far = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert far < 0.02, jax.tree_util.keystr(path)

  jax.tree.map_with_path(check, rounded, exact)


def train(dtype, steps=30):
  """Losses of a short training."""
  model = build(dtype)
  tx = config_lib.optimizer(
    ConfigDict(
      {"optimizer": {"kind": "factored_adam", "peak": 5e-2, "warmup_steps": 5}}
    )
  )[1]
  step_fn = jax.jit(
    functools.partial(
      step.train_step, model=model, tx=tx, aux_weights={"load": 0.1}, seed=0
    )
  )
  current = state.TrainState(jnp.int32(0), draw(), tx.init(draw()))
  curve = []
  for i in range(steps):
    current, metrics = step_fn(current, batch_of(i))
    curve.append(float(metrics["loss"]))
  assert {leaf.dtype for leaf in jax.tree.leaves(current.params)} == {
    jnp.dtype("float32")
  }
  return np.array(curve)


def test_training_goes_down_alike():
  wide, narrow = train("float32"), train("bfloat16")
  assert wide[-3:].mean() < 0.7 * wide[:3].mean()
  np.testing.assert_allclose(narrow, wide, rtol=0.05)


def test_an_unknown_precision_names_the_known():
  with pytest.raises(ValueError, match=r"model\.dtype is 'bf16'; .*'bfloat16'"):
    build("bf16")


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
  model = build("float32", layers=(section,), **{section: layer})
  params = jax.eval_shape(
    lambda: nn.unbox(model.init(KEY, batch_of(), method="loss"))["params"]
  )
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
