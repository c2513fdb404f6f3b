"""Lines through a model that repeats its source: all of them, in order."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.data.batches import SourceRows
from moejax.training import decode, translate

START, END, V = 1, 2, 16
WORDS = [f"w{i}" for i in range(V)]


class Repeats(nn.Module):
  """A model that writes a row's own pieces, its `</s>` last."""

  def setup(self):
    self.table = self.param("table", nn.initializers.zeros, (V, V))

  def encode(self, source, source_segment, source_start):
    return source, source_segment, source_start

  def begin(self, rows):
    return (jnp.zeros((rows, 1)),)

  def step(self, memory, state, ids):
    source, segment, source_start = memory
    place = state[0][:, 0].astype(jnp.int32)
    here = jnp.arange(source.shape[1])[None] == place[:, None]
    begun = (place > 0) | ((ids == START) & source_start[:, 0])
    piece = jnp.where(here & (segment > 0), source, 0).sum(1)
    logits = 5.0 * jax.nn.one_hot(jnp.where(begun, piece, 3), V)
    log_p = jax.nn.log_softmax(logits + self.table[ids])
    return (state[0] + 1,), log_p, here.astype(jnp.float32)


@functools.cache
def translator(search, layout_name):
  """Returns batch -> hypotheses, with parameters where the layout has them."""
  layout = sharding.LAYOUTS[layout_name]
  mesh = sharding.make_mesh(layout)
  params = {"table": jnp.zeros((V, V))}
  params = jax.device_put(params, sharding.shardings(params, layout, mesh))
  run = translate.finder(Repeats(), search, layout, mesh)
  return functools.partial(run, params)


SEARCH = functools.partial(decode.beam_search, start=START, end=END)
GREEDY, BEAM = (functools.partial(SEARCH, beam=beam) for beam in (1, 3))


def batch(rows, places, size=8):
  """A batch of (line, part of it, ids), filled up with empty rows."""
  shape = size, places
  source, segment = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  start = np.zeros(shape, np.bool_)
  start[:, 0] = True
  line, part = np.full(size, -1), np.zeros(size, np.int64)
  for row, (line[row], part[row], ids) in enumerate(rows):
    source[row, : len(ids) + 1] = [*ids, END]
    segment[row, : len(ids) + 1] = 1
    start[row, len(ids) + 1 : len(ids) + 2] = True
  return SourceRows(source, segment, start, line, part)


def text(ids):
  return " ".join(WORDS[i] for i in ids if i > END)


# Line 3 is empty, line 1 in three parts; longest first, as a reader may.
BATCHES = [
  batch([(1, 0, [5, 6, 7, 8, 9]), (4, 0, [3, 3, 4, 4, 5])], 8),
  batch([(1, 2, [11]), (0, 0, [4]), (2, 0, [10, 3]), (1, 1, [6, 5])], 4),
  batch([(5, 0, [7])], 4),
]
LINES = ["w4", "w5 w6 w7 w8 w9 w6 w5 w11", "w10 w3", "", "w3 w3 w4 w4 w5", "w7"]


@pytest.mark.parametrize(
  "search, layout",
  [(GREEDY, "replicated"), (GREEDY, "fsdp"), (BEAM, "expert")],
)
def test_every_line_comes_back_in_its_place(search, layout):
  run = translator(search, layout)
  done = []
  assert translate.lines(run, BATCHES, 6, text, done.append) == LINES
  assert done == [2, 4, 1]


def test_a_shape_is_compiled_once(caplog):
  run = translator(GREEDY, "expert")
  for each in BATCHES[:2]:
    run(each)
  with jax.log_compiles(), caplog.at_level("WARNING"):
    run(BATCHES[2])
    assert "Compiling" not in caplog.text
    run(batch([(0, 0, [7])], 5))
    assert "Compiling" in caplog.text


def test_a_line_break_makes_no_new_line():
  run = translator(GREEDY, "expert")
  found = translate.lines(run, BATCHES, 6, lambda ids: f"a\n{len(ids)}\r\nb")
  assert found[0] == "a 2 b"
  assert found[3] == ""


def test_all_devices_get_all_hypotheses():
  found = translator(BEAM, "expert")(BATCHES[0])
  assert found.ids.sharding.is_fully_replicated
  assert len(found.ids.sharding.device_set) == 8


def test_rows_must_divide_over_the_devices():
  run = translator(GREEDY, "expert")
  with pytest.raises(ValueError, match="7 entries, .*over 8 devices"):
    run(batch([], 4, size=7))
