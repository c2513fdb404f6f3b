"""Devices by name, there or not."""

import importlib.util
import re
import types

import jax
import pytest
from jax.experimental import topologies

from moejax.planning import chips


def fake_devices(monkeypatch, kind, *coords):
  """Puts devices of a kind at hand, and into every topology of a TPU."""
  devices = [
    types.SimpleNamespace(device_kind=kind, coords=place) for place in coords
  ]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  found = types.SimpleNamespace(devices=devices)
  monkeypatch.setattr(topologies, "get_topology_desc", lambda *_, **__: found)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_devices_at_hand():
  found = chips.find("")
  assert found.is_here and found.chip is None
  assert (list(found.devices), found.sides) == (jax.devices(), (8,))
  assert found.name == f"8 x {jax.devices()[0].device_kind}"


@pytest.mark.parametrize(
  "kind, name, sides",
  [
    ("TPU v5 lite", "v5e", (2, 3)),
    ("TPU v5", "v5p", (2, 3, 1)),
    ("TPU v6 lite", "v6e", (2, 3)),
    ("NVIDIA A100-SXM4-80GB", "a100", (2,)),
    ("NVIDIA H100 80GB HBM3", "h100", (2,)),
    ("NVIDIA H200", "h200", (2,)),
    ("NVIDIA B200", "b200", (2,)),
    # Slower ones than the SXM with all of its memory.
    ("NVIDIA A100-SXM4-40GB", None, (2,)),
    ("NVIDIA A100-PCIE-40GB", None, (2,)),
    ("NVIDIA H100 PCIe", None, (2,)),
    ("NVIDIA H100 NVL", None, (2,)),
    ("NVIDIA H200 NVL", None, (2,)),
    ("NVIDIA H200 MIG 1g.18gb", None, (2,)),
  ],
)
def test_chips_at_hand(kind, name, sides, monkeypatch):
  fake_devices(monkeypatch, kind, (0, 0, 0), (1, 2, 0))
  found = chips.find("")
  assert (found.chip, found.sides) == (chips.CHIPS.get(name), sides)
  assert found.node is None


def test_fake_devices():
  found = chips.find("cpu:2x2")
  assert len(found.devices) == 4 and not found.is_here
  with pytest.raises(ValueError, match=r"cpu:9.* 8 CPU device\(s\) already"):
    chips.find("cpu:9")


@pytest.mark.parametrize(
  "name, said",
  [
    ("v7:2x2", r"'v7'; choose one of 'v4', 'v5e', 'v5p', 'v6e', 'a100'"),
    ("v5e", "such as v5p:4x4x8"),
    ("v5e:4by4", "such as v5p:4x4x8"),
    ("v5e:4", "1 sides, but v5e chips lie in 2 dimensions"),
    ("v5p:4x4", "2 sides, but v5p chips lie in 3 dimensions"),
    ("l40s:8", "'h200', 'b200', 'cpu'"),
    ("h100", "such as h100:8 or h100:4x8"),
    ("h100:0x8", "such as h100:8 or h100:4x8"),
    ("h100:2x2x8", "3 sides, but GPUs have nodes and GPUs of a node"),
    ("h100:16", "joins 8 at most; write nodes, too, as in h100:2x8"),
    ("a100:3x12", "joins 8 at most; write nodes, too, as in a100:6x8"),
  ],
)
def test_names_that_are_none(name, said):
  with pytest.raises(ValueError, match=said):
    chips.find(name)


def test_a_v4_has_two_devices_with_half_of_all(monkeypatch):
  fake_devices(monkeypatch, "TPU v4", *2 * [(0, 0, 0), (1, 0, 0)])
  found, whole = chips.find("v4:2x1x1"), chips.CHIPS["v4"]
  assert (found.sides, found.is_here) == ((2, 1, 1), False)
  assert [2 * each for each in found.chip[1:5]] == list(whole[1:5])
  assert found.chip[5:] == whole[5:]


def test_the_compiler_may_be_missing_or_refuse(monkeypatch):
  fake_devices(monkeypatch, "TPU v5 lite")

  def refuse(*_, **__):
    raise RuntimeError("no such slice")

  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  said = "no topology 'v5e:3x5' (no such slice)"
  with pytest.raises(ValueError, match=re.escape(said)):
    chips.find("v5e:3x5")
  # Nor does it without the assembler.
  with pytest.raises(ModuleNotFoundError, match=r"plan-gpu.*\(no such slice"):
    chips.find("h100:8")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
    chips.find("v5e:4x4")
  with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[plan-gpu"):
    chips.find("h100:8")
