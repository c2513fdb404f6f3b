"""Thresholds and biases that follow quantiles, through steps of training."""

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
import reference_losses

from moejax import experts, losses, moe, router, sharding
from moejax.models import layers, lstm_lm
from moejax.training import optim, state, step

pytestmark = pytest.mark.usefixtures("few_sizes")

# Few words, so that many tokens are one and the same, and tie.
B, L, D, V, E, K = 16, 4, 6, 5, 8, 3
RATE = 0.3
FOLLOW = {"learned_by": "quantile"}


def flat(gate):
  return moe.MoE(gate, experts.FeedForward(E, 4), L, None, None)


def two_levels():
  """Slots, some of them empty, at the second level."""
  primary = router.Sigmoid(4, 2, **FOLLOW)
  within = moe.MoE(router.ExpertThreshold(3, 1), experts.FeedForward(3, 4))
  return moe.HierarchicalMoE(primary, within, L)


MIXTURES = {
  "balanced": lambda: flat(router.Balanced(E, K, over="batch", **FOLLOW)),
  "expert threshold": lambda: flat(router.ExpertThreshold(E, K)),
  "sigmoid": lambda: flat(router.Sigmoid(E, K, **FOLLOW)),
  "two levels": two_levels,
}


def make_batch(seed):
  random = np.random.default_rng(seed)
  mask = np.arange(L) < random.integers(1, L + 1, (B, 1))
  words = random.integers(0, V, (2, B, L)).astype(np.int32) * mask
  start = np.arange(L)[None] == np.zeros((B, 1))
  return {
    "inputs": words[0],
    "targets": words[1],
    "mask": mask,
    "start": start,
  }


def make(name, dtype, devices, clip_norm=1e-3):
  """The model, its first state, and its optimizer, which clips nearly all."""
  net = lstm_lm.LSTMLM(V, D, (layers.LSTM(D), MIXTURES[name]()), dtype=dtype)
  schedule = optim.warmup_rsqrt(0.01, 10)
  tx = optim.adam(schedule, clip_norm=clip_norm)
  layout = sharding.LAYOUTS["data_expert" if devices > 1 else "replicated"]
  mesh = sharding.make_mesh(layout, jax.devices()[:devices])
  shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in BATCH.items()}
  first = state.create(net, tx, shapes, 0, layout, mesh)
  return net, first, tx, layout, mesh


BATCH = make_batch(0)


def train(name, dtype, devices, parts, over, steps=3):
  """Returns the model and its parameters before and after every step."""
  net, current, tx, layout, mesh = make(name, dtype, devices)
  fn = jax.jit(
    functools.partial(
      step.train_step,
      model=net,
      tx=tx,
      aux_weights={"quantile": RATE},
      seed=0,
      microbatches=parts,
      balance_over=over,
    ),
    out_shardings=(state.shardings(current), None),
  )
  rows, seen = sharding.batch_sharding(layout, mesh, B), []
  with sharding.use(layout, mesh):
    for i in range(steps):
      seen.append(jax.device_get(nn.unbox(current.params)))
      current, _ = fn(current, step.place(make_batch(i), rows))
  return net, [*seen, jax.device_get(nn.unbox(current.params))]


@functools.cache
def routed(net, parts):
  """Params, batch -> the decision about each microbatch."""

  def fn(params, batch):
    found = []
    for index in range(parts):
      part = {n: a[index::parts] for n, a in batch.items()}
      _, sown = net.apply(
        {"params": params}, part, train=True, mutable=["routing"], method="loss"
      )
      found += losses.routings(nn.unbox(sown))
    return found

  return jax.jit(fn)


def targets(levels, values):
  """What the loops aim at, of one level in some decisions; NaN for nothing."""
  P, E = values.shape
  aims = np.full((P, E), np.nan)
  for p in range(P):
    tokens = []
    for level in levels:
      logits = np.asarray(level.logits, np.float64).reshape(P, -1, E)
      tokens += [logits[p][np.asarray(level.mask).reshape(P, -1)[p]]]
    tokens, k = np.concatenate(tokens), int(levels[0].k[0])
    if len(tokens) and levels[0].bias is None:
      aims[p] = reference_losses.threshold_targets(tokens, k)
    elif len(tokens):
      aims[p] = reference_losses.bias_targets(tokens, values[p], k)
  return aims


def averages(params):
  """All that follow quantiles, [P, E] each, the upper level first."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return [
    np.atleast_2d(leaf).astype(np.float64)
    for path, leaf in leaves
    if "average" in jax.tree_util.keystr(path)
  ]


CASES = {
  "balanced": ("balanced", "float32", 1, "microbatch"),
  "expert threshold": ("expert threshold", "bfloat16", 2, "batch"),
  "sigmoid": ("sigmoid", "bfloat16", 2, "microbatch"),
  "two levels": ("two levels", "float32", 2, "microbatch"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_averages_as_the_loops_do(name):
  """Adam, its schedule, and clipping all gradients but these have no part."""
  mixture, dtype, parts, over = CASES[name]
  net, seen = train(mixture, dtype, 1, parts, over)
  for i, (before, after) in enumerate(itertools.pairwise(seen)):
    found = routed(net, parts)(before, make_batch(i))
    levels = [found]
    if found[0].primary is not None:
      levels = [[r.primary for r in found], found]
    ours, theirs = averages(before), averages(after)
    assert len(levels) == len(ours) == len(theirs)
    for level, value, got in zip(levels, ours, theirs, strict=True):
      each = [level] if over == "batch" else [[r] for r in level]
      moves = [np.nan_to_num(targets(r, value) - value) for r in each]
      want = value + RATE * np.mean(moves, axis=0)
      np.testing.assert_allclose(got, want, atol=1e-6)
      assert np.abs(want - value).max() > 1e-3


def test_eight_devices_move_them_as_one():
  runs = [
    train("two levels", "float32", n, 2, "batch", 2)[1][-1] for n in (1, 8)
  ]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, *runs)
