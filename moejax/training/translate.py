"""Translation of lines: batches of rows through beam search, texts in order."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from moejax import sharding
from moejax.data import batches
from moejax.data.batches import SourceRows
from moejax.data.pieces import Pieces
from moejax.training import decode
from moejax.training.decode import Hypotheses


class Translator:
  """Translates lines of text by a model, whatever its parameters.

  All processes give it the same lines, and each gets all of them.
  """

  def __init__(
    self,
    model: nn.Module,
    pieces: Pieces,
    source_length: int,
    hypotheses: int,
    layout: sharding.Layout,
    mesh: jax.sharding.Mesh,
    beam: int = 8,
    **search: Any,
  ):
    """Compiles nothing yet; ValueError for a source_length or beam too small.

    Args:
      model: has the methods `encode`, `begin` and `step` of `gnmt.GNMT`. A
        translation depends on its own line alone if the model's mixtures drop
        nothing (`gnmt.for_decoding`).
      pieces: of both languages.
      source_length: pieces of a source; a longer line is cut (`batches.cut`).
      hypotheses: to follow at once over all devices, in whole beams.
      layout, mesh: where arrays lie.
      beam: hypotheses of each line.
      **search: how else to search, see `decode.beam_search`.
    """
    # Here, as else training would only fail when it first shows examples.
    batches.check_length(source_length)
    decode.check_beam(beam)
    self._pieces, self._source_length = pieces, source_length
    self._layout, self._mesh = layout, mesh
    # Whole beams on each device.
    self._batch_size = -(-hypotheses // (beam * mesh.size)) * mesh.size
    beam_search = functools.partial(
      decode.beam_search,
      start=pieces.start,
      end=pieces.end,
      beam=beam,
      **search,
    )

    @sharding.zero3
    def run(params, source, segment, source_start):
      apply = functools.partial(model.apply, {"params": params})
      memory = apply(source, segment, source_start, method="encode")
      state = apply(source.shape[0], method="begin")
      step = functools.partial(apply, method="step")
      return beam_search(step, memory, state, segment > 0)

    # Compiled once for each shape of a batch.
    self._run = jax.jit(run, out_shardings=sharding.whole_sharding(mesh))

  def tag(self, language: str) -> int | None:
    """Returns what a source begins with to be translated into a language.

    ValueError where there are several languages, and it is none of them.
    """
    return self._pieces.tag(language) if self._pieces.languages else None

  def find(self, params: Any, batch: SourceRows) -> Hypotheses:
    """Returns the hypotheses of each row, on all devices."""
    where = sharding.batch_sharding(self._layout, self._mesh, len(batch.source))
    source = (
      jax.make_array_from_callback(rows.shape, where, rows.__getitem__)
      for rows in (batch.source, batch.source_segment, batch.source_start)
    )
    with sharding.use(self._layout, self._mesh):
      return self._run(params, *source)

  def lines(
    self,
    params: Any,
    texts: Sequence[str],
    language: str,
    advance: Callable[[int], object] = lambda rows: None,
  ) -> list[str]:
    """Translates each line by itself, and keeps their order; errors as `tag`.

    Args:
      params: of the model.
      texts: lines. One without words becomes "".
      language: to translate into, where there are several.
      advance: is told after each batch how many parts of lines it had.
    """
    # Of each line its parts, which may come in any order.
    found: list[dict[int, str]] = [{} for _ in texts]
    for batch in batches.source_rows(
      self._pieces,
      texts,
      self._source_length,
      self._batch_size,
      self.tag(language),
    ):
      best = jax.device_get(self.find(params, batch))
      real = np.flatnonzero(batch.line >= 0).tolist()
      for row in real:
        ids = best.ids[row, 0, : best.lengths[row, 0]].tolist()
        # A model may write a line break, which must not make two lines of one.
        text = " ".join(self._pieces.decode(ids).splitlines())
        found[batch.line[row]][int(batch.part[row])] = text
      advance(len(real))
    return [" ".join(text for _, text in sorted(of.items())) for of in found]
