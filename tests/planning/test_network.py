"""Seconds of a collective on links, by hand."""

import jax
import pytest
import topology

from moejax import sharding
from moejax.planning import chips, network
from moejax.planning.collectives import Collective

SENT = 10**9
EXPERT = sharding.LAYOUTS["expert"]


def seconds(kind, name, layout=EXPERT, axes=("expert",)):
  topology.chips()  # or skip
  where = chips.find(name)
  mesh = sharding.make_mesh(layout, where.devices)
  what = Collective(kind, "f32", SENT, SENT, axes, 1, True)
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
    ("collective-permute", "v5p:4x4x8", 1),
    # Half of what 128 devices send goes to the other half of the longest side,
    # by two cuts of 4 x 4 links: 128 * 64 / 127 of it by 32.
    ("all-to-all", "v5p:4x4x8", 32 * 127 / (64 * 64)),
    ("ragged-all-to-all", "v5p:4x4x8", 32 * 127 / (64 * 64)),
    # One cut of 4 links, for 8 * 8 / 15 of what one device sends.
    ("all-to-all", "v5e:4x4", 4 * 15 / 64),
  ],
)
def test_all_chips_together(kind, name, links):
  rate = chips.CHIPS[name.partition(":")[0]].link_rate
  assert seconds(kind, name) == pytest.approx(SENT / (links * rate))


@pytest.mark.parametrize(
  "axes, links",
  [
    # The devices of an axis that is half of the last side: 4 x 4 x 4, of which
    # only two sides are whole.
    (("expert",), 5),
    # Pairs that are four steps apart share the ring of eight among four.
    (("data",), 2 / 4),
    (("data", "expert"), 6),
    (None, 6),
  ],
)
def test_parts_of_a_torus(axes, links):
  layout = sharding.LAYOUTS["data_expert"]
  rate = chips.CHIPS["v5p"].link_rate
  got = seconds("all-gather", "v5p:4x4x8", layout, axes)
  assert got == pytest.approx(SENT / (links * rate))


def test_through_a_switch_all_links_carry():
  where = chips.Topology("", jax.devices(), chips.CHIPS["h100"], (8,), False)
  mesh = sharding.make_mesh(EXPERT)
  what = Collective("all-to-all", "f32", SENT, SENT, ("expert",), 1, True)
  assert network.seconds(what, where, mesh) == pytest.approx(SENT / 450e9)
