"""Translation of lines: batches of rows through a search, texts in order."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from moejax import placement, sharding
from moejax.training.decode import Hypotheses

# A search of `moejax.training.decode` with its settings, as a function of
# (step_fn, memory, state, source_mask).
Search = Callable[..., Hypotheses]
# A batch of `data.sources`: arrays source, source_segment, source_start [N, M];
# the line each row belongs to and which part of it the row is, both [N].
SourceRows = Any
# (params, batch) -> what was found for each of its rows.
Translator = Callable[[Any, SourceRows], Hypotheses]


def translator(
  model: nn.Module,
  search: Search,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> Translator:
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

  whole = placement.whole_sharding(mesh)

  @functools.partial(jax.jit, out_shardings=whole)
  def found(params, *source):
    return placement.gathered(run)(params, *source)

  def translate(params, batch):
    where = placement.batch_sharding(layout, mesh, len(batch.source))
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
