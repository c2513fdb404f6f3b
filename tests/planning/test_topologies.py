"""Devices by name, there or not."""

import importlib.util

import jax
import pytest
import topology

from moejax.planning import chips


def test_devices_at_hand():
  found = chips.find("")
  assert found.is_here and found.chip is None
  assert (list(found.devices), found.sides) == (jax.devices(), (8,))


def test_fake_devices():
  found = chips.find("cpu:2x2")
  assert len(found.devices) == 4 and not found.is_here
  with pytest.raises(ValueError, match=r"cpu:9.* 8 CPU device\(s\) already"):
    chips.find("cpu:9")


@pytest.mark.parametrize(
  "name, said",
  [
    ("v7:2x2", r"'v7'; choose one of 'v4', 'v5e', 'v5p', 'v6e', 'cpu'"),
    ("v5e", "such as v5p:4x4x8"),
    ("v5e:4by4", "such as v5p:4x4x8"),
    ("v5e:4", "1 sides, but v5e chips lie in 2 dimensions"),
    ("v5p:4x4", "2 sides, but v5p chips lie in 3 dimensions"),
  ],
)
def test_names_that_are_none(name, said):
  with pytest.raises(ValueError, match=said):
    chips.find(name)


def test_the_compiler_may_be_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
    chips.find("v5e:4x4")


@pytest.mark.parametrize(
  "name", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:4x4"]
)
def test_chips_that_are_not_there(name):
  topology.chips()  # or skip
  kind, _, sides = name.partition(":")
  found = chips.find(name)
  assert found.sides == tuple(map(int, sides.split("x")))
  # A v4 has two devices, each with a half of everything.
  total = found.chip.memory * len(found.devices)
  count = len({tuple(device.coords) for device in found.devices})
  assert total == chips.CHIPS[kind].memory * count
  with pytest.raises(ValueError, match="no topology"):
    chips.find("v5e:3x5")
