"""Lines through a model that repeats its source: all of them, in order."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.data.batches import SourceRows
from moejax.data.pieces import Pieces
from moejax.training.evaluators import Translator
from moejax.training.session import Session

START, END, V = 1, 2, 32
LETTERS = " abcdefghijklmnopqrst"


class Repeats(nn.Module):
  """A model that writes a row's own pieces, its `</s>` last."""

  def setup(self):
    self.table = self.param("table", nn.initializers.zeros, (V, V))

  def for_decoding(self):
    return self

  def encode(self, source, source_segment, source_start):
    return source, source_segment, source_start

  def begin(self, rows, length):
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


class Letters(Pieces):
  """A piece for each letter."""

  start, end, languages = START, END, ()

  def __init__(self):
    pass

  def encode(self, text):
    return [LETTERS.index(letter) + 3 for letter in text]

  def decode(self, ids):
    return "".join(LETTERS[i - 3] for i in ids if i > END)


# One without words, and one of two parts, of which the shorter comes first.
TEXTS = ["ab", 2 * "abc def ghi jkl mno ", "  ", "t", "a bc", "def"]


@functools.cache
def translator(layout_name, beam):
  """The translator of a layout, and parameters where the layout has them."""
  layout = sharding.LAYOUTS[layout_name]
  mesh = sharding.make_mesh(layout)
  params = {"table": jnp.zeros((V, V))}
  params = jax.device_put(params, sharding.shardings(params, layout, mesh))
  about = types.SimpleNamespace(rows_at_once=8)
  shapes = {"source": jax.ShapeDtypeStruct((8, 32), jnp.int32)}
  built = Session(about, Repeats(), None, layout, mesh, None, shapes, None)
  return Translator(built, Letters(), beam), params


@pytest.mark.parametrize("layout, beam", [("fsdp", 1), ("expert", 3)])
def test_every_line_comes_back_in_its_place(layout, beam):
  run, params = translator(layout, beam)
  done = []
  found = run.lines(params, TEXTS, "", done.append)
  assert found == [" ".join(text.split()) for text in TEXTS]
  # As many rows as there are parts of lines, at most eight at once.
  assert sum(done) == 6 and max(done) <= 8


def test_a_line_break_makes_no_new_line(monkeypatch):
  run, params = translator("fsdp", 1)
  monkeypatch.setattr(
    Letters, "decode", lambda self, ids: f"a\n{len(ids)}\r\nb"
  )
  assert run.lines(params, ["ab", ""], "") == ["a 3 b", ""]


def test_all_devices_get_all_hypotheses_of_a_program_compiled_once(caplog):
  run, params = translator("expert", 3)
  rows = np.zeros((8, 16), np.int32)
  start = rows.astype(bool)
  batch = SourceRows(rows, rows, start, np.arange(8), np.zeros(8, int))
  found = run.find(params, batch)
  assert found.ids.sharding.is_fully_replicated
  assert len(found.ids.sharding.device_set) == 8
  with jax.log_compiles(), caplog.at_level("WARNING"):
    run.find(params, batch)
    assert "Compiling" not in caplog.text
