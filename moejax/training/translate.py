"""Translation of lines: batches of rows through a search, texts in order."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from moejax import sharding
from moejax.data import batches as batches_lib
from moejax.data.batches import SourceRows
from moejax.data.pieces import Pieces
from moejax.models import gnmt
from moejax.training import decode
from moejax.training.decode import Hypotheses

# A search of `moejax.training.decode` with its settings, as a function of
# (step_fn, memory, state, source_mask).
Search = Callable[..., Hypotheses]
# (params, batch) -> what was found for each of its rows.
Find = Callable[[Any, SourceRows], Hypotheses]


def finder(
  model: nn.Module,
  search: Search,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> Find:
  """Returns a function (params, batch) -> hypotheses of the batch's rows.

  It is compiled once for each shape of a batch. All processes give it the same
  batch, and each gets all hypotheses.

  Args:
    model: has the methods `encode`, `begin` and `step` of `gnmt.GNMT`. A
      translation depends on its own row alone if the model's mixtures drop
      nothing (`gnmt.for_decoding`).
    search: how pieces are chosen, such as
      functools.partial(decode.beam_search, start=1, end=2).
    layout: where arrays lie.
    mesh: of the devices.

  Raises:
    ValueError: when called, the rows do not divide over the devices.
  """

  def run(params, source, segment, source_start):
    apply = functools.partial(model.apply, {"params": params})
    memory = apply(source, segment, source_start, method="encode")
    state = apply(source.shape[0], method="begin")
    step = functools.partial(apply, method="step")
    return search(step, memory, state, segment > 0)

  whole = sharding.whole_sharding(mesh)

  @functools.partial(jax.jit, out_shardings=whole)
  def found(params, *source):
    return sharding.zero3(run)(params, *source)

  def translate(params, batch):
    where = sharding.batch_sharding(layout, mesh, len(batch.source))
    source = (
      jax.make_array_from_callback(rows.shape, where, rows.__getitem__)
      for rows in (batch.source, batch.source_segment, batch.source_start)
    )
    with sharding.use(layout, mesh):
      return found(params, *source)

  return translate


def lines(
  translate: Callable[[SourceRows], Hypotheses],
  batches: Iterable[SourceRows],
  num_lines: int,
  decode: Callable[[list[int]], str],
  advance: Callable[[int], object] = lambda rows: None,
) -> list[str]:
  """Translates rows, which may come in any order, to lines in order.

  Args:
    translate: finds the hypotheses of a batch; the best of each row is taken.
    batches: of rows; one of line -1 only fills up its batch.
    num_lines: how many there are. One without rows is translated as "".
    decode: turns ids into text; leaves `</s>` out.
    advance: is told after each batch how many rows of lines it had, to show
      how far the work is.

  Returns:
    A line of text for each, its parts in order with a space between.
  """
  texts: list[dict[int, str]] = [{} for _ in range(num_lines)]
  for batch in batches:
    found = jax.device_get(translate(batch))
    real = np.flatnonzero(batch.line >= 0)
    for row in real.tolist():
      ids = found.ids[row, 0, : found.lengths[row, 0]]
      # A model may write a line break, which must not make two lines of one.
      text = " ".join(decode(ids.tolist()).splitlines())
      texts[batch.line[row]][int(batch.part[row])] = text
    advance(len(real))
  return [" ".join(text for _, text in sorted(of.items())) for of in texts]


class Translator:
  """Translates lines of text by a model, whatever its parameters.

  It follows a number of hypotheses at once, whole beams, one for each device at
  the least.
  """

  def __init__(
    self,
    model: gnmt.GNMT,
    pieces: Pieces,
    source_length: int,
    hypotheses: int,
    layout: sharding.Layout,
    mesh: jax.sharding.Mesh,
    beam: int = 8,
    **search: Any,
  ):
    """Compiles nothing yet.

    Args:
      model: for the pieces.
      pieces: of both languages.
      source_length: pieces of a source; a longer line is cut (`batches.cut`).
      hypotheses: to follow at once, over all devices.
      layout: where arrays lie.
      mesh: of the devices.
      beam: hypotheses of each line.
      **search: how else to search, see `decode.beam_search`.

    Raises:
      ValueError: source_length or beam is too small, or the model cannot
        translate piece by piece (`gnmt.for_decoding`).
    """
    # Here, as else training would only fail when it first shows examples.
    batches_lib.check_length(source_length)
    decode.check_beam(beam)
    self._pieces, self._source_length = pieces, source_length
    each = -(-hypotheses // (beam * mesh.size))
    self._batch_size = each * mesh.size
    beam_search = functools.partial(
      decode.beam_search,
      start=pieces.start,
      end=pieces.end,
      beam=beam,
      **search,
    )
    self._find = finder(gnmt.for_decoding(model), beam_search, layout, mesh)

  def tag(self, language: str) -> int | None:
    """Returns what a source begins with to be translated into a language.

    Raises:
      ValueError: there are several languages, and it is none of them.
    """
    return self._pieces.tag(language) if self._pieces.languages else None

  def lines(
    self,
    params: Any,
    texts: Sequence[str],
    language: str,
    advance: Callable[[int], object] = lambda rows: None,
  ) -> list[str]:
    """Translates each line by itself, and keeps their order.

    Args:
      params: of the model.
      texts: lines. One without words becomes "".
      language: to translate into, where there are several.
      advance: see `lines`.

    Raises:
      ValueError: as `tag`.
    """
    batches = batches_lib.source_rows(
      self._pieces,
      texts,
      self._source_length,
      self._batch_size,
      self.tag(language),
    )
    return lines(
      functools.partial(self._find, params),
      batches,
      len(texts),
      self._pieces.decode,
      advance,
    )
