"""Evaluation: the same numbers however many rows are read at once."""

import functools

import jax
import numpy as np
import pytest

from moejax import experts, moe, router, sharding
from moejax.data import batches, packing, vocab
from moejax.models import layers, lstm_lm
from moejax.training import evaluators

L, D, E = 16, 8, 8
LINES = [f"{'so ' * (i % 9)}line {i} of many" for i in range(120)]
VOCABULARY = vocab.Vocabulary.build(LINES, min_count=1)
PAIRS = packing.Pairs(None, "train", None, LINES)
ROWS = packing.PackedRows(packing.tokenize(PAIRS, VOCABULARY), VOCABULARY, L)


@functools.cache
def model():
  mixture = moe.MoE(
    router.TopK(E, 2),
    experts.FeedForward(E, 8),
    group_size=L,
    eval_capacity_factor=0.8,
  )
  return lstm_lm.LSTMLM(len(VOCABULARY), D, (layers.LSTM(D), mixture))


@functools.cache
def parameters():
  """Large enough for every choice and every drop to tell."""
  batch = next(batches.eval_batches(ROWS, 8))
  init = functools.partial(model().init, jax.random.key(0), method="loss")
  boxed = jax.jit(init)(batch)["params"]
  return jax.tree.map(lambda w: 3 * w + 0.1, sharding.unbox(boxed))


@functools.cache
def evaluated(batch_size, devices=1):
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout, jax.devices()[:devices])
  run = evaluators.losses_of(model(), batch_size, layout, mesh)
  return run(parameters(), ROWS)


def test_all_at_once_drops_and_fills_up():
  whole = evaluated(len(ROWS) + 3)
  assert whole["words"] == ROWS.num_words
  assert whole["dropped_fraction"] > 0.05
  assert whole["loss"] == pytest.approx(np.log(whole["perplexity"]))


@pytest.mark.parametrize("batch_size, devices", [(8, 1), (8, 8), (40, 8)])
def test_rows_at_once_are_not_in_the_numbers(batch_size, devices):
  assert len(ROWS) % batch_size
  want, got = evaluated(len(ROWS) + 3), evaluated(batch_size, devices)
  for name in ("words", "loss", "perplexity", "dropped_fraction"):
    assert got[name] == pytest.approx(want[name], rel=1e-5), name


def test_rows_must_divide_over_the_devices():
  with pytest.raises(ValueError, match="12 entries, .*over 8 devices; .*micro"):
    evaluated(12, 8)
