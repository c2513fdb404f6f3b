"""Seconds of a collective on links, by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.planning import chips, network
from moejax.planning.collectives import Collective

SENT = 10**9


@dataclasses.dataclass(frozen=True)
class Device:
  """Of a chip that is not there only its place counts."""

  coords: tuple[int, ...]


def seconds(kind, name, shape=None, axes=("expert",)):
  chip, _, text = name.partition(":")
  sides = tuple(map(int, text.split("x")))
  devices = np.empty(sides, object)
  for place in np.ndindex(sides):
    # The compiler gives three coordinates, whatever the torus.
    devices[place] = Device((*place, 0)[:3])
  where = chips.Topology(name, [], chips.CHIPS[chip], sides, False)
  # The last side comes first, so that "data" is a part of it.
  grid = devices.T.reshape(shape or (1, devices.size, 1))
  mesh = jax.sharding.Mesh(grid, ("data", "expert", "model"))
  what = Collective(kind, "f32", 0, SENT, axes, 1, True)
  return network.seconds(what, where, mesh)


@pytest.mark.parametrize(
  "kind, name, links",
  [
    # Lines of four: each end has one link to the rest, along two sides.
    ("all-gather", "v5e:4x4", 2),
    # Rings: two links to the rest, along three sides, and along two.
    ("all-reduce", "v5p:4x4x8", 6),
    ("reduce-scatter", "v6e:16x16", 4),
    # One ring and one line.
    ("all-gather", "v5e:8x16", 3),
    # No cube, so no ring; a side of one has no links.
    ("all-gather", "v5p:2x2x1", 2),
    ("all-gather", "v4:4x4x2", 3),
    ("collective-permute", "v5p:4x4x8", 1),
    # Half of what 128 devices send goes to the other half of the longest side,
    # by two cuts of 4 x 4 links: 128 * 64 / 127 of it by 32.
    ("all-to-all", "v5p:4x4x8", 32 * 127 / (64 * 64)),
    ("ragged-all-to-all", "v5p:4x4x8", 32 * 127 / (64 * 64)),
    # One cut of 4 links, for 8 * 8 / 15 of what one device sends.
    ("all-to-all", "v5e:4x4", 4 * 15 / 64),
    # The line of 8 is slower than the ring of 16: one cut of 16 links.
    ("all-to-all", "v5e:8x16", 16 * 127 / (64 * 64)),
  ],
)
def test_all_chips_together(kind, name, links):
  rate = chips.CHIPS[name.partition(":")[0]].link_rate
  assert seconds(kind, name) == pytest.approx(SENT / (links * rate))


@pytest.mark.parametrize(
  "axes, links",
  [
    # Half of the last side, 4 x 4 x 4: only two sides are whole.
    (("expert",), 5),
    # Pairs that are four steps apart share the ring of eight among four.
    (("data",), 2 / 4),
    (("data", "expert"), 6),
    (None, 6),
  ],
)
def test_parts_of_a_torus(axes, links):
  got = seconds("all-gather", "v5p:4x4x8", (2, 64, 1), axes)
  assert got == pytest.approx(SENT / (links * chips.CHIPS["v5p"].link_rate))


@pytest.mark.parametrize(
  "between, rate",
  [
    # By 18 links of 25 GB/s.
    (0, 450e9),
    # Half of it at 50 GB/s, and the other half meanwhile.
    (SENT // 2, 100e9),
    # So much that both take as long.
    (SENT // 10, 500e9),
    (SENT // 100, 450e9 / 0.99),
  ],
)
def test_gpus_send_by_all_links_and_between_nodes(between, rate):
  where = chips.Topology("", [], chips.CHIPS["h100"], (2, 4), False)
  axes = ("expert",)
  what = Collective("all-to-all", "f32", 0, SENT, axes, 1, True, between)
  mesh = jax.sharding.Mesh(jax.devices(), "expert")
  assert network.seconds(what, where, mesh) == pytest.approx(SENT / rate)
