"""How long a collective takes on a torus, or on NVLink and between nodes.

An estimate: every link carries what the best known algorithm puts on it, at the
rate that its maker names, and nothing else.
"""

import jax
import numpy as np

from moejax.planning.chips import Topology
from moejax.planning.collectives import Collective


def seconds(
  collective: Collective, topology: Topology, mesh: jax.sharding.Mesh
) -> float:
  """Returns the seconds that one run of a collective takes.

  All but those named below send their bytes around rings along all sides of the
  torus at once (lines, where a side does not close). What goes from everybody
  to everybody is as slow as the links that the two halves of the longest side
  are joined by. Within a node each GPU sends by all its links, and at the same
  time to other nodes what `Collective.between_bytes` says.
  """
  chip, sent = topology.chip, collective.wire_bytes
  if not chip.axes:
    between = collective.between_bytes
    inside = (sent - between) / (chip.link_rate * chip.links)
    return max(inside, between / chip.gpu.network_rate)
  # One of the groups of devices that exchange.
  axes = mesh.axis_names if collective.axes is None else collective.axes
  group = mesh.devices[
    tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  ]
  places = np.array([device.coords for device in np.ravel(group)])
  counts, links = [], []
  for axis, side in enumerate(topology.sides):
    at = np.unique(places[:, axis])
    if at.size > 1:
      # So many groups share the links of this side.
      apart = (at[-1] - at[0]) / (at.size - 1)
      # In three dimensions all sides close to rings if the chips fill cubes,
      # else none. A ring of places apart goes all around as well.
      closes = topology.sides if chip.axes == 3 else (side,)
      is_ring = all(each % chip.wraps == 0 for each in closes)
      is_ring = is_ring and round(apart * at.size) == side
      counts.append(at.size)
      links.append((2 if is_ring else 1) / apart)
  if not links or collective.kind == "collective-permute":
    return sent / chip.link_rate
  if collective.kind.endswith("all-to-all"):
    # Half of the n devices send n/2 of their n - 1 parts to the other half, by
    # n / L links along a side of L: each of them carries this much.
    size = np.prod(counts)
    slowest = max(np.divide(counts, links))
    return sent * size * slowest / (4 * (size - 1)) / chip.link_rate
  return sent / (sum(links) * chip.link_rate)
