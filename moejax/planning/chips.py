"""Devices to plan for: those at hand, fake ones, and TPUs that are not there.

A TPU's compiler runs on any Linux machine (libtpu is a Python package), so a
laptop can compile a program for a pod.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from moejax import config_fields

GIB = 2**30


class Chip(NamedTuple):
  """What a device can do at best, as its maker says."""

  kind: str  # How a device at hand begins to call itself.
  # Of its matrix units a second, bfloat16 operands, without sparsity.
  flops: float
  memory: float  # Bytes of its large memory.
  memory_rate: float  # Bytes to or from it a second.
  # Bytes a second of one link to another device, in one direction.
  link_rate: float
  links: int  # How many it has.
  axes: int  # Of the torus that the links make; 0 is a switch that joins all.
  # A side of so many devices, or of a multiple, closes to a ring.
  wraps: int = 0


# TPUs: Google's Cloud documentation, one page each ("TPU v4", ..., read in
# November 2026); their GB of memory are GiB, as the compiler counts. The rate
# of a link is the "bidirectional bandwidth per chip" over links and directions;
# v4's page gives the bisection of a pod instead, 24 TB/s over 2 x 16 x 16
# links. GPUs: NVIDIA's H100 and H200 data sheets, SXM, dense; 900 GB/s of
# NVLink is both directions of 18 links.
CHIPS = {
  "v4": Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 50e9, 6, 3, 4),
  "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 50e9, 4, 2, 16),
  "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 100e9, 6, 3, 4),
  "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1638e9, 100e9, 4, 2, 16),
  # Those on a PCIe card or with NVL are slower.
  "h100": Chip("NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 25e9, 18, 0),
  "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 25e9, 18, 0),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)


class Topology(NamedTuple):
  """Devices to compile for."""

  name: str  # As `find` takes it.
  devices: Sequence[jax.Device]  # They need not be there.
  chip: Chip | None  # What one can do; None where that is unknown, as of a CPU.
  # Of the torus in which they lie; one number where it is none.
  sides: tuple[int, ...]
  is_here: bool  # Whether a program compiled for them runs.


_HOW = (
  f"write a kind of chip ({', '.join(TPUS)}) and how many lie along each side,"
  " such as v5p:4x4x8 or v5e:4x4; or cpu:8 for fake devices; or nothing for"
  " the devices at hand."
)
# Else a TPU's compiler asks what machine this is, and complains of the answer.
# Nothing runs on it, so it need not wait for another process either.
_NO_MACHINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def find(name: str) -> Topology:
  """Returns the devices of a name such as "v5p:4x4x8"; of "" those at hand.

  ValueError where there are none of that name; ModuleNotFoundError where the
  TPU's compiler is missing.
  """
  if not name:
    return _at_hand()
  kind, _, shape = name.partition(":")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"topology {name!r}: {_HOW}")
  sides = tuple(int(side) for side in shape.split("x"))
  count = math.prod(sides)
  if kind == "cpu":
    with contextlib.suppress(RuntimeError):  # the CPU is in use already
      jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
      raise ValueError(
        f"topology {name!r} comes too late: this process has made"
        f" {len(devices)} CPU device(s) already; name the largest cpu topology"
        " first, or set JAX_NUM_CPU_DEVICES."
      )
    return Topology(name, devices[:count], None, (count,), False)
  chip = CHIPS[
    config_fields.one_of(kind, dict.fromkeys((*TPUS, "cpu")), "topology")
  ]
  if len(sides) != chip.axes:
    raise ValueError(
      f"topology {name!r} has {len(sides)} sides, but {kind} chips lie in"
      f" {chip.axes} dimensions; {_HOW}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      f"topology {name!r} needs the TPU's compiler, which runs on any Linux"
      " machine but is not installed; run: pip install libtpu"
    )
  from jax.experimental import topologies

  for variable, value in _NO_MACHINE.items():
    os.environ.setdefault(variable, value)
  try:
    devices = topologies.get_topology_desc(name, "tpu").devices
  except Exception as error:  # Whatever the compiler's own code raises.
    raise ValueError(
      f"the TPU's compiler knows no topology {name!r} ({error}); {_HOW}"
    ) from error
  # The compiler sees each of a v4's two cores as a device, with half of all.
  cores = len(devices) // count
  rates = ("flops", "memory", "memory_rate", "link_rate")
  part = chip._replace(**{n: getattr(chip, n) / cores for n in rates})
  return Topology(name, devices, part, sides, False)


def _at_hand() -> Topology:
  devices = jax.devices()
  kind = devices[0].device_kind
  # "TPU v5" begins the names of two.
  fit = [each for each in CHIPS.values() if kind.startswith(each.kind)]
  chip = max(fit, key=lambda each: len(each.kind), default=None)
  sides = (len(devices),)
  if chip and chip.axes:
    places = [device.coords for device in devices]
    sides = tuple(1 + max(each) for each in zip(*places, strict=True))
    sides = sides[: chip.axes]
  return Topology(f"{len(devices)} x {kind}", devices, chip, sides, True)
