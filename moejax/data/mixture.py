"""Rows of several directions of translation as the rows of one corpus."""

from collections.abc import Sequence

import grain
import numpy as np

from moejax.data import translation

# Rows that change places with each other; that of a batch or of many.
_WINDOW = 1024


class Mixture:
  """The rows of several directions, of one after the other.

  In training, the share of a direction in all target words is proportional to
  its own words to the power of 1 / temperature: at 1 every row comes equally
  often, and above it small directions come more often.

  Attributes:
    row_length: target places of a row.
    num_words: real targets in all rows.
    unknown: 0, as word pieces spell all.
    digest: a short name that other rows would not have.
    shares: of the target words of training, by direction.
  """

  unknown = 0.0

  def __init__(
    self, parts: Sequence[translation.PackedPairs], temperature: float = 1.0
  ):
    """Takes rows of one shape.

    Raises:
      ValueError: there are none, or temperature is not above 0.
    """
    if not parts:
      raise ValueError("a mixture needs 1 direction or more, got 0")
    if not temperature > 0:
      raise ValueError(f"temperature must be above 0, got {temperature}")
    self._parts = tuple(parts)
    self.row_length = parts[0].row_length
    words = np.array([part.num_words for part in parts], np.float64)
    self.num_words = sum(part.num_words for part in parts)
    self.digest = translation.joined(part.digest for part in parts)
    powers = (words / words.max()) ** (1 / temperature)
    self.shares = tuple((powers / powers.sum()).tolist())
    self._lengths = np.array([len(part) for part in parts])
    self._words_of_row = words / self._lengths
    self._ends = np.cumsum(self._lengths)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    part = int(np.searchsorted(self._ends, row, side="right"))
    begin = int(self._ends[part] - self._lengths[part])
    return self._parts[part][row - begin]

  def padding(self) -> dict[str, np.ndarray]:
    """Returns a row without a real target, which fills up a batch."""
    return self._parts[0].padding()

  def order(self, seed: int) -> grain.MapDataset:
    """Mixes the orders of the directions, each endless."""
    *seeds, last = np.random.SeedSequence(seed).generate_state(
      len(self._parts) + 1
    )
    orders = [
      part.order(int(own)) for part, own in zip(self._parts, seeds, strict=True)
    ]
    if len(orders) == 1:
      return orders[0]
    weights = np.array(self.shares) / self._words_of_row
    mixed = grain.MapDataset.mix(orders, (weights / weights.sum()).tolist())
    # They take turns there: of two directions every other row, as one of two
    # microbatches is, would be of the same.
    return grain.experimental.WindowShuffleMapDataset(
      mixed, window_size=_WINDOW, seed=int(last) >> 1
    )
