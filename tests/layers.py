"""Whole layers in training, with weights off their start and with drops."""

import flax.linen as nn
import gatings
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import reference

from moejax import losses, moe, router

G, D = 2, 2
# Groups of 8 tokens, and 4 slots, the least there are.
TOKENS, E, K = 8, 3, 2
SLOTS = 4
_RANDOM = np.random.default_rng(2)
# For the gating that has none of its own: its ids are made of them.
GIVEN = _RANDOM.normal(size=(G, TOKENS, E))
# What multiplies y in the score.
OUT = _RANDOM.normal(size=(G, TOKENS, D))
MASK = np.arange(TOKENS)[None] != np.array([[2], [TOKENS]])


def make(dispatcher, name, kind):
  """Makes the layer, all its random weights, and x."""
  choose = router.ROUTERS[name]
  has_k = "k" in choose.__dataclass_fields__
  layer = moe.MoE(
    choose(E, **({"k": K} if has_k else {})),
    kinds.case(kind).make(E),
    group_size=TOKENS,
    capacity_factor=0.5,
    dispatch=dispatcher,
  )
  random = np.random.default_rng(1)

  def init():
    x, ids = jnp.zeros((1, TOKENS, D)), jnp.zeros((1, TOKENS), jnp.int32)
    return nn.unbox(layer.init(jax.random.key(0), x, ids=ids)).get("params", {})

  at = {
    "x": jnp.asarray(random.normal(size=(G, TOKENS, D)) + 1, jnp.float32),
    "router": {},
    "experts": {},
    **jax.tree.map(
      lambda w: jnp.asarray(random.normal(size=w.shape), w.dtype),
      jax.eval_shape(init),
    ),
  }
  if "gate" in at["router"]:
    # The last expert is wanted by most tokens, and x is mostly positive.
    kernel = at["router"]["gate"]["kernel"]
    at["router"]["gate"]["kernel"] = kernel.at[:, -1].add(2)
  if "bias" in at["router"]:
    at["router"]["bias"] = jnp.asarray(gatings.bias(E))
  return layer, at


def decided(name, at, routing):
  """at -> the decisions of the loops, with the chance that `routing` had."""
  second = np.asarray(routing.assignment.expert)[:, TOKENS:] < E

  def logits_of(at):
    kernels = {
      key: w["kernel"]
      for key, w in at["router"].items()
      if key in ("gate", "noise")
    }
    logits = at["x"] @ kernels["gate"] if "gate" in kernels else GIVEN
    noise = at["x"] @ kernels["noise"] if "noise" in kernels else 0 * logits
    return logits, np.logaddexp(0, noise) + 1e-2

  logits, noise_std = logits_of(at)
  noise = gatings.noise_of(routing, logits, noise_std)

  def decide(at):
    logits, noise_std = logits_of(at)
    if name == "gshard_top_2":
      draws = np.where(second, 0, 2)
      return [
        reference.gshard_top_2(logits[g], draws[g], MASK[g]) for g in range(G)
      ]
    return gatings.decide(name, logits, noise, noise_std, MASK, K)

  return decide


def run(layer, at):
  """Returns y, the decision, and the gradient of sum(y * OUT)."""

  def score(at):
    at = dict(at)
    y, state = layer.apply(
      {"params": at},
      at.pop("x"),
      train=True,
      mask=jnp.asarray(MASK),
      ids=jnp.asarray(gatings.ids(GIVEN)),
      rngs={"router": jax.random.key(4)},
      mutable=["routing"],
    )
    return (y * jnp.asarray(OUT, y.dtype)).sum(), (y, state)

  fn = jax.jit(jax.value_and_grad(score, has_aux=True))
  (_, (y, state)), slopes = fn(at)
  (routing,) = losses.routings(state)
  return y, routing, slopes
