"""Devices to plan for: at hand, fake, or TPUs and GPUs that are not there.

The compilers of both are Python packages that run on any Linux machine, so a
laptop can compile a program for a pod.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import config_fields

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Gpu(NamedTuple):
  """What of a chip only a GPU has; all but the first for its compiler."""

  network_rate: float  # Bytes a second to other nodes, of each GPU of a node.
  capability: int  # Major number of its compute capability.
  cores: int  # Streaming multiprocessors.
  lanes: int  # Products of float32 that each of them does at once.
  gigahertz: float
  cache: int  # Bytes of all of its L2 cache.
  shared: int  # Bytes of memory that the threads of a core share.


class Chip(NamedTuple):
  """What a device can do at best, as its maker says."""

  # How a device at hand calls itself; of a TPU, how it begins to.
  kind: str
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
  gpu: Gpu | None = None


# TPUs: Google's Cloud documentation, one page each ("TPU v4", ..., read in
# November 2026); their GB of memory are GiB, as the compiler counts. The rate
# of a link is the "bidirectional bandwidth per chip" over links and directions;
# v4's page gives the bisection of a pod instead, 24 TB/s over 2 x 16 x 16
# links. GPUs: the SXM modules by NVIDIA's data sheets (A100, H100, H200, DGX
# B200), dense products; the "bandwidth" of NVLink there is both directions of
# all links. Those on a PCIe card or with NVL are slower, and none of these. The
# network is that of a DGX: 8 x 400 Gb/s for 8 GPUs, of an A100 8 x 200. What
# the compiler asks for besides is as XLA's own descriptions of these chips say
# (openxla/xla, xla/backends/gpu/target_config/specs).
_HOPPER = Gpu(50e9, 9, 132, 128, 1.98, 50 * MIB, 228 * KIB)
_AMPERE = Gpu(25e9, 8, 108, 64, 1.41, 40 * MIB, 164 * KIB)
_BLACKWELL = Gpu(50e9, 10, 148, 128, 1.965, 132644864, 228 * KIB)
CHIPS = {
  "v4": Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 50e9, 6, 3, 4),
  "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 50e9, 4, 2, 16),
  "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 100e9, 6, 3, 4),
  "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1638e9, 100e9, 4, 2, 16),
  "a100": Chip(
    "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 25e9, 12, 0, 0, _AMPERE
  ),
  "h100": Chip(
    "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 25e9, 18, 0, 0, _HOPPER
  ),
  "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 25e9, 18, 0, 0, _HOPPER),
  "b200": Chip(
    "NVIDIA B200", 2250e12, 180e9, 8000e9, 50e9, 18, 0, 0, _BLACKWELL
  ),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)
GPUS = tuple(name for name, chip in CHIPS.items() if chip.gpu)
NODE = 8  # So many GPUs at most are joined by one switch of NVLink.


class Topology(NamedTuple):
  """Devices to compile for."""

  name: str  # As `find` takes it.
  devices: Sequence[jax.Device]  # They need not be there.
  chip: Chip | None  # What one can do; None where that is unknown, as of a CPU.
  # Of the torus in which they lie; of GPUs, nodes and GPUs of a node; one
  # number where all are joined alike.
  sides: tuple[int, ...]
  is_here: bool  # Whether a program compiled for them runs.
  options: Mapping[str, Any] = {}  # For their compiler.

  @property
  def node(self) -> int | None:
    """How many devices of a node come one after the other; None without one."""
    is_split = self.chip and self.chip.gpu and len(self.sides) == 2
    return self.sides[1] if is_split else None


_HOW = (
  f"write a kind of TPU ({', '.join(TPUS)}) and how many lie along each side,"
  f" such as v5p:4x4x8 or v5e:4x4; or a kind of GPU ({', '.join(GPUS)}), nodes"
  " and GPUs of a node, such as h100:8 or h100:4x8; or cpu:8 for fake devices;"
  " or nothing for the devices at hand."
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

  For others than those JAX is told to run on the CPU, unless it runs already.
  ValueError where there are none of that name; ModuleNotFoundError where their
  compiler is missing.
  """
  if not name:
    return _at_hand()
  kind, _, shape = name.partition(":")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"topology {name!r}: {_HOW}")
  sides = tuple(int(side) for side in shape.split("x"))
  # Else JAX looks for TPUs and GPUs as well: their packages complain of none.
  jax.config.update("jax_platforms", "cpu")
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
    config_fields.one_of(kind, dict.fromkeys((*CHIPS, "cpu")), "topology")
  ]
  if chip.gpu:
    return _gpus(name, chip, sides)
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


# What every NVIDIA GPU since 2020 has in common, and what differs.
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability} {feature} }}
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.gigahertz} l2_cache_size: {gpu.cache}
  device_memory_size: {chip.memory:.0f} memory_bandwidth: {chip.memory_rate:.0f}
  shared_memory_per_core: {gpu.shared} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {most_shared}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_core_limit: 2048 threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kind}"
"""
# CUB's radix sort takes room that only a device tells; else a warning does.
_NO_DEVICE = {"xla_gpu_enable_cub_radix_sort": False}


def _gpus(name: str, chip: Chip, sides: tuple[int, ...]) -> Topology:
  """As `find`, of the nodes and the GPUs of a node."""
  if len(sides) > 2:
    raise ValueError(
      f"topology {name!r} has {len(sides)} sides, but GPUs have nodes and GPUs"
      f" of a node; {_HOW}"
    )
  nodes, size = sides = (1, *sides)[-2:]
  if size > NODE:
    raise ValueError(
      f"topology {name!r} has {size} GPUs of a node, but one switch of NVLink"
      f" joins {NODE} at most; write nodes, too, as in"
      f" {name.partition(':')[0]}:{nodes * math.ceil(size / NODE)}x{NODE}."
    )
  missing = (
    f"topology {name!r} needs the GPU's compiler, which runs on any Linux"
    " machine but is not installed; run: pip install -e '.[plan-gpu]'; and set"
    " JAX_PLATFORMS=cpu where JAX runs already"
  )
  if importlib.util.find_spec("jax_plugins") is None:
    raise ModuleNotFoundError(f"{missing}.")
  from jax.experimental import topologies

  feature = "feature_extension: ACCELERATED_FEATURES"
  target = _TARGET.format(
    chip=chip,
    gpu=chip.gpu,
    # The newest instructions are those of one kind of chip.
    feature=feature if chip.gpu.capability >= 9 else "",
    most_shared=chip.gpu.shared - KIB,
  )
  try:
    devices = topologies.get_topology_desc(
      platform="cuda", target_config=target, topology=f"1x{nodes}x{size}"
    ).devices
    # The assembler and a library are apart, in a package or in a CUDA of this
    # machine: only a program tells whether they are found.
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((1,), "float32", sharding=one)
    jax.jit(jnp.sin).lower(x).compile()
  except (RuntimeError, NotImplementedError) as error:
    said = str(error).partition("\n")[0]
    raise ModuleNotFoundError(f"{missing} ({said}).") from error
  return Topology(name, devices, chip, sides, False, _NO_DEVICE)


def _at_hand() -> Topology:
  devices = jax.devices()
  kind = devices[0].device_kind
  # "TPU v5" begins the names of two; "NVIDIA H200 NVL" is no "NVIDIA H200".
  fit = [
    each
    for each in CHIPS.values()
    if (kind == each.kind if each.gpu else kind.startswith(each.kind))
  ]
  chip = max(fit, key=lambda each: len(each.kind), default=None)
  sides = (len(devices),)
  if chip and chip.axes:
    places = [device.coords for device in devices]
    sides = tuple(1 + max(each) for each in zip(*places, strict=True))
    sides = sides[: chip.axes]
  return Topology(f"{len(devices)} x {kind}", devices, chip, sides, True)
