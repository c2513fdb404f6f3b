"""How long a collective takes on the links of a torus, or through a switch.

An estimate: every link carries what the best known way of its kind puts on it,
at the rate that its maker names, and nothing else.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moejax.planning.chips import Chip, Topology
from moejax.planning.collectives import Collective


class _Line(NamedTuple):
  """How a group of devices lies along one side of the torus.

  Attributes:
    count: of the group's places there, above 1.
    apart: steps from one to the next; so many groups share the links.
    is_ring: whether the last is the neighbour of the first.
  """

  count: int
  apart: float
  is_ring: bool

  @property
  def ways(self) -> float:
    """Links of each place that carry for the group, one way each."""
    return (2 if self.is_ring else 1) / self.apart


def seconds(
  collective: Collective, topology: Topology, mesh: jax.sharding.Mesh
) -> float:
  """Returns the seconds that one run of a collective takes.

  All but those named below send their bytes around rings along all sides of the
  torus at once (lines, where a side does not close). What goes from everybody
  to everybody is as slow as the links that the two halves of the longest side
  are joined by. Through a switch each sends by all its links.

  Args:
    collective: with the bytes that a device sends.
    topology: whose chip is known.
    mesh: that the program was compiled for.
  """
  chip = topology.chip
  sent = collective.wire_bytes
  if not chip.axes:
    return sent / (chip.link_rate * chip.links)
  lines = _lines(_group(collective, mesh), topology)
  if not lines or collective.kind == "collective-permute":
    return sent / chip.link_rate
  if collective.kind.endswith("all-to-all"):
    # Half of the n devices send n/2 of their n - 1 parts to the other half, by
    # n / L ways along a side of L: each of them carries this much.
    size = np.prod([line.count for line in lines])
    slowest = max(line.count / line.ways for line in lines)
    return sent * size * slowest / (4 * (size - 1)) / chip.link_rate
  return sent / (sum(line.ways for line in lines) * chip.link_rate)


def _group(collective: Collective, mesh: jax.sharding.Mesh) -> list[jax.Device]:
  """Returns one of the groups of devices that talk."""
  axes = mesh.axis_names if collective.axes is None else collective.axes
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  return np.asarray(mesh.devices[index]).flatten().tolist()


def _lines(group: Sequence[jax.Device], topology: Topology) -> list[_Line]:
  """Returns how a group lies along every side that it spans."""
  places = np.array([device.coords for device in group])
  lines = []
  for axis, side in enumerate(topology.sides):
    at = np.unique(places[:, axis])
    if at.size > 1:
      apart = (at[-1] - at[0]) / (at.size - 1)
      # A ring of places apart goes all the way round as well.
      closes = _closes(topology.chip, topology.sides, axis)
      lines.append(
        _Line(at.size, apart, closes and round(apart * at.size) == side)
      )
  return lines


def _closes(chip: Chip, sides: Sequence[int], axis: int) -> bool:
  """Says whether a side of the torus closes to a ring.

  In three dimensions all sides do if the chips fill cubes, else none.
  """
  of = sides if chip.axes == 3 else sides[axis : axis + 1]
  return all(side % chip.wraps == 0 for side in of)
