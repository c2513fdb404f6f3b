"""How long a compiled program takes, if all ran as fast as the maker says."""

from typing import NamedTuple

import jax

from moejax.planning import network
from moejax.planning.chips import Topology
from moejax.planning.collectives import Collective
from moejax.planning.work import Work

# Seconds that it takes to start a kernel, and a collective, as XLA's own model
# of a GPU has them (openxla/xla, gpu_performance_model_base.h).
KERNEL, COLLECTIVE = 1e-6, 5e-6


class Estimate(NamedTuple):
  """Seconds of a step, if every part ran as fast as the chip's maker says.

  Every instruction takes the time of its products or of its bytes, whichever is
  longer (a roofline); collectives and, on a GPU, starting kernels come on top,
  as if nothing ran beside them. What a scheduler overlaps makes it less; small
  products, short loops and waiting make it more.
  """

  matrix: float  # Of instructions that matrix units bound.
  memory: float  # Of those that memory bounds.
  network: float  # Of collectives.
  launches: float = 0.0  # Of starting a GPU's kernels.

  @property
  def seconds(self) -> float:
    """Of the step."""
    return sum(self)

  @property
  def bound(self) -> str:
    """Which of them takes longest."""
    return max(self._fields, key=lambda name: getattr(self, name))


def estimate(
  done: list[Work],
  found: list[Collective],
  topology: Topology,
  mesh: jax.sharding.Mesh,
) -> Estimate:
  """Adds up the seconds of instructions and of collectives."""
  matrix = memory = 0.0
  for each in done:
    by_product = each.flops / topology.chip.flops
    by_bytes = each.bytes / topology.chip.memory_rate
    if by_product > by_bytes:
      matrix += by_product
    else:
      memory += by_bytes
  exchanged = sum(
    network.seconds(each, topology, mesh) * each.times for each in found
  )
  launches = 0.0
  if topology.chip.gpu:
    launches = KERNEL * sum(each.launches for each in done)
    launches += (COLLECTIVE - KERNEL) * sum(each.times for each in found)
  return Estimate(matrix, memory, exchanged, launches)
